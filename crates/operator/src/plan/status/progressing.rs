//! `Progressing`: what is still on its way, the most telling part of it first.

use cadre_k8s_api::{ConditionType, Reason, Tier, status::TierStatus};

use super::{Judged, Verdict};
use crate::plan::{ObjectKind, component::Component, pods::OurPod};

/// Pods named in a message.
const NAMED: usize = 4;

impl Judged<'_, '_> {
    pub(super) fn progressing(&self) -> Verdict {
        if let Some(message) = self.updating() {
            return Verdict::new("True", Reason::Updating, message);
        }
        if let Some(message) = self.scaling() {
            return Verdict::new("True", Reason::Scaling, message);
        }
        let missing = self.missing().into_iter().map(|(_, words)| words);
        let parts: Vec<String> = self.former().into_iter().chain(missing).collect();
        if parts.is_empty() {
            return Verdict::new("False", Reason::AsSpecified, "everything is as the spec says");
        }
        let message = parts.join("; ");
        let reason = if self.is_loading() { Reason::LoadingWeights } else { Reason::Starting };
        let message = match self.loading().filter(|_| reason == Reason::LoadingWeights) {
            Some(loading) => format!("{message}; {} of the weights are read", loading.summary),
            None => message,
        };
        Verdict::new("True", reason, message)
    }

    /// What of a predecessor is in the way of ours.
    fn former(&self) -> Option<String> {
        let named = |(kind, name): &(ObjectKind, String)| format!("{} {name}", kind.name());
        let names: Vec<String> = self.leaving.iter().take(NAMED).map(named).collect();
        let more = self.leaving.len().saturating_sub(NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        (!names.is_empty()).then(|| {
            format!(
                "what was there before under this name is still being removed: {}{more}",
                names.join(", ")
            )
        })
    }

    /// Some shard has not read all that it is to read.
    pub(super) fn is_loading(&self) -> bool {
        let members = self.facts.word().map(|word| word.members.as_slice()).unwrap_or_default();
        members.iter().filter_map(|member| member.loading).any(|load| load.bytes_read < load.bytes_expected)
    }

    /// Pods of an old template.
    fn updating(&self) -> Option<String> {
        let old: Vec<&OurPod<'_>> = self
            .facts
            .pods()
            .iter()
            .filter(|pod| !pod.has_ended() && self.rendered.is_outdated(pod))
            .collect();
        if old.is_empty() {
            return None;
        }
        let names: Vec<&str> = old.iter().take(NAMED).map(|pod| pod.name()).collect();
        let more = if old.len() > NAMED { format!(" and {} more", old.len() - NAMED) } else { String::new() };
        let waits =
            self.waits.as_ref().map(|waits| format!("; the next shard waits: {waits}")).unwrap_or_default();
        Some(format!("pods of the old template are replaced: {}{more}{waits}", names.join(", ")))
    }

    fn scaling(&self) -> Option<String> {
        let mut parts: Vec<String> =
            Tier::ALL.into_iter().filter_map(|tier| self.tier_scaling(tier)).collect();
        let change =
            self.facts.word().filter(|word| word.generation.epoch.0 > 0).and_then(|word| word.next.as_ref());
        if let Some(next) = change {
            let layout = next.layout;
            let what = format!("{} shards, {} redundant slots", layout.shards, layout.redundant_slots);
            parts.push(format!("the layout of {what} waits: {}", next.waiting_for));
        }
        (!parts.is_empty() && !self.is_starting()).then(|| parts.join("; "))
    }

    /// A tier whose number has changed, until it has the new one.
    fn tier_scaling(&self, tier: Tier) -> Option<String> {
        let now = self.tier(tier);
        let component = Component::Tier(tier);
        let before = self.facts.model().status.as_ref().and_then(|status| of_tier(status, tier));
        let was_scaling = self
            .facts
            .condition(ConditionType::Progressing.name())
            .is_some_and(|known| known.status == "True" && known.reason == Reason::Scaling.name());
        let changed = before.is_some_and(|before| before.desired != now.desired);
        let leaving = self.facts.pods_of(component).filter(|pod| pod.is_terminating()).count();
        let under_way = now.ready < now.desired || leaving > 0;
        if now.replicas <= now.desired && !changed && !(was_scaling && under_way) {
            return None;
        }
        let drain = if leaving > 0 { format!(", {leaving} drain") } else { String::new() };
        let here =
            if now.replicas == now.desired { String::new() } else { format!(", {} exist", now.replicas) };
        (under_way || now.replicas != now.desired || changed).then(|| {
            format!("{}: {} of {} pods routable{here}{drain}", tier.suffix(), now.ready, now.desired)
        })
    }
}

fn of_tier(status: &cadre_k8s_api::MoEModelStatus, tier: Tier) -> Option<&TierStatus> {
    match tier {
        Tier::Prefill => status.prefill.as_ref(),
        Tier::Decode => status.decode.as_ref(),
        Tier::Experts => status.experts.as_ref(),
    }
}
