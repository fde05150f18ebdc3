//! The stores of every kind that a plan reads, and which models a change concerns.

use std::collections::BTreeMap;

use cadre_k8s_api::{MoEModel, MoETier, Tier, model::SourceRef, names::label};
use k8s_openapi::api::core::v1::{Event, Node, PersistentVolumeClaim, Pod};
use kube::{Resource, ResourceExt};

pub(crate) use children::{ChildStores, VisitStore};

use super::{
    queue::ModelKey,
    store::{Change, Store, Version},
};
use crate::{observed::NodeView, plan::ObjectKind};

mod children;

/// One store per kind.
#[derive(Clone, Debug)]
pub(crate) struct Stores {
    pub(crate) models: Store<MoEModel>,
    pub(crate) tiers: Store<MoETier>,
    pub(crate) children: ChildStores,
    pub(crate) pods: Store<Pod>,
    pub(crate) claims: Store<PersistentVolumeClaim>,
    pub(crate) nodes: Store<Node>,
    /// Events FailedCreate: pods that were refused.
    pub(crate) refusals: Store<Event>,
    /// Events FailedMount.
    pub(crate) failed_mounts: Store<Event>,
}

impl Stores {
    /// Empty ones.
    pub(crate) fn new() -> Self {
        Self {
            models: Store::new(|model| Some(own_key(model))),
            tiers: Store::new(|tier| Some(ModelKey::new(tier.namespace()?, tier.spec.model_name.clone()))),
            children: ChildStores::new(),
            pods: Store::new(labelled),
            claims: Store::new(|_| None),
            nodes: Store::new(|_| None),
            refusals: Store::new(|_| None),
            failed_mounts: Store::new(|_| None),
        }
    }

    /// The state of a child or pod.
    pub(crate) fn version(&self, kind: ObjectKind, namespace: &str, name: &str) -> Option<Version> {
        match kind {
            ObjectKind::Tier => self.tiers.version(namespace, name),
            ObjectKind::Pod => self.pods.version(namespace, name),
            _ => self.children.version(kind, namespace, name),
        }
    }

    /// Every model.
    pub(crate) fn keys(&self) -> Vec<ModelKey> {
        self.models.matching(|_| true).iter().map(|model| own_key(model)).collect()
    }

    /// Models whose tier has the object's name, or that the object names.
    pub(crate) fn of_tier(&self, change: &Change<MoETier>) -> Vec<ModelKey> {
        let of = |tier: &MoETier| {
            let namespace = tier.namespace().unwrap_or_default();
            let name = tier.name_any();
            let by_name = Tier::ALL
                .into_iter()
                .filter_map(|tier| name.strip_suffix(tier.suffix())?.strip_suffix('-'))
                .map(|model| ModelKey::new(namespace.clone(), model));
            by_name.chain(self.tiers.model_of(tier)).collect::<Vec<_>>()
        };
        change.sides().flat_map(of).collect()
    }

    /// Models with a pod on a node that is not what it was. Heartbeats are no change.
    pub(crate) fn of_node(&self, change: &Change<Node>) -> Vec<ModelKey> {
        if change.old.as_deref().map(node_view) == change.new.as_deref().map(node_view) {
            return Vec::new();
        }
        let Some(name) = change.sides().next().map(ResourceExt::name_any) else { return Vec::new() };
        let pods = self.pods.matching(|pod| node_of(pod) == Some(name.as_str()));
        pods.iter().filter_map(|pod| labelled(&**pod)).collect()
    }

    /// Models whose checkpoint is in a claim.
    pub(crate) fn of_claim(&self, change: &Change<PersistentVolumeClaim>) -> Vec<ModelKey> {
        let Some(claim) = change.sides().next() else { return Vec::new() };
        let (namespace, name) = (claim.namespace(), claim.name_any());
        let models = self
            .models
            .matching(|model| model.namespace() == namespace && claim_name(model) == Some(name.as_str()));
        models.iter().map(|model| own_key(model)).collect()
    }

    /// Models with the pod or the workload that an event is about. An event that comes before its object does needs
    /// no trigger: the object will be one.
    pub(crate) fn of_event(&self, change: &Change<Event>) -> Vec<ModelKey> {
        let of = |event: &Event| {
            let about = &event.involved_object;
            let (namespace, name) = (about.namespace.as_deref()?, about.name.as_deref()?);
            match about.kind.as_deref()? {
                "Pod" => labelled(&*self.pods.get(namespace, name)?),
                "StatefulSet" => labelled(&*self.children.stateful_sets.get(namespace, name)?),
                "ReplicaSet" => labelled(&*self.children.deployments.get(namespace, deployment_of(name)?)?),
                _ => None,
            }
        };
        change.sides().filter_map(of).collect()
    }
}

/// Copies of what stores share.
pub(crate) fn owned<K: Clone>(objects: Vec<std::sync::Arc<K>>) -> Vec<K> {
    objects.iter().map(|object| (**object).clone()).collect()
}

/// The model that the label names.
pub(crate) fn labelled<K: Resource<DynamicType = ()>>(object: &K) -> Option<ModelKey> {
    let name = object.labels().get(label::MODEL)?;
    Some(ModelKey::new(object.namespace()?, name.clone()))
}

/// Namespace and name of a model itself.
pub(crate) fn own_key(model: &MoEModel) -> ModelKey {
    ModelKey::new(model.namespace().unwrap_or_default(), model.name_any())
}

/// The Deployment that a ReplicaSet is of, by the form of its name.
pub(crate) fn deployment_of(replica_set: &str) -> Option<&str> {
    Some(replica_set.rsplit_once('-')?.0)
}

/// The node that a pod is on.
pub(crate) fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

/// The claim that a model's checkpoint is in.
pub(crate) fn claim_name(model: &MoEModel) -> Option<&str> {
    match model.spec.model.source.given()? {
        SourceRef::Claim(claim) => Some(&claim.claim_name),
        _ => None,
    }
}

/// What matters of a node.
pub(crate) fn node_view(node: &Node) -> NodeView {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    NodeView {
        labels: node
            .labels()
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect::<BTreeMap<_, _>>(),
        ready: conditions
            .into_iter()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True"),
    }
}
