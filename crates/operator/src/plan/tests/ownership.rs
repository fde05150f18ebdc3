//! Whose objects are whose.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use k8s_openapi::{
    api::core::v1::{Pod, Service},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};

use super::{
    cluster::{Cluster, is_empty},
    samples,
};
use crate::plan::{Action, Plan};

fn applied(plan: &Plan) -> Vec<String> {
    let named = |action: &Action| match action {
        Action::Apply { object, why } => {
            let kind = &object.types.as_ref().unwrap().kind;
            Some(format!("{kind} {}: {why}", object.metadata.name.as_ref().unwrap()))
        }
        _ => None,
    };
    plan.actions.iter().filter_map(named).collect()
}

fn service(owner: Option<OwnerReference>) -> Service {
    let metadata = ObjectMeta {
        name: Some("pocket-http".into()),
        owner_references: owner.map(|owner| vec![owner]),
        ..ObjectMeta::default()
    };
    Service { metadata, ..Service::default() }
}

fn owner(kind: &str, name: &str, uid: &str) -> OwnerReference {
    OwnerReference {
        kind: kind.into(),
        name: name.into(),
        uid: uid.into(),
        controller: Some(true),
        ..OwnerReference::default()
    }
}

#[test]
fn an_object_of_somebody_else_is_never_touched() {
    for (other, whose) in [(None, "nobody"), (Some(owner("Gateway", "edge", "g")), "Gateway edge")] {
        let mut cluster = Cluster::new(samples::pocket());
        cluster.seen.children.services.push(service(other));
        let plan = cluster.plan();
        assert!(!applied(&plan).iter().any(|object| object.contains("pocket-http")));
        cluster.apply(&plan);
        let (status, reason, message) = cluster.condition("Degraded");
        assert_eq!((status.as_str(), reason.as_str()), ("True", "NameTaken"));
        assert_eq!(
            message,
            format!("Service pocket-http: the model needs this name, and the object belongs to {whose}")
        );
    }
}

#[test]
fn children_of_a_deleted_model_of_the_same_name_are_waited_for() {
    let mut cluster = Cluster::new(samples::pocket());
    cluster.seen.children.services.push(service(Some(owner("MoEModel", "pocket", "an-earlier-one"))));
    let plan = cluster.plan();
    assert!(!applied(&plan).iter().any(|object| object.contains("pocket-http")));
    cluster.apply(&plan);
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
    cluster.seen.children.services.retain(|one| one.metadata.uid.is_some());
    assert!(applied(&cluster.plan()).iter().any(|object| object.contains("pocket-http")));
}

#[test]
fn pods_of_a_deleted_stateful_set_are_waited_for_before_there_is_a_new_one() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.seen.children.stateful_sets.clear();
    let plan = cluster.plan();
    assert!(applied(&plan).is_empty(), "{:?}", applied(&plan));
    cluster.apply(&plan);
    let (status, _, message) = cluster.condition("Progressing");
    assert_eq!(status, "True");
    assert!(message.contains("still being removed: Pod pocket-experts-0, "), "{message}");
    // Orphaned ones are adopted by a new StatefulSet.
    let mut orphaned = Cluster::settled(samples::pocket());
    orphaned.seen.children.stateful_sets.clear();
    for pod in orphaned.seen.pods.iter_mut() {
        if pod.metadata.name.as_ref().unwrap().starts_with("pocket-experts") {
            pod.metadata.owner_references = None;
        }
    }
    for mut cluster in [cluster, orphaned] {
        cluster.seen.pods.retain(|pod| {
            let meta = &pod.metadata;
            !meta.name.as_ref().unwrap().starts_with("pocket-experts") || meta.owner_references.is_none()
        });
        assert_eq!(applied(&cluster.plan()), ["StatefulSet pocket-experts: it does not exist"]);
    }
}

#[test]
fn an_orphan_with_our_labels_is_taken_back() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.seen.children.services[0].metadata.owner_references = None;
    let name = cluster.seen.children.services[0].metadata.name.clone().unwrap();
    assert_eq!(
        applied(&cluster.plan()),
        [format!("Service {name}: metadata.ownerReferences is not as applied")]
    );
    cluster.settle();
    assert!(cluster.seen.children.services[0].metadata.owner_references.is_some());
}

#[test]
fn a_field_of_ours_that_somebody_changed_is_corrected_and_one_of_theirs_is_left() {
    let mut cluster = Cluster::settled(samples::pocket());
    let meta = &mut cluster.seen.children.deployments[0].metadata;
    meta.labels.as_mut().unwrap().insert("team".into(), "blue".into());
    meta.annotations.as_mut().unwrap().insert("deployment.kubernetes.io/revision".into(), "3".into());
    assert!(is_empty(&cluster.plan()));
    let spec = cluster.seen.children.deployments[0].spec.as_mut().unwrap();
    spec.template.spec.as_mut().unwrap().containers[0].image = Some("evil:1".into());
    let name = cluster.seen.children.deployments[0].metadata.name.clone().unwrap();
    assert_eq!(
        applied(&cluster.plan()),
        [format!("Deployment {name}: spec.template.spec.containers.image is not as applied")]
    );
}

#[test]
fn a_child_that_was_deleted_is_made_again() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.seen.children.config_maps.clear();
    assert_eq!(applied(&cluster.plan()), ["ConfigMap pocket-layout: it does not exist"]);
}

#[test]
fn a_child_of_another_version_of_the_operator_is_removed() {
    let mut cluster = Cluster::settled(samples::pocket());
    let uid = cluster.seen.model.metadata.uid.clone().unwrap();
    let mut old = service(Some(owner("MoEModel", "pocket", &uid)));
    old.metadata.name = Some("pocket-old".into());
    old.metadata.uid = Some("old".into());
    cluster.seen.children.services.push(old);
    let plan = cluster.plan();
    assert!(
        matches!(&plan.actions[..], [Action::Delete { name, uid, .. }] if name == "pocket-old" && uid == "old"),
        "{:?}",
        plan.actions
    );
}

#[test]
fn a_pod_that_only_has_our_labels_is_nobodys() {
    let mut cluster = Cluster::settled(samples::pocket());
    let mut pod: Pod = cluster.first("decode").clone();
    pod.metadata.name = Some("soak".into());
    pod.metadata.uid = Some("soak".into());
    pod.metadata.owner_references = Some(vec![owner("Job", "soak", "j")]);
    cluster.seen.pods.push(pod);
    let plan = cluster.plan();
    assert!(is_empty(&plan), "{}", crate::plan::render(&plan));
    assert!(plan.operator_view.unwrap().pods.iter().all(|known| known.pod.name != "soak"));
}
