//! The router's metrics: one table, one struct of handles.

use std::time::Duration;

use cadre_telemetry::{
    Counter, CounterFamily, Gauge, GaugeFamily, Histogram, HistogramFamily, Label, MetricKind, MetricSpec,
    Metrics, MetricsError,
    metrics::{COUNT_BUCKETS, LATENCY_BUCKETS},
};

const API: Label = Label::OneOf("api", &["grpc_generate", "grpc_stream", "http_completions", "http_chat"]);
const OUTCOME: Label = Label::OneOf(
    "outcome",
    &["ok", "invalid", "refused", "no_worker", "worker_failed", "deadline", "cancelled", "internal"],
);

const REQUESTS: MetricSpec = MetricSpec {
    name: "cadre_router_requests_total",
    kind: MetricKind::Counter,
    help: "Requests that ended, by front door and outcome.",
    labels: &[API, OUTCOME],
};
const WAITING: MetricSpec = MetricSpec {
    name: "cadre_router_waiting_requests",
    kind: MetricKind::Gauge,
    help: "Requests in the admission queue that wait for their turn.",
    labels: &[],
};
const RUNNING: MetricSpec = MetricSpec {
    name: "cadre_router_running_sequences",
    kind: MetricKind::Gauge,
    help: "Sequences that have been given to workers and have not ended.",
    labels: &[],
};
const QUEUE_WAIT: MetricSpec = MetricSpec {
    name: "cadre_router_queue_wait_seconds",
    kind: MetricKind::Histogram(LATENCY_BUCKETS),
    help: "Time from a prepared request to its turn.",
    labels: &[],
};
const TIME_TO_FIRST_TOKEN: MetricSpec = MetricSpec {
    name: "cadre_router_time_to_first_token_seconds",
    kind: MetricKind::Histogram(LATENCY_BUCKETS),
    help: "Time from a request's arrival to its first token, by front door.",
    labels: &[API],
};
const INTER_TOKEN: MetricSpec = MetricSpec {
    name: "cadre_router_inter_token_seconds",
    kind: MetricKind::Histogram(LATENCY_BUCKETS),
    help: "Time between consecutive tokens of a sequence.",
    labels: &[],
};
const REQUEST_SECONDS: MetricSpec = MetricSpec {
    name: "cadre_router_sequence_seconds",
    kind: MetricKind::Histogram(LATENCY_BUCKETS),
    help: "Time from a request's arrival to the end of each of its sequences.",
    labels: &[],
};
const PROMPT_TOKENS: MetricSpec = MetricSpec {
    name: "cadre_router_prompt_tokens_total",
    kind: MetricKind::Counter,
    help: "Prompt tokens of sequences given to workers.",
    labels: &[],
};
const PROMPT_LENGTH: MetricSpec = MetricSpec {
    name: "cadre_router_prompt_length_tokens",
    kind: MetricKind::Histogram(COUNT_BUCKETS),
    help: "Tokens per prompt.",
    labels: &[],
};
const GENERATED_TOKENS: MetricSpec = MetricSpec {
    name: "cadre_router_generated_tokens_total",
    kind: MetricKind::Counter,
    help: "Tokens received from decode workers.",
    labels: &[],
};
const RESERVE_RETRIES: MetricSpec = MetricSpec {
    name: "cadre_router_reserve_retries_total",
    kind: MetricKind::Counter,
    help: "Requests moved to another decode worker before pages were reserved.",
    labels: &[],
};
const MEMBERS: MetricSpec = MetricSpec {
    name: "cadre_router_members",
    kind: MetricKind::Gauge,
    help: "Registered members by role and state.",
    labels: &[
        Label::OneOf("role", &["prefill", "decode", "both", "expert"]),
        Label::OneOf("state", &["starting", "ready", "draining"]),
    ],
};
const MEMBERS_LOST: MetricSpec = MetricSpec {
    name: "cadre_router_members_lost_total",
    kind: MetricKind::Counter,
    help: "Members removed, by cause.",
    labels: &[Label::OneOf("cause", &["lease", "closed", "replaced", "refused", "pod_gone", "stranger"])],
};
const MEMBERS_REFUSED: MetricSpec = MetricSpec {
    name: "cadre_router_members_refused_total",
    kind: MetricKind::Counter,
    help: "Registrations and reports refused, by reason; generation is another checkpoint or numerics class.",
    labels: &[Label::OneOf(
        "reason",
        &["generation", "shard", "pod_gone", "stranger", "full", "digest", "malformed", "gone"],
    )],
};
const FAILED_PROOFS: MetricSpec = MetricSpec {
    name: "cadre_router_failed_proofs",
    kind: MetricKind::Gauge,
    help: "Members that say they are ready and failed the step that the coordinator asked of them; no work goes to them.",
    labels: &[],
};
const IGNORED_FIELDS: MetricSpec = MetricSpec {
    name: "cadre_router_ignored_fields_total",
    kind: MetricKind::Counter,
    help: "Fields of HTTP requests that are not known here and were ignored; the log names each once.",
    labels: &[],
};
const OLDEST_EPOCH: MetricSpec = MetricSpec {
    name: "cadre_router_oldest_epoch",
    kind: MetricKind::Gauge,
    help: "Oldest placement epoch that shards still answer; below the one in force during a change.",
    labels: &[],
};
const LAYOUT_CHANGES: MetricSpec = MetricSpec {
    name: "cadre_router_layout_changes_total",
    kind: MetricKind::Counter,
    help: "Steps of changes of layout: planned, in force, given up for a newer one, settled (old one dropped).",
    labels: &[Label::OneOf("step", &["planned", "in_force", "given_up", "settled"])],
};
const NEXT_SHARDS: MetricSpec = MetricSpec {
    name: "cadre_router_next_shards",
    kind: MetricKind::Gauge,
    help: "Shards of the placement on its way: all, and those that have prepared it; 0 if none is.",
    labels: &[Label::OneOf("state", &["all", "prepared"])],
};
const UNCOVERED: MetricSpec = MetricSpec {
    name: "cadre_router_uncovered_experts",
    kind: MetricKind::Gauge,
    help: "(layer, expert) pairs without a routable copy.",
    labels: &[],
};
const AT_RISK: MetricSpec = MetricSpec {
    name: "cadre_router_at_risk_experts",
    kind: MetricKind::Gauge,
    help: "(layer, expert) pairs with fewer routable copies than the layout asks for, or all in one domain.",
    labels: &[],
};
const OPERATOR_VIEW_AGE: MetricSpec = MetricSpec {
    name: "cadre_router_operator_view_age_seconds",
    kind: MetricKind::Gauge,
    help: "Time since the operator's last view, to 5 s; -1 before the first. It grows while nothing changes.",
    labels: &[],
};
const EPOCH: MetricSpec = MetricSpec {
    name: "cadre_router_placement_epoch",
    kind: MetricKind::Gauge,
    help: "Epoch of the placement in force.",
    labels: &[],
};
const IMBALANCE: MetricSpec = MetricSpec {
    name: "cadre_router_expert_imbalance_ratio",
    kind: MetricKind::Gauge,
    help: "Largest over mean tokens per shard in the load window, copies sharing evenly; 1 is perfect.",
    labels: &[Label::Bounded("layer", "expert layers of the model")],
};

/// Every metric of the router, for registration and docs/metrics.md.
pub const CATALOG: &[MetricSpec] = &[
    REQUESTS,
    WAITING,
    RUNNING,
    QUEUE_WAIT,
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN,
    REQUEST_SECONDS,
    PROMPT_TOKENS,
    PROMPT_LENGTH,
    GENERATED_TOKENS,
    RESERVE_RETRIES,
    MEMBERS,
    MEMBERS_LOST,
    MEMBERS_REFUSED,
    EPOCH,
    OLDEST_EPOCH,
    LAYOUT_CHANGES,
    NEXT_SHARDS,
    UNCOVERED,
    AT_RISK,
    FAILED_PROOFS,
    IGNORED_FIELDS,
    OPERATOR_VIEW_AGE,
    IMBALANCE,
];

/// The front door that a request came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// gRPC, whole.
    GrpcGenerate,
    /// gRPC, streamed.
    GrpcStream,
    /// `/v1/completions`.
    HttpCompletions,
    /// `/v1/chat/completions`.
    HttpChat,
}

impl Api {
    /// The label.
    pub fn label(self) -> &'static str {
        match self {
            Self::GrpcGenerate => "grpc_generate",
            Self::GrpcStream => "grpc_stream",
            Self::HttpCompletions => "http_completions",
            Self::HttpChat => "http_chat",
        }
    }
}

/// Handles of all metrics in [`CATALOG`].
#[derive(Clone, Debug)]
pub struct RouterMetrics {
    requests: CounterFamily,
    pub(crate) waiting: Gauge,
    pub(crate) running: Gauge,
    queue_wait: Histogram,
    time_to_first_token: HistogramFamily,
    inter_token: Histogram,
    sequence: Histogram,
    prompt_tokens: Counter,
    prompt_length: Histogram,
    generated_tokens: Counter,
    pub(crate) reserve_retries: Counter,
    pub(crate) members: GaugeFamily,
    pub(crate) members_lost: CounterFamily,
    pub(crate) members_refused: CounterFamily,
    pub(crate) epoch: Gauge,
    pub(crate) oldest_epoch: Gauge,
    pub(crate) layout_changes: CounterFamily,
    pub(crate) next_shards: GaugeFamily,
    pub(crate) uncovered_experts: Gauge,
    pub(crate) at_risk_experts: Gauge,
    pub(crate) failed_proofs: Gauge,
    pub(crate) ignored_fields: Counter,
    pub(crate) operator_view_age: Gauge,
    pub(crate) imbalance: GaugeFamily,
}

impl RouterMetrics {
    /// Registers everything.
    pub fn register(metrics: &Metrics) -> Result<Self, MetricsError> {
        Ok(Self {
            requests: metrics.counters(&REQUESTS)?,
            waiting: metrics.gauge(&WAITING)?,
            running: metrics.gauge(&RUNNING)?,
            queue_wait: metrics.histogram(&QUEUE_WAIT)?,
            time_to_first_token: metrics.histograms(&TIME_TO_FIRST_TOKEN)?,
            inter_token: metrics.histogram(&INTER_TOKEN)?,
            sequence: metrics.histogram(&REQUEST_SECONDS)?,
            prompt_tokens: metrics.counter(&PROMPT_TOKENS)?,
            prompt_length: metrics.histogram(&PROMPT_LENGTH)?,
            generated_tokens: metrics.counter(&GENERATED_TOKENS)?,
            reserve_retries: metrics.counter(&RESERVE_RETRIES)?,
            members: metrics.gauges(&MEMBERS)?,
            members_lost: metrics.counters(&MEMBERS_LOST)?,
            members_refused: metrics.counters(&MEMBERS_REFUSED)?,
            epoch: metrics.gauge(&EPOCH)?,
            oldest_epoch: metrics.gauge(&OLDEST_EPOCH)?,
            layout_changes: metrics.counters(&LAYOUT_CHANGES)?,
            next_shards: metrics.gauges(&NEXT_SHARDS)?,
            uncovered_experts: metrics.gauge(&UNCOVERED)?,
            at_risk_experts: metrics.gauge(&AT_RISK)?,
            failed_proofs: metrics.gauge(&FAILED_PROOFS)?,
            ignored_fields: metrics.counter(&IGNORED_FIELDS)?,
            operator_view_age: metrics.gauge(&OPERATOR_VIEW_AGE)?,
            imbalance: metrics.gauges(&IMBALANCE)?,
        })
    }

    /// A request ended.
    pub fn ended(&self, api: Api, outcome: &'static str) {
        self.requests.with(&[api.label(), outcome]).inc();
    }

    /// A request waited so long for its turn.
    pub fn waited(&self, time: Duration) {
        self.queue_wait.observe(time.as_secs_f64());
    }

    /// A sequence was given to workers.
    pub fn dispatched(&self, prompt_tokens: usize) {
        self.prompt_tokens.inc_by(prompt_tokens as u64);
        self.prompt_length.observe(prompt_tokens as f64);
    }

    /// The first token of a sequence arrived.
    pub fn first_token(&self, api: Api, since_arrival: Duration) {
        self.generated_tokens.inc();
        self.time_to_first_token.with(&[api.label()]).observe(since_arrival.as_secs_f64());
    }

    /// A later token arrived.
    pub fn next_token(&self, since_last: Duration) {
        self.generated_tokens.inc();
        self.inter_token.observe(since_last.as_secs_f64());
    }

    /// A sequence ended.
    pub fn sequence_ended(&self, since_arrival: Duration) {
        self.sequence.observe(since_arrival.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn every_metric_of_the_catalog_is_registered_and_nothing_else() {
        let metrics = Metrics::new();
        let handles = RouterMetrics::register(&metrics).unwrap();
        handles.imbalance.with(&["1"]).set(1.0);
        let text = metrics.encode().unwrap();
        let exposed: std::collections::BTreeSet<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE cadre_"))
            .filter_map(|line| line.split(' ').next())
            .collect();
        let declared = CATALOG.iter().map(|spec| spec.name.strip_prefix("cadre_").unwrap()).collect();
        assert_eq!(exposed, declared);
    }
}
