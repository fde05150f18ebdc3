//! What a tier may add to its pods: parts of a Kubernetes pod that the operator does not decide itself.
//!
//! Each is a type of its own with bounds, or one of Kubernetes' under a bounded schema, and each is rendered: what is
//! not here is refused at admission. What stays out is what the operator relies on (probes, ports, command, the image's
//! read-only root, no token) and what the restricted pod security standard forbids.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::HostPath;
use crate::{rules, schema};

/// A rule of spreading the tier's pods.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::spread()))]
pub struct SpreadConstraint {
    /// Node label whose values are the domains.
    #[schemars(length(max = 317), regex(pattern = schema::LABEL_KEY))]
    pub topology_key: String,
    /// Most pods that a domain may have more than another one.
    #[serde(default = "super::one")]
    #[schemars(range(min = 1, max = 1024))]
    pub max_skew: i32,
    /// Whether a pod that cannot keep the rule waits or is placed anyway.
    #[serde(default)]
    pub when_unsatisfiable: WhenUnsatisfiable,
    /// Domains that there must be; only with DoNotSchedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub min_domains: Option<i32>,
}

/// What happens to a pod that cannot keep a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum WhenUnsatisfiable {
    /// It is placed anyway.
    #[default]
    ScheduleAnyway,
    /// It waits.
    DoNotSchedule,
}

/// As whom the processes run. They are never root.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodUser {
    /// User of the processes; 65532 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4_294_967_294_i64))]
    pub run_as_user: Option<i64>,
    /// Group of the processes; 65532 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4_294_967_294_i64))]
    pub run_as_group: Option<i64>,
    /// Group that owns the volumes, where their kind has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4_294_967_294_i64))]
    pub fs_group: Option<i64>,
    /// More groups of the processes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::groups")]
    pub supplemental_groups: Vec<i64>,
}

/// An environment variable. Those of cadre itself have fields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::variable()))]
pub struct EnvVariable {
    /// Its name; names that begin with CADRE_ are cadre's own.
    #[schemars(length(min = 1, max = 256), regex(pattern = schema::VARIABLE))]
    pub name: String,
    /// Its value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 4096))]
    pub value: Option<String>,
    /// Where its value comes from instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_from: Option<VariableSource>,
}

/// Where a variable's value comes from: exactly one of the fields.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::variable_source()))]
pub struct VariableSource {
    /// A key of a ConfigMap of the model's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_key_ref: Option<KeyOf>,
    /// A key of a Secret of the model's namespace, where the operator allows Secrets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<KeyOf>,
    /// A field of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field_ref: Option<FieldOf>,
}

/// A key of an object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyOf {
    /// Name of the object.
    #[schemars(length(max = 253), regex(pattern = schema::SUBDOMAIN))]
    pub name: String,
    /// The key.
    #[schemars(length(max = 253), regex(pattern = schema::DATA_KEY))]
    pub key: String,
}

/// A field of the pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FieldOf {
    /// Its path: `status.hostIP`, `spec.nodeName`.
    #[schemars(length(min = 1, max = 253))]
    pub field_path: String,
}

/// A volume beside the checkpoint's, and where it is mounted: exactly one source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::volume()))]
pub struct TierVolume {
    /// Its name in the pod.
    #[schemars(length(max = 63), regex(pattern = schema::LABEL))]
    pub name: String,
    /// Where it is mounted: `/dev/shm`.
    #[schemars(length(min = 1, max = 256), extend("x-kubernetes-validations" = rules::mount_path()))]
    pub mount_path: String,
    /// Whether it is mounted read-only.
    #[serde(default)]
    pub read_only: bool,
    /// An empty folder that lives as long as the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty_dir: Option<EmptyDir>,
    /// A ConfigMap of the model's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<ObjectName>,
    /// A Secret of the model's namespace, where the operator allows Secrets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<ObjectName>,
    /// A claim of the model's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ObjectName>,
    /// A folder of the nodes, where the operator allows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_path: Option<HostPath>,
}

/// An empty folder.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EmptyDir {
    /// Memory keeps it in memory, which counts as the container's; the node's disk if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub medium: Option<Medium>,
    /// Most that it may hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::size")]
    pub size_limit: Option<k8s_openapi::apimachinery::pkg::api::resource::Quantity>,
}

/// What an empty folder is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Medium {
    /// Memory.
    Memory,
}

/// An object by its name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ObjectName {
    /// Its name.
    #[schemars(length(max = 253), regex(pattern = schema::SUBDOMAIN))]
    pub name: String,
}

impl WhenUnsatisfiable {
    /// As Kubernetes writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ScheduleAnyway => "ScheduleAnyway",
            Self::DoNotSchedule => "DoNotSchedule",
        }
    }
}
