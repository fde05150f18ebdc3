//! `MoETier`: one tier of a model, with the scale subresource. Made by the operator, scaled by users,
//! HorizontalPodAutoscalers or KEDA.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{names::Tier, rules, schema};

/// One tier of a MoEModel, made by the operator. `kubectl scale moetier/MODEL-decode --replicas=4` turns it.
#[derive(CustomResource, JsonSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "cadre.dev",
    version = "v1alpha1",
    kind = "MoETier",
    plural = "moetiers",
    singular = "moetier",
    category = "cadre",
    namespaced,
    status = "MoETierStatus",
    derive = "PartialEq",
    cel,
    selectable = ".spec.modelName",
    validation = rules::tier_name(),
    scale = r#"{"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas", "labelSelectorPath": ".status.selector"}"#,
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.modelName"),
    printcolumn(name = "Desired", type_ = "integer", json_path = ".spec.replicas"),
    printcolumn(name = "Current", type_ = "integer", json_path = ".status.replicas"),
    printcolumn(name = "Ready", type_ = "integer", json_path = ".status.ready"),
    printcolumn(name = "Loaded", type_ = "string", json_path = ".status.loaded"),
    printcolumn(
        name = "Limited",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"ScalingLimited\")].status"
    ),
    printcolumn(name = "Accelerators", type_ = "string", json_path = ".status.accelerators", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::tier_spec()))]
pub struct MoETierSpec {
    /// The model. Immutable.
    #[schemars(length(min = 1, max = 40), regex(pattern = schema::LABEL), extend("x-kubernetes-validations" = rules::immutable("modelName")))]
    pub model_name: String,
    /// Which of its tiers. Immutable.
    #[schemars(extend("x-kubernetes-validations" = rules::immutable("tier")))]
    pub tier: Tier,
    /// Pods wanted. Set from the model when the model's number changes, and by whoever scales the tier.
    /// At least 1 for Experts.
    #[schemars(range(min = 0, max = 1024))]
    pub replicas: i32,
    /// The model's number when it was last taken over; written by the operator alone.
    #[schemars(range(min = 0, max = 1024))]
    pub declared_replicas: i32,
}

/// The state of a tier.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MoETierStatus {
    /// Generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Pods that exist; what autoscalers compare with.
    pub replicas: i32,
    /// Pods that work is routed to.
    pub ready: i32,
    /// Pods wanted after the budget and, for experts, the number of slots.
    pub desired: i32,
    /// Label selector of the pods, for autoscalers.
    #[schemars(length(max = 1024))]
    pub selector: String,
    /// Percent of the weights read (experts).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub loaded: Option<String>,
    /// Number and name of the accelerators, and memory of the fullest: `24 x NVIDIA H200, 61.2/139.8 GiB`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub accelerators: Option<String>,
    /// ScalingLimited (docs/operations.md).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
}
