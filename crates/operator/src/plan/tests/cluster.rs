//! A cluster that plans are tried on: it takes a plan's writes as the API server would, and then its controllers,
//! kubelets and coordinator take one step.
//!
//! Simpler than Kubernetes, and not kinder: a write with an old resourceVersion or of another's object panics,
//! pods go and come one step after the other, and what is told to the coordinator holds until it is told anew.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, time::Duration};

use cadre_k8s_api::{
    MoEModel, MoETier, MoETierStatus, Tier,
    names::{ROUTABLE_GATE, label},
};
use cadre_types::OperatorView;
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, StatefulSet, StatefulSetStatus},
        core::v1::{Pod, PodCondition, PodTemplateSpec},
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time},
    jiff::Timestamp,
};
use kube::core::DynamicObject;
use serde::de::DeserializeOwned;

use super::super::{Action, ObjectKind, Plan, plan};
use crate::{
    kinds::{ChildObject, VisitList},
    observed::{NodeView, Observed},
};

mod coordinator;
mod workloads;

pub(super) use coordinator::Coordinator;
pub(super) use workloads::{is_ready, template_of};

/// Longest that anything may take to come to rest.
const PATIENCE: usize = 120;

/// The image of models that name none.
pub(super) const IMAGE: &str = "ghcr.io/cadre-dev/cadre:0.1.0";

/// The cluster.
pub(super) struct Cluster {
    pub(super) seen: Observed,
    pub(super) coordinator: Coordinator,
    /// Pods of this image cannot be pulled.
    pub(super) broken_image: Option<String>,
    /// No node takes pods with this key in their node selector.
    pub(super) unschedulable: Option<String>,
    /// Pods of the newest template of the shards do not start.
    pub(super) broken_shards: bool,
    /// Names for pods, uids and versions.
    serial: u64,
    /// What was told last.
    view: Option<OperatorView>,
}

impl Cluster {
    /// Three nodes and a model of which nothing exists.
    pub(super) fn new(model: MoEModel) -> Self {
        let mut seen = Observed::nothing(model, IMAGE);
        seen.now = Timestamp::from_second(1_800_000_000).unwrap();
        seen.watching_since = seen.now - Duration::from_secs(3600);
        let zones = ["zone-a", "zone-b", "zone-c"];
        seen.nodes = (0..3).map(|node| (format!("node-{node}"), self::node(node, zones[node]))).collect();
        Self {
            seen,
            coordinator: Coordinator::default(),
            broken_image: None,
            unschedulable: None,
            broken_shards: false,
            serial: 0,
            view: None,
        }
    }

    /// A cluster that has come to rest.
    pub(super) fn settled(model: MoEModel) -> Self {
        let mut cluster = Self::new(model);
        cluster.settle();
        cluster
    }

    /// Plans, writes, moves; returns what was planned.
    pub(super) fn round(&mut self) -> Plan {
        let plan = plan(&self.seen);
        self.apply(&plan);
        self.step();
        plan
    }

    /// Rounds until nothing is planned any more and nothing moves; returns how many it took.
    pub(super) fn settle(&mut self) -> usize {
        let mut still = 0;
        for round in 1..=PATIENCE {
            still = if is_empty(&self.round()) { still + 1 } else { 0 };
            // Conditions may change by age alone, up to a minute later.
            if still > 12 {
                return round;
            }
        }
        panic!("not at rest after {PATIENCE} rounds: {}", super::super::render(&plan(&self.seen)));
    }

    /// Rounds until something holds.
    pub(super) fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) -> Vec<Plan> {
        let mut plans = Vec::new();
        while !holds(self) {
            assert!(plans.len() < PATIENCE, "{what} never came: {}", super::super::render(&plan(&self.seen)));
            plans.push(self.round());
        }
        plans
    }

    pub(super) fn plan(&self) -> Plan {
        plan(&self.seen)
    }

    /// Names of pods of a component, without those that go.
    pub(super) fn pods(&self, component: &str) -> Vec<String> {
        let of = |pod: &&Pod| component_of(pod) == component && pod.metadata.deletion_timestamp.is_none();
        self.seen.pods.iter().filter(of).map(|pod| name(&pod.metadata)).collect()
    }

    pub(super) fn pod(&mut self, name: &str) -> &mut Pod {
        self.seen.pods.iter_mut().find(|pod| pod.metadata.name.as_deref() == Some(name)).unwrap()
    }

    /// The first pod of a component.
    pub(super) fn first(&mut self, component: &str) -> &mut Pod {
        let name = self.pods(component)[0].clone();
        self.pod(&name)
    }

    pub(super) fn deployment(&self, name: &str) -> &Deployment {
        self.seen.children.deployments.iter().find(|one| one.metadata.name.as_deref() == Some(name)).unwrap()
    }

    pub(super) fn shards(&self) -> i32 {
        self.seen.children.stateful_sets[0].spec.as_ref().unwrap().replicas.unwrap()
    }

    pub(super) fn replicas(&self, name: &str) -> i32 {
        self.deployment(name).spec.as_ref().unwrap().replicas.unwrap()
    }

    /// As `kubectl scale` does.
    pub(super) fn scale(&mut self, tier: Tier, replicas: i32) {
        let version = self.version();
        let object = self.seen.tiers.get_mut(&tier).unwrap();
        object.spec.replicas = replicas;
        object.metadata.generation = object.metadata.generation.map(|at| at + 1);
        object.metadata.resource_version = Some(version);
    }

    /// As `kubectl edit` does.
    pub(super) fn edit(&mut self, change: impl FnOnce(&mut MoEModel)) {
        change(&mut self.seen.model);
        self.seen.model.metadata.generation = self.seen.model.metadata.generation.map(|at| at + 1);
    }

    /// As `kubectl delete pod` does.
    pub(super) fn kill(&mut self, name: &str) {
        let now = Time(self.seen.now);
        self.pod(name).metadata.deletion_timestamp = Some(now);
    }

    /// A condition of the model as it is written.
    pub(super) fn condition(&self, type_: &str) -> (String, String, String) {
        let status = self.seen.model.status.as_ref().unwrap();
        let found = status.conditions.iter().find(|one| one.type_ == type_).unwrap();
        (found.status.clone(), found.reason.clone(), found.message.clone())
    }

    /// Status and reason of it.
    pub(super) fn verdict(&self, type_: &str) -> String {
        let (status, reason, _) = self.condition(type_);
        format!("{status} {reason}")
    }

    pub(super) fn passes(&mut self, seconds: u64) {
        self.seen.now += Duration::from_secs(seconds);
    }

    fn version(&mut self) -> String {
        self.serial += 1;
        self.serial.to_string()
    }

    /// Takes a plan's writes.
    pub(super) fn apply(&mut self, plan: &Plan) {
        self.check_victims(plan);
        for action in &plan.actions {
            match action {
                Action::Apply { object, .. } => self.apply_object(object),
                Action::Delete { kind, name, uid, force, .. } => self.delete(*kind, name, uid, *force),
                Action::SetRoutable { pod, uid, routable, .. } => self.set_gate(pod, uid, *routable),
            }
        }
        if let Some(status) = &plan.status {
            self.seen.model.status = Some(status.clone());
        }
        for (tier, status) in &plan.tier_status {
            self.write_tier_status(*tier, status.clone());
        }
        self.view.clone_from(&plan.operator_view);
    }

    fn write_tier_status(&mut self, tier: Tier, status: MoETierStatus) {
        self.seen.tiers.get_mut(&tier).unwrap().status = Some(status);
    }

    fn apply_object(&mut self, object: &DynamicObject) {
        let kind = object.types.as_ref().unwrap().kind.clone();
        let (version, uid) = (self.version(), format!("uid-{}", self.serial));
        let (model, now) = (self.seen.model.metadata.uid.clone().unwrap(), self.seen.now);
        let write = Write { object, version, uid, model, now };
        match kind.as_str() {
            "MoETier" => {
                let tier: MoETier = write.typed();
                let known = self.seen.tiers.get(&tier.spec.tier);
                let written =
                    write.over(known, |one| &one.metadata, |one| serde_json::to_value(&one.spec).unwrap());
                let status = known.and_then(|one| one.status.clone());
                self.seen.tiers.insert(tier.spec.tier, MoETier { status, ..written });
            }
            "StatefulSet" => {
                let status = self.seen.children.stateful_sets.first().and_then(|one| one.status.clone());
                self.seen.children.visit(ObjectKind::StatefulSet, &write);
                self.seen.children.stateful_sets[0].status = status;
            }
            _ => {
                let kind = ObjectKind::of(object.types.as_ref().unwrap()).unwrap();
                self.seen.children.visit(kind, &write);
            }
        }
    }

    fn delete(&mut self, kind: ObjectKind, name: &str, uid: &str, force: bool) {
        assert_eq!(kind, ObjectKind::Pod, "only pods are deleted here");
        let now = Time(self.seen.now);
        let pod = self.pod(name);
        assert_eq!(pod.metadata.uid.as_deref(), Some(uid));
        pod.metadata.deletion_timestamp.get_or_insert(now);
        if force {
            self.seen.pods.retain(|pod| pod.metadata.name.as_deref() != Some(name));
        }
    }

    fn set_gate(&mut self, name: &str, uid: &str, routable: bool) {
        let pod = self.pod(name);
        assert_eq!(pod.metadata.uid.as_deref(), Some(uid));
        set_condition(pod, ROUTABLE_GATE, routable);
    }

    /// No expert loses its last copy by a pod that the plan deletes while old and new speak the same generation.
    fn check_victims(&self, plan: &Plan) {
        let Some(layout) = self.coordinator.in_force else { return };
        let wanted = super::super::children::checkpoint_of(&self.seen);
        let deleted = |pod: &Pod| {
            plan.actions.iter().any(
                |action| matches!(action, Action::Delete { uid, .. } if pod.metadata.uid.as_ref() == Some(uid)),
            )
        };
        let shards = self.seen.pods.iter().filter(|pod| component_of(pod) == "experts");
        let (mut routable, mut lost) = (0, 0);
        for pod in shards {
            let serves = self.coordinator.is_routable(pod);
            let same = pod.metadata.labels.as_ref().unwrap()[label::CHECKPOINT] == wanted;
            routable += u16::from(serves && !deleted(pod));
            lost += u16::from(serves && deleted(pod) && same);
        }
        assert!(lost <= 1, "{lost} shards that serve are deleted at once");
        if lost > 0 && layout.min_copies > 1 {
            let gone = layout.shards - routable.min(layout.shards);
            assert!(gone < layout.min_copies, "{gone} of {} shards gone", layout.shards);
        }
    }
}

/// A server-side apply.
struct Write<'a> {
    object: &'a DynamicObject,
    version: String,
    uid: String,
    model: String,
    now: Timestamp,
}

impl Write<'_> {
    fn typed<T: DeserializeOwned>(&self) -> T {
        serde_json::from_value(serde_json::to_value(self.object).unwrap()).unwrap()
    }

    fn over<T: DeserializeOwned>(
        &self,
        known: Option<&T>,
        meta: impl Fn(&T) -> &ObjectMeta,
        spec: impl Fn(&T) -> serde_json::Value,
    ) -> T {
        let mut object = self.object.clone();
        let known_spec = known.map(spec);
        let known = known.map(meta);
        self.precondition(known);
        let changed = known_spec.as_ref().is_none_or(|spec| spec != &object.data["spec"]);
        self.stamp(&mut object.metadata, known, changed);
        serde_json::from_value(serde_json::to_value(object).unwrap()).unwrap()
    }

    fn put_into<T: ChildObject>(&self, list: &mut Vec<T>) {
        fn meta<T: ChildObject>(one: &mut T) -> &mut ObjectMeta {
            one.meta_mut()
        }
        let name = self.object.metadata.name.clone();
        let at = list.iter_mut().position(|one| meta(one).name == name);
        let known = at.map(|at| (meta(&mut list[at]).clone(), serde_json::to_value(&list[at]).unwrap()));
        self.precondition(known.as_ref().map(|(meta, _)| meta));
        let mut written: T = self.typed();
        let after = serde_json::to_value(&written).unwrap();
        let changed = known.as_ref().is_none_or(|(_, before)| before["spec"] != after["spec"]);
        self.stamp(meta(&mut written), known.as_ref().map(|(meta, _)| meta), changed);
        match at {
            Some(at) => list[at] = written,
            None => list.push(written),
        }
    }

    fn precondition(&self, known: Option<&ObjectMeta>) {
        if let Some(version) = &self.object.metadata.resource_version {
            let known = known.and_then(|known| known.resource_version.as_ref());
            assert_eq!(Some(version), known, "planned from a stale observation");
        }
        if let Some(owner) = known.and_then(|known| known.owner_references.iter().flatten().next()) {
            assert_eq!(owner.uid, self.model, "{:?} is another's", self.object.metadata.name);
        }
    }

    fn stamp(&self, meta: &mut ObjectMeta, known: Option<&ObjectMeta>, changed: bool) {
        meta.uid = Some(known.and_then(|known| known.uid.clone()).unwrap_or_else(|| self.uid.clone()));
        meta.creation_timestamp =
            known.map_or(Some(Time(self.now)), |known| known.creation_timestamp.clone());
        meta.resource_version = Some(self.version.clone());
        let generation = known.and_then(|known| known.generation).unwrap_or(0);
        meta.generation = Some(generation + i64::from(changed));
    }
}

impl VisitList for &Write<'_> {
    fn list<K: ChildObject>(self, list: &mut Vec<K>) {
        self.put_into(list);
    }
}

/// Whether a plan has nothing to do and nothing to tell.
pub(super) fn is_empty(plan: &Plan) -> bool {
    plan.actions.is_empty() && plan.status.is_none() && plan.tier_status.is_empty() && plan.events.is_empty()
}

fn node(index: usize, zone: &str) -> NodeView {
    let labels = [
        ("kubernetes.io/hostname".to_owned(), format!("node-{index}")),
        ("topology.kubernetes.io/zone".to_owned(), zone.to_owned()),
    ];
    NodeView { labels: BTreeMap::from(labels), ready: true }
}

pub(super) fn name(meta: &ObjectMeta) -> String {
    meta.name.clone().unwrap()
}

pub(super) fn component_of(pod: &Pod) -> &str {
    pod.metadata.labels.as_ref().and_then(|labels| labels.get(label::COMPONENT)).map_or("", String::as_str)
}

pub(super) fn set_condition(pod: &mut Pod, type_: &str, value: bool) {
    let conditions = pod.status.get_or_insert_default().conditions.get_or_insert_default();
    conditions.retain(|one| one.type_ != type_);
    let status = if value { "True" } else { "False" };
    conditions.push(PodCondition { type_: type_.into(), status: status.into(), ..PodCondition::default() });
}
