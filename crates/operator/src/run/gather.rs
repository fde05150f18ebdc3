//! From the stores to [`Observed`]: everything that a plan of one model reads, at one moment.

use std::collections::BTreeMap;

use cadre_k8s_api::Tier;
use k8s_openapi::{
    api::core::v1::{Event, Pod},
    jiff::Timestamp,
};
use kube::ResourceExt;

use super::{
    memory::Memory,
    queue::ModelKey,
    stores::{Stores, claim_name, deployment_of, node_of, node_view, owned},
};
use crate::{
    allowed::Allowed,
    observed::{ClaimState, CoordinatorReport, NodeView, Observed},
};

/// What is the same for all models.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    /// Image of pods whose model names none.
    pub(crate) default_image: String,
    /// Namespace of the operator's own pods.
    pub(crate) operator_namespace: Option<String>,
    /// What models may ask for.
    pub(crate) allowed: Allowed,
}

/// What is observed of a model; `None` if there is no such model.
pub(crate) fn gather(
    stores: &Stores,
    key: &ModelKey,
    memory: &Memory,
    coordinator: Option<CoordinatorReport>,
    settings: &Settings,
    cluster_secret: Option<String>,
    now: Timestamp,
) -> Option<Observed> {
    let model = stores.models.get(&key.namespace, &key.name)?;
    let pods = owned(stores.pods.of_model(key));
    let mut observed = Observed {
        tiers: tiers(stores, key),
        children: stores.children.of_model(key),
        refused_pods: BTreeMap::new(),
        failed_mounts: failed_mounts(stores, key, &pods),
        claim: claim(stores, key, claim_name(&model)),
        nodes: nodes(stores, &pods),
        pods,
        coordinator,
        refused_children: memory.refused.clone(),
        default_image: settings.default_image.clone(),
        operator_namespace: settings.operator_namespace.clone(),
        allowed: settings.allowed.clone(),
        cluster_secret,
        watching_since: memory.since,
        now,
        model: (*model).clone(),
    };
    observed.refused_pods = refused_pods(stores, key, &observed);
    // Objects of our names without our label are in no store.
    memory.strangers.add_to(&mut observed.children);
    Some(observed)
}

/// By name: a tier that belongs to another model is seen too, so that the plan can say whose it is.
fn tiers(stores: &Stores, key: &ModelKey) -> BTreeMap<Tier, cadre_k8s_api::MoETier> {
    let object = |tier: Tier| stores.tiers.get(&key.namespace, &tier.object_name(&key.name));
    Tier::ALL.into_iter().filter_map(|tier| Some((tier, (*object(tier)?).clone()))).collect()
}

fn claim(stores: &Stores, key: &ModelKey, name: Option<&str>) -> ClaimState {
    let Some(name) = name else { return ClaimState::NotNamed };
    match stores.claims.get(&key.namespace, name) {
        Some(claim) => ClaimState::Found(Box::new((*claim).clone())),
        None => ClaimState::Missing,
    }
}

fn nodes(stores: &Stores, pods: &[Pod]) -> BTreeMap<String, NodeView> {
    let node = |name: &str| Some((name.to_owned(), node_view(&*stores.nodes.get("", name)?)));
    pods.iter().filter_map(node_of).filter_map(node).collect()
}

/// Events outlive what they tell of by an hour. A refusal counts until a pod of the workload could be made after it;
/// of several the last counts.
fn refused_pods(stores: &Stores, key: &ModelKey, observed: &Observed) -> BTreeMap<String, String> {
    let created = |meta: &kube::api::ObjectMeta| meta.creation_timestamp.as_ref().map(|time| time.0);
    let deployments = observed.children.deployments.iter().map(|object| ("ReplicaSet", &object.metadata));
    let sets = observed.children.stateful_sets.iter().map(|object| ("StatefulSet", &object.metadata));
    let mut refused = BTreeMap::new();
    for (kind, meta) in deployments.chain(sets) {
        let Some(workload) = meta.name.as_deref() else { continue };
        let is_of = |name: &str| match kind {
            "ReplicaSet" => deployment_of(name) == Some(workload),
            _ => name == workload,
        };
        let pods = observed.pods.iter().filter(|pod| {
            pod.owner_references().iter().any(|owner| owner.kind == kind && is_of(&owner.name))
        });
        let since = pods.filter_map(|pod| created(&pod.metadata)).chain(created(meta)).max();
        let last = last_event(stores.refusals.matching(|event| {
            let about = &event.involved_object;
            about.kind.as_deref() == Some(kind)
                && about.namespace.as_deref() == Some(&*key.namespace)
                && about.name.as_deref().is_some_and(is_of)
        }));
        if let Some((at, message)) = last
            && since.is_none_or(|since| at >= since)
        {
            refused.insert(workload.to_owned(), message);
        }
    }
    refused
}

/// Of pods that have not started; a pod that runs has its volumes, whatever an event of the past hour says.
fn failed_mounts(stores: &Stores, key: &ModelKey, pods: &[Pod]) -> BTreeMap<String, String> {
    let pending = pods.iter().filter(|pod| {
        pod.status.as_ref().and_then(|status| status.phase.as_deref()).is_none_or(|phase| phase == "Pending")
    });
    let failure = |pod: &Pod| {
        let (name, uid) = (pod.name_any(), pod.uid());
        let events = stores.failed_mounts.matching(|event| {
            let about = &event.involved_object;
            about.namespace.as_deref() == Some(&*key.namespace)
                && about.name.as_deref() == Some(&*name)
                && about.uid == uid
        });
        Some((name, last_event(events)?.1))
    };
    pending.filter_map(failure).collect()
}

/// When the last of the events was seen last, and its message.
fn last_event(events: Vec<std::sync::Arc<Event>>) -> Option<(Timestamp, String)> {
    let last = events.iter().max_by_key(|event| seen(event))?;
    Some((seen(last)?, last.message.clone()?))
}

fn seen(event: &Event) -> Option<Timestamp> {
    let series =
        event.series.as_ref().and_then(|series| series.last_observed_time.as_ref()).map(|time| time.0);
    let last = event.last_timestamp.as_ref().map(|time| time.0);
    let first = event.event_time.as_ref().map(|time| time.0);
    let made = event.metadata.creation_timestamp.as_ref().map(|time| time.0);
    [series, last, first].into_iter().flatten().max().or(made)
}

#[cfg(test)]
mod tests;
