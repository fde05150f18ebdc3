//! Nothing is accepted and ignored: every field that the schema of a MoEModel has changes what is made of it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_k8s_api::{MoEModel, crd, manifest};
use serde_json::{Value, json};

use super::samples;
use crate::{
    allowed::Allowed,
    observed::Observed,
    plan::{Action, Plan, plan},
};

/// Kubernetes' own types, which are handed on as a whole.
const WHOLE: [&str; 3] = ["affinity", "clients", "metrics"];

/// What shows elsewhere: a budget only limits tiers that ask for more (`plan::wants`).
const ELSEWHERE: [&str; 1] = ["/budget/gpus"];

/// What every tier may say of its pods.
fn pod() -> Value {
    let quantities = json!({"cpu": "1", "memory": "1Gi"});
    json!({
        "resources": {"requests": quantities, "limits": quantities},
        "nodeSelector": {"example.com/pool": "a"},
        "tolerations": [
            {"key": "a", "operator": "Equal", "value": "b", "effect": "NoExecute", "tolerationSeconds": 5},
        ],
        "priorityClassName": "high",
        "affinity": {
            "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
                {"labelSelector": {}, "topologyKey": "zone"},
                {"labelSelector": {"matchLabels": {"a": "b"}}, "topologyKey": "zone"},
            ]},
        },
        "topologySpreadConstraints": [
            {"topologyKey": "rack", "maxSkew": 2, "whenUnsatisfiable": "DoNotSchedule", "minDomains": 2},
        ],
        "runtimeClassName": "nvidia",
        "schedulerName": "binpack",
        "serviceAccountName": "account",
        "securityContext": {"runAsUser": 1000, "runAsGroup": 1001, "fsGroup": 1002, "supplementalGroups": [1003]},
        "env": [
            {"name": "A", "value": "b"},
            {"name": "B", "valueFrom": {"configMapKeyRef": {"name": "map", "key": "k"}}},
            {"name": "C", "valueFrom": {"secretKeyRef": {"name": "secret", "key": "k"}}},
            {"name": "D", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
        ],
        "volumes": [
            {"name": "shm", "mountPath": "/dev/shm", "readOnly": false,
             "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
            {"name": "map", "mountPath": "/a", "readOnly": true, "configMap": {"name": "map"}},
            {"name": "secret", "mountPath": "/b", "readOnly": true, "secret": {"name": "secret"}},
            {"name": "claim", "mountPath": "/c", "readOnly": true, "persistentVolumeClaim": {"name": "claim"}},
            {"name": "host", "mountPath": "/d", "readOnly": true, "hostPath": {"path": "/srv"}},
        ],
    })
}

fn with(mut pod: Value, more: Value) -> Value {
    pod.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    pod
}

/// A spec with every field; with a claim it has workers beside shards, whose threads are those of one process.
fn full(source: Value) -> Value {
    let gpu = json!({"resource": "nvidia.com/gpu", "count": 1});
    let limits = json!({
        "maxStepTokens": 100, "threads": 2, "dispatchTimeoutSeconds": 3, "uncoveredTimeoutSeconds": 4,
        "handoffTimeoutSeconds": 5, "handoffBeginTimeoutSeconds": 6,
    });
    let worker = || {
        with(
            pod(),
            json!({
                "replicas": 2, "kvCache": "64Mi", "accelerator": gpu, "limits": limits,
            }),
        )
    };
    let of_shards = match source.get("persistentVolumeClaim") {
        Some(_) => json!({"worker": {"kvCache": "64Mi", "limits": limits}}),
        None => json!({"limits": {"threads": 2}}),
    };
    json!({
        "image": "registry.example/cadre:1",
        "imagePullSecrets": [{"name": "pull"}],
        "model": {"source": source, "servedName": "a/b", "routedExperts": 32, "numerics": "Bf16"},
        "router": with(pod(), json!({
            "limits": {
                "maxConcurrent": 10, "maxWaiting": 20, "maxBodyBytes": 4096, "defaultTimeoutSeconds": 5,
                "maxTimeoutSeconds": 50, "reserveTimeoutSeconds": 6, "stallTimeoutSeconds": 7,
            },
            "service": {
                "type": "LoadBalancer", "annotations": {"example.com/a": "b"}, "loadBalancerClass": "example.com/lb",
                "externalTrafficPolicy": "Local",
            },
        })),
        "prefill": worker(),
        "decode": worker(),
        "experts": with(with(pod(), of_shards), json!({
            "shards": 4, "redundantSlots": 32, "minCopies": 2, "spreadBy": "kubernetes.io/hostname", "accelerator": gpu,
        })),
        "network": {
            "policy": "Managed",
            "clients": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}],
            "metrics": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        },
        "budget": {"gpus": 8},
        "drainSeconds": 30,
    })
}

fn sources() -> [Value; 4] {
    [
        json!({"image": {"path": "/models/x"}}),
        json!({"persistentVolumeClaim": {"claimName": "weights", "path": "a"}}),
        json!({"hostPath": {"path": "/srv/x"}}),
        json!({"imageVolume": {"reference": "registry.example/ds:1", "path": "a"}}),
    ]
}

fn model(spec: &Value) -> MoEModel {
    let mut model = samples::pocket();
    model.spec = serde_json::from_value(spec.clone()).unwrap();
    model
}

fn made(spec: &Value) -> String {
    let plan: Plan = plan(&Observed::nothing(model(spec), "image:1"));
    let object = |action: &Action| match action {
        Action::Apply { object, .. } => serde_json::to_string(object).unwrap(),
        other => panic!("{other:?}"),
    };
    let objects: Vec<String> = plan.actions.iter().map(object).collect();
    format!("{objects:?}{:?}", plan.operator_view)
}

/// Paths of the fields without fields of their own; `[]` is any item and `{}` any key.
fn leaves(schema: &Value, path: &str, found: &mut Vec<String>) {
    let whole = WHOLE.iter().any(|name| path.ends_with(&format!("/{name}")));
    match schema["properties"].as_object().filter(|_| !whole) {
        Some(properties) => {
            for (name, inner) in properties {
                leaves(inner, &format!("{path}/{name}"), found);
            }
        }
        None if whole => found.push(path.to_owned()),
        None if schema["items"].is_object() => leaves(&schema["items"], &format!("{path}/[]"), found),
        None if schema["additionalProperties"].is_object() => found.push(format!("{path}/{{}}")),
        None => found.push(path.to_owned()),
    }
}

/// The value of a path in the first item, or under the first key, that has it.
fn value_at<'a>(value: &'a mut Value, path: &[&str]) -> Option<&'a mut Value> {
    match path.split_first() {
        None => Some(value),
        Some((&"[]", rest)) => value.as_array_mut()?.iter_mut().find_map(|item| value_at(item, rest)),
        Some((&"{}", rest)) => value.as_object_mut()?.values_mut().find_map(|item| value_at(item, rest)),
        Some((name, rest)) => value_at(value.get_mut(*name)?, rest),
    }
}

/// Another value of the kind.
fn changed(value: &Value, path: &str) -> Value {
    match value {
        Value::Bool(flag) => json!(!flag),
        Value::Number(number) => json!(number.as_i64().unwrap() + 1),
        Value::String(text) => match (path.rsplit('/').next().unwrap(), text.as_str()) {
            ("numerics", _) => json!("F32"),
            ("policy", _) => json!("None"),
            ("type", _) => json!("NodePort"),
            ("externalTrafficPolicy", _) => json!("Cluster"),
            ("whenUnsatisfiable", _) => json!("ScheduleAnyway"),
            ("operator", _) => json!("Exists"),
            ("effect", _) => json!("NoSchedule"),
            // It has one value and absence.
            ("medium", _) => Value::Null,
            (_, text) if text.starts_with(|first: char| first.is_ascii_digit()) => json!(format!("1{text}")),
            (_, text) => json!(format!("{text}x")),
        },
        Value::Array(_) => json!([]),
        _ => Value::Null,
    }
}

#[test]
fn every_field_of_the_schema_changes_what_is_made() {
    let schema = crd::schema(&crd::all()[0])["properties"]["spec"].clone();
    let mut paths = Vec::new();
    leaves(&schema, "", &mut paths);
    assert!(paths.len() > 200, "{}", paths.len());
    let specs = sources().map(full);
    let before = specs.each_ref().map(made);
    for path in paths {
        if ELSEWHERE.contains(&path.as_str()) {
            continue;
        }
        let steps: Vec<&str> = path.split('/').skip(1).collect();
        let at = specs.iter().position(|spec| value_at(&mut spec.clone(), &steps).is_some());
        let at = at.unwrap_or_else(|| panic!("{path} is new: give it a value here"));
        let mut spec = specs[at].clone();
        let value = value_at(&mut spec, &steps).unwrap();
        *value = changed(value, &path);
        assert_ne!(made(&spec), before[at], "{path} is accepted and ignored");
    }
}

#[test]
fn a_spec_with_every_field_is_admitted() {
    for source in sources() {
        let mut value = serde_json::to_value(samples::pocket()).unwrap();
        value["spec"] = full(source);
        if let Err(refusals) = manifest::model(&value) {
            panic!("{refusals:#?}");
        }
    }
}

/// The steady state of a model with everything is as quiet as any other.
#[test]
fn a_model_with_every_field_comes_to_rest() {
    let mut full_model = model(&full(sources()[0].clone()));
    full_model.spec.budget = None;
    let mut cluster = super::cluster::Cluster::new(full_model);
    cluster.settle();
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
}

#[test]
fn what_reaches_beyond_the_pods_is_made_only_where_the_operator_allows_it() {
    let refused = |spec: &Value, allowed: &Allowed| {
        let mut observed = Observed::nothing(model(spec), "image:1");
        observed.allowed = allowed.clone();
        let plan = plan(&observed);
        let status = plan.status.unwrap();
        let degraded = status.conditions.iter().find(|one| one.type_ == "Degraded").unwrap();
        (degraded.status == "True").then(|| {
            assert_eq!(degraded.reason, "NotAllowed");
            degraded.message.clone()
        })
    };
    let plain = serde_json::to_value(&samples::pocket().spec).unwrap();
    assert_eq!(refused(&plain, &Allowed::default()), None, "a sample needs no permission");
    let host = json!({"hostPath": {"path": "/srv/x"}});
    for tier in ["router", "prefill", "decode", "experts"] {
        for (field, value, word) in [
            ("priorityClassName", json!("system-node-critical"), "models.allow.priorityClasses"),
            ("serviceAccountName", json!("admin"), "models.allow.serviceAccounts"),
            (
                "volumes",
                json!([{"name": "a", "mountPath": "/a", "hostPath": {"path": "/"}}]),
                "models.allow.hostPaths",
            ),
            (
                "volumes",
                json!([{"name": "a", "mountPath": "/a", "secret": {"name": "s"}}]),
                "models.allow.secrets",
            ),
            (
                "env",
                json!([{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]),
                "models.allow.secrets",
            ),
        ] {
            let mut spec = plain.clone();
            spec[tier][field] = value;
            let message = refused(&spec, &Allowed::default()).unwrap();
            assert!(message.contains(word) && message.contains(tier), "{message}");
            assert_eq!(refused(&spec, &Allowed::everything()), None, "{tier}.{field}");
        }
    }
    let mut spec = plain.clone();
    spec["model"]["source"] = host;
    let message = refused(&spec, &Allowed::default()).unwrap();
    assert!(message.contains("/srv/x") && message.contains("models.allow.hostPaths"), "{message}");
    let some = Allowed { host_paths: vec!["/srv".into()], ..Allowed::default() };
    assert_eq!(refused(&spec, &some), None);
}

/// A model that serves when what it asks for is allowed no more goes on as it is.
#[test]
fn what_is_not_allowed_any_more_stays_as_it_is() {
    let mut model = samples::pocket();
    model.spec.decode.pod.priority_class_name = Some("high".into());
    let mut cluster = super::cluster::Cluster::settled(model);
    cluster.seen.allowed = Allowed::default();
    for _ in 0..5 {
        let plan = cluster.round();
        assert!(plan.actions.is_empty(), "{:?}", plan.actions);
    }
    assert_eq!(
        (cluster.verdict("Ready"), cluster.verdict("Degraded")),
        ("True AsSpecified".into(), "True NotAllowed".into())
    );
}
