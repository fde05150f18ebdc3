//! `ExpertsCovered`: the coordinator's count of routable copies, in words.

use cadre_k8s_api::Reason;
use cadre_types::{Coverage, CoverageExample};

use super::{Judged, Verdict};

/// Experts named in a message.
const NAMED: usize = 3;

impl Judged<'_, '_> {
    pub(super) fn covered(&self) -> Verdict {
        let unknown = |message: String| Verdict::new("Unknown", Reason::CoverageUnknown, message);
        let Some(word) = self.facts.word() else {
            let why = self.facts.unreachable().unwrap_or_default();
            return unknown(format!("the coordinator has not said: {why}"));
        };
        if word.generation.epoch.0 == 0 {
            return unknown("no placement is in force yet".to_owned());
        }
        let coverage = &word.coverage;
        if coverage.uncovered > 0 {
            return Verdict::new("False", Reason::ExpertUncovered, uncovered(coverage));
        }
        if coverage.at_risk > 0 {
            let message = named(coverage, coverage.at_risk, |example| example.copies > 0);
            return Verdict::new("False", Reason::ExpertAtRisk, message);
        }
        let copies = match word.layout.min_copies {
            1 => "a routable copy".to_owned(),
            copies => format!("{copies} routable copies in more than one failure domain"),
        };
        let message = format!("all {} experts of all layers have {copies}", coverage.experts);
        Verdict::new("True", Reason::AsSpecified, message)
    }
}

/// The uncovered ones.
pub(super) fn uncovered(coverage: &Coverage) -> String {
    named(coverage, coverage.uncovered, |example| example.copies == 0)
}

fn named(coverage: &Coverage, count: u64, matches: impl Fn(&CoverageExample) -> bool) -> String {
    let examples: Vec<String> = coverage
        .examples
        .iter()
        .filter(|example| matches(example))
        .take(NAMED)
        .map(|example| {
            format!("expert {} of layer {}: {}", example.expert.0, example.layer.0, example.reason)
        })
        .collect();
    let more = count.saturating_sub(examples.len() as u64);
    match (examples.is_empty(), more) {
        (true, _) => format!("{count} of {} experts", coverage.experts),
        (false, 0) => examples.join("; "),
        (false, more) => format!("{}; and {more} more of {}", examples.join("; "), coverage.experts),
    }
}
