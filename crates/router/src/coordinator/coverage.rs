//! How well experts are covered: a pure count over a placement and the shards that are routable.

use std::collections::BTreeMap;

use cadre_types::{Coverage, CoverageExample, LogicalExpert, Placement, placement::Replica};

/// Experts named at most.
pub(super) const EXAMPLES: usize = 8;

/// The routable shards by index, each with its failure domain where it is known.
pub(super) type Routable<'a> = BTreeMap<u16, Option<&'a str>>;

/// Counts uncovered experts and those at risk.
pub(super) fn coverage(placement: &Placement, min_copies: u16, routable: &Routable<'_>) -> Coverage {
    let mut coverage = Coverage::default();
    let mut at_risk = Vec::new();
    for layer in placement.layers() {
        for expert in (0..placement.num_experts()).map_while(|id| u16::try_from(id).ok()).map(LogicalExpert) {
            coverage.experts += 1;
            let (copies, reason) =
                judge(placement.replicas(layer.layer, expert), usize::from(min_copies), routable);
            let Some(reason) = reason else { continue };
            let example = CoverageExample { layer: layer.layer, expert, copies: copies as u32, reason };
            if copies == 0 {
                coverage.uncovered += 1;
                if coverage.examples.len() < EXAMPLES {
                    coverage.examples.push(example);
                }
            } else {
                coverage.at_risk += 1;
                if at_risk.len() < EXAMPLES {
                    at_risk.push(example);
                }
            }
        }
    }
    at_risk.truncate(EXAMPLES - coverage.examples.len());
    coverage.examples.extend(at_risk);
    coverage
}

/// Routable copies of an expert, and what is wrong with them.
fn judge(replicas: &[Replica], min_copies: usize, routable: &Routable<'_>) -> (usize, Option<String>) {
    let domains: Vec<Option<&str>> =
        replicas.iter().filter_map(|copy| routable.get(&copy.shard.0)).copied().collect();
    let copies = domains.len();
    let reason = if copies == 0 {
        Some("no routable copy".to_owned())
    } else if copies < min_copies {
        Some(format!("{copies} of {min_copies} copies"))
    } else if min_copies > 1 {
        domains[0]
            .filter(|first| domains.iter().all(|domain| *domain == Some(*first)))
            .map(|domain| format!("all copies in {domain}"))
    } else {
        None
    };
    (copies, reason)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use cadre_types::{LayerId, LayerPlacement, PlacementEpoch};

    use super::*;

    /// Expert 0 on shards 0 and 1, expert 1 on 0 and 2, expert 2 on 1 and 2.
    fn placement(layers: u16) -> Placement {
        let slots = [[0, 1], [2, 0], [1, 2]].map(|on| on.map(LogicalExpert).to_vec()).to_vec();
        let layer = |layer| LayerPlacement { layer: LayerId(layer), slots: slots.clone() };
        Placement::new(PlacementEpoch(1), 3, (1..=layers).map(layer).collect()).unwrap()
    }

    fn reasons(coverage: &Coverage) -> Vec<(u16, u32, &str)> {
        coverage.examples.iter().map(|e| (e.expert.0, e.copies, e.reason.as_str())).collect()
    }

    #[test]
    fn everything_is_covered_by_copies_in_different_domains() {
        let routable = Routable::from([(0, Some("a")), (1, Some("b")), (2, None)]);
        let covered = coverage(&placement(2), 2, &routable);
        assert_eq!((covered.experts, covered.uncovered, covered.at_risk), (6, 0, 0));
        assert!(covered.examples.is_empty());
    }

    #[test]
    fn fewer_copies_than_asked_for_and_one_domain_for_all_are_risks() {
        let routable = Routable::from([(0, Some("a")), (1, Some("a"))]);
        let risky = coverage(&placement(1), 2, &routable);
        assert_eq!((risky.uncovered, risky.at_risk), (0, 3));
        assert_eq!(
            reasons(&risky),
            [(0, 2, "all copies in a"), (1, 1, "1 of 2 copies"), (2, 1, "1 of 2 copies")]
        );
        let one_is_enough = coverage(&placement(1), 1, &routable);
        assert_eq!((one_is_enough.uncovered, one_is_enough.at_risk), (0, 0));
    }

    #[test]
    fn the_uncovered_are_named_first_and_the_list_is_bounded() {
        let lost = coverage(&placement(9), 2, &Routable::from([(0, None)]));
        assert_eq!((lost.experts, lost.uncovered, lost.at_risk), (27, 9, 18));
        assert_eq!(lost.examples.len(), EXAMPLES);
        assert!(lost.examples.iter().all(|e| e.expert.0 == 2 && e.reason == "no routable copy"));
        let few = coverage(&placement(2), 2, &Routable::from([(0, None)]));
        assert_eq!(few.examples.len(), 6);
        assert_eq!(few.examples[2].reason, "1 of 2 copies");
        assert_eq!(coverage(&placement(1), 1, &Routable::new()).uncovered, 3);
    }
}
