//! One rule of the planner each. Random loads are in `tests/properties.rs`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_types::{LayerId, ShardIndex};

use super::*;
use crate::{explain, load::LayerLoad};

const EPOCH: PlacementEpoch = PlacementEpoch(1);

fn load(layers: &[&[u64]]) -> ExpertLoad {
    let layer =
        |(at, tokens): (usize, &&[u64])| LayerLoad { layer: LayerId(at as u16 + 1), tokens: tokens.to_vec() };
    ExpertLoad::new(layers.iter().enumerate().map(layer).collect()).unwrap()
}

/// As many copies for everyone as the redundant slots afford; nothing known of domains.
fn layout(experts: usize, shards: usize, redundant: usize) -> Layout {
    let min_copies = affordable_copies(experts, redundant) as u16;
    Layout { shards: shards as u16, redundant_slots: redundant as u32, min_copies }
}

fn plan(load: &ExpertLoad, experts: usize, shards: usize, redundant: usize) -> Result<Placement, PlanError> {
    plan_initial(load, experts, layout(experts, shards, redundant), &[], EPOCH)
}

fn uniform(layers: u16, experts: usize) -> ExpertLoad {
    ExpertLoad::uniform((1..=layers).map(LayerId), experts).unwrap()
}

#[test]
fn thirty_two_experts_over_seven_shards_are_even_over_all_layers_too() {
    let placement = plan(&uniform(6, 32), 32, 7, 0).unwrap();
    for layer in placement.layers() {
        assert!(layer.slots.iter().all(|slots| [4, 5].contains(&slots.len())));
    }
    let total =
        |shard| -> usize { placement.shard_slots(ShardIndex(shard)).map(|(_, slots)| slots.len()).sum() };
    let totals: Vec<usize> = (0..7).map(total).collect();
    assert_eq!(totals, [28, 28, 28, 27, 27, 27, 27], "192 slots over 7 shards");
}

#[test]
fn with_as_many_redundant_slots_as_experts_everyone_has_two_copies() {
    let skewed: Vec<u64> = (0..32).map(|expert| 1 << expert).collect();
    for load in [uniform(2, 32), load(&[&skewed, &[0; 32]])] {
        for shards in [2, 3, 4, 7, 32] {
            let placement = plan(&load, 32, shards, 32).unwrap();
            let report = explain(&placement, &load).unwrap();
            assert_eq!(report.copies.len(), 1);
            assert_eq!((report.min_copies(), report.copies[0].experts), (2, 64));
            assert!(report.shard_loss.iter().all(|loss| loss.uncovers.is_empty()));
        }
    }
}

#[test]
fn extra_copies_go_to_the_largest_load_per_copy() {
    let of = |tokens: &[u64], shards, redundant| {
        copies_per_expert(tokens, shards, affordable_copies(tokens.len(), redundant), redundant)
    };
    let copies = |tokens: &[u64], redundant| of(tokens, 8, redundant);
    assert_eq!(copies(&[100, 10, 40, 30, 5], 4), [4, 1, 2, 1, 1]);
    assert_eq!(copies(&[1, 1, 1, 1, 1], 2), [2, 2, 1, 1, 1], "lowest id on ties");
    assert_eq!(copies(&[4, 2, 1], 2), [2, 2, 1], "fewer copies on ties");
    assert_eq!(copies(&[0, 0, 0], 2), [2, 2, 1], "an idle layer is spread, not piled on expert 0");
    assert_eq!(copies(&[100, 1, 1], 4), [3, 2, 2], "the minimum of two comes first");
    assert_eq!(of(&[100, 1, 1], 2, 2), [2, 2, 1], "no more copies than shards");
    assert_eq!(copies(&[u64::MAX, u64::MAX - 1, 1, 1], 3), [3, 2, 1, 1], "no overflow");
}

#[test]
fn scaling_a_load_changes_nothing() {
    let tokens = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86];
    let scaled = tokens.map(|tokens| tokens * 1_000_003);
    let plan = |tokens: &[u64]| plan(&load(&[tokens]), 12, 5, 4).unwrap();
    assert_eq!(plan(&tokens), plan(&scaled));
    assert_eq!(reduced(&scaled), tokens);
    assert_eq!(reduced(&[0, 0]), [0, 0]);
}

#[test]
fn refusals_name_their_numbers() {
    let refused = |shards, redundant| plan(&uniform(1, 32), 32, shards, redundant).unwrap_err().to_string();
    assert_eq!(
        refused(1, 4),
        "plan: 4 redundant slots need at least 2 shards: a second copy on the only shard protects nothing"
    );
    assert_eq!(
        refused(3, 65),
        "plan: 65 redundant slots are more than 64, with which each of 32 experts has a copy on each of \
         3 shards"
    );
    assert_eq!(refused(33, 0), "plan: 33 shards for 32 slots per layer would leave shards without experts");
    assert_eq!(refused(0, 0), "plan: 0 shards, must be in 1..=65536");
    assert_eq!(
        plan(&uniform(1, 32), 16, 2, 0).unwrap_err(),
        PlanError::ExpertCount { found: 32, expected: 16 }
    );
}

#[test]
fn full_redundancy_puts_everything_everywhere() {
    let placement = plan(&uniform(1, 6), 6, 4, 18).unwrap();
    let all: Vec<LogicalExpert> = (0..6).map(LogicalExpert).collect();
    assert_eq!(placement.layers()[0].slots, vec![all; 4]);
}

#[test]
fn copies_that_have_no_slots_are_refused_with_what_they_need() {
    let ask = |shards, redundant_slots, min_copies| {
        let layout = Layout { shards, redundant_slots, min_copies };
        plan_initial(&uniform(1, 32), 32, layout, &[], EPOCH).unwrap_err().to_string()
    };
    assert_eq!(
        ask(4, 31, 2),
        "plan: 2 copies of each of 32 experts need 2 shards and 32 redundant slots, there are 4 shards and \
         31 redundant slots"
    );
    assert!(ask(2, 32, 3).contains("need 3 shards and 64 redundant slots"));
    assert_eq!(ask(2, 0, 0), "plan: 0 copies, must be in 1..=65536");
    let layout = Layout { shards: 2, redundant_slots: 0, min_copies: 1 };
    let refused = plan_initial(&uniform(1, 32), 32, layout, &[None], EPOCH).unwrap_err();
    assert_eq!(refused, PlanError::DomainCount { found: 1, shards: 2 });
}

#[test]
fn one_guaranteed_copy_leaves_every_slot_to_load() {
    let hot: Vec<u64> = (0..8).map(|expert| if expert == 3 { 100 } else { 1 }).collect();
    let layout = Layout { shards: 8, redundant_slots: 8, min_copies: 1 };
    let placement = plan_initial(&load(&[&hot]), 8, layout, &[], EPOCH).unwrap();
    assert_eq!(placement.replicas(LayerId(1), LogicalExpert(3)).len(), 8);
}

#[test]
fn two_copies_lie_in_the_two_domains_that_there_are() {
    let skewed: Vec<u64> = (0..32).map(|expert| 1 << expert).collect();
    let layout = Layout { shards: 8, redundant_slots: 32, min_copies: 2 };
    // Domains neither alternate nor are they halves of the list.
    let domains = [0, 0, 1, 0, 1, 1, 1, 0].map(|domain| Some(DomainIndex(domain)));
    let placement = plan_initial(&load(&[&skewed, &[1; 32]]), 32, layout, &domains, EPOCH).unwrap();
    for layer in placement.layers() {
        for expert in (0..32).map(LogicalExpert) {
            let [a, b] = placement.replicas(layer.layer, expert) else { panic!("two copies of {expert}") };
            assert_ne!(domains[a.shard.index()], domains[b.shard.index()], "{expert} of {}", layer.layer);
        }
    }
}
