//! Counters of one dispatcher, written by its thread and read by whoever exports metrics. Plain atomics:
//! this crate knows no metrics library.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cadre_proto::v1;
use cadre_types::{LayerId, LogicalExpert, Placement, ShardIndex};
use parking_lot::RwLock;

use crate::health::Failure;

/// Upper bounds of the round-trip buckets in seconds; the last bucket is everything above.
pub const ROUND_TRIP_BOUNDS: [f64; 14] =
    [50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.5, 2.0, 10.0];

/// A histogram with fixed bounds.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; ROUND_TRIP_BOUNDS.len() + 1],
    sum_nanos: AtomicU64,
}

impl Histogram {
    /// Counts a sample.
    pub fn observe(&self, sample: Duration) {
        let seconds = sample.as_secs_f64();
        let bucket = ROUND_TRIP_BOUNDS.partition_point(|&bound| bound < seconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_nanos.fetch_add(sample.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Samples per bucket (not cumulative), and their sum in seconds.
    pub fn snapshot(&self) -> ([u64; ROUND_TRIP_BOUNDS.len() + 1], f64) {
        let buckets = std::array::from_fn(|at| self.buckets[at].load(Ordering::Relaxed));
        (buckets, self.sum_nanos.load(Ordering::Relaxed) as f64 * 1e-9)
    }
}

/// One shard's part.
#[derive(Debug, Default)]
pub struct ShardStats {
    /// Frames sent, probes not counted.
    pub frames: AtomicU64,
    /// (token, expert) pairs sent to this shard's copies.
    pub pairs: AtomicU64,
    /// Failures by [`Failure::index`].
    pub failures: [AtomicU64; Failure::ALL.len()],
    /// Times it was taken out, or avoided because it was slow.
    pub ejections: AtomicU64,
    /// 1 while frames may go to it.
    pub usable: AtomicU64,
    /// 1 while it gets only what no other usable copy can compute, because it is slow.
    pub avoided: AtomicU64,
}

/// Counters of one dispatcher. All grow for ever but the gauges, which say so.
#[derive(Debug, Default)]
pub struct DispatchStats {
    /// Payload bytes of frames sent.
    pub bytes_out: AtomicU64,
    /// Payload bytes of answers.
    pub bytes_in: AtomicU64,
    /// Pairs that were sent again after a failure.
    pub retried_pairs: AtomicU64,
    /// Probes sent.
    pub probes: AtomicU64,
    /// Answers that came after their frame had been given up.
    pub late_answers: AtomicU64,
    /// Exchanges that failed because an expert had no live copy.
    pub uncovered: AtomicU64,
    /// From sending a frame to its answer.
    pub round_trip: Histogram,
    /// Microseconds that frames waited in shards' queues, summed.
    pub queue_micros: AtomicU64,
    /// Microseconds that shards computed for frames, summed.
    pub compute_micros: AtomicU64,
    shards: RwLock<Vec<Arc<ShardStats>>>,
    experts: OnceLock<ExpertTokens>,
    /// What was not finite and has not been disproven.
    faults: RwLock<Vec<ShardFault>>,
}

/// A shard that was taken out because a row was not finite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ShardFault {
    pub(crate) shard: ShardIndex,
    /// Of the process that answered.
    pub(crate) address: String,
    pub(crate) layer: LayerId,
    pub(crate) expert: LogicalExpert,
}

/// Tokens routed per (layer, logical expert).
#[derive(Debug)]
struct ExpertTokens {
    layers: Vec<LayerId>,
    experts: usize,
    tokens: Vec<AtomicU64>,
}

pub(crate) fn add(counter: &AtomicU64, value: usize) {
    counter.fetch_add(value as u64, Ordering::Relaxed);
}

impl DispatchStats {
    /// A shard's counters.
    pub fn shard(&self, shard: ShardIndex) -> Arc<ShardStats> {
        if let Some(stats) = self.shards.read().get(shard.index()) {
            return stats.clone();
        }
        let mut shards = self.shards.write();
        while shards.len() <= shard.index() {
            shards.push(Arc::default());
        }
        shards[shard.index()].clone()
    }

    /// Forgets shards from this index on: no placement has them any more.
    pub fn forget_from(&self, shards: usize) {
        let mut known = self.shards.write();
        if known.len() > shards {
            known.truncate(shards);
            known.shrink_to_fit();
        }
    }

    /// Every shard's counters, by index.
    pub fn shards(&self) -> Vec<Arc<ShardStats>> {
        self.shards.read().clone()
    }

    pub(crate) fn set_faults(&self, faults: Vec<ShardFault>) {
        *self.faults.write() = faults;
    }

    /// Shards that are taken out because a row was not finite, for reports; at most one fault of a shard.
    pub fn faults(&self) -> Vec<v1::ShardFault> {
        let faults = self.faults.read();
        let wire = faults.iter().map(|fault| v1::ShardFault {
            shard: u32::from(fault.shard.0),
            address: fault.address.clone(),
            layer: u32::from(fault.layer.0),
            expert: u32::from(fault.expert.0),
        });
        wire.collect()
    }

    /// Sizes the table of tokens by the first placement; a model's layers and experts never change.
    pub(crate) fn observe_placement(&self, placement: &Placement) {
        self.experts.get_or_init(|| {
            let layers: Vec<_> = placement.layers().iter().map(|placed| placed.layer).collect();
            let experts = placement.num_experts();
            let tokens = (0..layers.len() * experts).map(|_| AtomicU64::new(0)).collect();
            ExpertTokens { layers, experts, tokens }
        });
    }

    /// Counts one layer step's choices.
    pub(crate) fn count_experts(&self, layer: LayerId, topk_idx: &[u16]) {
        let Some(table) = self.experts.get() else { return };
        let Ok(at) = table.layers.binary_search(&layer) else { return };
        let row = &table.tokens[at * table.experts..(at + 1) * table.experts];
        for &expert in topk_idx {
            if let Some(count) = row.get(usize::from(expert)) {
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Tokens routed so far, layer by layer, indexed by logical expert.
    pub fn expert_tokens(&self) -> Vec<(LayerId, Vec<u64>)> {
        let Some(table) = self.experts.get() else { return Vec::new() };
        let rows = table.tokens.chunks(table.experts.max(1));
        let load = |row: &[AtomicU64]| row.iter().map(|n| n.load(Ordering::Relaxed)).collect();
        table.layers.iter().copied().zip(rows.map(load)).collect()
    }
}

/// Turns the ever-growing table of tokens into the differences that reports carry.
#[derive(Debug)]
pub struct ExpertLoadWindow {
    stats: Arc<DispatchStats>,
    previous: Vec<(LayerId, Vec<u64>)>,
}

impl ExpertLoadWindow {
    /// Starts with what has been counted so far as zero.
    pub fn new(stats: Arc<DispatchStats>) -> Self {
        let previous = stats.expert_tokens();
        Self { stats, previous }
    }

    /// As [`DispatchStats::faults`].
    pub fn faults(&self) -> Vec<v1::ShardFault> {
        self.stats.faults()
    }

    /// Tokens since the last call; layers without any are left out.
    pub fn take(&mut self) -> Vec<v1::LayerLoad> {
        let now = self.stats.expert_tokens();
        let before = std::mem::replace(&mut self.previous, now);
        let mut loads = Vec::new();
        for (at, (layer, tokens)) in self.previous.iter().enumerate() {
            let old = before.get(at).map_or(&[][..], |(_, tokens)| tokens.as_slice());
            let tokens: Vec<u64> = tokens
                .iter()
                .enumerate()
                .map(|(expert, count)| count - old.get(expert).copied().unwrap_or(0))
                .collect();
            if tokens.iter().any(|&count| count > 0) {
                loads.push(v1::LayerLoad { layer: u32::from(layer.0), tokens });
            }
        }
        loads
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use cadre_types::{LayerPlacement, PlacementEpoch};

    use super::*;

    #[test]
    fn samples_land_in_their_bucket() {
        let histogram = Histogram::default();
        for micros in [1, 50, 51, 10_000_001] {
            histogram.observe(Duration::from_micros(micros));
        }
        let (buckets, sum) = histogram.snapshot();
        assert_eq!((buckets[0], buckets[1], buckets[14]), (2, 1, 1));
        assert!((sum - 10.000_103).abs() < 1e-9);
    }

    #[test]
    fn a_window_reports_differences_only() {
        let slots = vec![vec![LogicalExpert(0), LogicalExpert(1)]];
        let layers =
            [3, 4].map(|layer| LayerPlacement { layer: LayerId(layer), slots: slots.clone() }).to_vec();
        let placement = Placement::new(PlacementEpoch(1), 2, layers).unwrap();
        let stats = Arc::new(DispatchStats::default());
        let mut window = ExpertLoadWindow::new(stats.clone());
        assert_eq!(window.take(), []);
        stats.observe_placement(&placement);
        stats.count_experts(LayerId(4), &[1, 1, 0]);
        let load = |layer, tokens: &[u64]| v1::LayerLoad { layer, tokens: tokens.to_vec() };
        assert_eq!(window.take(), [load(4, &[1, 2])]);
        assert_eq!(window.take(), []);
        stats.count_experts(LayerId(3), &[0]);
        stats.count_experts(LayerId(9), &[0]);
        assert_eq!(window.take(), [load(3, &[1, 0])]);
    }
}
