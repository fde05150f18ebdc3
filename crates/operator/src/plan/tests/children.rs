//! What is created: snapshots of every child of two samples, and what no snapshot says by itself.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_k8s_api::{MoEModel, Tier, model::Numerics};
use serde_json::{Value, json};

use super::samples;
use crate::plan::{Action, manifests, preview, render};

const IMAGE: &str = "registry.example/cadre@sha256:0000";

fn objects(model: MoEModel) -> Vec<Value> {
    let actions = preview(model, IMAGE).actions;
    let object = |action: Action| match action {
        Action::Apply { object, .. } => serde_json::to_value(&*object).unwrap(),
        other => panic!("{other:?}"),
    };
    actions.into_iter().map(object).collect()
}

fn workload(model: MoEModel, suffix: &str) -> Value {
    let has_pods = |object: &Value| object.pointer("/spec/template").is_some();
    let named = |object: &Value| object["metadata"]["name"].as_str().unwrap().ends_with(suffix);
    objects(model).into_iter().find(|object| has_pods(object) && named(object)).unwrap()
}

fn pod(model: MoEModel, suffix: &str) -> Value {
    workload(model, suffix)["spec"]["template"]["spec"].clone()
}

fn args(model: MoEModel, suffix: &str) -> Vec<String> {
    serde_json::from_value(pod(model, suffix)["containers"][0]["args"].clone()).unwrap()
}

fn flag(args: &[String], name: &str) -> String {
    args[args.iter().position(|arg| arg == name).unwrap() + 1].clone()
}

#[test]
fn all_children_of_the_pocket_sample() {
    insta::assert_snapshot!(manifests(&preview(samples::pocket(), IMAGE)).unwrap());
}

#[test]
fn all_children_of_deepseek_on_node_pools() {
    insta::assert_snapshot!(manifests(&preview(samples::pools(), IMAGE)).unwrap());
}

#[test]
fn a_plan_reads_like_this() {
    insta::assert_snapshot!(render(&preview(samples::pocket(), IMAGE)));
}

#[test]
fn every_pod_is_restricted() {
    for suffix in ["-router", "-prefill", "-decode", "-experts"] {
        let pod = pod(samples::pools(), suffix);
        let container = &pod["containers"][0];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{suffix}");
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
        assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
        assert_eq!(container["securityContext"]["capabilities"], json!({"drop": ["ALL"]}));
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert!(pod.get("hostNetwork").is_none() && pod.get("hostPID").is_none());
        for volume in pod["volumes"].as_array().unwrap() {
            let kinds: Vec<&String> =
                volume.as_object().unwrap().keys().filter(|key| *key != "name").collect();
            assert!(["persistentVolumeClaim", "configMap"].contains(&kinds[0].as_str()), "{kinds:?}");
        }
        assert!(container["volumeMounts"].as_array().unwrap().iter().all(|mount| mount["readOnly"] == true));
    }
}

#[test]
fn members_have_the_gate_and_the_router_has_none() {
    for (suffix, gate) in [("-router", false), ("-prefill", true), ("-decode", true), ("-experts", true)] {
        let gates = pod(samples::pocket(), suffix).get("readinessGates").cloned();
        assert_eq!(gates, gate.then(|| json!([{"conditionType": "cadre.dev/Routable"}])), "{suffix}");
    }
}

#[test]
fn liveness_depends_on_no_peer_and_the_grace_outlasts_the_drain() {
    let mut model = samples::pocket();
    model.spec.drain_seconds = 100;
    for suffix in ["-router", "-prefill", "-decode", "-experts"] {
        let pod = pod(model.clone(), suffix);
        let path = |probe: &str| pod["containers"][0][probe]["httpGet"]["path"].clone();
        assert_eq!(path("livenessProbe"), "/healthz", "{suffix}");
        assert_eq!(path("startupProbe"), "/startedz?hold=900");
        assert_eq!(path("readinessProbe"), "/readyz?hold=3600");
        let patience = |probe: &str| pod["containers"][0][probe]["timeoutSeconds"].as_i64().unwrap();
        assert!(patience("readinessProbe") > 3600 && patience("startupProbe") > 900, "a hold is no failure");
        assert_eq!(pod["containers"][0]["startupProbe"]["initialDelaySeconds"], 3);
        assert_eq!(flag(&args(model.clone(), suffix), "--drain-timeout"), "100");
        assert!(pod["terminationGracePeriodSeconds"].as_i64().unwrap() > 105);
    }
}

#[test]
fn the_checkpoint_is_read_only_wherever_it_comes_from() {
    let source = |source: Value| {
        let mut model = samples::pocket();
        model.spec.model.source = serde_json::from_value(source).unwrap();
        let pod = pod(model.clone(), "-experts");
        let volume = pod.get("volumes").map(|volumes| volumes[0].clone());
        let mount = pod["containers"][0].get("volumeMounts").map(|mounts| mounts[0].clone());
        (flag(&args(model, "-experts"), "--model"), volume, mount)
    };
    let mount = json!({"name": "checkpoint", "mountPath": "/checkpoint", "readOnly": true});
    assert_eq!(source(json!({"image": {"path": "/models/x"}})), ("/models/x".into(), None, None));
    assert_eq!(
        source(json!({"persistentVolumeClaim": {"claimName": "ds", "path": "a/b"}})),
        (
            "/checkpoint/a/b".into(),
            Some(
                json!({"name": "checkpoint", "persistentVolumeClaim": {"claimName": "ds", "readOnly": true}})
            ),
            Some(mount.clone())
        )
    );
    assert_eq!(
        source(json!({"hostPath": {"path": "/srv/ds"}})),
        (
            "/checkpoint".into(),
            Some(json!({"name": "checkpoint", "hostPath": {"path": "/srv/ds", "type": "Directory"}})),
            Some(mount.clone())
        )
    );
    assert_eq!(
        source(json!({"imageVolume": {"reference": "registry.example/ds:1"}})),
        (
            "/checkpoint".into(),
            Some(json!({"name": "checkpoint", "image": {"reference": "registry.example/ds:1"}})),
            Some(mount)
        )
    );
}

#[test]
fn an_update_adds_a_pod_first_unless_it_would_wait_for_an_accelerator() {
    let rolling = |model: MoEModel| workload(model, "-decode")["spec"]["strategy"]["rollingUpdate"].clone();
    assert_eq!(rolling(samples::pocket()), json!({"maxSurge": 1, "maxUnavailable": 0}));
    assert_eq!(rolling(samples::pools()), json!({"maxSurge": 0, "maxUnavailable": 1}));
}

#[test]
fn without_prefill_workers_decode_workers_compute_prompts() {
    let mut model = samples::pocket();
    assert_eq!(flag(&args(model.clone(), "-decode"), "--role"), "decode");
    model.spec.prefill.replicas = 0;
    assert_eq!(flag(&args(model, "-decode"), "--role"), "both");
}

#[test]
fn nothing_empty_is_rendered() {
    fn empties(value: &Value, path: &str, found: &mut Vec<String>) {
        match value {
            // Selectors of a NetworkPolicy: all pods, all namespaces.
            Value::Object(map) if map.is_empty() && path.ends_with("Selector") => {}
            Value::Object(map) if map.is_empty() => found.push(path.into()),
            Value::Array(list) if list.is_empty() => found.push(path.into()),
            Value::String(text) if text.is_empty() => found.push(path.into()),
            Value::Null => found.push(path.into()),
            Value::Object(map) => {
                map.iter().for_each(|(key, value)| empties(value, &format!("{path}.{key}"), found))
            }
            Value::Array(list) => list.iter().for_each(|value| empties(value, path, found)),
            _ => {}
        }
    }
    let mut model = samples::pools();
    model.spec.decode.pod.tolerations[0].value = Some(String::new());
    let mut found = Vec::new();
    objects(model).iter().for_each(|object| empties(object, "", &mut found));
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn a_users_word_on_lost_nodes_counts() {
    let given = |tolerations: Value| {
        let mut model = samples::pocket();
        model.spec.experts.pod.tolerations = serde_json::from_value(tolerations).unwrap();
        pod(model, "-experts")["tolerations"].as_array().unwrap().len()
    };
    assert_eq!(given(json!([])), 2);
    assert_eq!(given(json!([{"operator": "Exists"}])), 1);
    assert_eq!(given(json!([{"key": "node.kubernetes.io/unreachable", "operator": "Exists"}])), 2);
    assert_eq!(given(json!([{"operator": "Exists", "effect": "NoSchedule"}])), 3);
}

#[test]
fn what_makes_processes_refuse_each_other_is_in_the_checkpoint_label_and_an_image_is_not() {
    let labels = |model: MoEModel| {
        let template = workload(model, "-experts")["spec"]["template"]["metadata"]["labels"].clone();
        (template["cadre.dev/checkpoint"].clone(), template["cadre.dev/template-hash"].clone())
    };
    let (checkpoint, template) = labels(samples::pocket());
    let mut image = samples::pocket();
    image.spec.image = Some("registry.example/other:1".into());
    assert_eq!(labels(image.clone()).0, checkpoint);
    assert_ne!(labels(image).1, template);
    let mut numerics = samples::pocket();
    numerics.spec.model.numerics = Numerics::F32;
    assert_ne!(labels(numerics).0, checkpoint);
    let mut scaled = samples::pocket();
    scaled.spec.experts.shards = 8;
    scaled.spec.decode.replicas = 5;
    assert_eq!(labels(scaled), (checkpoint, template), "scaling changes no pod");
}

#[test]
fn names_of_shard_pods_say_expert_and_all_names_fit() {
    let mut model = samples::pocket();
    model.metadata.name = Some("a".repeat(40));
    for object in objects(model) {
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        assert!(name.len() + "-1023".len() <= 63, "{name}");
    }
    assert!(Tier::Experts.object_name("pocket").contains("expert"));
}

fn variable(pod: &Value, name: &str) -> Option<Value> {
    let all = pod["containers"][0]["env"].as_array().unwrap();
    let mut named = all.iter().filter(|variable| variable["name"] == name);
    let found = named.next().map(|variable| variable["value"].clone());
    assert!(named.next().is_none(), "{name} twice");
    found
}

#[test]
fn an_accelerator_reaches_the_process_and_no_other_does() {
    for suffix in ["-prefill", "-decode", "-experts"] {
        let (with, without) = (pod(samples::pools(), suffix), pod(samples::pocket(), suffix));
        assert_eq!(flag(&args(samples::pools(), suffix), "--device"), "cuda:0");
        assert_eq!(flag(&args(samples::pools(), suffix), "--numerics"), "cuda-fp8");
        assert_eq!(flag(&args(samples::pocket(), suffix), "--device"), "cpu");
        assert_eq!(with["containers"][0]["resources"]["limits"]["nvidia.com/gpu"], "1");
        assert_eq!(variable(&with, "NVIDIA_DRIVER_CAPABILITIES"), Some(json!("compute,utility")));
        // Which cards there are is the device plugin's word.
        assert_eq!(variable(&with, "NVIDIA_VISIBLE_DEVICES"), None);
        assert_eq!(variable(&without, "NVIDIA_VISIBLE_DEVICES"), Some(json!("void")));
        let tolerated = |pod: &Value| {
            let all = pod["tolerations"].as_array().unwrap();
            all.iter().filter(|one| one["key"] == "nvidia.com/gpu").count()
        };
        assert_eq!((tolerated(&with), tolerated(&without)), (1, 0), "{suffix}");
    }
    let router = pod(samples::pools(), "-router");
    assert_eq!(variable(&router, "NVIDIA_VISIBLE_DEVICES"), Some(json!("void")));
}

#[test]
fn a_users_word_on_the_driver_and_the_taint_counts() {
    let mut model = samples::pools();
    model.spec.decode.pod.env =
        serde_json::from_value(json!([{"name": "NVIDIA_DRIVER_CAPABILITIES", "value": "all"}])).unwrap();
    model.spec.decode.pod.tolerations =
        serde_json::from_value(json!([{"key": "nvidia.com/gpu", "operator": "Equal", "value": "a"}]))
            .unwrap();
    let pod = pod(model, "-decode");
    assert_eq!(variable(&pod, "NVIDIA_DRIVER_CAPABILITIES"), Some(json!("all")));
    let tolerations = pod["tolerations"].as_array().unwrap();
    let gpu: Vec<&Value> = tolerations.iter().filter(|one| one["key"] == "nvidia.com/gpu").collect();
    assert_eq!(gpu, [&json!({"key": "nvidia.com/gpu", "operator": "Equal", "value": "a"})]);
}
