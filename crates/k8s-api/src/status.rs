//! What users read back.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{names::Tier, schema};

/// The state of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MoEModelStatus {
    /// Generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Progressing, Degraded, ExpertsCovered, ScalingLimited (docs/operations.md).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
    /// Prefill workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill: Option<TierStatus>,
    /// Decode workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode: Option<TierStatus>,
    /// Expert shards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<TierStatus>,
    /// Epoch of the placement in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement_epoch: Option<i64>,
    /// Hash of the checkpoint in service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub model_hash: Option<String>,
    /// Largest over mean tokens per shard, two decimals; absent without traffic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub imbalance: Option<String>,
    /// Weights read by the shards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loading: Option<LoadingStatus>,
    /// Accelerators that the model's processes compute on, as they report them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerators: Option<AcceleratorsStatus>,
}

/// Accelerators over all tiers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AcceleratorsStatus {
    /// Those of one name in one tier.
    #[schemars(length(max = 16))]
    pub cards: Vec<AcceleratorStatus>,
    /// Number, name, and memory of the fullest: `32 x NVIDIA H200, 61.2/139.8 GiB`.
    #[schemars(length(max = 256))]
    pub summary: String,
}

/// Accelerators of one name in one tier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AcceleratorStatus {
    /// The tier.
    pub tier: Tier,
    /// What the driver calls them: `NVIDIA H200`.
    #[schemars(length(max = 64))]
    pub name: String,
    /// How many.
    pub count: i32,
    /// Bytes used on the fullest of them, by whoever uses it; told anew when a hundredth of it has changed.
    pub memory_used: i64,
    /// Bytes of that one.
    pub memory_total: i64,
}

/// Pods of a tier.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TierStatus {
    /// Pods wanted, after the budget.
    pub desired: i32,
    /// Pods that exist.
    pub replicas: i32,
    /// Pods that work is routed to.
    pub ready: i32,
    /// ready/desired.
    #[schemars(length(max = 32))]
    pub summary: String,
}

/// Progress of reading weights, over all shards.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoadingStatus {
    /// Bytes read.
    pub bytes_read: i64,
    /// Bytes that will have been read.
    pub bytes_expected: i64,
    /// Whole percent.
    #[schemars(length(max = 32))]
    pub summary: String,
}
