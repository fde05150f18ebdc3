//! The seams between a dispatcher and a shard: a link ([`DispatchTransport`]), what makes links
//! ([`Connect`]), the shard behind one ([`ShardService`]), and the [`Reply`] that travels with a frame.
//!
//! A `Reply` is answered exactly once: whoever drops it without an answer has answered
//! [`LinkError::Dropped`]. So no frame is ever forgotten silently, whatever thread or task dies.

use std::{sync::Arc, time::Instant};

use cadre_types::ShardIndex;
use tokio::sync::Notify;

use crate::frame::{Answer, DispatchFrame, LinkError};

pub mod grpc;
pub mod io;
pub mod local;
pub mod server;

/// Frames without an answer that one link carries. A worker has two micro-batches under way, each with
/// one frame per shard, split at 64 MiB at most four ways: 8; the rest is room for abandoned frames whose
/// late answers are still to come.
pub const MAX_LINK_FRAMES: usize = 64;

/// One link to one shard.
pub trait DispatchTransport: Send + Sync + 'static {
    /// Hands a frame over without waiting for it to leave. A link that is down or full answers at once
    /// with the error.
    fn send(&self, frame: DispatchFrame, reply: Reply);

    /// Whether a frame sent now would reach the shard.
    fn is_up(&self) -> bool;
}

/// Makes links.
pub trait Connect: Send + Sync + 'static {
    /// A link to a shard. `changed` is called, from any thread, when the link goes up or down; it must
    /// not block. The link lives until dropped.
    fn connect(
        &self,
        shard: ShardIndex,
        address: &str,
        changed: Arc<dyn Fn() + Send + Sync>,
    ) -> Arc<dyn DispatchTransport>;

    /// What runs the links' I/O on the thread that waits for it; `None` if links need no help.
    fn driver(&self) -> Option<Arc<dyn Drive>> {
        None
    }
}

/// Runs the I/O of dispatch streams on the thread that waits for it: a worker's engine for answers, a shard's
/// compute thread for frames. A round trip then wakes two threads less, which is most of what a small frame
/// costs.
pub trait Drive: Send + Sync + 'static {
    /// Runs `send`, which hands frames or answers of `bytes` in all to streams, and writes what the sockets
    /// take at once. The rest is written in the background.
    fn flush(&self, bytes: usize, send: &mut dyn FnMut());

    /// Runs I/O until `event` is notified or the deadline passes. False if this thread cannot (it is
    /// inside an async runtime already) and must wait by other means.
    fn wait(&self, event: &Notify, deadline: Instant) -> bool;
}

/// A shard, as servers and in-process links see it.
pub trait ShardService: Send + Sync + 'static {
    /// Takes a frame. Must not block beyond computing it (an inline shard computes before it returns, a
    /// shard with its own thread queues it); the answer goes to `reply`.
    fn submit(&self, frame: DispatchFrame, reply: Reply);
}

/// Where answers go.
pub trait AnswerSink: Send + Sync + 'static {
    /// Takes the answer to a frame. Must not block.
    fn deliver(&self, sequence: u64, answer: Answer);

    /// True if nobody waits for this frame any more and computing it is a waste.
    fn is_cancelled(&self) -> bool;
}

/// The right and duty to answer one frame once.
pub struct Reply {
    sink: Option<Arc<dyn AnswerSink>>,
    sequence: u64,
}

impl Reply {
    /// For a frame with this sequence number.
    pub fn new(sink: Arc<dyn AnswerSink>, sequence: u64) -> Self {
        Self { sink: Some(sink), sequence }
    }

    /// Answers.
    pub fn send(mut self, answer: Answer) {
        if let Some(sink) = self.sink.take() {
            sink.deliver(self.sequence, answer);
        }
    }

    /// True if nobody waits for this frame any more.
    pub fn is_cancelled(&self) -> bool {
        self.sink.as_ref().is_none_or(|sink| sink.is_cancelled())
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(sink) = self.sink.take() {
            sink.deliver(self.sequence, Err(LinkError::Dropped));
        }
    }
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reply").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}
