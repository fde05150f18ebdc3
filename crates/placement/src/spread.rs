//! The copies of a placement moved apart, after its shards have moved to other failure domains.
//!
//! A placement is planned for the nodes on which its shards are. Kubernetes may put their successors elsewhere, and
//! then two copies of an expert can end up on one node. This makes the next placement with as few moves as it takes;
//! carrying it out is a change of placement like any other.

use cadre_types::{LayerPlacement, LogicalExpert, Placement, PlacementEpoch};

use crate::{
    load::ExpertLoad,
    pack::{Domains, crowded, respread},
    plan::{DomainIndex, PlanError, logical, reduced},
};

/// The placement with which more experts have their `min_copies` copies in different domains, or `None` if this one
/// is as good as any that is found. `domains` is the failure domain of each shard as in
/// [`plan_initial`](crate::plan_initial); the number of slots of every shard stays.
pub fn plan_spread(
    load: &ExpertLoad,
    placement: &Placement,
    min_copies: usize,
    domains: &[Option<DomainIndex>],
    epoch: PlacementEpoch,
) -> Result<Option<Placement>, PlanError> {
    let (shards, num_experts) = (placement.num_shards(), placement.num_experts());
    if load.num_experts() != num_experts {
        return Err(PlanError::ExpertCount { found: load.num_experts(), expected: num_experts });
    }
    if domains.len() != shards {
        return Err(PlanError::DomainCount { found: domains.len(), shards });
    }
    let domains = Domains::new(domains, shards);
    let (mut before, mut after) = (0, 0);
    let layers: Vec<LayerPlacement> = placement
        .layers()
        .iter()
        .map(|layer| {
            let held: Vec<Vec<usize>> = layer.slots.iter().map(|on| indices(on)).collect();
            let here = crowded(&held, num_experts, min_copies, &domains);
            let counted = load.layers().iter().find(|load| load.layer == layer.layer);
            // A layer that was not counted is as good as one of equal experts.
            let tokens = counted.map_or_else(|| vec![1; num_experts], |layer| reduced(&layer.tokens));
            let moved = if here > 0 { respread(&tokens, &held, min_copies, &domains) } else { held };
            before += here;
            after += crowded(&moved, num_experts, min_copies, &domains);
            LayerPlacement { layer: layer.layer, slots: moved.iter().map(|on| logical(on)).collect() }
        })
        .collect();
    if after >= before {
        return Ok(None);
    }
    Ok(Some(Placement::new(epoch, num_experts, layers)?))
}

fn indices(experts: &[LogicalExpert]) -> Vec<usize> {
    let mut indices: Vec<usize> = experts.iter().map(|expert| usize::from(expert.0)).collect();
    indices.sort_unstable();
    indices
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::collections::BTreeSet;

    use cadre_types::{LayerId, Layout};
    use proptest::prelude::*;

    use super::*;
    use crate::{load::LayerLoad, plan::plan_initial};

    fn load(experts: usize) -> ExpertLoad {
        let layer = |layer| LayerLoad { layer: LayerId(layer), tokens: (1..=experts as u64).collect() };
        ExpertLoad::new(vec![layer(1), layer(2)]).unwrap()
    }

    fn on(domains: &[u16]) -> Vec<Option<DomainIndex>> {
        domains.iter().map(|&domain| Some(DomainIndex(domain))).collect()
    }

    fn planned(experts: usize, layout: Layout, domains: &[Option<DomainIndex>]) -> Placement {
        plan_initial(&load(experts), experts, layout, domains, PlacementEpoch(1)).unwrap()
    }

    /// Experts of all layers whose copies are all in one domain.
    fn together(placement: &Placement, domains: &[u16]) -> usize {
        let layers = placement.layers().iter();
        let experts = layers.flat_map(|layer| {
            (0..placement.num_experts())
                .map(|expert| placement.replicas(layer.layer, LogicalExpert(expert as u16)))
        });
        let domains_of = |copies: &[cadre_types::placement::Replica]| {
            copies.iter().map(|copy| domains[copy.shard.index()]).collect::<BTreeSet<_>>().len()
        };
        experts.filter(|copies| domains_of(copies) < 2).count()
    }

    /// Slots that hold another expert than before.
    fn loaded(before: &Placement, after: &Placement) -> usize {
        let layers = before.layers().iter().zip(after.layers());
        let shards = layers.flat_map(|(before, after)| before.slots.iter().zip(&after.slots));
        shards.map(|(before, after)| after.iter().filter(|expert| !before.contains(expert)).count()).sum()
    }

    const FOUR: Layout = Layout { shards: 4, redundant_slots: 32, min_copies: 2 };

    #[test]
    fn shards_that_moved_get_their_copies_apart_again_with_few_moves() {
        let before = planned(32, FOUR, &on(&[0, 1, 2, 0]));
        assert_eq!(together(&before, &[0, 1, 2, 0]), 0);
        let moved = [0, 1, 2, 1];
        let crowded = together(&before, &moved);
        assert!(crowded > 0);
        let after = plan_spread(&load(32), &before, 2, &on(&moved), PlacementEpoch(2)).unwrap().unwrap();
        assert_eq!((after.epoch(), together(&after, &moved)), (PlacementEpoch(2), 0));
        let most = 2 * crowded;
        assert!(loaded(&before, &after) <= most, "{} loaded for {crowded}", loaded(&before, &after));
    }

    #[test]
    fn what_cannot_be_better_is_left() {
        let before = planned(32, FOUR, &on(&[0, 1, 2, 0]));
        for domains in [on(&[0, 1, 2, 0]), on(&[0, 0, 0, 0]), vec![None; 4]] {
            assert_eq!(plan_spread(&load(32), &before, 2, &domains, PlacementEpoch(2)), Ok(None));
        }
        assert_eq!(plan_spread(&load(32), &before, 1, &on(&[0, 1, 2, 1]), PlacementEpoch(2)), Ok(None));
        let refused = plan_spread(&load(32), &before, 2, &on(&[0, 1]), PlacementEpoch(2));
        assert_eq!(refused, Err(PlanError::DomainCount { found: 2, shards: 4 }));
    }

    proptest! {
        /// Wherever the shards go: never worse, the same copies and slots, and as good as a plan from nothing.
        #[test]
        fn as_good_as_planned_anew(
            experts in 3usize..12,
            shards in 2usize..7,
            before in prop::collection::vec(0u16..4, 7),
            after in prop::collection::vec(0u16..4, 7),
        ) {
            let layout = Layout { shards: shards as u16, redundant_slots: experts as u32, min_copies: 2 };
            let (before, after) = (&before[..shards], &after[..shards]);
            let placed = planned(experts, layout, &on(before));
            let spread = plan_spread(&load(experts), &placed, 2, &on(after), PlacementEpoch(2)).unwrap();
            let best = together(&planned(experts, layout, &on(after)), after);
            let now = spread.as_ref().unwrap_or(&placed);
            prop_assert!(together(now, after) <= together(&placed, after));
            prop_assert!(together(now, after) <= best);
            for (was, is) in placed.layers().iter().zip(now.layers()) {
                let sizes = |slots: &[Vec<LogicalExpert>]| slots.iter().map(Vec::len).collect::<Vec<_>>();
                prop_assert_eq!(sizes(&was.slots), sizes(&is.slots));
                for expert in (0..experts as u16).map(LogicalExpert) {
                    let copies = |placement: &Placement| placement.replicas(was.layer, expert).len();
                    prop_assert_eq!(copies(&placed), copies(now));
                }
            }
        }
    }
}
