//! A real step, asked of a member by the coordinator. Who is asked, and what follows: `state::proofs`.
//!
//! A worker that decodes is asked for one token after a prompt of one, which goes through every layer and the
//! experts. A prefill worker is asked for the same prompt and hands it to a worker that decodes. A shard is asked for
//! rows of ones through one of its experts in each layer, or through a certain one; they must be as many as asked
//! for, and finite.

mod rows;
mod step;

use std::{collections::BTreeMap, time::Duration};

use cadre_proto::{
    connection::{ConnectionEnd, with_causes},
    secret::{ClusterSecret, Present},
};
use cadre_types::{Generation, LayerId, Member};
use tokio::{sync::mpsc, task::JoinHandle};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use super::{Command, state::ConnectionId};

/// Bound on one step: a worker waits half a minute for an expert without a copy, and others may be before it.
const STEP: Duration = Duration::from_secs(45);

/// What a member is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) connection: ConnectionId,
    pub(super) member: Member,
    /// Under which it is asked.
    pub(super) generation: Generation,
    pub(super) step: Step,
}

/// The step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// One token from one token.
    Decode,
    /// A prompt of one token, handed to this worker.
    Prefill { decode_address: String },
    /// A row of ones through each of these slots.
    Rows { slots: Vec<(LayerId, u32)> },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It has done the step.
    Passed,
    /// It has answered, and the answer is wrong.
    Wrong(String),
    /// It has not answered, or refused: it may be busy, or not be reached from here.
    Unanswered(String),
}

impl Verdict {
    fn refused(status: &Status) -> Self {
        Self::Unanswered(match ConnectionEnd::of_status(status) {
            Some(end) => format!("{end}: {}", with_causes(status)),
            None => format!("{:?}: {}", status.code(), status.message()),
        })
    }
}

/// The steps that are asked for just now, at most one per member.
#[derive(Debug)]
pub(super) struct Prover {
    present: Present,
    /// Width of the model's rows.
    hidden: usize,
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
    pub(super) fn new(
        secret: Option<&ClusterSecret>,
        hidden: usize,
        commands: mpsc::WeakSender<Command>,
    ) -> Self {
        Self { present: Present::new(secret), hidden, commands, asked: BTreeMap::new() }
    }

    /// Asks those that are not being asked, and nobody else any more.
    pub(super) fn follow(&mut self, questions: Vec<Question>) {
        self.asked
            .retain(|connection, _| questions.iter().any(|question| question.connection == *connection));
        for question in questions {
            let (present, hidden, commands) = (self.present.clone(), self.hidden, self.commands.clone());
            self.asked.entry(question.connection).or_insert_with(|| {
                Asked(tokio::spawn(async move {
                    let connection = question.connection;
                    let asked = tokio::time::timeout(STEP, ask(&question, present, hidden)).await;
                    let verdict =
                        asked.unwrap_or_else(|_| Verdict::Unanswered(format!("no answer within {STEP:?}")));
                    if let Some(commands) = commands.upgrade() {
                        // The owner being gone ends everything anyway.
                        let _ = commands.send(Command::Judged { connection, verdict }).await;
                    }
                }))
            });
        }
    }

    /// An answer has come; the member may be asked again.
    pub(super) fn answered(&mut self, connection: ConnectionId) {
        self.asked.remove(&connection);
    }
}

async fn ask(question: &Question, present: Present, hidden: usize) -> Verdict {
    let Question { member, generation, step, .. } = question;
    let channel = match connect(&member.address).await {
        Ok(channel) => channel,
        Err(unanswered) => return unanswered,
    };
    let asked = match step {
        Step::Decode => step::decode(channel, present, member, *generation).await,
        Step::Prefill { decode_address } => match connect(decode_address).await {
            Ok(decode) => {
                step::prefill([channel, decode], present, member, decode_address, *generation).await
            }
            Err(unanswered) => return unanswered,
        },
        Step::Rows { slots } => rows::ask(channel, present, *generation, slots, hidden).await,
    };
    asked.unwrap_or_else(|status| Verdict::refused(&status))
}

async fn connect(address: &str) -> Result<Channel, Verdict> {
    let unanswered = |error: tonic::transport::Error| {
        Verdict::Unanswered(format!("connect to {address}: {}", with_causes(&error)))
    };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(unanswered)?;
    endpoint.connect().await.map_err(unanswered)
}
