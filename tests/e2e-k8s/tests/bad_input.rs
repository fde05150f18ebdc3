//! What cannot work says so within 15 s: each case a condition with its reason, never a silent Pending.
//!
//! Counted from the apply where the operator can know at once; else from the moment at which the cluster shows the
//! fact (the kubelet has tried to pull, the process has ended).

use std::time::Instant;

use cadre_e2e::checkpoints;
use cadre_e2e_k8s::{
    Claim, Kubectl, Model, Namespace, Operator, PodView,
    bad_checkpoint::{of_claim, pending},
    cluster, figures,
    figures::Figures,
    pod,
    wait::{self, LIMIT, SAID, holds},
};
use cadre_k8s_api::{ConditionType, Reason};
use serde_json::{Value, json};

/// The model says what is wrong with it within [`SAID`] of its apply.
fn told(model: &Model<'_>, reason: Reason) {
    let condition = model.until_reason(ConditionType::Degraded, reason, LIMIT);
    let took = model.age();
    row(reason, &condition.message, figures::seconds(took), "-".into());
    assert!(took <= SAID, "{} took {took:.1?}: {}", reason.name(), condition.message);
}

/// As [`told`], from the moment at which some pod shows the fact.
fn told_after(model: &Model<'_>, fact: impl Fn(&PodView) -> bool, reason: Reason) {
    wait::until("a pod shows what is wrong", LIMIT, || {
        let pods = model.all_pods()?;
        holds(pods.iter().any(&fact), || format!("{pods:#?}"))
    });
    let shown = Instant::now();
    let condition = model.until_reason(ConditionType::Degraded, reason, LIMIT);
    let took = shown.elapsed();
    row(reason, &condition.message, figures::seconds(model.age()), figures::seconds(took));
    assert!(took <= SAID, "{} took {took:.1?}: {}", reason.name(), condition.message);
}

fn row(reason: Reason, message: &str, from_apply: String, from_fact: String) {
    let figures =
        Figures::new("conditions", &["reason", "seconds from apply", "seconds from the fact", "message"]);
    let message = message.chars().take(120).collect::<String>().replace('|', "/").replace('\n', " ");
    figures.row(reason.name(), &[from_apply, from_fact, message]);
}

/// A process of it has ended.
fn ended(pod: &PodView) -> bool {
    pod.ended.is_some()
}

/// Applies the sample with a change that is told at once.
fn refused_at_once(test: &str, patch: Value, reason: Reason) {
    Operator::installed();
    let namespace = Namespace::new(test);
    told(&Model::apply(&namespace, &patch), reason);
}

/// A checkpoint with this harm is told after the first process has ended over it.
fn refused_checkpoint(test: &str, harm: impl FnOnce(&std::path::Path), reason: Reason) {
    if cluster().scripts_or_notice(&format!("{} of a damaged checkpoint", reason.name())).is_none() {
        return;
    }
    Operator::installed();
    let namespace = Namespace::new(test);
    let claim = Claim::of_copy(&namespace, "weights", harm);
    let model = Model::apply(&namespace, &claim.source());
    told_after(&model, ended, reason);
}

#[test]
fn a_checkpoint_that_is_cut_off() {
    let shard = |folder: &std::path::Path| {
        let names =
            std::fs::read_dir(folder).expect("the copy").map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
        names.sort();
        names.into_iter().find(|name| name.ends_with(".safetensors")).expect("weights")
    };
    refused_checkpoint(
        "truncated",
        |folder| checkpoints::truncate(folder, &shard(folder), 1000),
        Reason::CheckpointInvalid,
    );
}

#[test]
fn a_checkpoint_whose_configuration_is_no_model() {
    let harm = |folder: &std::path::Path| {
        checkpoints::edit_json(folder, "config.json", |config| config["hidden_size"] = json!(-1));
    };
    refused_checkpoint("config", harm, Reason::CheckpointInvalid);
}

#[test]
fn a_checkpoint_with_other_experts_than_the_spec_says() {
    Operator::installed();
    let namespace = Namespace::new("mismatch");
    let patch = json!({"spec": {"model": {"routedExperts": 64}, "experts": {"redundantSlots": 64}}});
    let model = Model::apply(&namespace, &patch);
    told_after(&model, ended, Reason::CheckpointMismatch);
    model.change(&json!({"spec": {"model": {"routedExperts": 32}, "experts": {"redundantSlots": 32}}}));
    model.until_settled();
}

#[test]
fn a_folder_that_is_not_in_the_image() {
    Operator::installed();
    let namespace = Namespace::new("folder");
    let model = Model::apply(
        &namespace,
        &json!({"spec": {"model": {"source": {"image": {"path": "/models/other"}}}}}),
    );
    told_after(&model, ended, Reason::CheckpointUnreadable);
}

#[test]
fn a_claim_that_does_not_exist_and_then_does() {
    Operator::installed();
    let namespace = Namespace::new("noclaim");
    let model = Model::apply(&namespace, &of_claim("weights"));
    told(&model, Reason::ClaimNotFound);
    if cluster().scripts_or_notice("a missing claim that comes").is_some() {
        let _claim = Claim::of_copy(&namespace, "weights", |_| {});
        model.until_settled();
        model.delete();
    }
}

#[test]
fn a_claim_that_nothing_fills() {
    Operator::installed();
    let namespace = Namespace::new("unbound");
    namespace.kubectl().apply(&pending("weights", &json!({"storageClassName": "example.com-none"})));
    told(&Model::apply(&namespace, &of_claim("weights")), Reason::ClaimNotBound);
}

#[test]
fn an_image_that_cannot_be_pulled_and_then_can() {
    Operator::installed();
    let namespace = Namespace::new("pull");
    // A port where nobody listens: refused at once, whatever the node's names resolve to.
    let model = Model::apply(&namespace, &json!({"spec": {"image": "127.0.0.1:1/cadre:none"}}));
    let waits = |pod: &PodView| {
        pod.waiting.as_deref().is_some_and(|reason| reason == "ErrImagePull" || reason == "ImagePullBackOff")
    };
    told_after(&model, waits, Reason::ImagePullFailed);
    model.change(&json!({"spec": {"image": cluster().image()}}));
    model.until_settled();
}

#[test]
fn too_few_accelerators() {
    let gpu = json!({"resource": "nvidia.com/gpu"});
    refused_at_once(
        "gpu",
        json!({"spec": {"decode": {"accelerator": gpu}}}),
        Reason::InsufficientAccelerators,
    );
}

/// Nodes that offer an accelerator and have none: the process says what it does not find.
#[test]
fn an_accelerator_that_image_or_node_cannot_use() {
    Operator::installed();
    let nodes = Kubectl::cluster_wide().must(&["get", "nodes", "--output=name"]);
    let offer =
        json!([{"op": "add", "path": "/status/capacity/nvidia.com~1pretended", "value": "8"}]).to_string();
    for node in nodes.lines() {
        Kubectl::cluster_wide().must(&[
            "patch",
            node,
            "--subresource=status",
            "--type=json",
            "--patch",
            &offer,
        ]);
    }
    let namespace = Namespace::new("driver");
    let accelerator = json!({"resource": "nvidia.com/pretended"});
    let model = Model::apply(&namespace, &json!({"spec": {"decode": {"accelerator": accelerator}}}));
    // The image without kernels has a static program, which says so; the one with kernels looks for a driver.
    let reason = match cluster().image().ends_with("-cuda") {
        true => Reason::AcceleratorDriverMissing,
        false => Reason::AcceleratorUnsupportedByImage,
    };
    told_after(&model, ended, reason);
    model.change(&json!({"spec": {"decode": {"accelerator": null}}}));
    model.until_settled();
}

#[test]
fn more_memory_than_any_node_has() {
    let resources = json!({"requests": {"memory": "100Ti"}});
    refused_at_once(
        "memory",
        json!({"spec": {"experts": {"resources": resources}}}),
        Reason::InsufficientResources,
    );
}

#[test]
fn no_node_with_the_label_of_the_selector() {
    let selector = json!({"example.com/pool": "experts"});
    refused_at_once(
        "selector",
        json!({"spec": {"experts": {"nodeSelector": selector}}}),
        Reason::NodeSelectorUnmatched,
    );
}

#[test]
fn nodes_without_the_label_of_the_failure_domain() {
    Operator::installed();
    let namespace = Namespace::new("domain");
    let model = Model::apply(&namespace, &json!({"spec": {"experts": {"spreadBy": "example.com/rack"}}}));
    // Known once a shard is on a node.
    told_after(&model, |pod| pod.component == "experts" && pod.node.is_some(), Reason::FailureDomainUnknown);
    model.until(ConditionType::Ready, "True", LIMIT);
}

#[test]
fn a_quota_that_leaves_no_pods_and_is_raised() {
    Operator::installed();
    let namespace = Namespace::new("quota");
    namespace.kubectl().apply(&json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}},
    }));
    wait::until("the quota is in force", LIMIT, || {
        let quota: Value = namespace.kubectl().get(&["resourcequota", "none"])?;
        holds(quota["status"]["hard"]["pods"] == "0", || quota["status"].to_string())
    });
    let model = Model::apply(&namespace, &json!({}));
    told(&model, Reason::PodsForbidden);
    namespace.kubectl().must(&["delete", "resourcequota", "none"]);
    model.until_settled();
}

#[test]
fn a_folder_of_the_nodes_where_the_namespace_forbids_it() {
    let source = json!({"image": null, "hostPath": {"path": "/models"}});
    refused_at_once("hostpath", json!({"spec": {"model": {"source": source}}}), Reason::PodsForbidden);
}

#[test]
fn a_priority_class_that_does_not_exist() {
    refused_at_once(
        "priority",
        json!({"spec": {"decode": {"priorityClassName": "example-none"}}}),
        Reason::PodsForbidden,
    );
}

#[test]
fn what_the_operator_does_not_allow() {
    let source = json!({"image": null, "hostPath": {"path": "/etc"}});
    for (test, patch) in [
        ("folder", json!({"spec": {"model": {"source": source}}})),
        ("class", json!({"spec": {"decode": {"priorityClassName": "system-node-critical"}}})),
        ("account", json!({"spec": {"router": {"serviceAccountName": "default"}}})),
    ] {
        refused_at_once(test, patch, Reason::NotAllowed);
    }
}

#[test]
fn less_memory_than_the_process_needs() {
    Operator::installed();
    let namespace = Namespace::new("oom");
    let memory = json!({"requests": {"memory": "20Mi"}, "limits": {"memory": "20Mi"}});
    let model = Model::apply(&namespace, &json!({"spec": {"decode": {"resources": memory}}}));
    told_after(&model, |pod| pod.ended.as_deref() == Some("OOMKilled"), Reason::OutOfMemory);
    let enough = json!({"requests": {"memory": "192Mi"}, "limits": {"memory": null}});
    model.change(&json!({"spec": {"decode": {"resources": enough}}}));
    model.until_settled();
}

#[test]
fn a_name_that_belongs_to_somebody_else() {
    Operator::installed();
    let namespace = Namespace::new("taken");
    namespace.kubectl().apply(&json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "pocket-layout"}, "data": {"mine": "1"},
    }));
    let model = Model::apply(&namespace, &json!({}));
    told(&model, Reason::NameTaken);
    let mine: Value = namespace.kubectl().get(&["configmap", "pocket-layout"]).expect("still there");
    assert_eq!(mine["data"], json!({"mine": "1"}), "nobody else's object is touched");
    namespace.kubectl().must(&["delete", "configmap", "pocket-layout"]);
    model.until_settled();
}

#[test]
fn a_silent_pending_pod_does_not_exist() {
    // Two things wrong at a time: both are told, in words.
    Operator::installed();
    let namespace = Namespace::new("both");
    let model = Model::apply(
        &namespace,
        &json!({"spec": {
            "decode": {"nodeSelector": {"example.com/pool": "decode"}},
            "experts": {"accelerator": {"resource": "nvidia.com/gpu"}},
        }}),
    );
    let condition = model.until(ConditionType::Degraded, "True", LIMIT);
    wait::until("both are told", SAID, || {
        let condition = model.condition(ConditionType::Degraded)?;
        let words = format!("{}: {}", condition.reason, condition.message);
        let both = [Reason::NodeSelectorUnmatched, Reason::InsufficientAccelerators];
        holds(both.iter().all(|reason| words.contains(reason.name())), || words)
    });
    assert_eq!(condition.status, "True");
    let pods = model.all_pods().expect("pods");
    assert!(pods.iter().any(|pod| pod.phase == "Pending"), "{}", pod::names(&pods));
}
