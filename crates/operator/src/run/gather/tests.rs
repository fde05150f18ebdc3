#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, StatefulSet},
        core::v1::{Node, ObjectReference, PersistentVolumeClaim},
    },
    apimachinery::pkg::apis::meta::v1::{OwnerReference, Time},
};
use kube::Resource;
use serde_json::json;

use super::*;
use crate::run::{
    queue::ModelKey,
    testing::{at, key, model, pod},
};

fn observe(stores: &Stores) -> Observed {
    gather(stores, &key(), &Memory::new("model-uid".into(), at(0)), None, &Settings::default(), None, at(100))
        .unwrap()
}

fn stores() -> Stores {
    let stores = Stores::new();
    stores.models.apply(model("10"));
    stores
}

fn named<K: Resource<DynamicType = ()> + Default>(name: &str, created: i64) -> K {
    let mut object = K::default();
    let meta = object.meta_mut();
    meta.name = Some(name.into());
    meta.namespace = Some("ns".into());
    meta.uid = Some(format!("uid-{name}"));
    meta.creation_timestamp = Some(Time(at(created)));
    meta.labels = Some([("cadre.dev/model".to_owned(), "m".to_owned())].into());
    object
}

fn event(kind: &str, name: &str, uid: Option<&str>, seen: i64, message: &str) -> Event {
    let mut event: Event = named(&format!("{name}.{seen}"), seen);
    event.involved_object = ObjectReference {
        kind: Some(kind.into()),
        namespace: Some("ns".into()),
        name: Some(name.into()),
        uid: uid.map(str::to_owned),
        ..ObjectReference::default()
    };
    event.last_timestamp = Some(Time(at(seen)));
    event.message = Some(message.into());
    event
}

fn pod_of(kind: &str, owner: &str, name: &str, created: i64) -> Pod {
    let mut pod = pod(name, "1");
    pod.metadata.creation_timestamp = Some(Time(at(created)));
    let owner = OwnerReference { kind: kind.into(), name: owner.into(), ..OwnerReference::default() };
    pod.metadata.owner_references = Some(vec![owner]);
    pod
}

#[test]
fn a_refusal_counts_until_a_pod_could_be_made_after_it() {
    let stores = stores();
    stores.children.stateful_sets.apply(named::<StatefulSet>("m-experts", 0));
    stores.children.deployments.apply(named::<Deployment>("m-decode", 0));
    stores.refusals.apply(event("StatefulSet", "m-experts", None, 20, "first"));
    stores.refusals.apply(event("StatefulSet", "m-experts", None, 30, "quota"));
    stores.refusals.apply(event("ReplicaSet", "m-decode-6f9c", None, 30, "pod security"));
    stores.refusals.apply(event("ReplicaSet", "m-decode-more-6f9c", None, 40, "another workload"));
    // Two of four fitted into the quota.
    stores.pods.apply(pod_of("StatefulSet", "m-experts", "m-experts-0", 25));
    let expected = [("m-decode", "pod security"), ("m-experts", "quota")];
    let refused = observe(&stores).refused_pods;
    assert_eq!(refused, expected.map(|(name, message)| (name.to_owned(), message.to_owned())).into());

    stores.pods.apply(pod_of("StatefulSet", "m-experts", "m-experts-1", 31));
    stores.pods.apply(pod_of("ReplicaSet", "m-decode-77aa", "m-decode-77aa-x", 31));
    assert!(observe(&stores).refused_pods.is_empty());
}

#[test]
fn an_event_of_a_former_workload_of_the_name_does_not_count() {
    let stores = stores();
    stores.children.stateful_sets.apply(named::<StatefulSet>("m-experts", 50));
    stores.refusals.apply(event("StatefulSet", "m-experts", None, 30, "quota"));
    assert!(observe(&stores).refused_pods.is_empty());
}

#[test]
fn a_failed_mount_is_of_this_pod_and_only_while_it_waits() {
    let stores = stores();
    stores.pods.apply(pod("m-decode-0", "1"));
    stores.failed_mounts.apply(event("Pod", "m-decode-0", Some("uid-of-another"), 10, "theirs"));
    assert!(observe(&stores).failed_mounts.is_empty());
    stores.failed_mounts.apply(event("Pod", "m-decode-0", Some("uid-m-decode-0"), 12, "no such folder"));
    assert_eq!(observe(&stores).failed_mounts["m-decode-0"], "no such folder");
    let mut running = pod("m-decode-0", "2");
    running.status = Some(serde_json::from_value(json!({"phase": "Running"})).unwrap());
    stores.pods.apply(running);
    assert!(observe(&stores).failed_mounts.is_empty());
}

#[test]
fn claims_and_nodes_of_the_model_are_found() {
    let stores = stores();
    assert!(matches!(observe(&stores).claim, ClaimState::Missing));
    let change = stores.claims.apply(named::<PersistentVolumeClaim>("weights", 0));
    assert_eq!(stores.of_claim(&change), [key()]);
    assert!(matches!(observe(&stores).claim, ClaimState::Found(_)));
    assert!(stores.of_claim(&stores.claims.apply(named("other", 0))).is_empty());

    let mut placed = pod("m-decode-0", "1");
    placed.spec = Some(serde_json::from_value(json!({"nodeName": "n1", "containers": []})).unwrap());
    stores.pods.apply(placed);
    let node = |version: &str, ready: &str| -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": "n1", "resourceVersion": version, "labels": {"zone": "a"}},
            "status": {"conditions": [{"type": "Ready", "status": ready, "lastHeartbeatTime": "2026-01-01T00:00:00Z"}]},
        }))
        .unwrap()
    };
    assert_eq!(stores.of_node(&stores.nodes.apply(node("1", "True"))), [key()]);
    assert!(stores.of_node(&stores.nodes.apply(node("2", "True"))).is_empty(), "a heartbeat is no change");
    assert_eq!(stores.of_node(&stores.nodes.apply(node("3", "Unknown"))), [key()]);
    let nodes = observe(&stores).nodes;
    assert!(!nodes["n1"].ready && nodes["n1"].labels["zone"] == "a");
}

#[test]
fn events_and_tiers_trigger_the_model_that_they_are_about() {
    let stores = stores();
    stores.pods.apply(pod("m-decode-0", "1"));
    stores.children.deployments.apply(named::<Deployment>("m-router", 0));
    let trigger = |event: Event| stores.of_event(&stores.refusals.apply(event));
    assert_eq!(trigger(event("Pod", "m-decode-0", None, 1, "x")), [key()]);
    assert_eq!(trigger(event("ReplicaSet", "m-router-5d4", None, 1, "x")), [key()]);
    assert!(trigger(event("Pod", "unknown", None, 1, "x")).is_empty());

    let tier = json!({
        "metadata": {"name": "m-decode", "namespace": "ns", "uid": "u"},
        "spec": {"modelName": "somebody", "tier": "Decode", "replicas": 1, "declaredReplicas": 1},
    });
    let change = stores.tiers.apply(serde_json::from_value(tier).unwrap());
    let models = stores.of_tier(&change);
    assert!(models.contains(&key()) && models.contains(&ModelKey::new("ns", "somebody")), "{models:?}");
    // Whoever owns it, the plan sees that the name is taken.
    assert_eq!(observe(&stores).tiers[&Tier::Decode].spec.model_name, "somebody");
}
