//! The CustomResourceDefinitions as they are installed.
//!
//! What the derive makes, with three things changed. `nullable` goes: a field without a value is left out, and null
//! would be a third state that no rule expects. Paragraph breaks in descriptions go: `kubectl explain` reflows them. And
//! the kind gets the description of its spec: the derive has none of its own for it.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::Value;

use crate::{MoEModel, MoETier};

/// All definitions, in the order in which they are installed.
pub fn all() -> Vec<CustomResourceDefinition> {
    vec![plain(MoEModel::crd()), plain(MoETier::crd())]
}

/// The schema of the only version of a definition.
pub fn schema(crd: &CustomResourceDefinition) -> Value {
    crd.spec
        .versions
        .first()
        .and_then(|version| version.schema.as_ref())
        .and_then(|schema| serde_json::to_value(&schema.open_api_v3_schema).ok())
        .unwrap_or_default()
}

fn plain(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut crd.spec.versions {
        let Some(schema) = version.schema.as_mut() else { continue };
        let mut value = serde_json::to_value(&schema.open_api_v3_schema).expect("a schema is JSON");
        simplify(&mut value);
        value["description"] = value["properties"]["spec"]["description"].clone();
        // The value came out of the same type: it fits.
        schema.open_api_v3_schema = serde_json::from_value(value).expect("a schema without null is a schema");
    }
    crd
}

fn simplify(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    map.remove("nullable");
    if let Some(Value::String(text)) = map.get_mut("description") {
        *text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    }
    if let Some(Value::Object(properties)) = map.get_mut("properties") {
        properties.values_mut().for_each(simplify);
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = map.get_mut(key) {
            simplify(inner);
        }
    }
}

#[cfg(test)]
mod tests;
