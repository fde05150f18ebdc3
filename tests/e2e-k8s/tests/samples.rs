//! What the API server accepts and refuses: every sample, and the table of crates/k8s-api/tests/admission.

use std::fs;

use cadre_e2e_k8s::{
    Kubectl, Model, Namespace, Operator, cluster, sample,
    wait::{self, LIMIT, holds},
};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Cases {
    accepted: Vec<Create>,
    refused: Vec<Create>,
    updates: Vec<Update>,
    tiers: Vec<TierCase>,
}

#[derive(Deserialize)]
struct Create {
    name: String,
    patch: Value,
    #[serde(default)]
    path: String,
    #[serde(default)]
    says: String,
}

#[derive(Deserialize)]
struct Update {
    name: String,
    before: Value,
    after: Value,
    ready: String,
    path: Option<String>,
    #[serde(default)]
    says: String,
}

#[derive(Deserialize)]
struct TierCase {
    name: String,
    object: String,
    spec: Value,
    update: Option<Value>,
    path: Option<String>,
    #[serde(default)]
    says: String,
}

fn cases() -> Cases {
    let text = include_str!("../../../crates/k8s-api/tests/admission/cases.yaml");
    serde_saphyr::from_str(text).expect("the table has its shape")
}

/// Compares what the API server did with what it must do; every case that differs is told.
#[derive(Default)]
struct Verdicts(Vec<String>);

impl Verdicts {
    /// `refusal` is the path and the words of a case that must be refused.
    fn add(&mut self, name: &str, outcome: Result<String, String>, refusal: Option<(&str, &str)>) {
        let fault = match (outcome, refusal) {
            (Ok(_), None) => return,
            (Err(words), Some((path, says))) if words.contains(path) && words.contains(says) => return,
            (Ok(_), Some(_)) => "was accepted".to_owned(),
            (Err(words), None) => format!("was refused: {words}"),
            (Err(words), Some((path, says))) => format!("no {path:?} or no {says:?} in: {words}"),
        };
        self.0.push(format!("{name}: {fault}"));
    }

    #[track_caller]
    fn end(self) {
        assert!(self.0.is_empty(), "{} cases differ:\n{}", self.0.len(), self.0.join("\n"));
    }
}

fn dry(kubectl: &Kubectl, verb: &str, object: &Value) -> Result<String, String> {
    let args = [verb, "--dry-run=server", "--validate=strict", "-f", "-"];
    kubectl.with_object(&args, object).map_err(|error| error.words().to_owned())
}

#[test]
fn specs_are_accepted_and_refused_as_the_table_says() {
    Operator::installed();
    let namespace = Namespace::new("cases");
    let mut verdicts = Verdicts::default();
    for (cases, is_refused) in [(cases().accepted, false), (cases().refused, true)] {
        for case in cases {
            let object = sample::patched(sample::plain_pocket(), &case.patch);
            let refusal = is_refused.then_some((case.path.as_str(), case.says.as_str()));
            verdicts.add(&case.name, dry(namespace.kubectl(), "create", &object), refusal);
        }
    }
    verdicts.end();
}

#[test]
fn changes_of_a_model_that_serves_are_refused_as_the_table_says() {
    let operator = Operator::installed();
    // The status is written by the test here.
    let _paused = operator.paused();
    let namespace = Namespace::new("updates");
    let kubectl = namespace.kubectl();
    let mut verdicts = Verdicts::default();
    for case in cases().updates {
        kubectl.apply(&sample::patched(sample::plain_pocket(), &case.before));
        let status = json!({"status": {"conditions": [{
            "type": "Ready", "status": case.ready, "reason": "AsSpecified", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }]}});
        let patch = status.to_string();
        kubectl.must(&[
            "patch",
            "moemodel",
            "pocket",
            "--subresource=status",
            "--type=merge",
            "--patch",
            &patch,
        ]);
        let after = sample::patched(sample::plain_pocket(), &case.after);
        let refusal = case.path.as_deref().map(|path| (path, case.says.as_str()));
        verdicts.add(&case.name, dry(kubectl, "replace", &after), refusal);
        kubectl.must(&["delete", "moemodel", "pocket", "--timeout=60s"]);
    }
    verdicts.end();
}

#[test]
fn tiers_are_accepted_and_refused_as_the_table_says() {
    let operator = Operator::installed();
    let _paused = operator.paused();
    let namespace = Namespace::new("tiers");
    let kubectl = namespace.kubectl();
    let object = |name: &str, spec: &Value| json!({"apiVersion": "cadre.dev/v1alpha1", "kind": "MoETier", "metadata": {"name": name}, "spec": spec});
    let mut verdicts = Verdicts::default();
    for case in cases().tiers {
        let refusal = case.path.as_deref().map(|path| (path, case.says.as_str()));
        let outcome = match &case.update {
            None => dry(kubectl, "create", &object(&case.object, &case.spec)),
            Some(update) => {
                kubectl.apply(&object(&case.object, &case.spec));
                let outcome = dry(kubectl, "replace", &object(&case.object, update));
                kubectl.must(&["delete", "moetier", &case.object, "--timeout=60s"]);
                outcome
            }
        };
        verdicts.add(&case.name, outcome, refusal);
    }
    verdicts.end();
}

/// Whether the cluster knows KEDA's kinds; one of our own is taught them.
fn knows_keda() -> bool {
    let kubectl = Kubectl::cluster_wide();
    let definition = "crd/scaledobjects.keda.sh";
    if kubectl.run(&["get", definition]).is_ok() {
        return true;
    }
    let Some(file) = cluster().keda() else { return false };
    kubectl.must(&["create", "-f", &file.display().to_string()]);
    kubectl.must(&["wait", definition, "--for=condition=Established", "--timeout=60s"]);
    true
}

#[test]
fn every_sample_is_accepted() {
    Operator::installed();
    let namespace = Namespace::new("samples");
    let kubectl = namespace.kubectl();
    let mut models = 0;
    for entry in fs::read_dir(sample::folder()).expect("deploy/samples") {
        let path = entry.expect("an entry").path();
        let file = path.display().to_string();
        if file.ends_with("keda.yaml") && !knows_keda() {
            // What KEDA would ask for is asked for in the next test.
            println!(
                "NOTICE: not shown on this cluster, it has no KEDA: deploy/samples/keda.yaml is accepted"
            );
            continue;
        }
        let accepted = kubectl.must(&["create", "--dry-run=server", "--validate=strict", "-f", &file]);
        assert!(!accepted.is_empty(), "{file}");
        models += accepted.lines().filter(|line| line.starts_with("moemodel.cadre.dev/")).count();
    }
    assert_eq!(models, 4, "pocket and three of DeepSeek-V3");
}

#[test]
fn autoscalers_find_and_turn_the_scale_of_a_tier() {
    Operator::installed();
    let namespace = Namespace::new("hpa");
    let model = Model::ready(&namespace, &json!({}));
    namespace.kubectl().must(&["apply", "-f", &sample::folder().join("hpa.yaml").display().to_string()]);
    for name in ["pocket-prefill", "pocket-decode"] {
        wait::until(&format!("the autoscaler {name} reads the scale"), LIMIT, || {
            let autoscaler: Value = namespace.kubectl().get(&["horizontalpodautoscaler", name])?;
            let conditions = autoscaler["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let able = conditions.iter().find(|condition| condition["type"] == "AbleToScale");
            holds(able.is_some_and(|able| able["status"] == "True"), || autoscaler["status"].to_string())
        });
    }
    // What KEDA and others read and write.
    for tier in cadre_k8s_api::Tier::ALL {
        let name = tier.object_name(model.name());
        let path = format!("/apis/cadre.dev/v1alpha1/namespaces/{}/moetiers/{name}/scale", namespace.name());
        let scale: Value = namespace
            .kubectl()
            .raw(&path)
            .and_then(|text| serde_json::from_str(&text).map_err(|error| error.to_string()))
            .expect("the scale subresource");
        let pods = model.pods(tier.suffix()).expect("pods").len();
        assert_eq!(scale["status"]["replicas"], json!(pods), "{scale}");
        let selector = scale["status"]["selector"].as_str().expect("a selector");
        let selected = namespace.kubectl().must(&["get", "pods", "--selector", selector, "--output=name"]);
        assert_eq!(selected.lines().count(), pods, "{selector}");
    }
}

#[test]
fn every_field_is_explained() {
    Operator::installed();
    let kubectl = Kubectl::cluster_wide();
    for field in [
        "moe.spec.experts.minCopies",
        "moe.spec.model.source",
        "moe.status.conditions",
        "moetier.spec.replicas",
    ] {
        let text = kubectl.must(&["explain", field]);
        let description = text.split("DESCRIPTION:").nth(1).unwrap_or_default().trim();
        assert!(description.len() > 20 && !description.starts_with("<empty>"), "{field}: {text}");
    }
}
