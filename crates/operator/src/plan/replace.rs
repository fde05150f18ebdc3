//! Which pods the plan takes away: shards of an old template (ADR 10), and pods of nodes that do not answer.
//!
//! **Another checkpoint, or other numerics**: all old shards at once, when the old router has drained; old and new
//! refuse each other anyway.
//!
//! **Otherwise** an old shard that serves goes only if no expert loses its last copy by that: every shard of the
//! layout in force is routable, no other is on its way out or up, no layout is on its way, and the layout keeps
//! two copies or more. With `minCopies: 1` no order keeps every expert; then it is one shard at a time, so that a
//! template that does not work costs one shard and not all. An old shard that serves nothing goes at once: that is
//! how a template that did not work is repaired.
//!
//! Router and workers come first. They are what a wrong image breaks at the least cost, and a new worker is
//! routable only while every shard can be reached.
//!
//! **Nodes that do not answer**: a pod there stays in the API until its kubelet says that it has ended, which a dead
//! one never does, and a StatefulSet makes no second one meanwhile. Shards write nothing and two of one index do no
//! harm, so the plan removes it: when its time to drain is over and the coordinator has lost it too. While its process
//! is alive and reached (only the kubelet is down), it goes on serving.

use std::time::Duration;

use cadre_k8s_api::Tier;
use cadre_types::CoordinatorStatus;

use super::{
    Action, ObjectKind, apply::Applied, children::Rendered, component::Component, facts::Facts, pods::OurPod,
};

const EXPERTS: Component = Component::Tier(Tier::Experts);

/// A deletion timestamp is the end of the grace period; a little more for clocks that differ.
const OVERDUE: Duration = Duration::from_secs(5);

/// A pod that is to be deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Victim {
    pub(super) name: String,
    pub(super) uid: String,
    force: bool,
    why: String,
}

impl Victim {
    fn new(pod: &OurPod<'_>, why: &str) -> Self {
        Self { name: pod.name().to_owned(), uid: pod.uid().to_owned(), force: false, why: why.to_owned() }
    }

    pub(super) fn into_action(self) -> Action {
        let Self { name, uid, force, why } = self;
        Action::Delete { kind: ObjectKind::Pod, name, uid, resource_version: None, force, why }
    }
}

/// The pods to delete now, and what the others wait for.
pub(super) fn victims(
    facts: &Facts<'_>,
    rendered: &Rendered,
    applied: &Applied,
) -> (Vec<Victim>, Option<String>) {
    let mut victims = lost(facts);
    let (old, waits) = outdated(facts, rendered, applied);
    victims.extend(old);
    (victims, waits)
}

fn outdated(facts: &Facts<'_>, rendered: &Rendered, applied: &Applied) -> (Vec<Victim>, Option<String>) {
    let old: Vec<&OurPod<'_>> = facts.active(EXPERTS).filter(|pod| rendered.is_outdated(pod)).collect();
    if old.is_empty() || !is_template_current(facts, applied) {
        let router = "the router of the old checkpoint drains first".to_owned();
        return (Vec::new(), applied.waits_for_router.then_some(router));
    }
    let (other, same): (Vec<&OurPod<'_>>, Vec<&OurPod<'_>>) =
        old.into_iter().partition(|pod| rendered.is_of_another_checkpoint(pod));
    let mut victims: Vec<Victim> = other
        .iter()
        .map(|pod| Victim::new(pod, "it serves another checkpoint or in another numerics class"))
        .collect();
    let (idle, serving): (Vec<&OurPod<'_>>, Vec<&OurPod<'_>>) =
        same.into_iter().partition(|pod| !pod.serves() && !pod.is_routable() && !pod.is_worker_routable());
    victims
        .extend(idle.iter().map(|pod| Victim::new(pod, "its template is out of date and it serves nothing")));
    // From the top, so that a layout that is about to shrink has less to replace.
    let next = serving.iter().max_by_key(|pod| pod.shard());
    let waits = match (next, obstacle(facts, rendered)) {
        (None, _) => None,
        (Some(_), Some(obstacle)) => Some(obstacle),
        (Some(_), None) if !victims.is_empty() => Some("other shards are replaced".to_owned()),
        (Some(next), None) => {
            victims.push(Victim::new(next, "its template is out of date and every expert has another copy"));
            None
        }
    };
    (victims, waits)
}

/// A deleted pod would be made from the wanted template.
fn is_template_current(facts: &Facts<'_>, applied: &Applied) -> bool {
    let Some(set) = facts.stateful_set() else { return false };
    let seen = set.status.as_ref().and_then(|status| status.observed_generation);
    !applied.waits_for_router
        && !applied.changes(ObjectKind::StatefulSet, &EXPERTS.object_name(facts.name()))
        && set.metadata.deletion_timestamp.is_none()
        && seen >= set.metadata.generation
}

/// Why no shard that serves may be replaced now.
fn obstacle(facts: &Facts<'_>, rendered: &Rendered) -> Option<String> {
    for component in [Component::Router, Component::Tier(Tier::Prefill), Component::Tier(Tier::Decode)] {
        if facts.active(component).any(|pod| rendered.is_outdated(pod)) {
            return Some(format!("{} pods are replaced first", component.label()));
        }
    }
    let Some(status) = facts.present() else { return Some("the coordinator does not answer".to_owned()) };
    if facts.is_settling() {
        return Some("members come back to a router that has just started".to_owned());
    }
    if let Some(next) = &status.next {
        return Some(format!(
            "a layout of {} shards is on its way: {}",
            next.layout.shards, next.waiting_for
        ));
    }
    if let Some(leaving) = facts.pods_of(EXPERTS).find(|pod| pod.is_terminating()) {
        return Some(format!("{} drains", leaving.name()));
    }
    incomplete(facts, status)
}

/// Names a shard of the layout in force without a routable pod.
fn incomplete(facts: &Facts<'_>, status: &CoordinatorStatus) -> Option<String> {
    let routable =
        |shard: u16| facts.active(EXPERTS).any(|pod| pod.shard() == Some(shard) && pod.is_routable());
    let missing = (0..status.layout.shards).find(|shard| !routable(*shard));
    match missing {
        Some(shard) => Some(format!("shard {shard} is not routable")),
        None if status.coverage.uncovered > 0 => {
            Some(format!("{} experts have no copy", status.coverage.uncovered))
        }
        None => None,
    }
}

/// Pods that only the API remembers.
fn lost(facts: &Facts<'_>) -> Vec<Victim> {
    let replaced = |pod: &OurPod<'_>| facts.active(pod.component).any(|other| other.has_started());
    let is_lost = |pod: &&OurPod<'_>| match pod.component {
        EXPERTS => facts.present().is_some() && !facts.is_settling() && !pod.is_routable(),
        // Two routers of one template under one name: members that ask for it would get either.
        Component::Router => replaced(pod) || facts.present().is_none(),
        Component::Tier(_) => false,
    };
    let overdue = |pod: &&OurPod<'_>| {
        let deadline = pod.pod.metadata.deletion_timestamp.as_ref();
        deadline.is_some_and(|deadline| facts.clock().passed(deadline.0, OVERDUE))
    };
    let stuck =
        facts.pods().iter().filter(|pod| facts.is_on_silent_node(pod)).filter(overdue).filter(is_lost);
    stuck
        .map(|pod| Victim {
            force: true,
            ..Victim::new(pod, "its node does not answer and its time to drain is over")
        })
        .collect()
}
