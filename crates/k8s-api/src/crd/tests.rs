#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::Value;

use super::*;

/// Every schema below one, with its path.
fn walk<'a>(schema: &'a Value, path: &str, found: &mut Vec<(String, &'a Value)>) {
    found.push((path.to_owned(), schema));
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        walk(inner, &format!("{path}.{name}"), found);
    }
    for (key, mark) in [("items", "[]"), ("additionalProperties", "{}")] {
        if let Some(inner) = schema.get(key).filter(|inner| inner.is_object()) {
            walk(inner, &format!("{path}{mark}"), found);
        }
    }
}

fn nodes(crd: &CustomResourceDefinition) -> Vec<(String, Value)> {
    let schema = schema(crd);
    let mut found = Vec::new();
    walk(&schema, &crd.spec.names.kind, &mut found);
    found.into_iter().map(|(path, node)| (path, node.clone())).collect()
}

#[test]
fn is_small_enough_for_client_side_apply() {
    for crd in all() {
        let bytes = serde_json::to_vec(&crd).unwrap().len();
        assert!(
            bytes < 200 << 10,
            "{} has {bytes} bytes; 256 KiB is the annotation's limit",
            crd.spec.names.plural
        );
    }
}

/// The API server charges a rule for the longest value that the schema admits.
#[test]
fn everything_that_users_write_is_bounded() {
    for crd in all() {
        for (path, node) in nodes(&crd) {
            let bounded = match node["type"].as_str() {
                Some("boolean") => true,
                Some("string") => {
                    node.get("maxLength").is_some()
                        || node.get("enum").is_some()
                        || node["format"] == "date-time"
                }
                Some("array") => node.get("maxItems").is_some(),
                Some("integer") => !path.contains(".spec") || node.get("minimum").is_some(),
                Some("object") => node.get("properties").is_some() || node.get("maxProperties").is_some(),
                _ => node.get("maxLength").is_some(),
            };
            assert!(bounded || path.split('.').count() == 1, "{path} has no bound: {node}");
        }
    }
}

#[test]
fn every_field_is_described_and_never_null() {
    for crd in all() {
        for (path, node) in nodes(&crd) {
            assert!(node.get("nullable").is_none(), "{path}");
            if path.ends_with("{}") {
                continue;
            }
            let text = node["description"].as_str().unwrap_or_default();
            assert!(!text.is_empty() && text.len() < 400 && !text.contains("[`"), "{path}: {text:?}");
        }
    }
}

#[test]
fn the_kinds_say_what_they_are() {
    let told =
        all().iter().map(|crd| schema(crd)["description"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert!(
        told[0].starts_with("A mixture-of-experts model") && told[1].starts_with("One tier of a MoEModel"),
        "{told:?}"
    );
}

#[test]
fn defaults_are_in_the_schema() {
    let schema = schema(&all()[0]);
    let at = |path: &str| schema.pointer(&format!("/properties/spec/properties/{path}/default")).cloned();
    for (path, default) in [
        ("drainSeconds", 30.into()),
        ("model/properties/routedExperts", 256.into()),
        ("model/properties/numerics", "Bf16".into()),
        ("prefill/properties/kvCache", "512Mi".into()),
        ("decode/properties/kvCache", "512Mi".into()),
        ("experts/properties/redundantSlots", 0.into()),
        ("experts/properties/minCopies", 1.into()),
        ("experts/properties/spreadBy", Value::from("kubernetes.io/hostname")),
    ] {
        assert_eq!(at(path), Some(default), "{path}");
    }
}

#[test]
fn every_rule_says_what_to_do() {
    for crd in all() {
        for (path, node) in nodes(&crd) {
            for rule in node["x-kubernetes-validations"].as_array().into_iter().flatten() {
                let told =
                    rule["message"].as_str().or(rule["messageExpression"].as_str()).unwrap_or_default();
                assert!(told.len() > 20, "{path}: {rule}");
                // An API server takes its result for unbounded and refuses the definition.
                assert!(!told.contains("string("), "{path}: {rule}");
                assert!(!rule["rule"].as_str().unwrap().contains("  "), "{path}: {rule}");
            }
        }
    }
}

#[test]
fn the_columns_of_kubectl_get() {
    let columns = |index: usize| -> Vec<String> {
        let crd: &CustomResourceDefinition = &all()[index];
        let columns = crd.spec.versions[0].additional_printer_columns.clone().unwrap();
        columns
            .into_iter()
            .filter(|column| column.priority.unwrap_or(0) == 0)
            .map(|column| column.name)
            .collect()
    };
    assert_eq!(columns(0), ["Ready", "Prefill", "Decode", "Shards", "Covered", "Imbalance", "Age"]);
    assert_eq!(columns(1), ["Model", "Desired", "Current", "Ready", "Loaded", "Limited", "Age"]);
    assert_eq!(all()[0].spec.names.short_names.as_deref(), Some(["moe".to_owned()].as_slice()));
}
