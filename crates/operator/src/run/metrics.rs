//! The operator's metrics: one table, one struct of handles.

use cadre_telemetry::{
    Counter, CounterFamily, Gauge, Histogram, Label, MetricKind, MetricSpec, Metrics, MetricsError,
    metrics::LATENCY_BUCKETS,
};

const KIND: Label =
    Label::Bounded("kind", "kinds that the operator watches or writes (`pods`, `moemodels`…)");

const RECONCILES: MetricSpec = MetricSpec {
    name: "cadre_operator_reconciles_total",
    kind: MetricKind::Counter,
    help: "Reconciles of a model, by what came out: nothing to do, something written, the cache is behind our own \
           writes, a write met a newer object, the API server refused a child, the API server failed, took too long, \
           or the model is gone.",
    labels: &[Label::OneOf(
        "result",
        &["steady", "written", "behind", "stale", "refused", "failed", "timeout", "gone"],
    )],
};
const RECONCILE_SECONDS: MetricSpec = MetricSpec {
    name: "cadre_operator_reconcile_seconds",
    kind: MetricKind::Histogram(LATENCY_BUCKETS),
    help: "Time of one reconcile, planning and writes together.",
    labels: &[],
};
const API_REQUESTS: MetricSpec = MetricSpec {
    name: "cadre_operator_api_requests_total",
    kind: MetricKind::Counter,
    help: "Requests to the Kubernetes API, by verb, kind and status code (`none` without an answer).",
    labels: &[
        Label::Bounded("verb", "get, list, watch, create, apply, patch, update, delete"),
        KIND,
        Label::Bounded("code", "HTTP status codes of the API server"),
    ],
};
const WATCH_RESTARTS: MetricSpec = MetricSpec {
    name: "cadre_operator_watch_restarts_total",
    kind: MetricKind::Counter,
    help: "Watches that had to list everything again (410 Gone, or no resource version to go on from).",
    labels: &[KIND],
};
const WATCH_ERRORS: MetricSpec = MetricSpec {
    name: "cadre_operator_watch_errors_total",
    kind: MetricKind::Counter,
    help: "Errors of watches; each is followed by a back-off and another attempt.",
    labels: &[KIND],
};
const MODELS: MetricSpec = MetricSpec {
    name: "cadre_operator_models",
    kind: MetricKind::Gauge,
    help: "Models in the watched namespaces.",
    labels: &[],
};
const WAITING: MetricSpec = MetricSpec {
    name: "cadre_operator_due_models",
    kind: MetricKind::Gauge,
    help: "Models that are to be reconciled now or later and are not being reconciled.",
    labels: &[],
};
const STREAMS: MetricSpec = MetricSpec {
    name: "cadre_operator_coordinator_streams",
    kind: MetricKind::Gauge,
    help: "Coordinators that the operator is connected to.",
    labels: &[],
};
const LEADER: MetricSpec = MetricSpec {
    name: "cadre_operator_leader",
    kind: MetricKind::Gauge,
    help: "1 while this process reconciles, 0 while it stands by.",
    labels: &[],
};

/// Every metric of the operator, for registration and docs/metrics.md.
pub const CATALOG: &[MetricSpec] = &[
    RECONCILES,
    RECONCILE_SECONDS,
    API_REQUESTS,
    WATCH_RESTARTS,
    WATCH_ERRORS,
    MODELS,
    WAITING,
    STREAMS,
    LEADER,
];

/// Handles of all metrics in [`CATALOG`].
#[derive(Clone, Debug)]
pub(crate) struct OperatorMetrics {
    pub(crate) reconciles: CounterFamily,
    pub(crate) reconcile_seconds: Histogram,
    pub(crate) api_requests: CounterFamily,
    watch_restarts: CounterFamily,
    watch_errors: CounterFamily,
    pub(crate) models: Gauge,
    pub(crate) due: Gauge,
    pub(crate) streams: Gauge,
    pub(crate) leader: Gauge,
}

impl OperatorMetrics {
    /// Registers everything.
    pub(crate) fn register(metrics: &Metrics) -> Result<Self, MetricsError> {
        Ok(Self {
            reconciles: metrics.counters(&RECONCILES)?,
            reconcile_seconds: metrics.histogram(&RECONCILE_SECONDS)?,
            api_requests: metrics.counters(&API_REQUESTS)?,
            watch_restarts: metrics.counters(&WATCH_RESTARTS)?,
            watch_errors: metrics.counters(&WATCH_ERRORS)?,
            models: metrics.gauge(&MODELS)?,
            due: metrics.gauge(&WAITING)?,
            streams: metrics.gauge(&STREAMS)?,
            leader: metrics.gauge(&LEADER)?,
        })
    }

    /// Restarts of the watches of a kind.
    pub(crate) fn watch_restarts(&self, kind: &str) -> Counter {
        self.watch_restarts.with(&[kind])
    }

    /// Errors of the watches of a kind.
    pub(crate) fn watch_errors(&self, kind: &str) -> Counter {
        self.watch_errors.with(&[kind])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn every_metric_of_the_catalog_is_registered_and_nothing_else() {
        let metrics = Metrics::new();
        let handles = OperatorMetrics::register(&metrics).unwrap();
        handles.api_requests.with(&["get", "pods", "200"]).inc();
        handles.watch_restarts("pods").inc();
        handles.watch_errors("pods").inc();
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
