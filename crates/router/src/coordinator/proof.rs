//! A real step, asked of a worker by the coordinator before work is routed to it.
//!
//! A worker says itself when it is ready, after a step of its own. One that registers while an operator is attached is
//! asked for one as well: one token after a prompt of one, which goes through every layer and the experts. Until it has
//! answered it is shown as starting. Prefill workers and shards cannot be asked alone: a prompt needs a decode worker
//! to go to, and a shard's rows mean nothing without the rest.

use std::{collections::BTreeMap, time::Duration};

use cadre_proto::{
    secret::{ClusterSecret, Present},
    v1::{self, decode_event::Event, worker_client::WorkerClient},
};
use cadre_types::{Generation, Member};
use tokio::{sync::mpsc, task::JoinHandle};
use tonic::transport::Endpoint;

use super::{Command, state::ConnectionId};

/// Bound on one step: a worker waits half a minute for an expert without a copy, and others may be before it.
const STEP: Duration = Duration::from_secs(45);

/// Pause after a step that failed. The member's stream goes on; nothing is routed to it.
const PAUSE: Duration = Duration::from_secs(1);

/// The steps that are asked for just now, at most one per member.
#[derive(Debug)]
pub(super) struct Prover {
    present: Present,
    /// Weak: the owner ends when everybody else's handles are gone.
    commands: mpsc::WeakSender<Command>,
    asked: BTreeMap<ConnectionId, Asked>,
}

#[derive(Debug)]
struct Asked(JoinHandle<()>);

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Prover {
    pub(super) fn new(secret: Option<&ClusterSecret>, commands: mpsc::WeakSender<Command>) -> Self {
        Self { present: Present::new(secret), commands, asked: BTreeMap::new() }
    }

    /// Asks those that have not been asked yet, and nobody else any more.
    pub(super) fn follow(&mut self, unproven: Vec<(ConnectionId, Member)>, generation: Generation) {
        self.asked.retain(|connection, _| unproven.iter().any(|(open, _)| open == connection));
        for (connection, member) in unproven {
            let (present, commands) = (self.present.clone(), self.commands.clone());
            self.asked.entry(connection).or_insert_with(|| {
                Asked(tokio::spawn(ask(connection, member, generation, present, commands)))
            });
        }
    }
}

async fn ask(
    connection: ConnectionId,
    member: Member,
    generation: Generation,
    present: Present,
    commands: mpsc::WeakSender<Command>,
) {
    loop {
        let stepped = tokio::time::timeout(STEP, step(&member, generation, present.clone())).await;
        match stepped.unwrap_or_else(|_| Err(format!("no answer within {STEP:?}"))) {
            Ok(()) => {
                if let Some(commands) = commands.upgrade() {
                    // The owner being gone ends everything anyway.
                    let _ = commands.send(Command::Proven { connection }).await;
                }
                return;
            }
            Err(problem) => {
                tracing::warn!(id = %member.id, address = member.address, problem, "a worker that says it is ready fails a step");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// One token from one token.
async fn step(member: &Member, generation: Generation, present: Present) -> Result<(), String> {
    let endpoint =
        Endpoint::from_shared(format!("http://{}", member.address)).map_err(|error| error.to_string())?;
    let channel = endpoint.connect().await.map_err(|error| format!("connect: {error}"))?;
    let request = v1::DecodeRequest {
        generation: Some(generation.into()),
        request_id: format!("proof of {}", member.id),
        prompt: vec![0],
        sampling: Some(v1::SamplingParams {
            top_p: 1.0,
            repetition_penalty: 1.0,
            ..v1::SamplingParams::default()
        }),
        max_tokens: 1,
        prefill: v1::PrefillMode::Local.into(),
        ..v1::DecodeRequest::default()
    };
    let mut client = WorkerClient::with_interceptor(channel, present);
    let failed = |status: tonic::Status| format!("{:?}: {}", status.code(), status.message());
    let mut events = client.decode(request).await.map_err(failed)?.into_inner();
    let mut tokens = 0;
    while let Some(event) = events.message().await.map_err(failed)? {
        match event.event {
            Some(Event::Token(_)) => tokens += 1,
            Some(Event::Finished(_)) if tokens == 1 => return Ok(()),
            Some(Event::Finished(_)) => return Err(format!("{tokens} tokens where one was asked for")),
            Some(Event::Reserved(_)) | None => {}
        }
    }
    Err("the answer ended without an end".to_owned())
}
