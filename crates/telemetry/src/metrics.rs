//! Metrics declared in tables. Every metric of a role is one [`MetricSpec`] constant in that role's
//! `metrics` module; registration goes through the specification, and docs/metrics.md is generated
//! from the same constants, so the page cannot drift from the code.
//!
//! Invariants: names begin with `cadre_` and end in a unit or `_total`; label values come from closed
//! sets ([`Label::OneOf`]) or from a number the cluster's layout bounds ([`Label::Bounded`]). A value
//! outside its closed set is counted under `other`, never as a new series. Families whose labels are
//! all closed exist from the start with every combination at zero, so a rate over them has no gap.

use std::{collections::BTreeSet, sync::Arc};

use prometheus::{HistogramOpts, Opts, Registry, TextEncoder, core::Collector};

/// A count that only grows. Cheap to clone.
pub type Counter = prometheus::IntCounter;
/// A value that moves both ways. Cheap to clone.
pub type Gauge = prometheus::Gauge;
/// A distribution over fixed buckets. Cheap to clone.
pub type Histogram = prometheus::Histogram;

/// Every name begins so.
pub const PREFIX: &str = "cadre_";

/// The series of values outside a closed set.
const OTHER: &str = "other";

/// Buckets for latencies from 100 µs to 100 s, in seconds.
pub const LATENCY_BUCKETS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    25.0, 50.0, 100.0,
];

/// Buckets for counts of tokens or rows, powers of two to 128 Ki.
pub const COUNT_BUCKETS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
    32768.0, 65536.0, 131072.0,
];

/// Buckets for sizes in bytes, 256 B to 256 MiB by fours.
pub const BYTES_BUCKETS: &[f64] = &[
    256.0,
    1024.0,
    4096.0,
    16384.0,
    65536.0,
    262144.0,
    1048576.0,
    4194304.0,
    16777216.0,
    67108864.0,
    268435456.0,
];

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MetricKind {
    /// Only grows; its name ends in `_total`.
    Counter,
    /// Moves both ways.
    Gauge,
    /// A distribution over these upper bounds.
    Histogram(&'static [f64]),
}

impl MetricKind {
    /// The name in the exposition format and in docs/metrics.md.
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// One label of a metric and where its values come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Label {
    /// One of these values.
    OneOf(&'static str, &'static [&'static str]),
    /// A number bounded by the layout; the second word says by what (`layers of the model`).
    Bounded(&'static str, &'static str),
}

impl Label {
    /// The label's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneOf(name, _) | Self::Bounded(name, _) => name,
        }
    }

    /// Its values in words, for docs/metrics.md.
    pub fn values(self) -> String {
        match self {
            Self::OneOf(_, values) => values.join(", "),
            Self::Bounded(_, by) => by.to_owned(),
        }
    }

    fn admit(self, value: &str) -> &str {
        match self {
            Self::OneOf(_, values) if !values.contains(&value) => {
                debug_assert!(false, "label {}: {value:?} is not one of {values:?}", self.name());
                OTHER
            }
            _ => value,
        }
    }
}

/// The declaration of one metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MetricSpec {
    /// Full name with prefix and unit.
    pub name: &'static str,
    /// What it is.
    pub kind: MetricKind,
    /// One sentence for the exposition and the docs.
    pub help: &'static str,
    /// Its labels, in the order in which [`Family::with`] takes values.
    pub labels: &'static [Label],
}

/// Why a metric could not be registered: a mistake in a table, found at start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetricsError {
    /// The name lacks the prefix.
    #[error("metric {name}: the name must begin with {PREFIX}")]
    Prefix {
        /// The metric.
        name: &'static str,
    },
    /// Registered as another kind, or with or without labels against its table.
    #[error("metric {name}: the table says {declared}, the code registers {wanted}")]
    Kind {
        /// The metric.
        name: &'static str,
        /// By the table.
        declared: String,
        /// By the call.
        wanted: &'static str,
    },
    /// The registry refused it (registered twice, or an invalid name).
    #[error("metric {name}: {problem}")]
    Registry {
        /// The metric.
        name: &'static str,
        /// The registry's words.
        problem: String,
    },
}

/// A metric with labels.
#[derive(Clone)]
pub struct Family<V> {
    vec: V,
    labels: &'static [Label],
}

impl<V> std::fmt::Debug for Family<V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Family").field("labels", &self.labels).finish_non_exhaustive()
    }
}

/// Counters by label.
pub type CounterFamily = Family<prometheus::IntCounterVec>;
/// Gauges by label.
pub type GaugeFamily = Family<prometheus::GaugeVec>;
/// Histograms by label.
pub type HistogramFamily = Family<prometheus::HistogramVec>;

/// A set of series told apart by labels.
pub trait Series: Collector + Clone + 'static {
    /// One of the series.
    type Handle;
    /// The series of these values, made if new. As many values as the family has labels.
    fn series(&self, values: &[&str]) -> Self::Handle;
    /// Drops all.
    fn clear(&self);
}

macro_rules! series {
    ($vec:ty, $handle:ty) => {
        impl Series for $vec {
            type Handle = $handle;

            fn series(&self, values: &[&str]) -> $handle {
                self.with_label_values(values)
            }

            fn clear(&self) {
                self.reset();
            }
        }
    };
}
series!(prometheus::IntCounterVec, Counter);
series!(prometheus::GaugeVec, Gauge);
series!(prometheus::HistogramVec, Histogram);

impl<V: Series> Family<V> {
    /// The series of these label values, in the order of the table. Missing values count as `other`,
    /// surplus ones are ignored (both fail in debug builds). Look it up once and keep the handle where
    /// the path is hot.
    pub fn with(&self, values: &[&str]) -> V::Handle {
        debug_assert_eq!(values.len(), self.labels.len(), "labels {:?}", self.labels);
        let admitted: Vec<&str> = self
            .labels
            .iter()
            .enumerate()
            .map(|(at, label)| values.get(at).map_or(OTHER, |value| label.admit(value)))
            .collect();
        self.vec.series(&admitted)
    }

    /// Drops every series, for families that are rebuilt whole (imbalance by layer).
    pub fn reset(&self) {
        self.vec.clear();
    }

    fn touch_closed(&self) {
        let mut rows: Vec<Vec<&str>> = vec![Vec::new()];
        for label in self.labels {
            let Label::OneOf(_, values) = label else { return };
            rows = rows
                .iter()
                .flat_map(|row| values.iter().map(|value| [row.as_slice(), &[*value]].concat()))
                .collect();
        }
        for row in rows {
            self.vec.series(&row);
        }
    }
}

/// The registry of one process. Clones share it.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
}

impl Metrics {
    /// A registry with the collector of this process (`process_cpu_seconds_total`,
    /// `process_resident_memory_bytes`, open files; Linux).
    pub fn new() -> Self {
        let registry = Registry::new();
        #[cfg(target_os = "linux")]
        {
            let process = prometheus::process_collector::ProcessCollector::for_self();
            // A fresh registry holds nothing that it could collide with.
            let _ = registry.register(Box::new(process));
        }
        Self { registry: Arc::new(registry) }
    }

    /// Registers a counter without labels.
    pub fn counter(&self, spec: &MetricSpec) -> Result<Counter, MetricsError> {
        expect_kind(spec, "counter", false)?;
        let counter = Counter::with_opts(opts(spec)).map_err(|error| refused(spec, &error))?;
        self.register(spec, counter)
    }

    /// Registers counters by label.
    pub fn counters(&self, spec: &MetricSpec) -> Result<CounterFamily, MetricsError> {
        expect_kind(spec, "counter", true)?;
        let vec = prometheus::IntCounterVec::new(opts(spec), &label_names(spec))
            .map_err(|error| refused(spec, &error))?;
        self.family(spec, vec)
    }

    /// Registers a gauge without labels.
    pub fn gauge(&self, spec: &MetricSpec) -> Result<Gauge, MetricsError> {
        expect_kind(spec, "gauge", false)?;
        let gauge = Gauge::with_opts(opts(spec)).map_err(|error| refused(spec, &error))?;
        self.register(spec, gauge)
    }

    /// Registers gauges by label.
    pub fn gauges(&self, spec: &MetricSpec) -> Result<GaugeFamily, MetricsError> {
        expect_kind(spec, "gauge", true)?;
        let vec = prometheus::GaugeVec::new(opts(spec), &label_names(spec))
            .map_err(|error| refused(spec, &error))?;
        self.family(spec, vec)
    }

    /// Registers a histogram without labels.
    pub fn histogram(&self, spec: &MetricSpec) -> Result<Histogram, MetricsError> {
        expect_kind(spec, "histogram", false)?;
        let histogram = Histogram::with_opts(histogram_opts(spec)).map_err(|error| refused(spec, &error))?;
        self.register(spec, histogram)
    }

    /// Registers histograms by label.
    pub fn histograms(&self, spec: &MetricSpec) -> Result<HistogramFamily, MetricsError> {
        expect_kind(spec, "histogram", true)?;
        let vec = prometheus::HistogramVec::new(histogram_opts(spec), &label_names(spec))
            .map_err(|error| refused(spec, &error))?;
        self.family(spec, vec)
    }

    /// Registers a metric that is counted elsewhere and read at every scrape.
    pub fn collector(&self, spec: &MetricSpec, collector: Box<dyn Collector>) -> Result<(), MetricsError> {
        expect_kind(spec, spec.kind.name(), !spec.labels.is_empty())?;
        self.registry.register(collector).map_err(|error| refused(spec, &error))
    }

    /// Everything in the text exposition format, version 0.0.4.
    pub fn encode(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// Content type of [`Self::encode`].
    pub const CONTENT_TYPE: &'static str = prometheus::TEXT_FORMAT;

    fn register<C: Collector + Clone + 'static>(
        &self,
        spec: &MetricSpec,
        collector: C,
    ) -> Result<C, MetricsError> {
        self.registry.register(Box::new(collector.clone())).map_err(|error| refused(spec, &error))?;
        Ok(collector)
    }

    fn family<V: Series>(&self, spec: &MetricSpec, vec: V) -> Result<Family<V>, MetricsError> {
        let family = Family { vec: self.register(spec, vec)?, labels: spec.labels };
        family.touch_closed();
        Ok(family)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// The table of a catalog in Markdown, for docs/metrics.md: rows sorted by name, one per metric.
pub fn markdown_table(catalog: &[MetricSpec]) -> String {
    let rows: BTreeSet<String> = catalog
        .iter()
        .map(|spec| {
            let labels: Vec<String> =
                spec.labels.iter().map(|label| format!("`{}` ({})", label.name(), label.values())).collect();
            format!("| `{}` | {} | {} | {} |", spec.name, spec.kind.name(), labels.join("; "), spec.help)
        })
        .collect();
    let mut table = String::from("| metric | kind | labels | meaning |\n| --- | --- | --- | --- |\n");
    for row in rows {
        table.push_str(&row);
        table.push('\n');
    }
    table
}

fn expect_kind(spec: &MetricSpec, kind: &'static str, labelled: bool) -> Result<(), MetricsError> {
    if !spec.name.starts_with(PREFIX) {
        return Err(MetricsError::Prefix { name: spec.name });
    }
    if spec.kind.name() != kind || spec.labels.is_empty() == labelled {
        let declared = format!("{} with {} labels", spec.kind.name(), spec.labels.len());
        return Err(MetricsError::Kind { name: spec.name, declared, wanted: kind });
    }
    Ok(())
}

fn label_names(spec: &MetricSpec) -> Vec<&'static str> {
    spec.labels.iter().map(|label| label.name()).collect()
}

fn opts(spec: &MetricSpec) -> Opts {
    Opts::new(spec.name, spec.help)
}

fn histogram_opts(spec: &MetricSpec) -> HistogramOpts {
    let MetricKind::Histogram(buckets) = spec.kind else {
        return HistogramOpts::new(spec.name, spec.help);
    };
    HistogramOpts::new(spec.name, spec.help).buckets(buckets.to_vec())
}

fn refused(spec: &MetricSpec, error: &prometheus::Error) -> MetricsError {
    MetricsError::Registry { name: spec.name, problem: error.to_string() }
}

#[cfg(test)]
mod tests;
