//! Children as they are to be against children as they are: what is created, corrected or removed.
//!
//! An object is left alone if every field that we want is as we want it, and nothing is there that we wanted
//! before and do not any more (the hash of what was applied). Fields of others (defaults, autoscalers' own,
//! labels of tools) do not count. An object of our name that another one controls, or that nobody made for us, is
//! never touched; one that lost its owner (`kubectl delete --cascade=orphan`) and carries our labels is taken back.
//!
//! **Another checkpoint** begins with the router. Its old pod drains with the old workers and shards, and while it
//! does it refuses new ones, whose processes would end and be restarted later and later. So the other workloads are
//! left as they are until it is gone.
//!
//! **A former StatefulSet's pods** are waited for before a new one is made. Its controller would meet their names,
//! and every attempt doubles the time to its next one, until minutes after they are gone.

use std::collections::BTreeSet;

use cadre_k8s_api::{
    Tier,
    names::{APPLIED_HASH, FIELD_MANAGER, label},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::Value;

use super::{
    Action, ObjectKind,
    children::{Child, Rendered},
    component::Component,
    facts::{Facts, controller},
    pods::OurPod,
};

mod covers;

use covers::difference;

/// The comparison.
#[derive(Debug, Default)]
pub(super) struct Applied {
    /// Applies, in order, then deletions of what no child is any more.
    pub(super) actions: Vec<Action>,
    /// Objects of our names that are not ours, and whose they are.
    pub(super) taken: Vec<(ObjectKind, String, String)>,
    /// Children of a deleted model of the same name and pods of a deleted StatefulSet; the garbage collector is at
    /// them.
    pub(super) leaving: Vec<(ObjectKind, String)>,
    /// Workers and shards wait for a router of another checkpoint to be gone.
    pub(super) waits_for_router: bool,
    changed: BTreeSet<(ObjectKind, String)>,
}

impl Applied {
    /// Whether a child is being written by this plan.
    pub(super) fn changes(&self, kind: ObjectKind, name: &str) -> bool {
        self.changed.contains(&(kind, name.to_owned()))
    }
}

/// Whose an object of our name is.
enum Owner {
    Us,
    /// A model of our name that is gone.
    Predecessor,
    Other(String),
}

/// Compares every child.
pub(super) fn compare(facts: &Facts<'_>, rendered: &Rendered) -> Applied {
    let other = |pod: &OurPod<'_>| rendered.is_of_another_checkpoint(pod);
    let waits_for_router = rendered.faults.is_empty() && facts.pods_of(Component::Router).any(other);
    let mut applied = Applied { waits_for_router, ..Applied::default() };
    for child in &rendered.children {
        let live = find(facts, child.kind, &child.name);
        match &live {
            None => {
                let former = former_pods(facts, child);
                if former.is_empty() {
                    applied.write(child, None, "it does not exist".to_owned());
                }
                applied.leaving.extend(former);
            }
            Some(live) => match owner(facts, live.meta) {
                Owner::Us if live.meta.deletion_timestamp.is_some() => {}
                Owner::Us if waits_for_router && is_of_members(facts, child) => {}
                Owner::Us => {
                    if let Some(why) = outdated(child, live) {
                        applied.write(child, Some(live), why);
                    }
                }
                Owner::Predecessor => applied.leaving.push((child.kind, child.name.clone())),
                Owner::Other(who) => applied.taken.push((child.kind, child.name.clone(), who)),
            },
        }
    }
    if rendered.faults.is_empty() {
        applied.actions.extend(leftovers(facts, rendered));
    }
    applied
}

impl Applied {
    fn write(&mut self, child: &Child, live: Option<&Live<'_>>, why: String) {
        self.changed.insert((child.kind, child.name.clone()));
        let mut object = child.object.clone();
        object.metadata.resource_version = live
            .filter(|live| must_be_current(child, live))
            .and_then(|live| live.meta.resource_version.clone());
        self.actions.push(Action::Apply { object: Box::new(object), why });
    }
}

/// Pods that a StatefulSet which does not exist any more still controls: none once they were orphaned.
fn former_pods(facts: &Facts<'_>, child: &Child) -> Vec<(ObjectKind, String)> {
    let shards =
        (child.kind == ObjectKind::StatefulSet).then(|| facts.pods_of(Component::Tier(Tier::Experts)));
    shards.into_iter().flatten().map(|pod| (ObjectKind::Pod, pod.name().to_owned())).collect()
}

/// A workload of workers or shards.
fn is_of_members(facts: &Facts<'_>, child: &Child) -> bool {
    let router = Component::Router.object_name(facts.name());
    matches!(child.kind, ObjectKind::Deployment | ObjectKind::StatefulSet) && child.name != router
}

/// Writes that take something away, or that carry a number of somebody else's, fail on a stale observation.
fn must_be_current(child: &Child, live: &Live<'_>) -> bool {
    child.kind == ObjectKind::Tier || live.replicas() > child.replicas.map(i64::from)
}

fn outdated(child: &Child, live: &Live<'_>) -> Option<String> {
    let before = live.replicas().filter(|before| child.replicas.is_some_and(|now| i64::from(now) != *before));
    if let (Some(before), Some(now)) = (before, child.replicas) {
        return Some(format!("replicas {before} → {now}"));
    }
    let hash = |meta: &ObjectMeta| meta.annotations.as_ref().and_then(|all| all.get(APPLIED_HASH)).cloned();
    if hash(live.meta) != hash(&child.object.metadata) {
        return Some("it is out of date".to_owned());
    }
    let wanted = serde_json::to_value(&child.object).unwrap_or_default();
    difference(&wanted, &live.value).map(|path| format!("{path} is not as applied"))
}

fn owner(facts: &Facts<'_>, meta: &ObjectMeta) -> Owner {
    let Some(owner) = controller(meta) else {
        let has = |key: &str, value: &str| {
            meta.labels.as_ref().and_then(|all| all.get(key)).is_some_and(|v| v == value)
        };
        return match has(label::MANAGED_BY, FIELD_MANAGER) && has(label::MODEL, facts.name()) {
            true => Owner::Us,
            false => Owner::Other("nobody".to_owned()),
        };
    };
    if facts.owns(meta) {
        return Owner::Us;
    }
    match owner.kind == "MoEModel" && owner.name == facts.name() {
        true => Owner::Predecessor,
        false => Owner::Other(format!("{} {}", owner.kind, owner.name)),
    }
}

/// Objects of ours that no child is any more, from an operator of another version.
fn leftovers(facts: &Facts<'_>, rendered: &Rendered) -> Vec<Action> {
    let wanted: BTreeSet<_> =
        rendered.children.iter().map(|child| (child.kind, child.name.as_str())).collect();
    let left = metas(facts).filter(|(kind, meta)| {
        let name = meta.name.as_deref().unwrap_or_default();
        facts.owns(meta) && meta.deletion_timestamp.is_none() && !wanted.contains(&(*kind, name))
    });
    left.map(|(kind, meta)| Action::Delete {
        kind,
        name: meta.name.clone().unwrap_or_default(),
        uid: meta.uid.clone().unwrap_or_default(),
        resource_version: None,
        force: false,
        why: "the model has no such child any more".to_owned(),
    })
    .collect()
}

/// A child as it is.
struct Live<'a> {
    meta: &'a ObjectMeta,
    value: Value,
}

impl Live<'_> {
    fn replicas(&self) -> Option<i64> {
        self.value.pointer("/spec/replicas")?.as_i64()
    }
}

fn find<'a>(facts: &Facts<'a>, kind: ObjectKind, name: &str) -> Option<Live<'a>> {
    let observed = facts.observed();
    if kind == ObjectKind::Tier {
        let found = observed.tiers.values().find(|tier| tier.metadata.name.as_deref() == Some(name))?;
        return Some(Live { meta: &found.metadata, value: serde_json::to_value(found).ok()? });
    }
    observed.children.find(kind, name).map(|(meta, value)| Live { meta, value })
}

/// Everything that may be a child; pods are their workloads'.
fn metas<'a>(facts: &Facts<'a>) -> impl Iterator<Item = (ObjectKind, &'a ObjectMeta)> {
    let observed = facts.observed();
    let tiers = observed.tiers.values().map(|object| (ObjectKind::Tier, &object.metadata));
    tiers.chain(observed.children.metas())
}
