//! Metrics of the dispatch path, from the dispatcher's own counters.
//!
//! Counters and gauges are refreshed with the worker's; the round-trip histogram is kept whole by the
//! dispatcher and read at every scrape, because samples cannot be taken back out of buckets.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use cadre_dispatch::{
    health::Failure,
    stats::{DispatchStats, ROUND_TRIP_BOUNDS},
};
use cadre_telemetry::{CounterFamily, GaugeFamily, Label, MetricKind, MetricSpec, Metrics, MetricsError};
use prometheus::{
    core::{Collector, Desc},
    proto,
};

use crate::metrics::raise;

const SHARD: Label = Label::Bounded("shard", "expert shards of the model");
const FAILURE: Label = Label::OneOf(
    "kind",
    &["unreachable", "timed_out", "refused", "bad_answer", "expired", "slow", "not_finite"],
);

const ROUND_TRIP: MetricSpec = MetricSpec {
    name: "cadre_dispatch_round_trip_seconds",
    kind: MetricKind::Histogram(&ROUND_TRIP_BOUNDS),
    help: "Time from sending a frame to its answer, the shard's queue and GEMM included.",
    labels: &[],
};
const BYTES: MetricSpec = MetricSpec {
    name: "cadre_dispatch_bytes_total",
    kind: MetricKind::Counter,
    help: "Payload bytes of frames to shards (out) and of their answers (in).",
    labels: &[Label::OneOf("direction", &["out", "in"])],
};
const SHARD_MICROS: MetricSpec = MetricSpec {
    name: "cadre_dispatch_shard_micros_total",
    kind: MetricKind::Counter,
    help: "Microseconds that frames spent at shards: waiting for their GEMM, and in it.",
    labels: &[Label::OneOf("part", &["queue", "compute"])],
};
const EVENTS: MetricSpec = MetricSpec {
    name: "cadre_dispatch_events_total",
    kind: MetricKind::Counter,
    help: "Pairs sent again after a failure, probes sent, answers that came too late, exchanges that found \
           no live copy.",
    labels: &[Label::OneOf("event", &["retried_pair", "probe", "late_answer", "uncovered"])],
};
const FRAMES: MetricSpec = MetricSpec {
    name: "cadre_dispatch_frames_total",
    kind: MetricKind::Counter,
    help: "Frames sent to a shard, probes not counted.",
    labels: &[SHARD],
};
const PAIRS: MetricSpec = MetricSpec {
    name: "cadre_dispatch_pairs_total",
    kind: MetricKind::Counter,
    help: "(token, expert) pairs sent to a shard's copies.",
    labels: &[SHARD],
};
const FAILURES: MetricSpec = MetricSpec {
    name: "cadre_dispatch_failures_total",
    kind: MetricKind::Counter,
    help: "Frames and probes of a shard that failed, by kind.",
    labels: &[SHARD, FAILURE],
};
const EJECTIONS: MetricSpec = MetricSpec {
    name: "cadre_dispatch_ejections_total",
    kind: MetricKind::Counter,
    help: "Times that a shard was taken out, or avoided because it was slow.",
    labels: &[SHARD],
};
const USABLE: MetricSpec = MetricSpec {
    name: "cadre_dispatch_shard_usable",
    kind: MetricKind::Gauge,
    help: "1 while frames may go to the shard.",
    labels: &[SHARD],
};

const AVOIDED: MetricSpec = MetricSpec {
    name: "cadre_dispatch_shard_avoided",
    kind: MetricKind::Gauge,
    help: "1 while the shard gets only what no other usable copy can compute, because it is many times slower than its \
           peers.",
    labels: &[SHARD],
};

/// Every metric of the dispatch path, for registration and docs/metrics.md.
pub const CATALOG: &[MetricSpec] =
    &[ROUND_TRIP, BYTES, SHARD_MICROS, EVENTS, FRAMES, PAIRS, FAILURES, EJECTIONS, USABLE, AVOIDED];

/// The handles.
#[derive(Debug)]
pub struct DispatchMetrics {
    stats: Arc<DispatchStats>,
    /// Shards at the last refresh.
    shards: AtomicUsize,
    bytes: CounterFamily,
    shard_micros: CounterFamily,
    events: CounterFamily,
    frames: CounterFamily,
    pairs: CounterFamily,
    failures: CounterFamily,
    ejections: CounterFamily,
    usable: GaugeFamily,
    avoided: GaugeFamily,
}

impl DispatchMetrics {
    /// Registers all of [`CATALOG`] over one dispatcher's counters.
    pub fn register(metrics: &Metrics, stats: Arc<DispatchStats>) -> Result<Self, MetricsError> {
        metrics.collector(&ROUND_TRIP, Box::new(RoundTrip::new(Arc::clone(&stats))))?;
        Ok(Self {
            stats,
            shards: AtomicUsize::new(0),
            bytes: metrics.counters(&BYTES)?,
            shard_micros: metrics.counters(&SHARD_MICROS)?,
            events: metrics.counters(&EVENTS)?,
            frames: metrics.counters(&FRAMES)?,
            pairs: metrics.counters(&PAIRS)?,
            failures: metrics.counters(&FAILURES)?,
            ejections: metrics.counters(&EJECTIONS)?,
            usable: metrics.gauges(&USABLE)?,
            avoided: metrics.gauges(&AVOIDED)?,
        })
    }

    /// Brings counters and gauges up to the dispatcher's.
    pub fn refresh(&self) {
        let stats = &self.stats;
        let totals: [(&CounterFamily, &str, &AtomicU64); 8] = [
            (&self.bytes, "out", &stats.bytes_out),
            (&self.bytes, "in", &stats.bytes_in),
            (&self.shard_micros, "queue", &stats.queue_micros),
            (&self.shard_micros, "compute", &stats.compute_micros),
            (&self.events, "retried_pair", &stats.retried_pairs),
            (&self.events, "probe", &stats.probes),
            (&self.events, "late_answer", &stats.late_answers),
            (&self.events, "uncovered", &stats.uncovered),
        ];
        for (family, label, count) in totals {
            raise(family, &[label], count);
        }
        let shards = stats.shards();
        if self.shards.swap(shards.len(), Ordering::Relaxed) > shards.len() {
            // Series of shards that no placement has go; those that stay are made again with all they have counted.
            self.frames.reset();
            self.pairs.reset();
            self.failures.reset();
            self.ejections.reset();
            self.usable.reset();
            self.avoided.reset();
        }
        for (index, shard) in shards.iter().enumerate() {
            let index = index.to_string();
            raise(&self.frames, &[&index], &shard.frames);
            raise(&self.pairs, &[&index], &shard.pairs);
            raise(&self.ejections, &[&index], &shard.ejections);
            for kind in Failure::ALL {
                raise(&self.failures, &[&index, kind.name()], &shard.failures[kind.index()]);
            }
            self.usable.with(&[&index]).set(shard.usable.load(Ordering::Relaxed) as f64);
            self.avoided.with(&[&index]).set(shard.avoided.load(Ordering::Relaxed) as f64);
        }
    }
}

/// The dispatcher's round-trip histogram as Prometheus reads it.
struct RoundTrip {
    stats: Arc<DispatchStats>,
    desc: Vec<Desc>,
}

impl RoundTrip {
    fn new(stats: Arc<DispatchStats>) -> Self {
        let desc =
            Desc::new(ROUND_TRIP.name.to_owned(), ROUND_TRIP.help.to_owned(), vec![], Default::default());
        // The name and help are constants above; `the_round_trip_is_exported` fails if they are refused.
        Self { stats, desc: desc.into_iter().collect() }
    }
}

impl Collector for RoundTrip {
    fn desc(&self) -> Vec<&Desc> {
        self.desc.iter().collect()
    }

    fn collect(&self) -> Vec<proto::MetricFamily> {
        let (counts, sum) = self.stats.round_trip.snapshot();
        let mut cumulative = 0;
        let buckets = ROUND_TRIP_BOUNDS.into_iter().zip(counts).map(|(bound, count)| {
            cumulative += count;
            let mut bucket = proto::Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(cumulative);
            bucket
        });
        let mut histogram = proto::Histogram::default();
        histogram.set_bucket(buckets.collect());
        histogram.set_sample_count(counts.iter().sum());
        histogram.set_sample_sum(sum);
        let mut metric = proto::Metric::default();
        metric.set_histogram(histogram);
        let mut family = proto::MetricFamily::default();
        family.set_name(ROUND_TRIP.name.to_owned());
        family.set_help(ROUND_TRIP.help.to_owned());
        family.set_field_type(proto::MetricType::HISTOGRAM);
        family.set_metric(vec![metric]);
        vec![family]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::time::Duration;

    use cadre_types::ShardIndex;

    use super::*;

    #[test]
    fn the_round_trip_is_exported() {
        let registry = Metrics::new();
        let stats = Arc::new(DispatchStats::default());
        let metrics = DispatchMetrics::register(&registry, Arc::clone(&stats)).unwrap();
        stats.round_trip.observe(Duration::from_micros(80));
        stats.round_trip.observe(Duration::from_secs(60));
        stats.shard(ShardIndex(1)).failures[Failure::TimedOut.index()].store(2, Ordering::Relaxed);
        stats.shard(ShardIndex(1)).usable.store(1, Ordering::Relaxed);
        metrics.refresh();
        let text = registry.encode().unwrap();
        for line in [
            "cadre_dispatch_round_trip_seconds_bucket{le=\"0.0001\"} 1",
            "cadre_dispatch_round_trip_seconds_bucket{le=\"10\"} 1",
            "cadre_dispatch_round_trip_seconds_bucket{le=\"+Inf\"} 2",
            "cadre_dispatch_round_trip_seconds_count 2",
            "cadre_dispatch_failures_total{kind=\"timed_out\",shard=\"1\"} 2",
            "cadre_dispatch_shard_usable{shard=\"0\"} 0",
            "cadre_dispatch_shard_usable{shard=\"1\"} 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn series_of_shards_that_are_forgotten_go_and_the_others_keep_their_counts() {
        let registry = Metrics::new();
        let stats = Arc::new(DispatchStats::default());
        let metrics = DispatchMetrics::register(&registry, Arc::clone(&stats)).unwrap();
        stats.shard(ShardIndex(0)).frames.store(5, Ordering::Relaxed);
        stats.shard(ShardIndex(60_003));
        metrics.refresh();
        assert!(registry.encode().unwrap().contains("shard=\"60003\""));
        stats.forget_from(1);
        metrics.refresh();
        let text = registry.encode().unwrap();
        assert!(text.contains("cadre_dispatch_frames_total{shard=\"0\"} 5\n"), "{text}");
        assert!(!text.contains("shard=\"1\"") && !text.contains("60003"), "{text}");
    }

    #[test]
    fn failure_labels_are_the_dispatchers() {
        let Label::OneOf(_, names) = FAILURE else { panic!("a closed set") };
        assert_eq!(names, Failure::ALL.map(Failure::name));
    }
}
