//! The first placement of a model: how many copies each expert gets, then where they go.
//!
//! Per layer there are `num_experts + redundant_slots` slots over all shards; shards differ by at most one
//! slot, and the wider ones rotate from layer to layer so that over all layers shards differ by at most
//! one slot as well.
//!
//! **Copies.** First safety: everyone gets the layout's `min_copies`. Then load: each slot left goes to the
//! expert with the most tokens per copy; on ties to the one with fewer copies, then to the lowest id. With
//! the same minimum, more redundant slots never raise the largest load of a copy.
//!
//! **Places** are chosen by `pack`: heaviest first, copies of an expert on different shards, and its first
//! `min_copies` copies in different failure domains wherever the domains have the slots for it.

use cadre_types::{LayerPlacement, Layout, LogicalExpert, Placement, PlacementEpoch, PlacementError};

use crate::{
    load::ExpertLoad,
    pack::{Domains, pack},
};

/// Failure domain of a shard: an index that shards which fail together share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainIndex(pub u16);

/// Ids of experts and shards are 16 bits wide.
const ID_LIMIT: usize = 1 << 16;

/// Plans a placement from nothing. `domains` is the failure domain of each shard, `None` where it is not
/// known (such a shard counts as a domain of its own); empty if none is known. The same load, or a
/// multiple of it, gives the same plan.
pub fn plan_initial(
    load: &ExpertLoad,
    num_experts: usize,
    layout: Layout,
    domains: &[Option<DomainIndex>],
    epoch: PlacementEpoch,
) -> Result<Placement, PlanError> {
    check(load, num_experts, layout, domains)?;
    let (shards, redundant_slots) = (usize::from(layout.shards), layout.redundant_slots as usize);
    let min_copies = usize::from(layout.min_copies);
    let slots = num_experts + redundant_slots;
    let domains = Domains::new(domains, shards);
    let layers = load.layers().iter().enumerate().map(|(at, layer)| {
        let tokens = reduced(&layer.tokens);
        let copies = copies_per_expert(&tokens, shards, min_copies, redundant_slots);
        let held = pack(&tokens, &copies, &slots_per_shard(slots, shards, at), min_copies, &domains);
        LayerPlacement { layer: layer.layer, slots: held.iter().map(|on| logical(on)).collect() }
    });
    Ok(Placement::new(epoch, num_experts, layers.collect())?)
}

/// The most copies that redundant slots can guarantee to every expert.
pub fn affordable_copies(num_experts: usize, redundant_slots: usize) -> usize {
    1 + redundant_slots / num_experts.max(1)
}

fn check(
    load: &ExpertLoad,
    num_experts: usize,
    layout: Layout,
    domains: &[Option<DomainIndex>],
) -> Result<(), PlanError> {
    let (shards, redundant_slots) = (usize::from(layout.shards), layout.redundant_slots as usize);
    let min_copies = usize::from(layout.min_copies);
    if load.num_experts() != num_experts {
        return Err(PlanError::ExpertCount { found: load.num_experts(), expected: num_experts });
    }
    for (what, value) in [("experts", num_experts), ("shards", shards), ("copies", min_copies)] {
        if !(1..=ID_LIMIT).contains(&value) {
            return Err(PlanError::Count { what, value, most: ID_LIMIT });
        }
    }
    if shards == 1 && redundant_slots > 0 {
        return Err(PlanError::OneShard { redundant_slots });
    }
    let most = num_experts * (shards - 1);
    if redundant_slots > most {
        return Err(PlanError::TooManyCopies { redundant_slots, most, num_experts, shards });
    }
    let slots = num_experts + redundant_slots;
    if shards > slots {
        return Err(PlanError::IdleShards { shards, slots });
    }
    let needed = num_experts * (min_copies - 1);
    if min_copies > shards || needed > redundant_slots {
        return Err(PlanError::TooFewSlots { min_copies, shards, redundant_slots, needed, num_experts });
    }
    if !domains.is_empty() && domains.len() != shards {
        return Err(PlanError::DomainCount { found: domains.len(), shards });
    }
    Ok(())
}

/// The same ratios in the smallest integers, so that no rounding can tell a load from its multiple.
pub(crate) fn reduced(tokens: &[u64]) -> Vec<u64> {
    let divisor = tokens.iter().copied().fold(0, gcd).max(1);
    tokens.iter().map(|tokens| tokens / divisor).collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Copies of each expert: the guaranteed minimum, and the rest by load; never more than shards.
fn copies_per_expert(tokens: &[u64], shards: usize, min_copies: usize, redundant_slots: usize) -> Vec<usize> {
    let num_experts = tokens.len();
    let mut copies = vec![min_copies; num_experts];
    for _ in 0..redundant_slots - num_experts * (min_copies - 1) {
        let hottest = (0..num_experts)
            .filter(|&expert| copies[expert] < shards)
            .max_by(|&a, &b| {
                // tokens[a] / copies[a] against tokens[b] / copies[b], exactly.
                let cross = |tokens: u64, copies: usize| u128::from(tokens) * copies as u128;
                cross(tokens[a], copies[b])
                    .cmp(&cross(tokens[b], copies[a]))
                    .then(copies[b].cmp(&copies[a]))
                    .then(b.cmp(&a))
            })
            .expect("redundant_slots is at most num_experts * (shards - 1)");
        copies[hottest] += 1;
    }
    copies
}

/// Slots of each shard in the `at`-th layer. The `slots % shards` wider shards follow on from those of the
/// layer before.
fn slots_per_shard(slots: usize, shards: usize, at: usize) -> Vec<usize> {
    let (narrow, wider) = (slots / shards, slots % shards);
    let first = at * wider % shards;
    (0..shards).map(|shard| narrow + usize::from((shard + shards - first) % shards < wider)).collect()
}

pub(crate) fn logical(experts: &[usize]) -> Vec<LogicalExpert> {
    let id = |&expert: &usize| u16::try_from(expert).expect("num_experts is at most ID_LIMIT");
    experts.iter().map(|expert| LogicalExpert(id(expert))).collect()
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The load is about another number of experts.
    #[error("plan: the expert load counts {found} experts per layer, the model has {expected}")]
    ExpertCount {
        /// Experts in the load.
        found: usize,
        /// Experts of the model.
        expected: usize,
    },
    /// A count is 0 or does not fit its id.
    #[error("plan: {value} {what}, must be in 1..={most}")]
    Count {
        /// What is counted.
        what: &'static str,
        /// How many.
        value: usize,
        /// The most that can be named.
        most: usize,
    },
    /// Copies of an expert go to different shards, and there is only one.
    #[error(
        "plan: {redundant_slots} redundant slots need at least 2 shards: a second copy on the only \
         shard protects nothing"
    )]
    OneShard {
        /// Redundant slots wanted.
        redundant_slots: usize,
    },
    /// More copies than shards to put them on.
    #[error(
        "plan: {redundant_slots} redundant slots are more than {most}, with which each of {num_experts} \
         experts has a copy on each of {shards} shards"
    )]
    TooManyCopies {
        /// Redundant slots wanted.
        redundant_slots: usize,
        /// Most that can be used.
        most: usize,
        /// Experts per layer.
        num_experts: usize,
        /// Shards.
        shards: usize,
    },
    /// Some shard would hold no expert of a layer.
    #[error("plan: {shards} shards for {slots} slots per layer would leave shards without experts")]
    IdleShards {
        /// Shards wanted.
        shards: usize,
        /// Slots per layer.
        slots: usize,
    },
    /// The copies asked for have no slots, or no shards.
    #[error(
        "plan: {min_copies} copies of each of {num_experts} experts need {min_copies} shards and {needed} \
         redundant slots, there are {shards} shards and {redundant_slots} redundant slots"
    )]
    TooFewSlots {
        /// Copies asked for.
        min_copies: usize,
        /// Shards.
        shards: usize,
        /// Redundant slots per layer.
        redundant_slots: usize,
        /// Redundant slots that the copies need.
        needed: usize,
        /// Experts per layer.
        num_experts: usize,
    },
    /// Domains are given for another number of shards.
    #[error("plan: failure domains of {found} shards, expected {shards} or none")]
    DomainCount {
        /// How many are given.
        found: usize,
        /// Shards.
        shards: usize,
    },
    /// The plan is not a valid placement; the message says where.
    #[error(transparent)]
    Placement(#[from] PlacementError),
}

#[cfg(test)]
mod tests;
