#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_k8s_api::{MoEModelStatus, MoETier, MoETierStatus, Tier, names::label};
use k8s_openapi::api::apps::v1::Deployment;
use kube::core::DynamicObject;
use serde_json::{Value, json};

use super::*;
use crate::{
    observed::Observed,
    plan::{Action, ObjectKind, Transition},
    run::testing::{Call, key, model, nothing, pod, rig},
};

fn deployment(name: &str, resource_version: &str) -> Deployment {
    let mut deployment = Deployment::default();
    deployment.metadata.name = Some(name.into());
    deployment.metadata.namespace = Some("ns".into());
    deployment.metadata.uid = Some(format!("uid-{name}"));
    deployment.metadata.resource_version = Some(resource_version.into());
    deployment.metadata.labels = Some([(label::MODEL.to_owned(), "m".to_owned())].into());
    deployment
}

fn tier() -> MoETier {
    let tier = json!({
        "apiVersion": "cadre.dev/v1alpha1", "kind": "MoETier",
        "metadata": {"name": "m-decode", "namespace": "ns", "uid": "uid-tier", "resourceVersion": "5"},
        "spec": {"modelName": "m", "tier": "Decode", "replicas": 1, "declaredReplicas": 1},
    });
    serde_json::from_value(tier).unwrap()
}

fn apply(kind: ObjectKind, name: &str) -> Action {
    let object = DynamicObject::new(name, &kind.resource()).within("ns").data(json!({"spec": {"of": name}}));
    Action::Apply { object: Box::new(object), why: "test".into() }
}

fn delete(kind: ObjectKind, name: &str) -> Action {
    Action::Delete {
        kind,
        name: name.into(),
        uid: format!("uid-{name}"),
        resource_version: Some("7".into()),
        force: false,
        why: "test".into(),
    }
}

fn gate(pod: &str, routable: bool) -> Action {
    Action::SetRoutable {
        pod: pod.into(),
        uid: format!("uid-{pod}"),
        routable,
        reason: "Admitted".into(),
        message: "a step ran".into(),
    }
}

fn status(epoch: i64) -> MoEModelStatus {
    MoEModelStatus { placement_epoch: Some(epoch), ..MoEModelStatus::default() }
}

fn with_actions(actions: Vec<Action>) -> Plan {
    Plan { actions, ..nothing() }
}

const DEPLOYMENT: &str = "PATCH /apis/apps/v1/namespaces/ns/deployments/m-router";
const MODEL_STATUS: &str = "PATCH /apis/cadre.dev/v1alpha1/namespaces/ns/moemodels/m/status";

fn assert_forced_apply(call: &Call) {
    assert_eq!(call.content_type, "application/apply-patch+yaml");
    assert!(
        call.query.contains("force=true") && call.query.contains("fieldManager=cadre-operator"),
        "{}",
        call.query
    );
}

#[tokio::test(start_paused = true)]
async fn one_reconcile_is_this_sequence_of_requests() {
    let mut rig = rig(|_| Plan {
        actions: vec![
            apply(ObjectKind::Service, "m-grpc"),
            apply(ObjectKind::Deployment, "m-router"),
            gate("m-decode-0", true),
            gate("m-decode-1", false),
            delete(ObjectKind::Pod, "m-experts-3"),
        ],
        status: Some(status(4)),
        tier_status: vec![(Tier::Decode, MoETierStatus { replicas: 1, ..MoETierStatus::default() })],
        events: vec![Transition {
            warning: true,
            reason: "PodsMissing".into(),
            action: "Observe".into(),
            note: "one is missing".into(),
        }],
        operator_view: None,
        requeue: Some(Duration::from_secs(7)),
    });
    rig.stores.children.deployments.apply(deployment("m-router", "3"));
    rig.stores.tiers.apply(tier());
    for name in ["m-decode-0", "m-decode-1", "m-experts-3"] {
        rig.stores.pods.apply(pod(name, "7"));
    }
    let reconcile = rig.reconcile();
    let server = &mut rig.server;

    // Nobody knows it: it may be somebody else's.
    server.expect("GET /api/v1/namespaces/ns/services/m-grpc").await.fail(404, "NotFound", "no such service");
    let call = server.expect("PATCH /api/v1/namespaces/ns/services/m-grpc").await;
    assert_forced_apply(&call);
    assert_eq!(call.body["spec"]["of"], "m-grpc");
    call.applied("20");
    // Known to be ours.
    let call = server.expect(DEPLOYMENT).await;
    assert_forced_apply(&call);
    call.applied("21");
    // Gates side by side: both are asked before either is answered.
    let first = server.expect("PATCH /api/v1/namespaces/ns/pods/m-decode-0/status").await;
    let second = server.expect("PATCH /api/v1/namespaces/ns/pods/m-decode-1/status").await;
    assert_eq!(first.content_type, "application/strategic-merge-patch+json");
    assert_eq!(first.body["metadata"], json!({"uid": "uid-m-decode-0"}));
    let condition = &first.body["status"]["conditions"][0];
    assert_eq!(condition["type"], "cadre.dev/Routable");
    assert_eq!((&condition["status"], &condition["reason"]), (&json!("True"), &json!("Admitted")));
    assert_eq!(second.body["status"]["conditions"][0]["status"], "False");
    second.applied("23");
    first.applied("22");
    // Exactly the observed pod.
    let call = server.expect("DELETE /api/v1/namespaces/ns/pods/m-experts-3").await;
    assert_eq!(call.body["preconditions"], json!({"uid": "uid-m-experts-3", "resourceVersion": "7"}));
    assert_eq!(call.body["gracePeriodSeconds"], Value::Null);
    call.ok(json!({"kind": "Status", "status": "Success", "apiVersion": "v1", "metadata": {}}));
    // Status last, the model's after its tiers'.
    let call = server.expect("PATCH /apis/cadre.dev/v1alpha1/namespaces/ns/moetiers/m-decode/status").await;
    assert_forced_apply(&call);
    assert_eq!(call.body["metadata"], json!({"name": "m-decode"}));
    call.applied("24");
    let call = server.expect(MODEL_STATUS).await;
    assert_forced_apply(&call);
    assert_eq!(call.body["status"], json!({"placementEpoch": 4}));
    assert_eq!(call.body["metadata"], json!({"name": "m"}));
    call.applied("25");
    let call = server.expect("POST /apis/events.k8s.io/v1/namespaces/ns/events").await;
    assert_eq!((&call.body["reason"], &call.body["type"]), (&json!("PodsMissing"), &json!("Warning")));
    assert_eq!(call.body["regarding"]["uid"], "model-uid");
    let event = call.body.clone();
    call.ok(event);

    assert_eq!(reconcile.await.unwrap(), Some(Duration::from_secs(7)));
    assert_eq!(rig.outcomes("written"), 1);
    rig.server.assert_idle();
}

#[tokio::test(start_paused = true)]
async fn a_steady_model_costs_no_request() {
    let mut rig = rig(|observed| Plan {
        // Whatever is said already is not said again.
        status: observed.model.status.clone(),
        tier_status: observed
            .tiers
            .values()
            .map(|tier| (tier.spec.tier, tier.status.clone().unwrap()))
            .collect(),
        ..nothing()
    });
    let mut known = model("10");
    known.status = Some(status(4));
    rig.stores.models.apply(known);
    let mut tier = tier();
    tier.status = Some(MoETierStatus::default());
    rig.stores.tiers.apply(tier);
    assert_eq!(rig.reconcile().await.unwrap(), Some(RESYNC));
    assert_eq!(rig.outcomes("steady"), 1);
    rig.server.assert_idle();
}

#[tokio::test(start_paused = true)]
async fn nothing_is_planned_from_before_our_own_write() {
    let mut rig = rig(|observed| {
        let written = observed.children.deployments.iter().any(|deployment| deployment.spec.is_some());
        if written { nothing() } else { with_actions(vec![apply(ObjectKind::Deployment, "m-router")]) }
    });
    rig.stores.children.deployments.apply(deployment("m-router", "3"));
    let reconcile = rig.reconcile();
    rig.server.expect(DEPLOYMENT).await.applied("20");
    reconcile.await.unwrap();

    // The watch is slow: the same plan would be made again.
    let again = rig.reconcile().await.unwrap().unwrap();
    assert!(again <= Duration::from_secs(5), "{again:?}");
    rig.stores.children.deployments.apply(deployment("m-router", "19"));
    rig.reconcile().await.unwrap();
    assert_eq!(rig.outcomes("behind"), 2);
    let mut shown = deployment("m-router", "21");
    shown.spec = Some(Default::default());
    rig.stores.children.deployments.apply(shown);
    rig.reconcile().await.unwrap();
    assert_eq!((rig.outcomes("written"), rig.outcomes("steady")), (1, 1));
    rig.server.assert_idle();
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_never_shows_the_write_does_not_stop_the_work() {
    let mut rig = rig(|_| with_actions(vec![apply(ObjectKind::Deployment, "m-router")]));
    rig.stores.children.deployments.apply(deployment("m-router", "3"));
    let reconcile = rig.reconcile();
    rig.server.expect(DEPLOYMENT).await.applied("20");
    reconcile.await.unwrap();
    let left = rig.reconcile().await.unwrap().unwrap();
    tokio::time::advance(left).await;
    let reconcile = rig.reconcile();
    rig.server.expect(DEPLOYMENT).await.applied("20");
    reconcile.await.unwrap();
    assert_eq!((rig.outcomes("behind"), rig.outcomes("written")), (1, 2));
}

#[tokio::test(start_paused = true)]
async fn a_conflict_is_planned_again_soon_and_nothing_is_deleted_or_said_meanwhile() {
    let mut rig = rig(|_| Plan {
        actions: vec![apply(ObjectKind::Deployment, "m-router"), delete(ObjectKind::Pod, "m-experts-0")],
        status: Some(status(1)),
        ..nothing()
    });
    rig.stores.children.deployments.apply(deployment("m-router", "3"));
    let reconcile = rig.reconcile();
    rig.server.expect(DEPLOYMENT).await.fail(409, "Conflict", "the object has been modified");
    let again = reconcile.await.unwrap().unwrap();
    assert!(again <= Duration::from_millis(100), "{again:?}");
    assert_eq!(rig.outcomes("stale"), 1);
    rig.server.assert_idle();
}

#[tokio::test(start_paused = true)]
async fn a_refused_child_is_remembered_with_the_servers_words_and_forgotten_after_success() {
    let mut rig = rig(|observed: &Observed| {
        let refused = observed.refused_children.get("Deployment m-router").cloned();
        Plan {
            actions: vec![
                apply(ObjectKind::Deployment, "m-router"),
                gate("m-decode-0", true),
                delete(ObjectKind::Pod, "m-experts-0"),
            ],
            status: Some(MoEModelStatus { model_hash: refused, ..status(1) }),
            requeue: Some(Duration::from_secs(60)),
            ..nothing()
        }
    });
    rig.stores.children.deployments.apply(deployment("m-router", "3"));
    rig.stores.pods.apply(pod("m-decode-0", "4"));
    let gate = "PATCH /api/v1/namespaces/ns/pods/m-decode-0/status";
    let mut delays = Vec::new();
    for said in [Value::Null, json!("quota exceeded")] {
        let reconcile = rig.reconcile();
        rig.server.expect(DEPLOYMENT).await.fail(403, "Forbidden", "quota exceeded");
        // What does not depend on it is done; a pod that would come back as it was stays.
        rig.server.expect(gate).await.applied("4");
        let call = rig.server.expect(MODEL_STATUS).await;
        assert_eq!(call.body["status"]["modelHash"], said);
        call.applied("10");
        delays.push(reconcile.await.unwrap().unwrap());
    }
    assert!(delays[0] < Duration::from_secs(1) && delays[1] > delays[0], "{delays:?}");

    let reconcile = rig.reconcile();
    rig.server.expect(DEPLOYMENT).await.applied("3");
    rig.server.expect(gate).await.applied("4");
    let delete = rig.server.expect("DELETE /api/v1/namespaces/ns/pods/m-experts-0").await;
    // It is gone already: as wanted.
    delete.fail(404, "NotFound", "no such pod");
    reconcile.await.unwrap();
    let memory = rig.reconciler.memories.recall(&key(), "model-uid").unwrap();
    assert!(memory.lock().await.refused.is_empty());
    assert_eq!((rig.outcomes("refused"), rig.outcomes("stale")), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_asks_for_silence_gets_it() {
    let mut rig = rig(|_| Plan {
        actions: vec![apply(ObjectKind::Deployment, "m-router"), gate("m-decode-0", true)],
        status: Some(status(1)),
        ..nothing()
    });
    rig.stores.children.deployments.apply(deployment("m-router", "3"));
    let reconcile = rig.reconcile();
    let call = rig.server.expect(DEPLOYMENT).await;
    call.fail_with(429, "TooManyRequests", "too many", &[("retry-after", "9")], Value::Null);
    // Nothing else of the pass is tried.
    assert_eq!(reconcile.await.unwrap(), Some(Duration::from_secs(9)));
    tokio::time::advance(Duration::from_secs(4)).await;
    assert_eq!(rig.reconcile().await.unwrap(), Some(Duration::from_secs(5)));
    assert_eq!(rig.outcomes("failed"), 1, "a reconcile that did not start is none");
    rig.server.assert_idle();
    tokio::time::advance(Duration::from_secs(5)).await;
    let reconcile = rig.reconcile();
    rig.server.expect(DEPLOYMENT).await.break_off();
    assert!(reconcile.await.unwrap().unwrap() < Duration::from_secs(1));
    assert_eq!(rig.outcomes("failed"), 2);
    assert_eq!(rig.metrics.api_requests.with(&["apply", "deployments", "none"]).get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_answer_is_not_waited_for_without_end() {
    let mut rig = rig(|_| Plan { status: Some(status(1)), ..nothing() });
    let reconcile = rig.reconcile();
    let unanswered = rig.server.expect(MODEL_STATUS).await;
    assert!(reconcile.await.unwrap().is_some());
    assert_eq!(rig.outcomes("timeout"), 1);
    drop(unanswered);
}

#[tokio::test(start_paused = true)]
async fn somebody_elses_object_is_never_applied_over() {
    let mut rig = rig(|observed: &Observed| {
        let taken = observed
            .children
            .services
            .iter()
            .any(|service| service.metadata.uid.as_deref() == Some("theirs"));
        if taken { nothing() } else { with_actions(vec![apply(ObjectKind::Service, "m-http")]) }
    });
    let get = "GET /api/v1/namespaces/ns/services/m-http";
    let theirs = json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "m-http", "namespace": "ns", "uid": "theirs", "resourceVersion": "1"}});
    let reconcile = rig.reconcile();
    rig.server.expect(get).await.ok(theirs.clone());
    assert!(reconcile.await.unwrap().unwrap() < Duration::from_secs(1), "the plan must learn of it at once");
    assert_eq!(rig.reconcile().await.unwrap(), Some(RECHECK));
    rig.server.assert_idle();

    // It is looked up again, and once it is gone the name is ours.
    tokio::time::advance(RECHECK).await;
    let reconcile = rig.reconcile();
    rig.server.expect(get).await.ok(theirs);
    reconcile.await.unwrap();
    tokio::time::advance(RECHECK).await;
    let reconcile = rig.reconcile();
    rig.server.expect(get).await.fail(404, "NotFound", "gone");
    rig.server.expect(get).await.fail(404, "NotFound", "gone");
    rig.server.expect("PATCH /api/v1/namespaces/ns/services/m-http").await.applied("30");
    reconcile.await.unwrap();
    assert_eq!((rig.outcomes("stale"), rig.outcomes("steady"), rig.outcomes("written")), (1, 2, 1));
}

#[tokio::test(start_paused = true)]
async fn our_own_child_without_its_label_is_applied_again() {
    let mut rig = rig(|_| with_actions(vec![apply(ObjectKind::Service, "m-http")]));
    let owner =
        json!([{"apiVersion": "cadre.dev/v1alpha1", "kind": "MoEModel", "name": "m", "uid": "model-uid"}]);
    let reconcile = rig.reconcile();
    rig.server.expect("GET /api/v1/namespaces/ns/services/m-http").await.ok(json!({"apiVersion": "v1",
        "kind": "Service", "metadata": {"name": "m-http", "uid": "ours", "ownerReferences": owner}}));
    rig.server.expect("PATCH /api/v1/namespaces/ns/services/m-http").await.applied("30");
    reconcile.await.unwrap();
    assert_eq!(rig.outcomes("written"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_model_that_is_gone_is_forgotten() {
    let mut rig = rig(|_| Plan { status: Some(status(1)), ..nothing() });
    let reconcile = rig.reconcile();
    // Deleted, and no watch has said so yet.
    rig.server.expect(MODEL_STATUS).await.fail(404, "NotFound", "no such model");
    reconcile.await.unwrap();
    rig.stores.models.delete(&model("11"));
    assert_eq!(rig.reconcile().await.unwrap(), None);
    assert_eq!(rig.outcomes("gone"), 2);
    rig.server.assert_idle();
}

#[tokio::test(start_paused = true)]
async fn a_namespace_that_goes_ends_the_pass() {
    let mut rig = rig(|_| Plan {
        status: Some(status(1)),
        actions: vec![apply(ObjectKind::Deployment, "m-router")],
        ..nothing()
    });
    rig.stores.children.deployments.apply(deployment("m-router", "3"));
    let reconcile = rig.reconcile();
    let details =
        json!({"causes": [{"reason": "NamespaceTerminating", "message": "ns is being terminated"}]});
    rig.server.expect(DEPLOYMENT).await.fail_with(403, "Forbidden", "forbidden", &[], details);
    reconcile.await.unwrap();
    assert_eq!(rig.outcomes("gone"), 1);
    rig.server.assert_idle();
}

#[tokio::test(start_paused = true)]
async fn the_time_of_a_gate_is_that_of_its_last_change() {
    let before = "2026-01-02T03:04:05Z";
    for (routable, kept) in [(true, true), (false, false)] {
        let mut rig = rig(move |_| with_actions(vec![gate("m-decode-0", routable)]));
        let mut pod = pod("m-decode-0", "4");
        let conditions = json!({"conditions": [{"type": "cadre.dev/Routable", "status": "True", "reason": "Old",
            "lastTransitionTime": before}]});
        pod.status = Some(serde_json::from_value(conditions).unwrap());
        rig.stores.pods.apply(pod);
        let reconcile = rig.reconcile();
        let call = rig.server.expect("PATCH /api/v1/namespaces/ns/pods/m-decode-0/status").await;
        assert_eq!(call.body["status"]["conditions"][0]["lastTransitionTime"] == before, kept);
        // Another pod has the name by now.
        call.fail(409, "Conflict", "uid mismatch");
        reconcile.await.unwrap();
        assert_eq!(rig.outcomes("stale"), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_of_a_lost_node_is_deleted_without_grace() {
    let mut rig = rig(|_| {
        let mut action = delete(ObjectKind::Pod, "m-experts-0");
        if let Action::Delete { force, .. } = &mut action {
            *force = true;
        }
        with_actions(vec![action])
    });
    rig.stores.pods.apply(pod("m-experts-0", "7"));
    let reconcile = rig.reconcile();
    let call = rig.server.expect("DELETE /api/v1/namespaces/ns/pods/m-experts-0").await;
    assert_eq!(call.body["gracePeriodSeconds"], 0);
    let body = serde_json::to_value(pod("m-experts-0", "8")).unwrap();
    call.ok(body);
    reconcile.await.unwrap();

    // Until the watch shows that it goes, nothing is planned.
    rig.reconcile().await.unwrap();
    assert_eq!(rig.outcomes("behind"), 1);
    rig.stores.pods.delete(&pod("m-experts-0", "9"));
    let reconcile = rig.reconcile();
    rig.server.expect("DELETE /api/v1/namespaces/ns/pods/m-experts-0").await.fail(404, "NotFound", "gone");
    reconcile.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_model_made_again_under_the_same_name_has_no_past() {
    let mut rig = rig(|observed| {
        with_actions(match observed.refused_children.len() {
            0 => vec![apply(ObjectKind::Deployment, "m-router")],
            _ => Vec::new(),
        })
    });
    rig.stores.children.deployments.apply(deployment("m-router", "3"));
    let reconcile = rig.reconcile();
    rig.server.expect(DEPLOYMENT).await.fail(422, "Invalid", "no");
    reconcile.await.unwrap();
    rig.reconcile().await.unwrap();
    assert_eq!((rig.outcomes("refused"), rig.outcomes("steady")), (1, 1));
    let before = rig.reconciler.memories.recall(&key(), "model-uid").unwrap().lock().await.since;

    let mut again = model("20");
    again.metadata.uid = Some("another-uid".into());
    rig.stores.models.apply(again);
    let reconcile = rig.reconcile();
    rig.server.expect(DEPLOYMENT).await.fail(422, "Invalid", "no");
    reconcile.await.unwrap();
    assert!(rig.reconciler.memories.recall(&key(), "model-uid").is_none());
    assert!(rig.reconciler.memories.recall(&key(), "another-uid").unwrap().lock().await.since >= before);
}
