//! Counters of a shard, for whoever exports metrics. All only grow.

use std::sync::atomic::{AtomicU64, Ordering};

use cadre_dispatch::RefusalCode;

/// Every refusal, in the order of [`ShardStats::refused`].
pub const REFUSALS: [(RefusalCode, &str); 7] = [
    (RefusalCode::Generation, "generation"),
    (RefusalCode::Epoch, "epoch"),
    (RefusalCode::Malformed, "malformed"),
    (RefusalCode::Oversize, "oversize"),
    (RefusalCode::Overloaded, "overloaded"),
    (RefusalCode::Unavailable, "unavailable"),
    (RefusalCode::Internal, "internal"),
];

/// The counters.
#[derive(Debug, Default)]
pub struct ShardStats {
    /// Frames computed, probes included.
    pub frames: AtomicU64,
    /// (token, expert) pairs computed.
    pub pairs: AtomicU64,
    /// Grouped computations; fewer than frames where frames were merged.
    pub batches: AtomicU64,
    /// Frames whose worker went away before they were computed.
    pub cancelled: AtomicU64,
    /// Microseconds that frames waited, summed.
    pub queue_micros: AtomicU64,
    /// Microseconds of computing.
    pub compute_micros: AtomicU64,
    /// Frames of finite rows whose results were not finite.
    pub not_finite: AtomicU64,
    /// Refused frames, as in [`REFUSALS`].
    pub refused: [AtomicU64; REFUSALS.len()],
}

impl ShardStats {
    /// Counts a refusal.
    pub(crate) fn refuse(&self, code: RefusalCode) {
        if let Some(at) = REFUSALS.iter().position(|(other, _)| *other == code) {
            self.refused[at].fetch_add(1, Ordering::Relaxed);
        }
    }
}

pub(crate) fn add(counter: &AtomicU64, value: usize) {
    counter.fetch_add(value as u64, Ordering::Relaxed);
}
