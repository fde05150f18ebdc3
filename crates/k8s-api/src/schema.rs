//! Pieces of the schema that a derive cannot say: patterns, and bounded forms of Kubernetes' own types, whose
//! schemas have neither bounds nor short descriptions.

use schemars::{Schema, SchemaGenerator, json_schema};

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

/// An image: `[registry[:port]/]path[:tag][@sha256:digest]`.
pub(crate) const IMAGE: &str = r"^([A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?(:[0-9]{1,5})?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*(:[A-Za-z0-9_][-A-Za-z0-9_.]{0,127})?(@sha256:[a-f0-9]{64})?$";

/// What the OpenAI API may call a model: `deepseek-ai/DeepSeek-V3`.
pub(crate) const SERVED_NAME: &str = "^[A-Za-z0-9]([-A-Za-z0-9._/:]*[A-Za-z0-9])?$";

/// Kubernetes' quantities, without a sign.
pub(crate) const QUANTITY: &str = r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[munkMGTPE]|[eE][0-9]{1,2})?$";

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
