//! Shards behind gRPC: one connection and one long-lived stream per (worker, shard), held by a background
//! task that reconnects with bounded back-off. Frames out on a stream that breaks fail at once.

use std::{collections::HashMap, sync::Arc};

use cadre_proto::{
    MAX_MESSAGE_BYTES,
    connection::{ConnectionEnd, with_causes},
    secret::{ClusterSecret, Present},
    v1,
};
use cadre_types::ShardIndex;
use parking_lot::Mutex;
use tokio::{sync::mpsc, task::AbortHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, transport::Endpoint};

use super::{
    Connect, DispatchTransport, Drive, MAX_LINK_FRAMES, Reply,
    io::{Driver, IoHandle},
};
use crate::{
    backoff::{Backoff, BackoffPolicy},
    frame::{DispatchFrame, LinkError},
    tuning, wire,
};

/// Makes gRPC links whose tasks run on one runtime.
#[derive(Clone, Debug)]
pub struct GrpcConnector {
    io: IoHandle,
    backoff: BackoffPolicy,
    present: Present,
}

impl GrpcConnector {
    /// Links whose I/O runs on this thread, or on the dispatching thread while that waits.
    pub fn new(io: IoHandle) -> Self {
        // A shard that restarts listens again within tens of milliseconds; sequences wait for it.
        let backoff = BackoffPolicy {
            first: std::time::Duration::from_millis(20),
            max: std::time::Duration::from_secs(1),
        };
        Self { io, backoff, present: Present::default() }
    }

    /// Shows shards the cluster's secret.
    pub fn with_secret(self, secret: Option<&ClusterSecret>) -> Self {
        Self { present: Present::new(secret), ..self }
    }
}

impl Connect for GrpcConnector {
    fn connect(
        &self,
        shard: ShardIndex,
        address: &str,
        changed: Arc<dyn Fn() + Send + Sync>,
    ) -> Arc<dyn DispatchTransport> {
        let link = Arc::new(Link {
            state: Mutex::new(State::Down("not connected yet".to_owned())),
            shard,
            address: address.to_owned(),
            present: self.present.clone(),
            changed,
        });
        let backoff = Backoff::new(self.backoff, &(shard.0, address));
        let task = self.io.runtime().spawn(link.clone().run(backoff)).abort_handle();
        Arc::new(GrpcTransport { link, task })
    }

    fn driver(&self) -> Option<Arc<dyn Drive>> {
        Some(Arc::new(Driver::new(self.io.clone())))
    }
}

/// A link to a shard in another process.
struct GrpcTransport {
    link: Arc<Link>,
    task: AbortHandle,
}

struct Link {
    state: Mutex<State>,
    shard: ShardIndex,
    address: String,
    present: Present,
    changed: Arc<dyn Fn() + Send + Sync>,
}

enum State {
    /// No stream; why.
    Down(String),
    Up {
        /// Bounded by [`MAX_LINK_FRAMES`], as `pending` is: a frame that waits here also waits there.
        outgoing: mpsc::Sender<v1::DispatchFrame>,
        pending: HashMap<u64, Reply>,
    },
}

impl DispatchTransport for GrpcTransport {
    fn send(&self, frame: DispatchFrame, reply: Reply) {
        let sequence = frame.sequence;
        let message = v1::DispatchFrame::from(frame);
        // Replies are sent after the lock is released: a sink may do anything.
        let (reply, error) = match &mut *self.link.state.lock() {
            State::Down(reason) => (Some(reply), LinkError::Disconnected(reason.clone())),
            State::Up { pending, .. } if pending.len() >= MAX_LINK_FRAMES => {
                (Some(reply), LinkError::Backlogged { outstanding: pending.len() })
            }
            State::Up { outgoing, pending } => {
                // Inserted first: the answer may arrive before `try_send` returns.
                pending.insert(sequence, reply);
                match outgoing.try_send(message) {
                    Ok(()) => return,
                    Err(error) => (
                        pending.remove(&sequence),
                        LinkError::Disconnected(format!("the stream is closing: {error}")),
                    ),
                }
            }
        };
        if let Some(reply) = reply {
            reply.send(Err(error));
        }
    }

    fn is_up(&self) -> bool {
        matches!(*self.link.state.lock(), State::Up { .. })
    }
}

impl Drop for GrpcTransport {
    fn drop(&mut self) {
        self.task.abort();
        self.link.down("the link was closed".to_owned());
    }
}

impl Link {
    async fn run(self: Arc<Self>, mut backoff: Backoff) {
        let endpoint = match tuning::endpoint(&self.address) {
            Ok(endpoint) => endpoint,
            Err(error) => {
                tracing::error!(shard = %self.shard, address = self.address, %error, "shard address refused");
                self.down(format!("address {:?}: {}", self.address, with_causes(&error)));
                return;
            }
        };
        loop {
            let reason = self.stream(&endpoint, &mut backoff).await;
            tracing::debug!(shard = %self.shard, address = self.address, reason, "dispatch stream is down");
            self.down(reason);
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    /// Connects and carries frames until the stream breaks; returns why.
    async fn stream(&self, endpoint: &Endpoint, backoff: &mut Backoff) -> String {
        let channel = match endpoint.connect().await {
            Ok(channel) => channel,
            Err(error) => return format!("{}: {}", self.address, with_causes(&error)),
        };
        let mut client = v1::expert_client::ExpertClient::with_interceptor(channel, self.present.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let (outgoing, frames) = mpsc::channel(MAX_LINK_FRAMES);
        let opening = client.dispatch(ReceiverStream::new(frames));
        let mut answers = match tokio::time::timeout(tuning::CONNECT_TIMEOUT, opening).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return self.end_of(&status),
            Err(_) => return format!("{}: no answer to Dispatch", self.address),
        };
        *self.state.lock() = State::Up { outgoing, pending: HashMap::new() };
        backoff.reset();
        tracing::debug!(shard = %self.shard, address = self.address, "dispatch stream is up");
        (self.changed)();
        loop {
            match answers.message().await {
                Ok(Some(message)) => {
                    let (sequence, answer) = wire::decode_answer(message);
                    match self.take(sequence) {
                        Some(reply) => reply.send(answer),
                        None => tracing::warn!(shard = %self.shard, sequence, "answer to no frame"),
                    }
                }
                Ok(None) => return format!("{}: the shard closed the stream", self.address),
                Err(status) => return self.end_of(&status),
            }
        }
    }

    /// Why the stream ended: how the connection did, or what the shard said.
    fn end_of(&self, status: &Status) -> String {
        match ConnectionEnd::of_status(status) {
            Some(end) => format!("{}: {end}: {}", self.address, with_causes(status)),
            None => format!("{}: {:?}: {}", self.address, status.code(), status.message()),
        }
    }

    fn take(&self, sequence: u64) -> Option<Reply> {
        match &mut *self.state.lock() {
            State::Up { pending, .. } => pending.remove(&sequence),
            State::Down(_) => None,
        }
    }

    fn down(&self, reason: String) {
        let before = std::mem::replace(&mut *self.state.lock(), State::Down(reason.clone()));
        if let State::Up { pending, .. } = before {
            for (_, reply) in pending {
                reply.send(Err(LinkError::Disconnected(reason.clone())));
            }
            (self.changed)();
        }
    }
}
