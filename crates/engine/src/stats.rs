//! What an engine counts: plain atomics, written by the step loop, read by whoever shows them.
//!
//! Every value has one writer, so relaxed stores suffice; a reader may see a step's counters before its
//! gauges. Distributions are not kept here: each step is given to the observer of
//! [`crate::EngineParts::on_step`] as a [`StepSample`].

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use cadre_scheduler::SchedulerStats;
use cadre_types::FinishReason;

/// One finished step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSample {
    /// Plan to last event.
    pub total: Duration,
    /// The part in which the network was computed, experts included.
    pub forward: Duration,
    /// Decode rows.
    pub decode_rows: usize,
    /// Prompt rows.
    pub prefill_rows: usize,
}

impl StepSample {
    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.decode_rows + self.prefill_rows
    }
}

/// How full an engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct EngineLoad {
    /// Sequences that have pages.
    pub running: u64,
    /// Sequences that wait for pages.
    pub waiting: u64,
    /// Pages free.
    pub pages_free: u64,
    /// Pages of the pool.
    pub pages_total: u64,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters since the start, and gauges of now.
        #[derive(Debug, Default)]
        pub struct EngineStats {
            $($(#[$doc])* pub $name: AtomicU64,)*
            /// Ended sequences by reason: stop, length, cancelled, deadline, error.
            pub ended: [AtomicU64; 5],
            running: AtomicU64,
            waiting: AtomicU64,
            pages_free: AtomicU64,
            pages_total: AtomicU64,
        }
    };
}

counters! {
    /// Steps computed.
    steps,
    /// Steps that failed.
    failed_steps,
    /// Prompt positions computed.
    prefill_tokens,
    /// Decode rows computed.
    decode_tokens,
    /// Tokens sampled.
    sampled_tokens,
    /// Nanoseconds spent in steps.
    step_nanos,
    /// Requests accepted into the waiting queue.
    submitted,
    /// Hand-offs whose every row left this engine.
    handoffs_sent,
    /// Hand-offs that arrived whole.
    handoffs_received,
    /// Hand-offs that failed here, sent or received.
    handoffs_failed,
    /// KV bytes read out of the cache.
    kv_bytes_sent,
    /// KV bytes written into the cache.
    kv_bytes_received,
}

/// Names of [`EngineStats::ended`], by index.
pub const ENDED: [&str; 5] = ["stop", "length", "cancelled", "deadline", "error"];

impl EngineStats {
    /// How full the engine is.
    pub fn load(&self) -> EngineLoad {
        EngineLoad {
            running: self.running.load(Ordering::Relaxed),
            waiting: self.waiting.load(Ordering::Relaxed),
            pages_free: self.pages_free.load(Ordering::Relaxed),
            pages_total: self.pages_total.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn end(&self, reason: FinishReason) {
        add(&self.ended[reason as usize], 1);
    }

    pub(crate) fn publish(&self, scheduler: &SchedulerStats) {
        let running = scheduler.prefilling + scheduler.awaiting_kv + scheduler.decoding + scheduler.held;
        self.running.store(running as u64, Ordering::Relaxed);
        self.waiting.store(scheduler.waiting as u64, Ordering::Relaxed);
        self.pages_free.store(scheduler.pages_free as u64, Ordering::Relaxed);
        self.pages_total.store(scheduler.pages_total as u64, Ordering::Relaxed);
    }
}

pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}
