//! Metrics of a process, read once.

use std::collections::BTreeMap;

/// Text in Prometheus' format.
#[derive(Clone, Debug)]
pub struct Metrics(String);

impl Metrics {
    /// What a `/metrics` said.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// Every series of a metric: its labels as written, and its value.
    pub fn series<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
        self.0.lines().filter_map(move |line| {
            let rest = line.strip_prefix(name)?;
            let (labels, value) = rest.rsplit_once(' ')?;
            let value = value.parse().ok()?;
            (labels.is_empty() || labels.starts_with('{')).then_some((labels, value))
        })
    }

    /// Sum over the series whose labels contain all of `labels` (`state="running"`); 0 if there is none, because a
    /// family has no series before its first event.
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let fits = |written: &str| labels.iter().all(|label| written.contains(label));
        self.series(name).filter(|(written, _)| fits(written)).map(|(_, value)| value).sum()
    }

    /// Requests of the operator that write something, by labels; the lease is renewed whatever happens.
    pub fn operator_writes(&self) -> BTreeMap<String, f64> {
        let writes = ["create", "apply", "patch", "update", "delete"].map(|verb| format!("verb=\"{verb}\""));
        self.series("cadre_operator_api_requests_total")
            .filter(|(labels, _)| writes.iter().any(|verb| labels.contains(verb)))
            .filter(|(labels, _)| !labels.contains("kind=\"leases\""))
            .map(|(labels, value)| (labels.to_owned(), value))
            .collect()
    }

    /// Writes of the operator since `before`, by labels; empty if there were none.
    pub fn operator_writes_since(&self, before: &Self) -> BTreeMap<String, f64> {
        let earlier = before.operator_writes();
        let since = |(labels, value): (String, f64)| {
            let more = value - earlier.get(&labels).copied().unwrap_or_default();
            (more != 0.0).then_some((labels, more))
        };
        self.operator_writes().into_iter().filter_map(since).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> Metrics {
        Metrics::new(
            "# TYPE cadre_a_total counter\n\
             cadre_a_total{shard=\"0\",kind=\"x\"} 3\ncadre_a_total{shard=\"1\",kind=\"x\"} 4\n\
             cadre_a_total_more{shard=\"0\"} 100\ncadre_b 2.5\n\
             cadre_operator_api_requests_total{verb=\"patch\",kind=\"pods\",code=\"200\"} 5\n\
             cadre_operator_api_requests_total{verb=\"update\",kind=\"leases\",code=\"200\"} 50\n\
             cadre_operator_api_requests_total{verb=\"watch\",kind=\"pods\",code=\"200\"} 500\n"
                .into(),
        )
    }

    #[test]
    fn sums_the_series_that_fit() {
        assert_eq!(metrics().sum("cadre_a_total", &[]), 7.0);
        assert_eq!(metrics().sum("cadre_a_total", &["shard=\"1\"", "kind=\"x\""]), 4.0);
        assert_eq!(metrics().sum("cadre_b", &[]), 2.5);
        assert_eq!(metrics().sum("cadre_c", &[]), 0.0);
    }

    #[test]
    fn a_lease_is_no_write() {
        let writes = metrics().operator_writes();
        assert_eq!(writes.values().sum::<f64>(), 5.0, "{writes:?}");
        assert!(metrics().operator_writes_since(&metrics()).is_empty());
        assert_eq!(metrics().operator_writes_since(&Metrics::new(String::new())), writes);
    }
}
