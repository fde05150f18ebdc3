//! `MoEModel`: one model, from its checkpoint to its tiers.
//!
//! Doc comments of types and fields are the descriptions in the CRD and in docs/api.md: written for users, and
//! short. Bounds are in the schema, next to the field; rules that span fields are in [`crate::rules`]. Every
//! string, list and map is bounded, because the API server charges a rule for the longest value possible.
//!
//! Unknown fields: the API server refuses them (strict field validation) or prunes them, [`crate::manifest`]
//! refuses them. Reading an object that the API server holds ignores them, so that an operator of the
//! previous version still reads the objects of a newer CRD after a roll-back.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{Affinity, LocalObjectReference, Toleration},
    apimachinery::pkg::api::resource::Quantity,
};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{rules, schema, status::MoEModelStatus};

mod limits;
mod network;
mod overlay;
mod sizes;

pub use limits::{ExpertLimits, RouterLimits, WorkerLimits};
pub use network::{NetworkSpec, PolicyMode, ServiceSpec, ServiceType, TrafficPolicy};
pub use overlay::{
    EmptyDir, EnvVariable, FieldOf, KeyOf, Medium, ObjectName, PodUser, SpreadConstraint, TierVolume,
    VariableSource, WhenUnsatisfiable,
};
pub use sizes::SourceRef;

/// A mixture-of-experts model served by a router, prefill and decode workers and expert shards.
#[derive(CustomResource, JsonSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "cadre.dev",
    version = "v1alpha1",
    kind = "MoEModel",
    plural = "moemodels",
    singular = "moemodel",
    shortname = "moe",
    category = "cadre",
    namespaced,
    status = "MoEModelStatus",
    derive = "PartialEq",
    cel,
    validation = rules::model_name(),
    validation = rules::served_experts(),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Prefill", type_ = "string", json_path = ".status.prefill.summary"),
    printcolumn(name = "Decode", type_ = "string", json_path = ".status.decode.summary"),
    printcolumn(name = "Shards", type_ = "string", json_path = ".status.experts.summary"),
    printcolumn(
        name = "Covered",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"ExpertsCovered\")].status"
    ),
    printcolumn(name = "Imbalance", type_ = "string", json_path = ".status.imbalance"),
    printcolumn(name = "Loaded", type_ = "string", json_path = ".status.loading.summary", priority = 1),
    printcolumn(name = "Accelerators", type_ = "string", json_path = ".status.accelerators.summary", priority = 1),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::model_spec()))]
pub struct MoEModelSpec {
    /// Image of every process of the model; the operator's own image by default. A change replaces the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512), regex(pattern = schema::IMAGE))]
    pub image: Option<String>,
    /// Secrets of the model's namespace for pulling images.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::pull_secrets")]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// The checkpoint.
    pub model: ModelSpec,
    /// The router.
    #[serde(default, skip_serializing_if = "RouterSpec::is_default")]
    pub router: RouterSpec,
    /// Prefill workers. Zero replicas let the decode workers compute prompts themselves.
    pub prefill: WorkerTierSpec,
    /// Decode workers.
    pub decode: WorkerTierSpec,
    /// Expert shards.
    pub experts: ExpertTierSpec,
    /// Who may connect to the model's pods.
    #[serde(default, skip_serializing_if = "NetworkSpec::is_default")]
    pub network: NetworkSpec,
    /// What all tiers together may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<BudgetSpec>,
    /// How long a pod that goes away may take to finish its sequences.
    #[serde(default = "default_drain_seconds")]
    #[schemars(range(min = 0, max = 3600))]
    pub drain_seconds: i32,
}

/// Which checkpoint, under which name, in which arithmetic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelSpec {
    /// Where the checkpoint is.
    pub source: ModelSource,
    /// Name under which clients ask for the model; the object's name by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128), regex(pattern = schema::SERVED_NAME))]
    pub served_name: Option<String>,
    /// Routed experts per layer, as the checkpoint has them; compared with the checkpoint at load. While the
    /// model is Ready it changes only together with the checkpoint.
    #[serde(default = "default_routed_experts")]
    #[schemars(range(min = 1, max = 4096))]
    pub routed_experts: i32,
    /// Numerics class: the same for every process of the model, so a change replaces all pods at once.
    #[serde(default)]
    pub numerics: Numerics,
}

/// Where a checkpoint comes from: exactly one of the fields.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::source()))]
pub struct ModelSource {
    /// A folder inside the image itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImagePath>,
    /// A claim in the model's namespace, mounted read-only by every pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimSource>,
    /// A folder of the nodes, where the operator allows it. Namespaces that enforce the baseline or restricted pod
    /// security standard forbid it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_path: Option<HostPath>,
    /// An OCI image mounted as a volume; the cluster needs the feature ImageVolume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_volume: Option<ImageVolume>,
}

/// A folder inside the image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImagePath {
    /// Absolute path of the folder.
    #[schemars(length(min = 1, max = 1024), extend("x-kubernetes-validations" = rules::absolute_path()))]
    pub path: String,
}

/// A persistent volume claim.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClaimSource {
    /// The claim's name.
    #[schemars(length(max = 253), regex(pattern = schema::SUBDOMAIN))]
    pub claim_name: String,
    /// Folder inside the volume, relative to its root; the root by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024), extend("x-kubernetes-validations" = rules::relative_path()))]
    pub path: Option<String>,
}

/// A folder of the nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostPath {
    /// Absolute path on every node that runs a pod of the model.
    #[schemars(length(min = 1, max = 1024), extend("x-kubernetes-validations" = rules::absolute_path()))]
    pub path: String,
}

/// An OCI image with the checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageVolume {
    /// The image.
    #[schemars(length(max = 512), regex(pattern = schema::IMAGE))]
    pub reference: String,
    /// Folder inside the image, relative to its root; the root by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024), extend("x-kubernetes-validations" = rules::relative_path()))]
    pub path: Option<String>,
}

/// A numerics class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Numerics {
    /// F32 activations, dequantised weights.
    F32,
    /// bf16 activations, F32 accumulation.
    #[default]
    Bf16,
    /// Activations quantised per 128 channels.
    Fp8,
    /// The recipe of Fp8 on the tensor cores of NVIDIA's Hopper: every tier has an accelerator.
    CudaFp8,
}

/// The router.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RouterSpec {
    /// Limits of the router.
    #[serde(default, skip_serializing_if = "RouterLimits::is_default")]
    pub limits: RouterLimits,
    /// The two Services for clients.
    #[serde(default, skip_serializing_if = "ServiceSpec::is_default")]
    pub service: ServiceSpec,
    /// Where its pod runs and what it may use.
    #[serde(flatten)]
    pub pod: PodSpec,
}

/// A tier of workers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerTierSpec {
    /// Pods. The tier's MoETier may be scaled away from it; a change here takes over again. With 0 decode
    /// workers, and none beside the shards (experts.worker), the model is paused: it is not Ready and takes no requests.
    #[schemars(range(min = 0, max = 1024))]
    pub replicas: i32,
    /// Latent KV cache of each pod.
    #[serde(default = "default_kv_cache")]
    #[schemars(schema_with = "schema::kv_cache")]
    pub kv_cache: Quantity,
    /// Limits of each worker.
    #[serde(default, skip_serializing_if = "WorkerLimits::is_default")]
    pub limits: WorkerLimits,
    /// Accelerator of each pod; without one it computes on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<Accelerator>,
    /// Where its pods run and what they may use.
    #[serde(flatten)]
    pub pod: PodSpec,
}

/// The worker beside a shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShardWorkerSpec {
    /// Latent KV cache of each.
    #[serde(default = "default_kv_cache")]
    #[schemars(schema_with = "schema::kv_cache")]
    pub kv_cache: Quantity,
    /// Limits of each; threads are those of the whole process, its shard included.
    #[serde(default, skip_serializing_if = "WorkerLimits::is_default")]
    pub limits: WorkerLimits,
}

/// The expert shards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::experts()))]
pub struct ExpertTierSpec {
    /// Shards, one pod each. The tier's MoETier may be scaled away from it; a change here takes over again.
    /// Divides routedExperts + redundantSlots.
    #[schemars(range(min = 1, max = 1024))]
    pub shards: i32,
    /// Slots per layer beyond one for each expert, over all shards: for second copies and for busy experts.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub redundant_slots: i32,
    /// Copies that every expert has at least, each on another shard and in another failure domain where
    /// there are enough.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1024))]
    pub min_copies: i32,
    /// Node label whose values are the failure domains.
    #[serde(default = "default_spread_by")]
    #[schemars(length(max = 317), regex(pattern = schema::LABEL_KEY))]
    pub spread_by: String,
    /// A decode worker beside each shard: in its pod, in one process with it, on the same accelerator. They are counted,
    /// drained and scaled with the shards, beside the workers that decode.replicas asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<ShardWorkerSpec>,
    /// Limits of each shard.
    #[serde(default, skip_serializing_if = "ExpertLimits::is_default")]
    pub limits: ExpertLimits,
    /// Accelerator of each pod; without one it computes on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<Accelerator>,
    /// Where its pods run and what they may use.
    #[serde(flatten)]
    pub pod: PodSpec,
}

/// What may differ between the pods of tiers; everything else is the operator's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    /// CPU and memory of the container.
    #[serde(default, skip_serializing_if = "Resources::is_default")]
    pub resources: Resources,
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "schema::node_selector")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that the pods tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::tolerations")]
    pub tolerations: Vec<Toleration>,
    /// Priority class of the pods, one that the operator allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253), regex(pattern = schema::SUBDOMAIN))]
    pub priority_class_name: Option<String>,
    /// Affinity, as of a Kubernetes pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::affinity")]
    pub affinity: Option<Affinity>,
    /// Rules of spreading the pods. One whose key the operator spreads by takes the place of the operator's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["topologyKey"]))]
    pub topology_spread_constraints: Vec<SpreadConstraint>,
    /// Runtime class of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253), regex(pattern = schema::SUBDOMAIN))]
    pub runtime_class_name: Option<String>,
    /// Scheduler of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253), regex(pattern = schema::SUBDOMAIN))]
    pub scheduler_name: Option<String>,
    /// Service account of the pods, one that the operator allows; one of the tier's own if absent. No token is mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253), regex(pattern = schema::SUBDOMAIN))]
    pub service_account_name: Option<String>,
    /// As whom the processes run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub security_context: Option<PodUser>,
    /// More environment variables of the container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub env: Vec<EnvVariable>,
    /// More volumes of the pods.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub volumes: Vec<TierVolume>,
}

/// CPU and memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::resources()))]
pub struct Resources {
    /// What the scheduler sets aside: `cpu`, `memory`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "schema::quantities")]
    pub requests: BTreeMap<String, Quantity>,
    /// What a container may not exceed: `cpu`, `memory`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "schema::quantities")]
    pub limits: BTreeMap<String, Quantity>,
}

/// The accelerator of one pod: its process computes on it, and on nothing else.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::accelerator()))]
pub struct Accelerator {
    /// Extended resource of the nodes, one of NVIDIA's: `nvidia.com/gpu`, or a part of one under a name of its own
    /// (`nvidia.com/mig-3g.71gb`).
    #[schemars(length(max = 317), regex(pattern = schema::EXTENDED_RESOURCE))]
    pub resource: String,
    /// How many of them each pod gets: 1, because a process computes on one.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub count: i32,
}

/// What all tiers together may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BudgetSpec {
    /// Accelerators over all pods of all tiers. Scaling beyond it is cut and said in ScalingLimited.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub gpus: i32,
}

fn default_drain_seconds() -> i32 {
    30
}

/// DeepSeek-V3's published number.
fn default_routed_experts() -> i32 {
    256
}

fn default_kv_cache() -> Quantity {
    Quantity("512Mi".to_owned())
}

fn one() -> i32 {
    1
}

fn default_spread_by() -> String {
    "kubernetes.io/hostname".to_owned()
}
