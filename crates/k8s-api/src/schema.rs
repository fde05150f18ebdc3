//! Pieces of the schema that a derive cannot say: patterns, and bounded forms of Kubernetes' own types, whose
//! schemas have neither bounds nor short descriptions.

use k8s_openapi::api::{core::v1::Affinity, networking::v1::NetworkPolicyPeer};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value, json};

use crate::rules;

/// A DNS label that also names Services: it starts with a letter.
pub(crate) const LABEL: &str = "^[a-z]([-a-z0-9]*[a-z0-9])?$";

/// Names of most objects.
pub(crate) const SUBDOMAIN: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";

/// A label key, with or without a prefix.
pub(crate) const LABEL_KEY: &str =
    r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$";

/// A resource outside Kubernetes' own: always with a prefix.
pub(crate) const EXTENDED_RESOURCE: &str =
    r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$";

/// An image: `[registry[:port]/]path[:tag][@sha256:digest]`; the registry may be an IPv6 address in brackets.
pub(crate) const IMAGE: &str = r"^(([A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*(:[A-Za-z0-9_][-A-Za-z0-9_.]{0,127})?(@sha256:[a-f0-9]{64})?$";

/// What the OpenAI API may call a model: `deepseek-ai/DeepSeek-V3`.
pub(crate) const SERVED_NAME: &str = "^[A-Za-z0-9]([-A-Za-z0-9._/:]*[A-Za-z0-9])?$";

/// Kubernetes' quantities, without a sign.
pub(crate) const QUANTITY: &str = r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[munkMGTPE]|[eE][0-9]{1,2})?$";

/// An environment variable's name.
pub(crate) const VARIABLE: &str = "^[A-Za-z_][A-Za-z0-9_]*$";

/// A key of a ConfigMap or Secret.
pub(crate) const DATA_KEY: &str = "^[-._a-zA-Z0-9]+$";

/// Bytes of KV cache.
pub(crate) fn kv_cache(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "pattern": QUANTITY,
        "maxLength": 32,
        "x-kubernetes-validations": rules::kv_cache(),
    })
}

/// `cpu` and `memory`.
pub(crate) fn quantities(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 8,
        "additionalProperties": {
            "x-kubernetes-int-or-string": true,
            "pattern": QUANTITY,
            "maxLength": 32,
        },
        "x-kubernetes-validations": rules::quantities(),
    })
}

/// A size in bytes.
pub(crate) fn size(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"x-kubernetes-int-or-string": true, "pattern": QUANTITY, "maxLength": 32})
}

/// Group ids.
pub(crate) fn groups(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "items": {
            "type": "integer",
            "format": "int64",
            "description": "A group's id.",
            "minimum": 1,
            "maximum": 4_294_967_294_i64,
        },
        "x-kubernetes-list-type": "set",
    })
}

/// Annotations of an object.
pub(crate) fn annotations(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": {"type": "string", "maxLength": 4096},
        "x-kubernetes-validations": rules::annotations(),
    })
}

/// Kubernetes' own type, bounded.
pub(crate) fn affinity(generator: &mut SchemaGenerator) -> Schema {
    kubernetes::<Affinity>(generator)
}

/// Peers of a NetworkPolicy.
pub(crate) fn peers(generator: &mut SchemaGenerator) -> Schema {
    let mut peer = Value::from(kubernetes::<NetworkPolicyPeer>(generator));
    peer["description"] = "Pods by label, namespaces by label, or addresses.".into();
    peer["x-kubernetes-validations"] = json!(rules::peer());
    json_schema!({"type": "array", "maxItems": 16, "items": peer, "x-kubernetes-list-type": "atomic"})
}

/// Longest list or map in one of Kubernetes' own types.
const MOST: u64 = 16;

/// One of Kubernetes' own types without its long descriptions, and with a bound for everything, because the API server
/// charges a rule for the longest value possible.
fn kubernetes<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let mut value = Value::from(generator.subschema_for::<T>());
    // A generator that does not inline gives a reference.
    if value.get("$ref").is_some() {
        value = Value::from(T::json_schema(generator));
    }
    bound(&mut value);
    Schema::try_from(value).unwrap_or_default()
}

fn bound(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    let text = map.get("description").and_then(Value::as_str).unwrap_or_default();
    let text = first_sentence(text);
    map.insert("description".into(), text.into());
    match map.get("type").and_then(Value::as_str) {
        Some("string") if !map.contains_key("enum") => at_most(map, "maxLength", 317),
        Some("array") => at_most(map, "maxItems", MOST),
        Some("integer") => {
            at_most(map, "minimum", 0);
            at_most(map, "maximum", 2_147_483_647);
        }
        Some("object") if !map.contains_key("properties") => at_most(map, "maxProperties", MOST),
        _ => {}
    }
    for inner in ["items", "additionalProperties"] {
        map.get_mut(inner).into_iter().for_each(bound);
    }
    map.get_mut("properties")
        .and_then(Value::as_object_mut)
        .into_iter()
        .flat_map(Map::values_mut)
        .for_each(bound);
}

fn at_most(map: &mut Map<String, Value>, key: &str, bound: u64) {
    map.entry(key).or_insert_with(|| bound.into());
}

/// What a table has room for.
fn first_sentence(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let end = text.find(". ").map_or(text.len(), |at| at + 1).min(160);
    let end = (0..=end).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    match text[..end].trim() {
        "" => "As in Kubernetes.".to_owned(),
        words => words.replace("[`", "`"),
    }
}

/// Labels of nodes.
pub(crate) fn node_selector(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": {
            "type": "string",
            "maxLength": 63,
            "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$",
        },
        "x-kubernetes-validations": rules::node_selector(),
    })
}

/// Names of Secrets.
pub(crate) fn pull_secrets(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 8,
        "items": {
            "type": "object",
            "description": "A Secret of the model's namespace.",
            "required": ["name"],
            "properties": {
                "name": {
                    "type": "string",
                    "description": "The Secret's name.",
                    "maxLength": 253,
                    "pattern": SUBDOMAIN,
                },
            },
        },
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["name"],
    })
}

/// Tolerations of pods.
pub(crate) fn tolerations(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "items": {
            "type": "object",
            "description": "A taint that is tolerated.",
            "properties": {
                "key": {
                    "type": "string",
                    "description": "Key of the taint; every key if absent.",
                    "maxLength": 317,
                    "pattern": LABEL_KEY,
                },
                "operator": {
                    "type": "string",
                    "description": "Whether the value must be equal; Equal if absent.",
                    "enum": ["Equal", "Exists"],
                },
                "value": {
                    "type": "string",
                    "description": "Value of the taint.",
                    "maxLength": 63,
                },
                "effect": {
                    "type": "string",
                    "description": "Effect of the taint; every effect if absent.",
                    "enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"],
                },
                "tolerationSeconds": {
                    "type": "integer",
                    "format": "int64",
                    "description": "How long NoExecute is tolerated; for ever if absent.",
                    "minimum": 0,
                },
            },
            "x-kubernetes-validations": rules::toleration(),
        },
        "x-kubernetes-list-type": "atomic",
    })
}

/// Conditions of a status.
pub(crate) fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "items": {
            "type": "object",
            "description": "One aspect of the state.",
            "required": ["type", "status", "lastTransitionTime", "reason", "message"],
            "properties": {
                "type": {
                    "type": "string",
                    "description": "Which aspect.",
                    "maxLength": 64,
                },
                "status": {
                    "type": "string",
                    "description": "Whether it holds.",
                    "enum": ["True", "False", "Unknown"],
                },
                "observedGeneration": {
                    "type": "integer",
                    "format": "int64",
                    "description": "Generation of the spec that this is about.",
                    "minimum": 0,
                },
                "lastTransitionTime": {
                    "type": "string",
                    "format": "date-time",
                    "description": "When the status last changed.",
                },
                "reason": {
                    "type": "string",
                    "description": "Why, as one of a closed set of words (docs/operations.md).",
                    "minLength": 1,
                    "maxLength": 128,
                    "pattern": "^[A-Za-z]([A-Za-z0-9]*)$",
                },
                "message": {
                    "type": "string",
                    "description": "Why, in words.",
                    "maxLength": 32768,
                },
            },
        },
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
    })
}
