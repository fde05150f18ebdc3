//! What admission accepts and refuses, without a cluster: the table in `cases.yaml`, the samples, and the agreement of
//! the rules' arithmetic with that of the types.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::PathBuf};

use cadre_k8s_api::{IMAGE, MoEModel, Tier, crd, manifest};
use kube::core::cel::Validator;
use proptest::prelude::*;
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
#[serde(deny_unknown_fields)]
struct Create {
    name: String,
    patch: Value,
    #[serde(default)]
    path: String,
    #[serde(default)]
    says: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
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
#[serde(deny_unknown_fields)]
struct TierCase {
    name: String,
    object: String,
    spec: Value,
    update: Option<Value>,
    path: Option<String>,
    #[serde(default)]
    says: String,
}

fn samples() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../deploy/samples")
}

fn pocket() -> Value {
    serde_saphyr::from_str(&fs::read_to_string(samples().join("pocket.yaml")).unwrap()).unwrap()
}

fn cases() -> Cases {
    serde_saphyr::from_str(include_str!("cases.yaml")).unwrap()
}

/// JSON merge patch (RFC 7396).
fn patched(mut object: Value, patch: &Value) -> Value {
    let Some(changes) = patch.as_object() else { return patch.clone() };
    if !object.is_object() {
        object = json!({});
    }
    for (key, change) in changes {
        let fields = object.as_object_mut().unwrap();
        if change.is_null() {
            fields.remove(key);
        } else {
            let inner = fields.remove(key).unwrap_or_default();
            fields.insert(key.clone(), patched(inner, change));
        }
    }
    object
}

/// One refusal, at the path, with the words.
fn assert_refused(name: &str, refusals: &[manifest::Refusal], path: &str, says: &str) {
    let fits = |refusal: &manifest::Refusal| refusal.path.starts_with(path) && refusal.message.contains(says);
    assert!(refusals.iter().any(fits), "{name}: no refusal of {path:?} says {says:?}: {refusals:#?}");
}

#[test]
fn accepts_what_is_right() {
    for case in cases().accepted {
        let object = patched(pocket(), &case.patch);
        let model =
            manifest::model(&object).unwrap_or_else(|refusals| panic!("{}: {refusals:#?}", case.name));
        assert!(model.spec.model.source.given().is_some(), "{}", case.name);
        assert!(model.spec.fits_shards(model.spec.experts.shards), "{}", case.name);
        // What is accepted survives a round trip: no field is read and dropped.
        let written = serde_json::to_value(&model).unwrap();
        assert_eq!(manifest::model(&written).unwrap(), model, "{}", case.name);
    }
}

#[test]
fn refuses_what_is_wrong() {
    for case in cases().refused {
        let object = patched(pocket(), &case.patch);
        let Err(refusals) = manifest::model(&object) else { panic!("{}: accepted", case.name) };
        assert_refused(&case.name, &refusals, &case.path, &case.says);
    }
}

/// Every rule of the model is refused by a case: a rule that no case reaches may be wrong.
#[test]
fn every_rule_has_a_case() {
    fn rules(schema: &Value, found: &mut Vec<String>) {
        for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
            found.push(rule["rule"].as_str().unwrap().to_owned());
        }
        schema["properties"].as_object().into_iter().flatten().for_each(|(_, inner)| rules(inner, found));
        ["items", "additionalProperties"]
            .iter()
            .filter_map(|key| schema.get(*key))
            .for_each(|inner| rules(inner, found));
    }
    let cases = cases();
    let mut broken: Vec<String> = Vec::new();
    let mut evaluate = |schema: &Value, object: &Value, old: Option<&Value>| {
        if let Err(errors) = Validator::new().validate(schema, object, old) {
            broken.extend(errors.into_vec().into_iter().map(|error| error.rule));
        }
    };
    let schemas: Vec<Value> = crd::all().iter().map(crd::schema).collect();
    for case in &cases.refused {
        evaluate(&schemas[0], &patched(pocket(), &case.patch), None);
    }
    for case in &cases.updates {
        let (old, new) = update(case);
        evaluate(&schemas[0], &new, Some(&old));
    }
    for case in &cases.tiers {
        let old = tier(case, &case.spec);
        match &case.update {
            Some(spec) => evaluate(&schemas[1], &tier(case, spec), Some(&old)),
            None => evaluate(&schemas[1], &old, None),
        }
    }
    let mut all = Vec::new();
    schemas.iter().for_each(|schema| rules(schema, &mut all));
    let missing: Vec<&String> = all.iter().filter(|rule| !broken.contains(rule)).collect();
    assert!(missing.is_empty(), "no case breaks {missing:#?}");
}

fn update(case: &Update) -> (Value, Value) {
    let status = json!({"status": {"conditions": [{
        "type": "Ready", "status": case.ready, "reason": "AsSpecified", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }]}});
    let old = patched(patched(pocket(), &case.before), &status);
    let new = patched(patched(pocket(), &case.after), &status);
    (old, new)
}

#[test]
fn changes_while_serving() {
    for case in cases().updates {
        let (old, new) = update(&case);
        match (manifest::model_update(&new, &old), &case.path) {
            (Ok(_), None) => {}
            (Err(refusals), Some(path)) => assert_refused(&case.name, &refusals, path, &case.says),
            (outcome, _) => panic!("{}: {outcome:?}", case.name),
        }
    }
}

fn tier(case: &TierCase, spec: &Value) -> Value {
    json!({"apiVersion": "cadre.dev/v1alpha1", "kind": "MoETier", "metadata": {"name": case.object}, "spec": spec})
}

#[test]
fn tiers() {
    for case in cases().tiers {
        let old = tier(&case, &case.spec);
        let outcome = match &case.update {
            Some(spec) => manifest::tier_update(&tier(&case, spec), &old),
            None => manifest::tier(&old),
        };
        match (outcome, &case.path) {
            (Ok(_), None) => {}
            (Err(refusals), Some(path)) => assert_refused(&case.name, &refusals, path, &case.says),
            (outcome, _) => panic!("{}: {outcome:?}", case.name),
        }
    }
}

#[test]
fn the_samples_are_accepted() {
    let mut files = 0;
    for entry in fs::read_dir(samples()).unwrap() {
        let path = entry.unwrap().path();
        let documents = manifest::read(&fs::read_to_string(&path).unwrap())
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(!documents.is_empty(), "{}", path.display());
        files += 1;
        for document in documents {
            let manifest::Document::Model(model) = document else { continue };
            if let Some(budget) = &model.spec.budget {
                assert!(model.spec.gpus() <= budget.gpus.into(), "{}", path.display());
            }
        }
    }
    assert!(files >= 6, "{files} samples");
}

#[test]
fn the_pocket_sample_needs_nothing_but_the_image() {
    let text = fs::read_to_string(samples().join("pocket.yaml")).unwrap();
    let documents = manifest::read(&text).unwrap();
    let [manifest::Document::Model(model)] = documents.as_slice() else { panic!("{documents:?}") };
    assert_eq!(model.spec.image.as_deref(), Some(IMAGE));
    assert_eq!(model.served_name(), "pocket");
    assert!(model.spec.experts.min_copies >= 2);
    assert!(Tier::ALL.iter().all(|tier| model.spec.accelerator(*tier).is_none()));
}

/// What the autoscaler examples scale exists under that name.
#[test]
fn the_autoscalers_scale_tiers_of_the_pocket_sample() {
    let mut targets = 0;
    for file in ["hpa.yaml", "keda.yaml"] {
        let objects: Vec<Value> =
            serde_saphyr::from_multiple(&fs::read_to_string(samples().join(file)).unwrap()).unwrap();
        for object in objects {
            let target = &object["spec"]["scaleTargetRef"];
            assert_eq!(
                (&target["apiVersion"], &target["kind"]),
                (&json!("cadre.dev/v1alpha1"), &json!("MoETier"))
            );
            let names = Tier::ALL.map(|tier| tier.object_name("pocket"));
            assert!(names.iter().any(|name| target["name"] == name.as_str()), "{file}: {target}");
            targets += 1;
        }
    }
    assert_eq!(targets, 4);
}

#[test]
fn files_are_read_strictly() {
    let text = fs::read_to_string(samples().join("pocket.yaml")).unwrap();
    let told = |text: &str| manifest::read(text).unwrap_err().to_string();
    let twice = text.replace("    shards: 4\n", "    shards: 4\n    shards: 4\n");
    assert!(told(&twice).contains("shards"), "{}", told(&twice));
    let unknown = told(&text.replace("kvCache", "kvcache"));
    assert!(
        unknown.contains("spec.prefill.kvcache: unknown field") && unknown.contains("spec.decode.kvcache"),
        "{unknown}"
    );
    assert!(told("kind: MoEModel").contains("document 1 has no apiVersion"));
    assert!(told(&text.replace("v1alpha1", "v2")).contains("cadre.dev/v1alpha1 does"));
    assert!(told(&text.replace("  name: pocket", "  nam: pocket")).contains("metadata.name"));
    assert!(told(&text.replace("  name: pocket", "  name: pocket\n  label: {}")).contains("metadata.label"));
    assert!(told("a: [").starts_with("not YAML"));
    assert!(matches!(
        manifest::read("---\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n").unwrap().as_slice(),
        [manifest::Document::Other { kind, name }] if kind == "Namespace" && name == "a"
    ));
}

/// The sums of the types and those of the rules.
fn model(shape: (i32, i32, i32, i32), pods: (i32, i32), count: i32, budget: i32) -> Value {
    let (routed, redundant, shards, copies) = shape;
    let accelerator = json!({"resource": "nvidia.com/gpu", "count": count});
    patched(
        pocket(),
        &json!({"spec": {
            "model": {"routedExperts": routed},
            "prefill": {"replicas": pods.0, "accelerator": accelerator},
            "decode": {"replicas": pods.1},
            "experts": {"shards": shards, "redundantSlots": redundant, "minCopies": copies, "accelerator": accelerator},
            "budget": {"gpus": budget},
        }}),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn rules_and_types_agree(
        shape in (1..40_i32, 0..90_i32, 1..12_i32, 1..4_i32),
        pods in (0..4_i32, 0..4_i32), count in 1..3_i32, budget in 0..40_i32,
    ) {
        let object = model(shape, pods, count, budget);
        let typed: MoEModel = serde_json::from_value(object.clone()).unwrap();
        let spec = &typed.spec;
        let fits = spec.fits_shards(spec.experts.shards)
            && spec.slots() >= i64::from(spec.model.routed_experts) * i64::from(spec.experts.min_copies)
            && spec.gpus() <= i64::from(budget)
            && count == 1;
        prop_assert_eq!(manifest::model(&object).is_ok(), fits, "{:?}", manifest::model(&object));
    }
}
