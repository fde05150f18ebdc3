#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

const REQUESTS: MetricSpec = MetricSpec {
    name: "cadre_test_requests_total",
    kind: MetricKind::Counter,
    help: "Requests.",
    labels: &[Label::OneOf("api", &["grpc", "http"]), Label::OneOf("outcome", &["ok", "error"])],
};
const WAIT: MetricSpec = MetricSpec {
    name: "cadre_test_wait_seconds",
    kind: MetricKind::Histogram(&[0.1, 1.0]),
    help: "Wait.",
    labels: &[],
};
const IMBALANCE: MetricSpec = MetricSpec {
    name: "cadre_test_imbalance_ratio",
    kind: MetricKind::Gauge,
    help: "Max over mean.",
    labels: &[Label::Bounded("layer", "layers of the model")],
};

#[test]
fn closed_families_start_with_every_combination_at_zero() {
    let metrics = Metrics::new();
    let requests = metrics.counters(&REQUESTS).unwrap();
    requests.with(&["http", "error"]).inc_by(2);
    let text = metrics.encode().unwrap();
    for (line, value) in [
        ("api=\"grpc\",outcome=\"ok\"", 0),
        ("api=\"grpc\",outcome=\"error\"", 0),
        ("api=\"http\",outcome=\"ok\"", 0),
        ("api=\"http\",outcome=\"error\"", 2),
    ] {
        let expected = format!("cadre_test_requests_total{{{line}}} {value}\n");
        assert!(text.contains(&expected), "{expected} not in\n{text}");
    }
}

#[test]
fn bounded_families_start_empty_and_reset_drops_series() {
    let metrics = Metrics::new();
    let imbalance = metrics.gauges(&IMBALANCE).unwrap();
    assert!(!metrics.encode().unwrap().contains("imbalance_ratio{"));
    imbalance.with(&["3"]).set(1.5);
    assert!(metrics.encode().unwrap().contains("cadre_test_imbalance_ratio{layer=\"3\"} 1.5\n"));
    imbalance.reset();
    assert!(!metrics.encode().unwrap().contains("imbalance_ratio{"));
}

#[test]
fn a_histogram_has_the_declared_buckets_and_the_process_reports_itself() {
    let metrics = Metrics::new();
    metrics.histogram(&WAIT).unwrap().observe(0.5);
    let text = metrics.encode().unwrap();
    assert!(text.contains("cadre_test_wait_seconds_bucket{le=\"0.1\"} 0\n"), "{text}");
    assert!(text.contains("cadre_test_wait_seconds_bucket{le=\"1\"} 1\n"), "{text}");
    #[cfg(target_os = "linux")]
    assert!(text.contains("\nprocess_resident_memory_bytes "), "{text}");
}

#[test]
#[cfg_attr(debug_assertions, should_panic(expected = "not one of"))]
fn a_value_outside_the_closed_set_never_makes_a_new_series() {
    let metrics = Metrics::new();
    metrics.counters(&REQUESTS).unwrap().with(&["smtp", "ok"]).inc();
    let text = metrics.encode().unwrap();
    assert!(text.contains("api=\"other\"") && !text.contains("smtp"), "{text}");
}

#[test]
fn mistakes_in_a_table_are_found_at_registration() {
    let metrics = Metrics::new();
    assert!(matches!(metrics.counter(&REQUESTS), Err(MetricsError::Kind { .. })));
    assert!(matches!(metrics.gauge(&WAIT), Err(MetricsError::Kind { .. })));
    assert!(matches!(metrics.histograms(&WAIT), Err(MetricsError::Kind { .. })));
    let unprefixed = MetricSpec { name: "test_total", ..REQUESTS };
    assert!(matches!(metrics.counters(&unprefixed), Err(MetricsError::Prefix { .. })));
    metrics.histogram(&WAIT).unwrap();
    assert!(matches!(metrics.histogram(&WAIT), Err(MetricsError::Registry { .. })));
}

#[test]
fn the_table_lists_every_metric_by_name() {
    let table = markdown_table(&[WAIT, REQUESTS]);
    let rows: Vec<&str> = table.lines().skip(2).collect();
    assert_eq!(
        rows,
        [
            "| `cadre_test_requests_total` | counter | `api` (grpc, http); `outcome` (ok, error) | Requests. |",
            "| `cadre_test_wait_seconds` | histogram |  | Wait. |",
        ]
    );
}
