//! The shard's metrics: one table, one struct of handles, and their refresh from the shard's counters.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use cadre_shard::{AnyShard, stats::REFUSALS};
use cadre_telemetry::{
    Counter, CounterFamily, Gauge, GaugeFamily, Label, MetricKind, MetricSpec, Metrics, MetricsError,
};

const FRAMES: MetricSpec = MetricSpec {
    name: "cadre_expert_frames_total",
    kind: MetricKind::Counter,
    help: "Dispatch frames of workers, by what became of them.",
    labels: &[Label::OneOf("outcome", &["computed", "refused", "cancelled"])],
};
const REFUSED: MetricSpec = MetricSpec {
    name: "cadre_expert_refused_total",
    kind: MetricKind::Counter,
    help: "Refused dispatch frames by reason.",
    labels: &[Label::OneOf(
        "reason",
        &["generation", "epoch", "malformed", "oversize", "overloaded", "unavailable", "internal"],
    )],
};
const PAIRS: MetricSpec = MetricSpec {
    name: "cadre_expert_pairs_total",
    kind: MetricKind::Counter,
    help: "(token, expert) pairs computed.",
    labels: &[],
};
const BATCHES: MetricSpec = MetricSpec {
    name: "cadre_expert_batches_total",
    kind: MetricKind::Counter,
    help: "Grouped computations; fewer than frames where frames of several workers were merged.",
    labels: &[],
};
const TIME: MetricSpec = MetricSpec {
    name: "cadre_expert_time_micros_total",
    kind: MetricKind::Counter,
    help: "Microseconds: frames waiting (summed over frames), and computing.",
    labels: &[Label::OneOf("what", &["queue", "compute"])],
};
const QUEUED: MetricSpec = MetricSpec {
    name: "cadre_expert_queued_pairs",
    kind: MetricKind::Gauge,
    help: "(token, expert) pairs waiting.",
    labels: &[],
};
const EXPERTS: MetricSpec = MetricSpec {
    name: "cadre_expert_resident_experts",
    kind: MetricKind::Gauge,
    help: "Experts loaded, over all layers.",
    labels: &[],
};
const RESIDENT_BYTES: MetricSpec = MetricSpec {
    name: "cadre_expert_resident_bytes",
    kind: MetricKind::Gauge,
    help: "Bytes of the packed weights of the experts loaded.",
    labels: &[],
};
const WEIGHT_BYTES: MetricSpec = MetricSpec {
    name: "cadre_expert_weight_bytes",
    kind: MetricKind::Gauge,
    help: "Checkpoint bytes of this shard's experts: read so far, and expected.",
    labels: &[Label::OneOf("state", &["read", "expected"])],
};
const EPOCH: MetricSpec = MetricSpec {
    name: "cadre_expert_placement_epoch",
    kind: MetricKind::Gauge,
    help: "Placement epoch served; 0 before the first.",
    labels: &[],
};

/// Every metric of a shard, for registration and docs/metrics.md.
pub const CATALOG: &[MetricSpec] =
    &[FRAMES, REFUSED, PAIRS, BATCHES, TIME, QUEUED, EXPERTS, RESIDENT_BYTES, WEIGHT_BYTES, EPOCH];

/// The handles.
#[derive(Debug)]
pub struct ExpertMetrics {
    frames: CounterFamily,
    refused: CounterFamily,
    pairs: Counter,
    batches: Counter,
    time: CounterFamily,
    queued: Gauge,
    experts: Gauge,
    resident_bytes: Gauge,
    weight_bytes: GaugeFamily,
    epoch: Gauge,
}

impl ExpertMetrics {
    /// Registers all of [`CATALOG`].
    pub fn register(metrics: &Metrics) -> Result<Self, MetricsError> {
        Ok(Self {
            frames: metrics.counters(&FRAMES)?,
            refused: metrics.counters(&REFUSED)?,
            pairs: metrics.counter(&PAIRS)?,
            batches: metrics.counter(&BATCHES)?,
            time: metrics.counters(&TIME)?,
            queued: metrics.gauge(&QUEUED)?,
            experts: metrics.gauge(&EXPERTS)?,
            resident_bytes: metrics.gauge(&RESIDENT_BYTES)?,
            weight_bytes: metrics.gauges(&WEIGHT_BYTES)?,
            epoch: metrics.gauge(&EPOCH)?,
        })
    }

    /// The counters, in the order of [`Counts::of`].
    fn counters(&self) -> Vec<Counter> {
        let mut counters = vec![
            self.frames.with(&["computed"]),
            self.frames.with(&["cancelled"]),
            self.frames.with(&["refused"]),
            self.pairs.clone(),
            self.batches.clone(),
            self.time.with(&["queue"]),
            self.time.with(&["compute"]),
        ];
        counters.extend(REFUSALS.iter().map(|(_, reason)| self.refused.with(&[reason])));
        counters
    }

    /// The gauges that add up over shards, in the order of [`Counts::of`].
    fn gauges(&self) -> [Gauge; 5] {
        [
            self.queued.clone(),
            self.experts.clone(),
            self.resident_bytes.clone(),
            self.weight_bytes.with(&["read"]),
            self.weight_bytes.with(&["expected"]),
        ]
    }
}

/// What one shard has been counted with so far. The metrics are sums over the shards of a process, and over the lives
/// of each.
#[derive(Debug)]
pub struct ShardMeter {
    metrics: Arc<ExpertMetrics>,
    counted: Mutex<Counts>,
}

/// A shard's numbers.
#[derive(Clone, Debug, Default, PartialEq)]
struct Counts {
    counters: Vec<u64>,
    gauges: Vec<f64>,
}

impl Counts {
    fn of(shard: &dyn AnyShard) -> Self {
        let stats = shard.stats();
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let refused: Vec<u64> = stats.refused.iter().map(load).collect();
        let counts = [&stats.pairs, &stats.batches, &stats.queue_micros, &stats.compute_micros].map(load);
        let frames = [load(&stats.frames), load(&stats.cancelled), refused.iter().sum()];
        let counters = frames.into_iter().chain(counts).chain(refused).collect();
        let (experts, bytes) = shard.resident();
        let progress = shard.progress();
        let gauges = vec![
            shard.queued_pairs() as f64,
            experts as f64,
            bytes as f64,
            progress.bytes_read as f64,
            progress.bytes_expected as f64,
        ];
        Self { counters, gauges }
    }
}

impl ShardMeter {
    /// For a shard that has counted nothing yet.
    pub fn new(metrics: Arc<ExpertMetrics>) -> Self {
        Self { metrics, counted: Mutex::default() }
    }

    /// Brings the metrics up to date.
    pub fn refresh(&self, shard: &dyn AnyShard) {
        self.count(Counts::of(shard));
        self.metrics.epoch.set(shard.epoch().map_or(0.0, |epoch| epoch.0 as f64));
    }

    fn count(&self, now: Counts) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        counted.counters.resize(now.counters.len(), 0);
        counted.gauges.resize(now.gauges.len(), 0.0);
        let counters = self.metrics.counters();
        for (counter, (now, before)) in counters.iter().zip(now.counters.iter().zip(&counted.counters)) {
            counter.inc_by(now.saturating_sub(*before));
        }
        let gauges = self.metrics.gauges();
        for (gauge, (now, before)) in gauges.iter().zip(now.gauges.iter().zip(&counted.gauges)) {
            gauge.add(now - before);
        }
        *counted = now;
    }
}

impl Drop for ShardMeter {
    /// What it held is held no more; what it counted has happened.
    fn drop(&mut self) {
        let counted = self.counted.get_mut().unwrap_or_else(PoisonError::into_inner);
        let gone = Counts { counters: counted.counters.clone(), gauges: vec![0.0; counted.gauges.len()] };
        self.count(gone);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn the_catalog_is_what_is_registered() {
        let metrics = Metrics::new();
        ExpertMetrics::register(&metrics).unwrap();
        let text = metrics.encode().unwrap();
        for spec in CATALOG {
            assert!(text.contains(spec.name), "{} is not exposed", spec.name);
        }
    }

    #[test]
    fn metrics_are_sums_over_shards_and_their_lives() {
        let metrics = Metrics::new();
        let ours = Arc::new(ExpertMetrics::register(&metrics).unwrap());
        let counts = |pairs: u64, experts: f64| Counts {
            counters: vec![0, 0, 0, pairs, 0, 0, 0],
            gauges: vec![0.0, experts, 0.0, 0.0, 0.0],
        };
        let (first, second) = (ShardMeter::new(ours.clone()), ShardMeter::new(ours.clone()));
        first.count(counts(5, 8.0));
        first.count(counts(5, 8.0));
        second.count(counts(7, 4.0));
        assert_eq!((ours.pairs.get(), ours.experts.get()), (12, 12.0));
        first.count(counts(6, 2.0));
        drop(first);
        assert_eq!((ours.pairs.get(), ours.experts.get()), (13, 4.0));
        // Its next life counts from nothing.
        let first = ShardMeter::new(ours.clone());
        first.count(counts(1, 8.0));
        assert_eq!((ours.pairs.get(), ours.experts.get()), (14, 12.0));
    }
}
