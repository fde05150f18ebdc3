//! How many pods each tier is to have.
//!
//! **Asked for** is the tier's number, or the model's where that has changed (ADR 11). **Desired** is what the
//! model can have of it:
//! - experts: the next lower number of shards among which the slots divide (the next higher one where there is no
//!   lower one): what is asked for is never exceeded where it need not be;
//! - `budget.gpus`: first every tier gets what the model declares, as far as it is asked for; admission has seen to
//!   it that this fits. What is left goes to tiers that ask for more than declared, in the order of [`GROWTH`].
//!
//! The rule looks at no history: the same numbers give the same pods after a restart of the operator, in whatever
//! order they were written, and no tier loses what it declares because another one grows.

use cadre_k8s_api::{
    MoEModelSpec, Reason, Tier,
    names::{self},
};
use cadre_types::Layout;

use super::facts::Facts;

/// Who gets accelerators beyond what is declared: decode first, because sequences that run need it; experts last,
/// because more shards make nothing possible that fewer did not.
const GROWTH: [Tier; 3] = [Tier::Decode, Tier::Prefill, Tier::Experts];

/// Who gives way last if a spec from before a rule asks for more than the budget: without experts nothing runs.
const DECLARED: [Tier; 3] = [Tier::Experts, Tier::Decode, Tier::Prefill];

/// Shards that a tier can be asked for (its schema).
const MOST_SHARDS: i32 = 1024;

/// A tier's number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Want {
    /// By the tier, or by the model.
    pub(super) asked: i32,
    /// What it gets.
    pub(super) desired: i32,
    /// Why that is another number.
    pub(super) limit: Option<Limit>,
}

/// Why a tier gets another number of pods than asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) reason: Reason,
    pub(super) message: String,
}

/// All tiers.
#[derive(Clone, Debug)]
pub(super) struct Wants {
    prefill: Want,
    decode: Want,
    experts: Want,
    layout: Layout,
}

impl Wants {
    pub(super) fn new(facts: &Facts<'_>) -> Self {
        Self::of(facts.spec(), |tier| asked(facts, tier))
    }

    fn of(spec: &MoEModelSpec, asked: impl Fn(Tier) -> i32) -> Self {
        let asked = Tier::ALL.map(|tier| asked(tier).max(i32::from(tier == Tier::Experts)));
        let fitted = Tier::ALL.map(|tier| fit(spec, tier, asked[index(tier)]));
        let desired = afford(spec, fitted);
        let want = |tier: Tier| {
            let (asked, fitted, got) = (asked[index(tier)], fitted[index(tier)], desired[index(tier)]);
            let limit = (got != asked).then(|| limit(spec, tier, [asked, fitted, got], desired));
            Want { asked, desired: got, limit }
        };
        let experts = want(Tier::Experts);
        let layout = Layout {
            shards: u16::try_from(experts.desired).unwrap_or(1),
            redundant_slots: u32::try_from(spec.experts.redundant_slots).unwrap_or(0),
            min_copies: u16::try_from(spec.experts.min_copies).unwrap_or(1),
        };
        Self { prefill: want(Tier::Prefill), decode: want(Tier::Decode), experts, layout }
    }

    pub(super) fn of_tier(&self, tier: Tier) -> &Want {
        match tier {
            Tier::Prefill => &self.prefill,
            Tier::Decode => &self.decode,
            Tier::Experts => &self.experts,
        }
    }

    pub(super) fn desired(&self, tier: Tier) -> i32 {
        self.of_tier(tier).desired
    }

    /// Decode workers: those of the tier, and those beside shards.
    pub(super) fn decode_workers(&self, spec: &MoEModelSpec) -> i32 {
        let beside = if spec.experts.worker.is_some() { self.desired(Tier::Experts) } else { 0 };
        self.desired(Tier::Decode).saturating_add(beside)
    }

    /// The layout of the experts.
    pub(super) fn layout(&self) -> Layout {
        self.layout
    }
}

/// The tier's number, unless the model's has changed since it was taken over.
fn asked(facts: &Facts<'_>, tier: Tier) -> i32 {
    let declared = facts.spec().declared_replicas(tier);
    let object = facts.observed().tiers.get(&tier).filter(|object| facts.owns(&object.metadata));
    match object {
        Some(object) if object.spec.declared_replicas == declared => object.spec.replicas,
        _ => declared,
    }
}

fn index(tier: Tier) -> usize {
    match tier {
        Tier::Prefill => 0,
        Tier::Decode => 1,
        Tier::Experts => 2,
    }
}

/// The number that the slots allow.
fn fit(spec: &MoEModelSpec, tier: Tier, asked: i32) -> i32 {
    if tier != Tier::Experts {
        return asked;
    }
    let above = || (asked..=MOST_SHARDS).find(|shards| spec.fits_shards(*shards));
    spec.largest_fitting_shards(asked.min(MOST_SHARDS)).or_else(above).unwrap_or(spec.experts.shards)
}

/// What the budget allows of it.
fn afford(spec: &MoEModelSpec, fitted: [i32; 3]) -> [i32; 3] {
    let Some(budget) = &spec.budget else { return fitted };
    let mut left = i64::from(budget.gpus);
    let mut granted = [0; 3];
    for tier in DECLARED {
        let at = index(tier);
        let base = fit(spec, tier, fitted[at].min(spec.declared_replicas(tier)));
        granted[at] = grant(spec, tier, base, &mut left);
    }
    for tier in GROWTH {
        let at = index(tier);
        if fitted[at] > granted[at] {
            left += i64::from(granted[at]) * spec.gpus_per_pod(tier);
            granted[at] = grant(spec, tier, fitted[at], &mut left);
        }
    }
    granted
}

/// The largest number up to `want` that can be paid for; a model has at least one layout of experts, paid for or
/// not.
fn grant(spec: &MoEModelSpec, tier: Tier, want: i32, left: &mut i64) -> i32 {
    let each = spec.gpus_per_pod(tier);
    let affordable =
        left.max(&mut 0).checked_div(each).map_or(want, |most| i32::try_from(most).unwrap_or(want));
    let granted = match tier {
        Tier::Experts => fit(spec, tier, want.min(affordable).max(1)),
        _ => want.min(affordable),
    };
    *left -= i64::from(granted) * each;
    granted
}

fn limit(spec: &MoEModelSpec, tier: Tier, [asked, fitted, got]: [i32; 3], desired: [i32; 3]) -> Limit {
    let what = format!("{}: {asked} asked for, {got} wanted", tier.suffix());
    if got != fitted {
        let used: i64 =
            Tier::ALL.map(|tier| i64::from(desired[index(tier)]) * spec.gpus_per_pod(tier)).iter().sum();
        let budget = spec.budget.as_ref().map_or(0, |budget| budget.gpus);
        let pods = Tier::ALL.map(|tier| format!("{} {}", tier.suffix(), desired[index(tier)])).join(", ");
        let each = spec.gpus_per_pod(tier);
        let message =
            format!("{what}: a pod takes {each} of budget.gpus {budget}, and {used} are taken ({pods} pods)");
        return Limit { reason: Reason::BudgetExceeded, message };
    }
    let (slots, experts) = (spec.slots(), &spec.experts);
    if got > asked {
        let why = match asked < experts.min_copies {
            true => format!("{} copies of every expert need as many shards", experts.min_copies),
            false => {
                format!("{slots} slots need at least {got} shards, because a shard holds an expert once")
            }
        };
        return Limit { reason: Reason::TooFewShards, message: format!("{what}: {why}") };
    }
    let message = format!("{what}: {slots} slots do not divide among {asked} shards");
    Limit { reason: Reason::SlotsNotDivisible, message }
}

/// Label selector of a tier's pods, as autoscalers want it.
pub(super) fn selector(model: &str, tier: Tier) -> String {
    format!("{}={model},{}={}", names::label::MODEL, names::label::COMPONENT, tier.suffix())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use proptest::prelude::*;

    use super::*;
    use crate::plan::tests::samples;

    /// The sample with node pools: 2 + 8 + 32 accelerators of 48, 512 slots in two copies.
    fn pools() -> MoEModelSpec {
        samples::pools().spec
    }

    fn wants(spec: &MoEModelSpec, prefill: i32, decode: i32, experts: i32) -> Wants {
        Wants::of(spec, |tier| [prefill, decode, experts][index(tier)])
    }

    fn numbers(wants: &Wants) -> [i32; 3] {
        Tier::ALL.map(|tier| wants.desired(tier))
    }

    fn limit_of(wants: &Wants, tier: Tier) -> (Reason, &str) {
        let limit = wants.of_tier(tier).limit.as_ref().unwrap();
        (limit.reason, &limit.message)
    }

    #[test]
    fn what_is_declared_is_what_is_wanted() {
        let wants = wants(&pools(), 2, 8, 32);
        assert_eq!(numbers(&wants), [2, 8, 32]);
        assert!(Tier::ALL.iter().all(|tier| wants.of_tier(*tier).limit.is_none()));
        assert_eq!(wants.layout(), Layout { shards: 32, redundant_slots: 256, min_copies: 2 });
    }

    #[test]
    fn beyond_the_budget_decode_grows_before_prefill_and_nobody_loses_what_it_declares() {
        let spec = pools();
        let cut = wants(&spec, 9, 20, 32);
        assert_eq!(numbers(&cut), [2, 14, 32]);
        assert_eq!(
            limit_of(&cut, Tier::Decode),
            (
                Reason::BudgetExceeded,
                "decode: 20 asked for, 14 wanted: a pod takes 1 of budget.gpus 48, and 48 are taken (prefill 2, decode 14, \
                 experts 32 pods)"
            )
        );
        assert_eq!(limit_of(&cut, Tier::Prefill).0, Reason::BudgetExceeded);
        assert_eq!(numbers(&wants(&spec, 9, 4, 32)), [9, 4, 32], "what decode gives back is free for others");
        assert_eq!(numbers(&wants(&spec, 1, 1, 64)), [1, 1, 32], "46 do not divide 512, so the shards stay");
    }

    #[test]
    fn shards_go_to_the_next_lower_number_that_divides_the_slots() {
        let spec = samples::pocket().spec;
        for (asked, desired) in [(4, 4), (5, 4), (7, 4), (8, 8), (63, 32), (64, 64), (1000, 64)] {
            let wants = wants(&spec, 1, 1, asked);
            assert_eq!(wants.desired(Tier::Experts), desired, "{asked}");
        }
        let seven = wants(&spec, 1, 1, 7);
        assert_eq!(
            limit_of(&seven, Tier::Experts),
            (
                Reason::SlotsNotDivisible,
                "experts: 7 asked for, 4 wanted: 64 slots do not divide among 7 shards"
            )
        );
    }

    #[test]
    fn too_few_shards_for_the_copies_become_as_many_as_are_needed() {
        let spec = samples::pocket().spec;
        let one = wants(&spec, 1, 1, 1);
        assert_eq!(one.desired(Tier::Experts), 2);
        assert_eq!(
            limit_of(&one, Tier::Experts),
            (
                Reason::TooFewShards,
                "experts: 1 asked for, 2 wanted: 2 copies of every expert need as many shards"
            )
        );
        let mut once = spec.clone();
        once.experts.min_copies = 1;
        assert_eq!(
            limit_of(&wants(&once, 1, 1, 1), Tier::Experts).1,
            "experts: 1 asked for, 2 wanted: 64 slots need at least 2 shards, because a shard holds an expert once"
        );
    }

    proptest! {
        #[test]
        fn the_budget_is_kept_and_the_declared_is_guaranteed(
            prefill in 0..100_i32, decode in 0..100_i32, experts in 0..200_i32, extra in 0..40_i32,
            prefill_each in 0..4_i32, decode_each in 0..4_i32,
        ) {
            let mut spec = pools();
            let give = |each: i32, accelerator: &mut Option<cadre_k8s_api::model::Accelerator>| match each {
                0 => *accelerator = None,
                each => accelerator.as_mut().unwrap().count = each,
            };
            give(prefill_each, &mut spec.prefill.accelerator);
            give(decode_each, &mut spec.decode.accelerator);
            let budget = i32::try_from(spec.gpus()).unwrap() + extra;
            spec.budget.as_mut().unwrap().gpus = budget;
            let wants = wants(&spec, prefill, decode, experts);
            let taken: i64 = Tier::ALL.iter().map(|tier| i64::from(wants.desired(*tier)) * spec.gpus_per_pod(*tier)).sum();
            prop_assert!(taken <= i64::from(budget), "{taken} of {budget}");
            prop_assert!(spec.fits_shards(wants.desired(Tier::Experts)));
            for (tier, asked) in [(Tier::Prefill, prefill), (Tier::Decode, decode)] {
                prop_assert!(wants.desired(tier) >= asked.min(spec.declared_replicas(tier)), "{tier:?}");
                prop_assert!(wants.desired(tier) <= asked);
            }
            for tier in Tier::ALL {
                let want = wants.of_tier(tier);
                prop_assert_eq!(want.limit.is_some(), want.desired != want.asked);
            }
        }
    }
}
