//! Frames waiting for the compute thread.
//!
//! The thread takes the oldest frame and, with it, every other waiting frame of the same layer under the
//! same placement: oldest first, so that no layer starves. The bound is in bytes, because that is what
//! waiting frames cost.
//!
//! While it waits, the thread runs the I/O of the streams that frames come by, if it is given a [`Drive`]: a
//! frame then reaches it without waking another thread.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use cadre_dispatch::{DispatchFrame, Drive, Reply};
use cadre_ops::Backend;
use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::shard::Held;

/// Payload of waiting frames. A decode frame of 256 tokens at hidden 7168 in e4m3 has 1.9 MB: a dozen
/// workers ahead of us. A frame that finds the queue empty is always taken, so the largest (64 MiB) passes.
pub const QUEUE_BYTES: usize = 24 << 20;

/// Waiting frames, for those that have hardly any bytes (probes): sixteen workers' whole links.
pub const QUEUE_FRAMES: usize = 1024;

/// Tokens that frames are merged up to; one frame may have more by itself.
const MERGED_TOKENS: usize = 4096;

/// How long the thread waits before it looks again: whatever changes the queue wakes it, so this bounds only
/// the wait itself.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// An accepted frame.
pub(crate) struct Job<B: Backend> {
    pub(crate) frame: DispatchFrame,
    pub(crate) reply: Reply,
    /// The placement under which it was accepted, and is computed.
    pub(crate) held: Arc<Held<B>>,
    pub(crate) accepted: Instant,
}

struct State<B: Backend> {
    jobs: VecDeque<Job<B>>,
    bytes: usize,
    pairs: usize,
    /// The thread is computing.
    busy: bool,
    closed: bool,
}

pub(crate) struct Queue<B: Backend> {
    state: Mutex<State<B>>,
    changed: Condvar,
    /// A frame came, or the queue was closed: for a thread that waits by driving I/O.
    arrived: Notify,
}

/// Why a frame was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// No room now.
    Bytes(usize),
    /// No room now.
    Frames(usize),
    /// The compute thread is gone.
    Closed,
}

impl<B: Backend> Queue<B> {
    pub(crate) fn new() -> Self {
        let state = State { jobs: VecDeque::new(), bytes: 0, pairs: 0, busy: false, closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), arrived: Notify::new() }
    }

    /// Takes a frame in, or gives it back.
    #[allow(
        clippy::result_large_err,
        reason = "the job comes back to be answered; it is not boxed to please the rare path"
    )]
    pub(crate) fn push(&self, job: Job<B>) -> Result<(), (Job<B>, Full)> {
        let mut state = self.state.lock();
        let bytes = job.frame.payload_bytes();
        if state.closed {
            return Err((job, Full::Closed));
        }
        if state.jobs.len() >= QUEUE_FRAMES {
            return Err((job, Full::Frames(state.jobs.len())));
        }
        if !state.jobs.is_empty() && state.bytes + bytes > QUEUE_BYTES {
            return Err((job, Full::Bytes(state.bytes)));
        }
        state.bytes += bytes;
        state.pairs += job.frame.pairs();
        state.jobs.push_back(job);
        drop(state);
        self.arrived.notify_one();
        self.changed.notify_all();
        Ok(())
    }

    /// (token, slot) pairs waiting.
    pub(crate) fn pairs(&self) -> usize {
        self.state.lock().pairs
    }

    /// Waits for frames, driving I/O meanwhile; the oldest and what merges with it. `None` once closed. The
    /// caller is busy until it calls again.
    pub(crate) fn take(&self, drive: Option<&dyn Drive>) -> Option<Vec<Job<B>>> {
        let mut state = self.state.lock();
        state.busy = false;
        self.changed.notify_all();
        loop {
            if state.closed {
                return None;
            }
            if let Some(first) = state.jobs.pop_front() {
                state.busy = true;
                return Some(merge(&mut state, first));
            }
            let deadline = Instant::now() + LOOK_AGAIN;
            match drive {
                // What is notified before the wait begins ends it at once.
                Some(drive) if MutexGuard::unlocked(&mut state, || drive.wait(&self.arrived, deadline)) => {}
                _ => drop(self.changed.wait_until(&mut state, deadline)),
            }
        }
    }

    /// Waits until nothing waits and nothing is computed; false at the deadline.
    pub(crate) fn wait_idle(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        while state.busy || !state.jobs.is_empty() {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return !state.busy && state.jobs.is_empty();
            }
        }
        true
    }

    /// Ends the compute thread; frames that wait are dropped, which answers them.
    pub(crate) fn close(&self) {
        let dropped = {
            let mut state = self.state.lock();
            state.closed = true;
            state.busy = false;
            (state.bytes, state.pairs) = (0, 0);
            std::mem::take(&mut state.jobs)
        };
        self.arrived.notify_one();
        self.changed.notify_all();
        drop(dropped);
    }

    /// Whether the compute thread is gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.state.lock().closed
    }
}

/// The first job (already popped) with all that merge with it, in order of arrival.
fn merge<B: Backend>(state: &mut State<B>, first: Job<B>) -> Vec<Job<B>> {
    let mut tokens = first.frame.tokens;
    let mut batch = vec![first];
    let mut at = 0;
    while at < state.jobs.len() {
        let job = &state.jobs[at];
        let fits = job.frame.layer == batch[0].frame.layer
            && Arc::ptr_eq(&job.held, &batch[0].held)
            && tokens + job.frame.tokens <= MERGED_TOKENS;
        if fits && let Some(job) = state.jobs.remove(at) {
            tokens += job.frame.tokens;
            batch.push(job);
        } else {
            at += 1;
        }
    }
    for job in &batch {
        state.bytes = state.bytes.saturating_sub(job.frame.payload_bytes());
        state.pairs = state.pairs.saturating_sub(job.frame.pairs());
    }
    batch
}

#[cfg(test)]
mod tests;
