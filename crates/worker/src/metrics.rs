//! The worker's metrics: one table, one struct of handles, and their refresh from the engine's counters.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use cadre_engine::{EngineStats, StepSample, stats::ENDED};
use cadre_proto::v1;
use cadre_telemetry::{
    CounterFamily, GaugeFamily, Histogram, HistogramFamily, Label, MetricKind, MetricSpec, Metrics,
    MetricsError,
    metrics::{COUNT_BUCKETS, LATENCY_BUCKETS},
};

const PHASE: Label = Label::OneOf("phase", &["decode", "prefill", "mixed"]);
const EXPERT_LAYERS: Label = Label::Bounded("layer", "expert layers of the model");

const STEP_SECONDS: MetricSpec = MetricSpec {
    name: "cadre_worker_step_seconds",
    kind: MetricKind::Histogram(LATENCY_BUCKETS),
    help: "Time of a step from plan to last event, by what its rows were.",
    labels: &[PHASE],
};
const STEP_ROWS: MetricSpec = MetricSpec {
    name: "cadre_worker_step_rows",
    kind: MetricKind::Histogram(COUNT_BUCKETS),
    help: "Rows of a step, decode rows and prompt tokens together.",
    labels: &[],
};
const STEPS: MetricSpec = MetricSpec {
    name: "cadre_worker_steps_total",
    kind: MetricKind::Counter,
    help: "Steps by outcome.",
    labels: &[Label::OneOf("outcome", &["ok", "failed"])],
};
const TOKENS: MetricSpec = MetricSpec {
    name: "cadre_worker_tokens_total",
    kind: MetricKind::Counter,
    help: "Tokens: prompt positions computed, decode rows computed, tokens sampled.",
    labels: &[Label::OneOf("kind", &["prefill", "decode", "sampled"])],
};
const SEQUENCES: MetricSpec = MetricSpec {
    name: "cadre_worker_sequences",
    kind: MetricKind::Gauge,
    help: "Sequences that have pages (running) or wait for them.",
    labels: &[Label::OneOf("state", &["running", "waiting"])],
};
const ENDED_TOTAL: MetricSpec = MetricSpec {
    name: "cadre_worker_sequences_ended_total",
    kind: MetricKind::Counter,
    help: "Sequences that ended, by reason.",
    labels: &[Label::OneOf("reason", &ENDED)],
};
const PAGES: MetricSpec = MetricSpec {
    name: "cadre_worker_kv_pages",
    kind: MetricKind::Gauge,
    help: "Pages of 64 tokens in the latent KV cache.",
    labels: &[Label::OneOf("state", &["used", "free"])],
};
const HANDOFFS: MetricSpec = MetricSpec {
    name: "cadre_worker_handoffs_total",
    kind: MetricKind::Counter,
    help: "KV hand-offs by what became of them here.",
    labels: &[Label::OneOf("outcome", &["sent", "received", "failed"])],
};
const KV_BYTES: MetricSpec = MetricSpec {
    name: "cadre_worker_kv_handoff_bytes_total",
    kind: MetricKind::Counter,
    help: "KV bytes read out of or written into the cache for hand-offs.",
    labels: &[Label::OneOf("direction", &["sent", "received"])],
};
const EXPERT_TOKENS: MetricSpec = MetricSpec {
    name: "cadre_worker_expert_tokens_total",
    kind: MetricKind::Counter,
    help: "(token, expert) pairs that the gate chose, by layer. By expert: the router's load window.",
    labels: &[EXPERT_LAYERS],
};
const EXPERT_SKEW: MetricSpec = MetricSpec {
    name: "cadre_worker_expert_skew_ratio",
    kind: MetricKind::Gauge,
    help: "Tokens of the busiest expert over the mean of all, since the start; 1 is even.",
    labels: &[EXPERT_LAYERS],
};
const WEIGHT_BYTES: MetricSpec = MetricSpec {
    name: "cadre_worker_weight_bytes",
    kind: MetricKind::Gauge,
    help: "Checkpoint bytes of this worker's share: read so far, and expected.",
    labels: &[Label::OneOf("state", &["read", "expected"])],
};

/// Every metric of a worker, for registration and docs/metrics.md.
pub const CATALOG: &[MetricSpec] = &[
    STEP_SECONDS,
    STEP_ROWS,
    STEPS,
    TOKENS,
    SEQUENCES,
    ENDED_TOTAL,
    PAGES,
    HANDOFFS,
    KV_BYTES,
    EXPERT_TOKENS,
    EXPERT_SKEW,
    WEIGHT_BYTES,
];

/// The handles.
#[derive(Debug)]
pub struct WorkerMetrics {
    step_seconds: HistogramFamily,
    step_rows: Histogram,
    steps: CounterFamily,
    tokens: CounterFamily,
    sequences: GaugeFamily,
    ended: CounterFamily,
    pages: GaugeFamily,
    handoffs: CounterFamily,
    kv_bytes: CounterFamily,
    expert_tokens: CounterFamily,
    expert_skew: GaugeFamily,
    weight_bytes: GaugeFamily,
    /// Tokens by expert since the start, for the skew.
    by_expert: Mutex<BTreeMap<u32, Vec<u64>>>,
}

impl WorkerMetrics {
    /// Registers all of [`CATALOG`].
    pub fn register(metrics: &Metrics) -> Result<Self, MetricsError> {
        Ok(Self {
            step_seconds: metrics.histograms(&STEP_SECONDS)?,
            step_rows: metrics.histogram(&STEP_ROWS)?,
            steps: metrics.counters(&STEPS)?,
            tokens: metrics.counters(&TOKENS)?,
            sequences: metrics.gauges(&SEQUENCES)?,
            ended: metrics.counters(&ENDED_TOTAL)?,
            pages: metrics.gauges(&PAGES)?,
            handoffs: metrics.counters(&HANDOFFS)?,
            kv_bytes: metrics.counters(&KV_BYTES)?,
            expert_tokens: metrics.counters(&EXPERT_TOKENS)?,
            expert_skew: metrics.gauges(&EXPERT_SKEW)?,
            weight_bytes: metrics.gauges(&WEIGHT_BYTES)?,
            by_expert: Mutex::default(),
        })
    }

    /// An observer of steps for [`cadre_engine::EngineParts::on_step`].
    pub fn step_observer(&self) -> impl FnMut(&StepSample) + Send + 'static {
        let [decode, prefill, mixed] =
            ["decode", "prefill", "mixed"].map(|phase| self.step_seconds.with(&[phase]));
        let rows = self.step_rows.clone();
        move |sample| {
            let seconds = match (sample.decode_rows, sample.prefill_rows) {
                (_, 0) => &decode,
                (0, _) => &prefill,
                _ => &mixed,
            };
            seconds.observe(sample.total.as_secs_f64());
            rows.observe(sample.rows() as f64);
        }
    }

    /// Weights read so far.
    pub fn loading(&self, read: u64, expected: u64) {
        self.weight_bytes.with(&["read"]).set(read as f64);
        self.weight_bytes.with(&["expected"]).set(expected as f64);
    }

    /// Brings counters and gauges up to the engine's.
    pub fn refresh(&self, stats: &EngineStats) {
        let counters = [
            (&self.steps, "ok", &stats.steps),
            (&self.steps, "failed", &stats.failed_steps),
            (&self.tokens, "prefill", &stats.prefill_tokens),
            (&self.tokens, "decode", &stats.decode_tokens),
            (&self.tokens, "sampled", &stats.sampled_tokens),
            (&self.handoffs, "sent", &stats.handoffs_sent),
            (&self.handoffs, "received", &stats.handoffs_received),
            (&self.handoffs, "failed", &stats.handoffs_failed),
            (&self.kv_bytes, "sent", &stats.kv_bytes_sent),
            (&self.kv_bytes, "received", &stats.kv_bytes_received),
        ];
        let ended = ENDED.into_iter().zip(&stats.ended).map(|(reason, count)| (&self.ended, reason, count));
        for (family, label, count) in counters.into_iter().chain(ended) {
            raise(family, &[label], count);
        }
        let load = stats.load();
        self.sequences.with(&["running"]).set(load.running as f64);
        self.sequences.with(&["waiting"]).set(load.waiting as f64);
        self.pages.with(&["free"]).set(load.pages_free as f64);
        self.pages.with(&["used"]).set((load.pages_total - load.pages_free) as f64);
    }

    /// Adds tokens per expert that are about to be reported.
    pub fn expert_load(&self, taken: &[v1::LayerLoad]) {
        let mut by_expert = self.by_expert.lock().unwrap_or_else(PoisonError::into_inner);
        for v1::LayerLoad { layer, tokens } in taken {
            let sums = by_expert.entry(*layer).or_insert_with(|| vec![0; tokens.len()]);
            sums.iter_mut().zip(tokens).for_each(|(sum, tokens)| *sum += tokens);
            let (total, most) = (sums.iter().sum::<u64>(), sums.iter().max().copied().unwrap_or(0));
            let label = layer.to_string();
            self.expert_tokens.with(&[&label]).inc_by(tokens.iter().sum());
            if total > 0 {
                let skew = most as f64 * sums.len() as f64 / total as f64;
                self.expert_skew.with(&[&label]).set(skew);
            }
        }
    }
}

/// Raises a counter to a count kept elsewhere; both only grow and this is the only writer.
pub(crate) fn raise(family: &CounterFamily, labels: &[&str], count: &AtomicU64) {
    let counter = family.with(labels);
    counter.inc_by(count.load(Ordering::Relaxed).saturating_sub(counter.get()));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::time::Duration;

    use super::*;

    #[test]
    fn counters_follow_the_engine_and_steps_land_in_their_phase() {
        let registry = Metrics::new();
        let metrics = WorkerMetrics::register(&registry).unwrap();
        let stats = EngineStats::default();
        stats.steps.store(3, Ordering::Relaxed);
        stats.ended[2].store(2, Ordering::Relaxed);
        metrics.refresh(&stats);
        metrics.refresh(&stats);
        let mut observe = metrics.step_observer();
        let sample = |decode_rows, prefill_rows| StepSample {
            total: Duration::from_millis(3),
            forward: Duration::from_millis(2),
            decode_rows,
            prefill_rows,
        };
        observe(&sample(4, 0));
        observe(&sample(0, 9));
        observe(&sample(1, 9));
        metrics.expert_load(&[v1::LayerLoad { layer: 3, tokens: vec![3, 1, 0, 0] }]);
        let text = registry.encode().unwrap();
        for line in [
            "cadre_worker_steps_total{outcome=\"ok\"} 3",
            "cadre_worker_sequences_ended_total{reason=\"cancelled\"} 2",
            "cadre_worker_step_seconds_count{phase=\"decode\"} 1",
            "cadre_worker_step_seconds_count{phase=\"mixed\"} 1",
            "cadre_worker_step_rows_sum 23",
            "cadre_worker_expert_tokens_total{layer=\"3\"} 4",
            "cadre_worker_expert_skew_ratio{layer=\"3\"} 3",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn the_catalog_is_what_is_registered() {
        let registry = Metrics::new();
        let metrics = WorkerMetrics::register(&registry).unwrap();
        metrics.expert_load(&[v1::LayerLoad { layer: 1, tokens: vec![1] }]);
        let text = registry.encode().unwrap();
        for spec in CATALOG {
            assert!(text.contains(&format!("# TYPE {} ", spec.name)), "{} is not exported", spec.name);
        }
    }
}
