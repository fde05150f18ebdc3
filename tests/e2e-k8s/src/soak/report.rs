//! What `cadre soak --json` prints: `start`, a `progress` each second, `summary` last.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::figures::Figures;

#[derive(Debug, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Line {
    Start {},
    Progress(Progress),
    Summary(Summary),
}

/// The state after some time.
#[derive(Clone, Debug, Deserialize)]
pub struct Progress {
    /// Seconds from its start.
    pub at: f64,
    /// Answered rightly.
    pub ok: u64,
    /// Ended with an error.
    pub failed: u64,
    /// Answered with another text.
    pub different: u64,
}

/// The whole run.
#[derive(Clone, Debug, Deserialize)]
pub struct Summary {
    /// How long it was.
    pub seconds: f64,
    /// Answered rightly.
    pub ok: u64,
    /// Ended with an error.
    pub failed: u64,
    /// Answered with another text.
    pub different: u64,
    /// By gRPC code.
    pub failures: BTreeMap<String, Failures>,
    /// The first texts that differ.
    pub samples: Vec<serde_json::Value>,
    /// Longest time between two tokens of a stream.
    pub longest_gap: Longest,
    /// Longest time in which no stream had a token.
    pub longest_silence: Longest,
}

/// Failures of one code.
#[derive(Clone, Debug, Deserialize)]
pub struct Failures {
    /// How many.
    pub count: u64,
    /// Seconds from the start.
    pub first_at: f64,
    /// Seconds from the start.
    pub last_at: f64,
    /// Of the first.
    pub message: String,
}

/// The longest of some times.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Longest {
    /// How long.
    pub ms: f64,
}

/// A pod's log holds standard error as well: the words (`cadre: …`) with which the program ends if requests failed.
pub(super) fn parse(text: &str) -> Result<Vec<Line>, String> {
    let line = |line: &str| serde_json::from_str(line).map_err(|error| format!("{error} in {line:?}"));
    text.lines().filter(|line| !line.is_empty() && !line.starts_with("cadre: ")).map(line).collect()
}

impl Summary {
    /// Seconds between the first and the last failure.
    pub fn outage(&self) -> f64 {
        let first = self.failures.values().map(|failures| failures.first_at).reduce(f64::min);
        let last = self.failures.values().map(|failures| failures.last_at).reduce(f64::max);
        last.zip(first).map_or(0.0, |(last, first)| last - first)
    }

    /// Failures may be of these codes only, and at most so many.
    #[track_caller]
    pub fn assert_bounded(&self, codes: &[&str], most: u64) {
        let named = self.failures.keys().all(|code| codes.contains(&code.as_str()));
        assert!(named, "failures of other codes than {codes:?}: {self:#?}");
        assert!(self.failed <= most, "{} failed, {most} allowed: {self:#?}", self.failed);
    }

    /// Writes a row of the table of what requests noticed.
    pub fn record(&self, what: &str) {
        let codes = self.failures.iter().map(|(code, failures)| format!("{} {code}", failures.count));
        let codes = codes.collect::<Vec<_>>().join(", ");
        let columns = [
            "what happened",
            "answered",
            "failed",
            "of these",
            "other texts",
            "seconds of failures",
            "longest gap ms",
        ];
        Figures::new("requests", &columns).row(
            what,
            &[
                self.ok.to_string(),
                self.failed.to_string(),
                if codes.is_empty() { "-".into() } else { codes },
                self.different.to_string(),
                format!("{:.1}", self.outage()),
                format!("{:.0}", self.longest_gap.ms),
            ],
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As crates/cadre/src/soak prints them.
    const LINES: &str = r#"{"event":"start","grpc":"pocket-grpc:50051","concurrency":4,"prompts":3}
{"event":"progress","at":1.0,"ok":7,"failed":0,"different":0,"running":4,"tokens":300,"longest_gap_ms":3.5}
{"event":"summary","seconds":9.5,"ok":70,"failed":3,"different":0,"tokens":3000,"failures":{"Unavailable":{"count":2,"first_at":1.5,"last_at":2.0,"message":"decode"},"Unknown":{"count":1,"first_at":1.0,"last_at":1.0,"message":"h2"}},"samples":[],"longest_gap":{"ms":12.5,"at":1.0},"longest_silence":{"ms":700.0,"at":1.7},"ttft_ms":{"p50":10.0,"p99":20.0,"most":30.0},"longest_request_ms":900.0}
"#;

    #[test]
    fn reads_what_the_load_prints() {
        let lines = parse(LINES).expect("the format");
        let [Line::Start {}, Line::Progress(progress), Line::Summary(summary)] = &lines[..] else {
            panic!("{lines:?}")
        };
        assert_eq!((progress.ok, summary.ok, summary.failed), (7, 70, 3));
        assert!((summary.outage() - 1.0).abs() < 1e-9, "{}", summary.outage());
        summary.assert_bounded(&["Unavailable", "Unknown"], 3);
        assert!(parse("no JSON").is_err());
        let with_words = format!("{LINES}\ncadre: 2 failed (0 allowed) and 0 differed\n");
        assert_eq!(parse(&with_words).expect("the format").len(), parse(LINES).expect("the format").len());
    }

    #[test]
    #[should_panic(expected = "3 failed, 2 allowed")]
    fn more_failures_than_allowed_are_told() {
        let lines = parse(LINES).expect("the format");
        if let Some(Line::Summary(summary)) = lines.last() {
            summary.assert_bounded(&["Unavailable", "Unknown"], 2);
        }
    }
}
