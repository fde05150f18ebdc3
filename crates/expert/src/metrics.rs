//! The shard's metrics: one table, one struct of handles, and their refresh from the shard's counters.

use std::sync::atomic::{AtomicU64, Ordering};

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

    /// Brings the metrics up to date.
    pub fn refresh(&self, shard: &dyn AnyShard) {
        let stats = shard.stats();
        raise(&self.frames.with(&["computed"]), &stats.frames);
        raise(&self.frames.with(&["cancelled"]), &stats.cancelled);
        raise(&self.pairs, &stats.pairs);
        raise(&self.batches, &stats.batches);
        raise(&self.time.with(&["queue"]), &stats.queue_micros);
        raise(&self.time.with(&["compute"]), &stats.compute_micros);
        let refused = AtomicU64::new(0);
        for ((_, reason), count) in REFUSALS.iter().zip(&stats.refused) {
            raise(&self.refused.with(&[reason]), count);
            refused.fetch_add(count.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        raise(&self.frames.with(&["refused"]), &refused);
        self.queued.set(shard.queued_pairs() as f64);
        let (experts, bytes) = shard.resident();
        self.experts.set(experts as f64);
        self.resident_bytes.set(bytes as f64);
        let progress = shard.progress();
        self.weight_bytes.with(&["read"]).set(progress.bytes_read as f64);
        self.weight_bytes.with(&["expected"]).set(progress.bytes_expected as f64);
        self.epoch.set(shard.epoch().map_or(0.0, |epoch| epoch.0 as f64));
    }
}

/// Raises a counter to a count that only grows.
fn raise(counter: &Counter, count: &AtomicU64) {
    counter.inc_by(count.load(Ordering::Relaxed).saturating_sub(counter.get()));
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
    fn counters_are_raised_to_what_the_shard_counted() {
        let metrics = Metrics::new();
        let ours = ExpertMetrics::register(&metrics).unwrap();
        let count = AtomicU64::new(5);
        raise(&ours.pairs, &count);
        raise(&ours.pairs, &count);
        assert_eq!(ours.pairs.get(), 5);
        count.store(7, Ordering::Relaxed);
        raise(&ours.pairs, &count);
        assert_eq!(ours.pairs.get(), 7);
    }
}
