//! How many of the wanted pods there may be now: what must come before what.
//!
//! - **Shards** grow at once and shrink only after the flip (ADR 9): those beyond the wanted layout hold experts
//!   of the layout in force until the coordinator says that the wanted one is in force and nothing older is in use.
//! - **Prefill to zero**: decode workers then compute prompts themselves, which is another role of their process.
//!   Prefill workers stay until the decode workers that need them have been replaced; the other way round decode
//!   workers keep computing prompts until a prefill worker is routable.

use std::cmp::Ordering;

use cadre_k8s_api::Tier;
use cadre_types::Role;
use k8s_openapi::api::core::v1::{Container, PodTemplateSpec};

use super::{component::Component, facts::Facts, pods::OurPod, wants::Wants};

/// What decode workers do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DecodeRole {
    /// Generate; prompts come from prefill workers.
    Decode,
    /// Compute prompts themselves as well.
    Both,
}

impl DecodeRole {
    /// The value of `--role`.
    pub(super) fn flag(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Both => "both",
        }
    }
}

/// The numbers for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pace {
    pub(super) prefill: i32,
    pub(super) decode: i32,
    pub(super) experts: i32,
    pub(super) decode_role: DecodeRole,
}

impl Pace {
    pub(super) fn new(facts: &Facts<'_>, wants: &Wants) -> Self {
        Self {
            prefill: prefill(facts, wants),
            decode: wants.desired(Tier::Decode),
            experts: experts(facts, wants),
            decode_role: decode_role(facts, wants),
        }
    }

    pub(super) fn replicas(&self, tier: Tier) -> i32 {
        match tier {
            Tier::Prefill => self.prefill,
            Tier::Decode => self.decode,
            Tier::Experts => self.experts,
        }
    }
}

fn experts(facts: &Facts<'_>, wants: &Wants) -> i32 {
    let desired = wants.desired(Tier::Experts);
    let current = facts.stateful_set().and_then(|set| set.spec.as_ref()?.replicas).unwrap_or(desired);
    match desired.cmp(&current) {
        Ordering::Less if may_shrink(facts, wants) => desired,
        Ordering::Less => current,
        Ordering::Equal | Ordering::Greater => desired,
    }
}

/// Nothing in use has more shards than the wanted layout.
fn may_shrink(facts: &Facts<'_>, wants: &Wants) -> bool {
    match (facts.present(), &facts.observed().coordinator) {
        // Before the first placement no shard holds anything, and the first one will be of this layout.
        (Some(status), _) => {
            status.layout == wants.layout() && (status.next.is_none() || status.generation.epoch.0 == 0)
        }
        (None, Some(_)) => false,
        // Never heard: a model that has not come up yet and whose author has thought again, unless shards serve.
        (None, None) => !facts.is_new_here() && !surplus(facts, wants).any(OurPod::serves),
    }
}

fn surplus<'f, 'a>(facts: &'f Facts<'a>, wants: &Wants) -> impl Iterator<Item = &'f OurPod<'a>> {
    let shards = wants.layout().shards;
    facts
        .active(Component::Tier(Tier::Experts))
        .filter(move |pod| pod.shard().is_some_and(|shard| shard >= shards))
}

fn prefill(facts: &Facts<'_>, wants: &Wants) -> i32 {
    let desired = wants.desired(Tier::Prefill);
    let current =
        facts.deployment(Component::Tier(Tier::Prefill)).and_then(|found| found.spec.as_ref()?.replicas);
    let needed = || {
        let decode = [Tier::Decode, Tier::Experts].map(Component::Tier);
        decode.into_iter().any(|of| facts.active(of).any(|pod| has_role(pod, Role::Decode)))
    };
    match current {
        Some(current)
            if desired == 0 && current > 0 && wants.decode_workers(facts.spec()) > 0 && needed() =>
        {
            current
        }
        _ => desired,
    }
}

fn has_role(pod: &OurPod<'_>, role: Role) -> bool {
    [pod.member, pod.beside].into_iter().flatten().any(|member| member.routable && member.member.role == role)
}

fn decode_role(facts: &Facts<'_>, wants: &Wants) -> DecodeRole {
    if wants.desired(Tier::Prefill) == 0 {
        return DecodeRole::Both;
    }
    let templates = facts
        .deployment(Component::Tier(Tier::Decode))
        .and_then(|found| found.spec.as_ref())
        .map(|spec| &spec.template)
        .into_iter()
        .chain(facts.stateful_set().and_then(|found| found.spec.as_ref()).map(|spec| &spec.template));
    let does_both = templates.into_iter().any(runs_both);
    match does_both && facts.routable(Tier::Prefill) == 0 {
        true => DecodeRole::Both,
        false => DecodeRole::Decode,
    }
}

fn runs_both(template: &PodTemplateSpec) -> bool {
    let containers = template.spec.iter().flat_map(|pod| &pod.containers);
    let args = |container: &Container| {
        let args = container.args.as_deref().unwrap_or_default();
        args.windows(2).any(|pair| pair[0] == "--role" && pair[1] == DecodeRole::Both.flag())
    };
    containers.into_iter().any(args)
}
