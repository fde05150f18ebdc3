//! The NetworkPolicies of a model on a network that enforces them: who belongs to the model reaches its workers and
//! shards, and nobody else does.

use cadre_e2e_k8s::{
    Model, Namespace, Operator, cluster,
    wait::{self, LIMIT, holds},
};
use cadre_k8s_api::{
    Tier,
    names::{label, port},
};
use serde_json::{Value, json};

/// What a connection that is dropped on its way comes to.
const DROPPED: &str = "no answer from";

/// Starts a pod with these labels that asks an address again and again for some seconds, longer than an agent takes to
/// hear of the pod.
fn ask(namespace: &Namespace, name: &str, labels: &Value, address: &str) {
    namespace.kubectl().apply(&json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "probe",
                "image": cluster().image(),
                "imagePullPolicy": "IfNotPresent",
                "args": ["probe", format!("http://{address}/"), "--timeout", "2", "--retry-for", "8"],
                "securityContext": {
                    "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
                },
            }],
        },
    }));
}

/// What it says of its last attempt.
fn answer(namespace: &Namespace, name: &str) -> String {
    let kubectl = namespace.kubectl();
    wait::until(&format!("pod {name} has asked"), LIMIT, || {
        let pod: Value = kubectl.get(&["pod", name])?;
        let phase = pod["status"]["phase"].as_str().unwrap_or_default().to_owned();
        holds(phase == "Failed" || phase == "Succeeded", || phase)
    });
    kubectl.must(&["logs", name])
}

#[test]
fn workers_and_shards_are_reached_by_their_model_and_by_nobody_else() {
    Operator::installed();
    let namespace = Namespace::new("policies");
    let elsewhere = Namespace::new("strangers");
    let model = Model::ready(&namespace, &json!({}));
    let address = |tier: Tier, port: u16| {
        let pod = &model.tier_pods(tier)[0];
        format!("{}:{port}", pod.ip.as_deref().expect("an address"))
    };
    let doors = [
        ("decode", address(Tier::Decode, port::WORKER)),
        ("prefill", address(Tier::Prefill, port::WORKER)),
        ("experts", address(Tier::Experts, port::EXPERT)),
    ];
    let labels = |model: &str| json!({label::MODEL: model, label::COMPONENT: "decode"});
    for (door, address) in &doors {
        // The first is nobody's pod either, but has the labels that let in: it shows that the address answers.
        ask(&namespace, &format!("member-{door}"), &labels(model.name()), address);
        ask(&namespace, &format!("neighbour-{door}"), &json!({}), address);
        ask(&namespace, &format!("other-{door}"), &labels("another"), address);
        ask(&elsewhere, &format!("forger-{door}"), &labels(model.name()), address);
    }
    for (door, address) in &doors {
        let member = answer(&namespace, &format!("member-{door}"));
        // It speaks another protocol, but it speaks.
        assert!(!member.contains(DROPPED), "{door} at {address}: {member}");
        for (namespace, name) in [(&namespace, "neighbour"), (&namespace, "other"), (&elsewhere, "forger")] {
            let said = answer(namespace, &format!("{name}-{door}"));
            assert!(said.contains(DROPPED), "{name} reaches {door} at {address}: {said}");
        }
    }
}
