//! The charts without a cluster: what helm makes of them, against what the code says.
//!
//! Renders are compared with `charts/cadre/golden/NAME.yaml`, made from `NAME.values.yaml` beside it;
//! `CADRE_UPDATE_GOLDEN=1` writes them anew. helm is `CADRE_HELM`, or the one in the path.

#![allow(clippy::disallowed_methods, reason = "a test is told where helm is by the task that runs it")]

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use cadre_e2e::binary::{cadre, root};
use cadre_k8s_api::{
    IMAGE, crd,
    manifest::{self, Document},
};
use cadre_operator::rbac::{self, Scope};
use serde_json::{Value, json};

const RELEASE: &str = "cadre";
const NAMESPACE: &str = "cadre-system";

/// Sets of values with a golden render.
const GOLDEN: [&str; 3] = ["defaults", "namespaced", "everything"];

fn chart(name: &str) -> PathBuf {
    root().join("charts").join(name)
}

fn values_of(golden: &str) -> PathBuf {
    chart("cadre").join("golden").join(format!("{golden}.values.yaml"))
}

fn helm(args: &[&str], files: &[PathBuf]) -> Output {
    let helm = std::env::var_os("CADRE_HELM").unwrap_or_else(|| OsString::from("helm"));
    let mut command = Command::new(&helm);
    command.args(args);
    for file in files {
        command.arg("--values").arg(file);
    }
    // A kubeconfig of the machine, or of another test, plays no part.
    command.env_remove("KUBECONFIG").env_remove("HELM_NAMESPACE");
    command.output().unwrap_or_else(|error| panic!("start {}: {error}", helm.display()))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What helm renders of a chart.
fn rendered(name: &str, release: &str, set: &[&str], files: &[PathBuf]) -> String {
    let folder = chart(name).display().to_string();
    let mut args = vec!["template", release, folder.as_str(), "--namespace", NAMESPACE];
    set.iter().for_each(|pair| args.extend(["--set", pair]));
    let output = helm(&args, files);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn objects(yaml: &str) -> Vec<Value> {
    let all: Vec<Value> = serde_saphyr::from_multiple(yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
    all.into_iter().filter(|object| !object.is_null()).collect()
}

fn operator(set: &[&str]) -> Vec<Value> {
    objects(&rendered("cadre", RELEASE, set, &[]))
}

fn golden(name: &str) -> Vec<Value> {
    objects(&rendered("cadre", RELEASE, &[], &[values_of(name)]))
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

fn only<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let found = of_kind(objects, kind);
    assert_eq!(found.len(), 1, "{kind}");
    found[0]
}

/// Specs of all pods that the chart starts: the operator's and the test's.
fn pods(objects: &[Value]) -> Vec<&Value> {
    let operator = &only(objects, "Deployment")["spec"]["template"]["spec"];
    vec![operator, &only(objects, "Pod")["spec"]]
}

#[test]
fn lint_finds_nothing() {
    let mut cases: Vec<(&str, Vec<PathBuf>)> =
        GOLDEN.iter().map(|name| ("cadre", vec![values_of(name)])).collect();
    cases.push(("cadre-crds", Vec::new()));
    for (name, files) in cases {
        let folder = chart(name).display().to_string();
        let output = helm(&["lint", "--strict", &folder], &files);
        assert!(
            output.status.success(),
            "{name} {files:?}: {}{}",
            text(&output.stdout),
            text(&output.stderr)
        );
    }
}

#[test]
fn renders_are_the_golden_ones() {
    let update = std::env::var_os("CADRE_UPDATE_GOLDEN").is_some();
    for name in GOLDEN {
        let file = chart("cadre").join("golden").join(format!("{name}.yaml"));
        let now = rendered("cadre", RELEASE, &[], &[values_of(name)]);
        if update {
            fs::write(&file, &now).unwrap_or_else(|error| panic!("write {}: {error}", file.display()));
        }
        let known =
            fs::read_to_string(&file).unwrap_or_else(|error| panic!("read {}: {error}", file.display()));
        let differs = known.lines().zip(now.lines()).enumerate().find(|(_, (known, now))| known != now);
        assert!(
            known == now,
            "{} is not what helm renders (CADRE_UPDATE_GOLDEN=1 writes it anew); first difference: {differs:?}",
            file.display()
        );
    }
}

/// The golden values file `defaults` is empty: its render is what most people get.
#[test]
fn the_default_image_is_the_one_that_xtask_makes() {
    let objects = golden("defaults");
    for pod in pods(&objects) {
        assert_eq!(pod["containers"][0]["image"], IMAGE);
    }
    assert_eq!(environment(&objects, "CADRE_IMAGE"), IMAGE);
}

fn environment(objects: &[Value], name: &str) -> Value {
    let container = &only(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0];
    let all = container["env"].as_array().expect("variables");
    all.iter()
        .find(|variable| variable["name"] == name)
        .map(|variable| variable["value"].clone())
        .unwrap_or_default()
}

#[test]
fn tag_and_digest_and_the_image_of_models() {
    let digest = format!("sha256:{}", "a".repeat(64));
    let with_digest = format!("image.digest={digest}");
    let repository = IMAGE.rsplit_once(':').expect("a tag").0;
    for (set, image) in [
        (vec!["image.tag=v2"], format!("{repository}:v2")),
        (vec![with_digest.as_str()], format!("{repository}@{digest}")),
        (vec!["image.tag=v2", &with_digest], format!("{repository}:v2@{digest}")),
        (
            vec!["image.repository=localhost:5000/cadre"],
            format!("localhost:5000/cadre:{}", IMAGE.rsplit_once(':').expect("a tag").1),
        ),
    ] {
        let objects = operator(&set);
        for pod in pods(&objects) {
            assert_eq!(pod["containers"][0]["image"], image.as_str(), "{set:?}");
        }
        assert_eq!(environment(&objects, "CADRE_IMAGE"), image.as_str(), "{set:?}");
    }
    let other = operator(&["modelImage=example.org/other:1"]);
    assert_eq!(environment(&other, "CADRE_IMAGE"), "example.org/other:1");
    assert_eq!(pods(&other)[0]["containers"][0]["image"], IMAGE);
}

/// Rules as a set: neither their order nor that of their fields means anything.
fn rules(role: &Value) -> BTreeSet<String> {
    role["rules"].as_array().expect("rules").iter().map(rule).collect()
}

fn rule(rule: &Value) -> String {
    let fields: BTreeMap<_, _> = rule.as_object().expect("a rule").iter().collect();
    json!(fields).to_string()
}

fn rules_of(scopes: &[Scope]) -> BTreeSet<String> {
    let values = scopes.iter().map(|scope| rbac::policy_rules_value(*scope));
    values.flat_map(|rules| rules.as_array().expect("rules").clone()).map(|found| rule(&found)).collect()
}

fn namespace(object: &Value) -> &str {
    object["metadata"]["namespace"].as_str().unwrap_or_default()
}

/// Roles with their scopes; the two for users, which only add to Kubernetes' own roles, apart.
fn assert_rights(objects: &[Value], cluster: &[Scope], watched: &[&str]) {
    let (users, ours): (Vec<&Value>, Vec<&Value>) =
        of_kind(objects, "ClusterRole").into_iter().partition(|role| {
            role["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-admin"] == "true"
        });
    assert_eq!((ours.len(), users.len()), (1, 2));
    assert_eq!(rules(ours[0]), rules_of(cluster));
    let mut expected: BTreeMap<(&str, &str), BTreeSet<String>> =
        BTreeMap::from([((NAMESPACE, "cadre-operator"), rules_of(&[Scope::Own]))]);
    expected
        .extend(watched.iter().map(|name| ((*name, "cadre-operator-models"), rules_of(&[Scope::Watched]))));
    let roles = of_kind(objects, "Role").into_iter();
    let found: BTreeMap<(&str, &str), BTreeSet<String>> = roles
        .map(|role| ((namespace(role), role["metadata"]["name"].as_str().expect("a name")), rules(role)))
        .collect();
    assert_eq!(found, expected);
    // Every role is bound once, in its namespace, to the operator's account and nobody else.
    let account = json!([{"kind": "ServiceAccount", "name": "cadre-operator", "namespace": NAMESPACE}]);
    let mut bound: BTreeSet<(&str, String)> = BTreeSet::new();
    for binding in of_kind(objects, "ClusterRoleBinding").into_iter().chain(of_kind(objects, "RoleBinding")) {
        assert_eq!(binding["subjects"], account);
        assert!(bound.insert((namespace(binding), binding["roleRef"]["name"].to_string())));
    }
    let roles = of_kind(objects, "Role").into_iter().chain(ours);
    let all: BTreeSet<(&str, String)> =
        roles.map(|role| (namespace(role), role["metadata"]["name"].to_string())).collect();
    assert_eq!(bound, all);
}

#[test]
fn the_rights_are_those_that_the_operator_uses() {
    assert_rights(&golden("defaults"), &[Scope::Cluster, Scope::Watched], &[]);
    assert_rights(&golden("namespaced"), &[Scope::Cluster], &["team-a", "team-b"]);
    assert_rights(&operator(&["watchNamespaces={cadre-system}"]), &[Scope::Cluster], &[NAMESPACE]);
    let none = operator(&["rbac.create=false", "rbac.userRoles=false"]);
    for kind in ["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"] {
        assert!(of_kind(&none, kind).is_empty(), "{kind}");
    }
}

/// The restricted pod security standard, and a read-only root.
#[test]
fn every_pod_is_restricted() {
    for name in GOLDEN {
        let objects = golden(name);
        for pod in pods(&objects) {
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{name}");
            assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{name}");
            assert!(pod.get("volumes").is_none() && pod.get("hostNetwork").is_none(), "{name}");
            for container in pod["containers"].as_array().expect("containers") {
                let expected = json!({
                    "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
                });
                assert_eq!(container["securityContext"], expected, "{name}");
                assert!(container["resources"]["limits"]["memory"].is_string(), "{name}");
            }
        }
        assert_eq!(
            pods(&objects)[1]["automountServiceAccountToken"],
            false,
            "{name}: the test needs no rights"
        );
    }
}

/// Every flag and variable that the chart sets exists.
#[test]
fn the_program_knows_every_flag() {
    for name in GOLDEN {
        let objects = golden(name);
        for pod in pods(&objects) {
            let container = &pod["containers"][0];
            let args: Vec<&str> =
                container["args"].as_array().expect("arguments").iter().filter_map(Value::as_str).collect();
            let help = Command::new(cadre()).args([args[0], "--help"]).output().expect("cadre starts");
            let help = text(&help.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
            let flags = args
                .iter()
                .filter(|arg| arg.starts_with("--"))
                .map(|arg| arg.split('=').next().unwrap_or(arg));
            for flag in flags {
                assert!(help.contains(&format!("{flag} ")), "{} {flag}: {help}", args[0]);
            }
            let variables = container["env"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|variable| variable["name"].as_str());
            for variable in variables.filter(|name| name.starts_with("CADRE_")) {
                assert!(help.contains(&format!("[env: {variable}=")), "{} {variable}: {help}", args[0]);
            }
        }
    }
}

#[test]
fn a_value_that_nothing_reads_is_refused_with_its_path() {
    for (set, path, says) in [
        ("replicaCount=2", "''", "replicaCount"),
        ("image.tagg=2", "'/image'", "tagg"),
        ("image.digest=sha256:short", "'/image/digest'", "pattern"),
        ("image.pullPolicy=Sometimes", "'/image/pullPolicy'", "one of"),
        ("replicas=0", "'/replicas'", "minimum"),
        ("log.level=info", "'/log'", "level"),
        ("watchNamespaces={Team_A}", "'/watchNamespaces/0'", "pattern"),
        ("watchNamespaces=a", "'/watchNamespaces'", "array"),
        ("metrics.serviceMonitor.enabled=true", "'/metrics/serviceMonitor'", "enabled"),
        ("metrics.podMonitor.interval=30", "'/metrics/podMonitor/interval'", "string"),
        ("networkPolicy.metricsFrom[0].pods=x", "'/networkPolicy/metricsFrom/0'", "pods"),
        ("tolerations[0].effect=Never", "'/tolerations/0/effect'", "one of"),
        ("extraEnv[0].value=x", "'/extraEnv/0'", "name"),
        ("resources.claims=x", "'/resources'", "claims"),
        ("affinity.node=x", "'/affinity'", "node"),
    ] {
        let folder = chart("cadre").display().to_string();
        let output = helm(&["template", RELEASE, &folder, "--set", set], &[]);
        let message = text(&output.stderr);
        assert!(!output.status.success(), "{set} is accepted");
        assert!(message.contains(&format!("at {path}")) && message.contains(says), "{set}: {message}");
    }
    let folder = chart("cadre-crds").display().to_string();
    let output = helm(&["template", "cadre-crds", &folder, "--set", "keep=false"], &[]);
    assert!(!output.status.success() && text(&output.stderr).contains("keep"));
}

fn schema(name: &str) -> Value {
    let file = chart(name).join("values.schema.json");
    let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("read {}: {error}", file.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// Objects without a closed set of keys, by path.
fn open(node: &Value, path: &str, found: &mut Vec<String>) {
    let is_map = node["additionalProperties"].is_object();
    if node["type"] == "object" && node["additionalProperties"] != false && !is_map {
        found.push(path.to_owned());
    }
    for key in ["properties", "definitions"] {
        for (name, inner) in node[key].as_object().into_iter().flatten() {
            open(inner, &format!("{path}/{name}"), found);
        }
    }
    for key in ["items", "additionalProperties"] {
        if node[key].is_object() {
            open(&node[key], &format!("{path}/{key}"), found);
        }
    }
}

/// Only Kubernetes' own types, which the API server checks, and what helm itself adds.
#[test]
fn the_schemas_are_closed_at_every_level() {
    let mut found = Vec::new();
    open(&schema("cadre"), "", &mut found);
    open(&schema("cadre-crds"), "crds", &mut found);
    let allowed = |path: &String| {
        let kubernetes = ["/affinity/", "/extraEnv/items/valueFrom/"];
        path.ends_with("/global") || kubernetes.iter().any(|own| path.starts_with(own))
    };
    found.retain(|path| !allowed(path));
    assert_eq!(found, Vec::<String>::new());
}

/// Every key of the schema stands in values.yaml, where its meaning is, under a comment.
#[test]
fn every_value_is_documented() {
    let text = fs::read_to_string(chart("cadre").join("values.yaml")).expect("values.yaml");
    let values: Value = serde_saphyr::from_str(&text).expect("YAML");
    let schema = schema("cadre");
    let keys = |value: &Value| -> BTreeSet<String> {
        value
            .as_object()
            .into_iter()
            .flatten()
            .map(|(key, _)| key.clone())
            .filter(|key| key != "global")
            .collect()
    };
    assert_eq!(keys(&values), keys(&schema["properties"]));
    for (key, value) in values.as_object().expect("a map") {
        let node = &schema["properties"][key];
        for (inner, value) in
            value.as_object().into_iter().flatten().filter(|_| node["properties"].is_object())
        {
            assert!(node["properties"][inner].is_object(), "{key}.{inner}");
            let node = &node["properties"][inner];
            let definition =
                node["$ref"].as_str().and_then(|path| schema.pointer(path.trim_start_matches('#')));
            let node = definition.unwrap_or(node);
            if let Some(properties) = node["properties"].as_object() {
                let missing: Vec<&String> =
                    properties.keys().filter(|name| value.get(name.as_str()).is_none()).collect();
                assert!(missing.is_empty(), "{key}.{inner}: {missing:?}");
            }
        }
        let at = format!("\n{key}:");
        let before = text.split(&at).next().unwrap_or_default();
        let last = before.lines().last().unwrap_or_default();
        let is_group = value.is_object() && !value.as_object().is_some_and(serde_json::Map::is_empty);
        let follows = ["podLabels", "tolerations", "nodeSelector", "podAnnotations"].contains(&key.as_str());
        assert!(last.starts_with('#') || is_group || follows, "{key} has no comment");
    }
}

#[test]
fn names_follow_the_release_and_can_be_overridden() {
    for (release, set, name) in [
        ("cadre", vec![], "cadre-operator"),
        ("my-operator", vec![], "my-operator"),
        ("cadre", vec!["nameOverride=models"], "cadre-models"),
        ("cadre", vec!["fullnameOverride=serving"], "serving"),
    ] {
        let objects = objects(&rendered("cadre", release, &set, &[]));
        for kind in ["Deployment", "Service", "ServiceAccount"] {
            assert_eq!(only(&objects, kind)["metadata"]["name"], name, "{release} {set:?}");
        }
        let args = &pods(&objects)[0]["containers"][0]["args"];
        let lease = format!("--lease={name}");
        assert!(args.as_array().expect("arguments").iter().any(|arg| arg == lease.as_str()), "{args}");
    }
}

/// Selectors of everything that selects pods fit the operator's pods and not the test's.
#[test]
fn selectors_fit_the_operator_and_only_it() {
    let objects = operator(&["replicas=2"]);
    let labels = &only(&objects, "Deployment")["spec"]["template"]["metadata"]["labels"];
    let test = &only(&objects, "Pod")["metadata"]["labels"];
    let selectors = [
        &only(&objects, "Deployment")["spec"]["selector"]["matchLabels"],
        &only(&objects, "Service")["spec"]["selector"],
        &only(&objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        &only(&objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ];
    for selector in selectors {
        let fits = |labels: &Value| {
            selector
                .as_object()
                .expect("a selector")
                .iter()
                .all(|(key, value)| labels.get(key) == Some(value))
        };
        assert!(fits(labels) && !fits(test), "{selector}");
    }
    assert!(
        of_kind(&operator(&[]), "PodDisruptionBudget").is_empty(),
        "one pod with a budget is a node that cannot drain"
    );
}

#[test]
fn the_definitions_are_those_of_the_types_and_stay() {
    let found = objects(&rendered("cadre-crds", "cadre-crds", &[], &[]));
    let types: Vec<Value> = crd::all().iter().map(|crd| serde_json::to_value(crd).expect("JSON")).collect();
    assert_eq!(found.len(), types.len());
    for (found, types) in found.iter().zip(&types) {
        assert_eq!(found["spec"], types["spec"]);
        assert_eq!(found["metadata"]["name"], types["metadata"]["name"]);
        assert_eq!(found["metadata"]["annotations"]["helm.sh/resource-policy"], "keep");
    }
}

/// What people are told to type after the installation works.
#[test]
fn the_model_in_the_notes_is_accepted() {
    let notes = fs::read_to_string(chart("cadre").join("templates/NOTES.txt")).expect("NOTES.txt");
    let (_, rest) = notes.split_once("<<MODEL\n").expect("a here-document");
    let (model, _) = rest.split_once("\nMODEL\n").expect("its end");
    let documents = manifest::read(model).unwrap_or_else(|error| panic!("{error}"));
    assert!(matches!(documents.as_slice(), [Document::Model(_)]), "{documents:?}");
}
