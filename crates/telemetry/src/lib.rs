//! Logs, metrics and the admin server that every role shares.
//!
//! Owns: the one logging set-up of a process ([`logging`]), a Prometheus registry whose metrics are
//! declared in tables ([`metrics`]), the named conditions of readiness ([`readiness`]) and the admin
//! HTTP server over them ([`admin`]). Refuses to know what any role does, and reads no environment:
//! `main` passes the log filter in.
//!
//! Read [`metrics::MetricSpec`] first.

pub mod admin;
pub mod logging;
pub mod metrics;
pub mod readiness;

pub use logging::{LogFormat, init_logging, one_line};
pub use metrics::{
    Counter, CounterFamily, Family, Gauge, GaugeFamily, Histogram, HistogramFamily, Label, MetricKind,
    MetricSpec, Metrics, MetricsError,
};
pub use readiness::Readiness;

// Handles that roles put into their signatures, re-exported so that they need no second version.
pub use axum;
