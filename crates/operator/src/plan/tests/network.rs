//! Who may connect to whom.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use cadre_k8s_api::model::PolicyMode;
use k8s_openapi::{
    api::networking::v1::{NetworkPolicy, NetworkPolicyPeer},
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};

use super::{cluster::Cluster, samples};
use crate::plan::{Action, ObjectKind};

/// A pod somewhere.
struct Somebody {
    namespace: &'static str,
    labels: BTreeMap<String, String>,
}

fn somebody(namespace: &'static str, labels: &[(&str, &str)]) -> Somebody {
    let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Somebody { namespace, labels }
}

fn member(model: &str, component: &str) -> Somebody {
    somebody("models", &[("cadre.dev/model", model), ("app.kubernetes.io/component", component)])
}

fn selects(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let mut exact = selector.match_labels.iter().flatten();
    let mut listed = selector.match_expressions.iter().flatten();
    exact.all(|(key, value)| labels.get(key) == Some(value))
        && listed.all(|one| {
            assert_eq!(one.operator, "In");
            labels.get(&one.key).is_some_and(|value| one.values.as_ref().unwrap().contains(value))
        })
}

/// As Kubernetes reads a peer: without a namespace selector it means the policy's own namespace.
fn is(peer: &NetworkPolicyPeer, who: &Somebody) -> bool {
    assert!(peer.ip_block.is_none());
    let namespace = BTreeMap::from([("kubernetes.io/metadata.name".to_owned(), who.namespace.to_owned())]);
    let in_namespace = match &peer.namespace_selector {
        Some(selector) => selects(selector, &namespace),
        None => who.namespace == "models",
    };
    in_namespace && peer.pod_selector.as_ref().is_none_or(|selector| selects(selector, &who.labels))
}

/// Ports of the component's pods that somebody reaches.
fn reached(cluster: &Cluster, component: &str, who: &Somebody) -> Vec<i32> {
    let pod = cluster.seen.pods.iter().find(|pod| super::cluster::component_of(pod) == component).unwrap();
    let labels = pod.metadata.labels.as_ref().unwrap();
    let is_for = |policy: &&NetworkPolicy| {
        selects(policy.spec.as_ref().unwrap().pod_selector.as_ref().unwrap(), labels)
    };
    let policies: Vec<_> = cluster.seen.children.network_policies.iter().filter(is_for).collect();
    assert_eq!(policies.len(), 1, "{component}");
    let spec = policies[0].spec.as_ref().unwrap();
    assert_eq!(spec.policy_types.as_deref(), Some(["Ingress".to_owned()].as_slice()));
    let mut ports = Vec::new();
    for rule in spec.ingress.iter().flatten() {
        let open = rule.from.as_ref().is_none_or(|from| from.iter().any(|peer| is(peer, who)));
        for port in rule.ports.as_ref().unwrap().iter().filter(|_| open) {
            ports.push(serde_json::to_value(&port.port).unwrap().as_i64().unwrap() as i32);
        }
    }
    ports
}

#[test]
fn everybody_reaches_what_it_needs_and_nothing_else() {
    let mut cluster = Cluster::new(samples::pocket());
    cluster.seen.operator_namespace = Some("cadre-system".into());
    cluster.settle();
    let operator = |namespace| {
        let labels = [("app.kubernetes.io/component", "operator"), ("app.kubernetes.io/part-of", "cadre")];
        somebody(namespace, &labels)
    };
    let (router, prefill) = (member("pocket", "router"), member("pocket", "prefill"));
    let (decode, experts) = (member("pocket", "decode"), member("pocket", "experts"));
    let (client, stranger) = (somebody("models", &[]), somebody("elsewhere", &[]));
    let mut forger = member("pocket", "decode");
    forger.namespace = "elsewhere";
    // Per component: who, and the ports beside that of metrics, which is everybody's.
    for (component, all) in [
        (
            "router",
            [
                (&router, vec![50051, 8000]),
                (&prefill, vec![50051, 8000, 50050]),
                (&decode, vec![50051, 8000, 50050]),
                (&experts, vec![50051, 8000, 50050]),
                (&client, vec![50051, 8000]),
                (&stranger, vec![]),
                (&forger, vec![]),
                (&operator("cadre-system"), vec![50050]),
                (&operator("elsewhere"), vec![]),
                (&member("other", "decode"), vec![50051, 8000]),
            ],
        ),
        (
            "decode",
            [
                (&router, vec![50052]),
                (&prefill, vec![50052]),
                (&decode, vec![50052]),
                (&experts, vec![]),
                (&client, vec![]),
                (&stranger, vec![]),
                (&forger, vec![]),
                (&operator("cadre-system"), vec![]),
                (&operator("elsewhere"), vec![]),
                (&member("other", "decode"), vec![]),
            ],
        ),
        (
            "experts",
            [
                (&router, vec![50053]),
                (&prefill, vec![50053]),
                (&decode, vec![50053]),
                (&experts, vec![]),
                (&client, vec![]),
                (&stranger, vec![]),
                (&forger, vec![]),
                (&operator("cadre-system"), vec![]),
                (&operator("elsewhere"), vec![]),
                (&member("other", "decode"), vec![]),
            ],
        ),
    ] {
        for (who, mut ports) in all {
            ports.push(9090);
            assert_eq!(
                reached(&cluster, component, who),
                ports,
                "{component}: {} {:?}",
                who.namespace,
                who.labels
            );
        }
    }
}

#[test]
fn clients_are_added_by_a_field_and_metrics_are_narrowed_by_one() {
    let peer = |team: &str| NetworkPolicyPeer {
        namespace_selector: Some(LabelSelector {
            match_labels: Some([("kubernetes.io/metadata.name".to_owned(), team.to_owned())].into()),
            ..LabelSelector::default()
        }),
        ..NetworkPolicyPeer::default()
    };
    let mut model = samples::pocket();
    model.spec.network.clients = vec![peer("apps")];
    model.spec.network.metrics = vec![peer("monitoring")];
    let cluster = Cluster::settled(model);
    let from = |namespace| somebody(namespace, &[]);
    assert_eq!(reached(&cluster, "router", &from("apps")), [50051, 8000]);
    assert_eq!(reached(&cluster, "router", &from("models")), [50051, 8000]);
    assert_eq!(reached(&cluster, "router", &from("monitoring")), [9090]);
    assert_eq!(reached(&cluster, "experts", &from("monitoring")), [9090]);
    assert_eq!(reached(&cluster, "experts", &from("apps")), Vec::<i32>::new());
}

#[test]
fn policies_go_when_they_are_not_wanted() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.edit(|model| model.spec.network.policy = PolicyMode::None);
    let plan = cluster.plan();
    let deleted = |action: &&Action| matches!(action, Action::Delete { kind: ObjectKind::NetworkPolicy, .. });
    assert_eq!(plan.actions.iter().filter(deleted).count(), 4);
    assert_eq!(plan.actions.len(), 4, "{:?}", plan.actions);
}
