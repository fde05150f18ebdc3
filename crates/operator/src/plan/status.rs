//! What users read: conditions, counts, progress.
//!
//! Made anew from what is observed; the status written last is read for three things only. Times of transitions
//! stay while a condition's status does. Words that depend on the coordinator stay while a process that has just
//! begun to watch has not heard it. And whether the model has been up, or was being scaled, when pods are missing:
//! that is the difference between a model that starts and one that has lost something.

use cadre_k8s_api::{
    ConditionType, MoEModelStatus, MoETierStatus, Reason, Tier,
    status::{LoadingStatus, TierStatus},
};
use cadre_types::Role;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::{
    ObjectKind,
    children::Rendered,
    component::Component,
    facts::Facts,
    findings::Finding,
    wants::{Wants, selector},
};

mod accelerators;
mod covered;
mod degraded;
mod progressing;
mod ready;

/// Longest message; a message is read in a terminal.
const MAX_MESSAGE: usize = 2000;

/// A change of imbalance below this is noise of the traffic and not worth a write.
const IMBALANCE_STEP: f64 = 0.05;

/// Everything that conditions are judged from.
pub(super) struct Judged<'a, 'f> {
    pub(super) facts: &'f Facts<'a>,
    pub(super) wants: &'f Wants,
    pub(super) rendered: &'f Rendered,
    pub(super) findings: &'f [Finding],
    /// What old shards wait for before they are replaced.
    pub(super) waits: Option<String>,
    /// What of a former model or StatefulSet of the same name is still there.
    pub(super) leaving: &'f [(ObjectKind, String)],
}

/// A condition before it has times.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Verdict {
    status: &'static str,
    reason: Reason,
    message: String,
}

impl Verdict {
    fn new(status: &'static str, reason: Reason, message: impl Into<String>) -> Self {
        Self { status, reason, message: message.into() }
    }
}

impl Judged<'_, '_> {
    /// The model's status.
    pub(super) fn model(&self) -> MoEModelStatus {
        let generation = self.facts.model().metadata.generation;
        let condition = |type_: ConditionType| {
            let before = self.facts.condition(type_.name());
            match self.verdict(type_) {
                Some(verdict) => Some(dated(self.facts, type_, verdict, generation, before)),
                None => before.cloned(),
            }
        };
        let before = self.facts.model().status.as_ref();
        let word = self.facts.word();
        let epoch = word.map(|status| status.generation.epoch.0).filter(|epoch| *epoch > 0);
        let epoch = epoch.and_then(|epoch| i64::try_from(epoch).ok());
        MoEModelStatus {
            observed_generation: generation,
            conditions: ConditionType::ALL.into_iter().filter_map(condition).collect(),
            prefill: Some(self.tier(Tier::Prefill)),
            decode: Some(self.tier(Tier::Decode)),
            experts: Some(self.tier(Tier::Experts)),
            placement_epoch: epoch.or_else(|| before?.placement_epoch),
            model_hash: word
                .map(|status| status.generation.model.to_string())
                .or_else(|| before?.model_hash.clone()),
            imbalance: self.imbalance(),
            loading: self.loading(),
            accelerators: self.accelerators(),
        }
    }

    /// Tiers whose status differs from the written one.
    pub(super) fn tiers(&self) -> Vec<(Tier, MoETierStatus)> {
        let owned =
            self.facts.observed().tiers.iter().filter(|(_, object)| self.facts.owns(&object.metadata));
        let changed = owned.filter_map(|(tier, object)| {
            let before = object.status.as_ref();
            let generation = object.metadata.generation;
            let name = ConditionType::ScalingLimited.name();
            let condition =
                before.and_then(|status| status.conditions.iter().find(|known| known.type_ == name));
            let counts = self.own(*tier);
            let status = MoETierStatus {
                observed_generation: generation,
                replicas: counts.replicas,
                ready: counts.ready,
                desired: counts.desired,
                selector: selector(self.facts.name(), *tier),
                loaded: self.loading().filter(|_| *tier == Tier::Experts).map(|loading| loading.summary),
                accelerators: self.accelerators().and_then(|all| {
                    let own: Vec<_> = all.cards.iter().filter(|card| card.tier == *tier).collect();
                    (!own.is_empty()).then(|| accelerators::summary(own))
                }),
                conditions: vec![dated(
                    self.facts,
                    ConditionType::ScalingLimited,
                    self.limited([*tier]),
                    generation,
                    condition,
                )],
            };
            (before != Some(&status)).then_some((*tier, status))
        });
        changed.collect()
    }

    /// `None` leaves the condition as it is.
    fn verdict(&self, type_: ConditionType) -> Option<Verdict> {
        let unheard = self.facts.word().is_none() && self.facts.is_new_here();
        let known = self.facts.condition(type_.name()).is_some();
        match type_ {
            ConditionType::Ready | ConditionType::ExpertsCovered if unheard && known => None,
            ConditionType::Ready => Some(self.ready()),
            ConditionType::Progressing => Some(self.progressing()),
            ConditionType::Degraded => Some(self.degraded()),
            ConditionType::ExpertsCovered => Some(self.covered()),
            ConditionType::ScalingLimited => Some(self.limited(Tier::ALL)),
        }
    }

    fn limited(&self, tiers: impl IntoIterator<Item = Tier>) -> Verdict {
        let limits: Vec<_> =
            tiers.into_iter().filter_map(|tier| self.wants.of_tier(tier).limit.as_ref()).collect();
        let Some(first) = limits.first() else {
            return Verdict::new("False", Reason::NotLimited, "every tier gets what it is asked for");
        };
        let messages: Vec<&str> = limits.iter().map(|limit| limit.message.as_str()).collect();
        Verdict::new("True", first.reason, messages.join("; "))
    }

    /// The pods of a tier, which its MoETier scales.
    fn own(&self, tier: Tier) -> TierStatus {
        let replicas = self.facts.active(Component::Tier(tier)).count();
        counts(self.wants.desired(tier), replicas, self.facts.routable(tier))
    }

    /// A tier as the model has it: decode workers beside shards are decode workers.
    fn tier(&self, tier: Tier) -> TierStatus {
        if tier != Tier::Decode {
            return self.own(tier);
        }
        let (beside, routable) = self.facts.workers_beside_shards();
        let replicas = self.facts.active(Component::Tier(tier)).count() + beside;
        counts(self.wants.decode_workers(self.facts.spec()), replicas, self.facts.routable(tier) + routable)
    }

    /// Components with fewer pods that work is routed to than wanted.
    fn missing(&self) -> Vec<(Component, String)> {
        let router = self.facts.active(Component::Router).any(|pod| pod.serves() || pod.has_started());
        let router = (!router).then(|| (Component::Router, self.pods_in_words(Component::Router, 0, 1)));
        let tiers = Tier::ALL.into_iter().filter_map(|tier| {
            let TierStatus { ready, desired, .. } = self.tier(tier);
            let component = Component::Tier(tier);
            (ready < desired).then(|| (component, self.pods_in_words(component, ready, desired)))
        });
        router.into_iter().chain(tiers).collect()
    }

    fn pods_in_words(&self, component: Component, routable: i32, desired: i32) -> String {
        let pods = match component {
            Component::Router => count(self.facts.active(component).count()),
            Component::Tier(tier) => self.tier(tier).replicas,
        };
        let what = if component == Component::Router { "running" } else { "routable" };
        let exist = if pods < desired { format!(", {pods} exist") } else { String::new() };
        format!("{}: {routable} of {desired} pods {what}{exist}", component.label())
    }

    /// The model has not been up since it was made, as far as its status remembers: no placement was ever in
    /// force, or nothing has gone wrong since.
    fn is_starting(&self) -> bool {
        let ready = self.facts.condition(ConditionType::Ready.name());
        let starting = [Reason::Starting, Reason::LoadingWeights].map(Reason::name);
        let placed =
            self.facts.model().status.as_ref().is_some_and(|status| status.placement_epoch.is_some());
        ready.is_none_or(|ready| {
            ready.status != "True" && (!placed || starting.contains(&ready.reason.as_str()))
        })
    }

    /// Weights read by the shards. Whole percents only: a model that loads is written a hundred times and not
    /// twice a second.
    fn loading(&self) -> Option<LoadingStatus> {
        let before = self.facts.model().status.as_ref().and_then(|status| status.loading.clone());
        let Some(word) = self.facts.word() else { return before };
        let shards = word.members.iter().filter(|member| matches!(member.member.role, Role::Expert(_)));
        let (read, expected) =
            shards.filter_map(|shard| shard.loading).fold((0_u64, 0_u64), |(read, expected), load| {
                (read.saturating_add(load.bytes_read), expected.saturating_add(load.bytes_expected))
            });
        if expected == 0 {
            return before;
        }
        let percent = u128::from(read.min(expected)) * 100 / u128::from(expected);
        let summary = format!("{percent}%");
        let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let now = LoadingStatus { bytes_read: bytes(read), bytes_expected: bytes(expected), summary };
        let alike = |before: &LoadingStatus| {
            before.summary == now.summary && before.bytes_expected == now.bytes_expected && read < expected
        };
        Some(before.filter(alike).unwrap_or(now))
    }

    fn imbalance(&self) -> Option<String> {
        let before = self.facts.model().status.as_ref().and_then(|status| status.imbalance.clone());
        let Some(word) = self.facts.word() else {
            return before.filter(|_| self.facts.is_new_here());
        };
        let now = word.imbalance?;
        let known = before.as_deref().and_then(|text| text.parse::<f64>().ok());
        match known {
            Some(known) if (known - now).abs() < IMBALANCE_STEP => before,
            _ => Some(format!("{now:.2}")),
        }
    }
}

fn counts(desired: i32, replicas: usize, ready: usize) -> TierStatus {
    let (replicas, ready) = (count(replicas), count(ready));
    TierStatus { desired, replicas, ready, summary: format!("{ready}/{desired}") }
}

fn count(pods: usize) -> i32 {
    i32::try_from(pods).unwrap_or(i32::MAX)
}

/// The status of a model that is being deleted: nothing else matters any more.
pub(super) fn deleting(facts: &Facts<'_>) -> MoEModelStatus {
    let mut status = facts.model().status.clone().unwrap_or_default();
    let generation = facts.model().metadata.generation;
    status.observed_generation = generation;
    for (type_, value) in [(ConditionType::Ready, "False"), (ConditionType::Progressing, "True")] {
        let verdict = Verdict::new(value, Reason::Deleting, "the model is being deleted; its pods drain");
        let now = dated(facts, type_, verdict, generation, facts.condition(type_.name()));
        match status.conditions.iter_mut().find(|known| known.type_ == type_.name()) {
            Some(known) => *known = now,
            None => status.conditions.push(now),
        }
    }
    status
}

/// A condition with its times: the transition is that of the status, not of reason or message.
fn dated(
    facts: &Facts<'_>,
    type_: ConditionType,
    verdict: Verdict,
    generation: Option<i64>,
    before: Option<&Condition>,
) -> Condition {
    let since = before
        .filter(|before| before.status == verdict.status)
        .map(|before| before.last_transition_time.clone());
    Condition {
        type_: type_.name().to_owned(),
        status: verdict.status.to_owned(),
        reason: verdict.reason.name().to_owned(),
        message: cut(verdict.message, MAX_MESSAGE),
        observed_generation: generation,
        last_transition_time: since.unwrap_or(Time(facts.clock().now())),
    }
}

/// At most so many bytes, cut between characters.
pub(super) fn cut(mut text: String, bytes: usize) -> String {
    const ENDING: &str = "…";
    if text.len() > bytes {
        let mut end = bytes.saturating_sub(ENDING.len());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str(ENDING);
    }
    text
}
