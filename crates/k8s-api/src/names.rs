//! Names that operator, charts, tests and users' scripts share: tiers, children, labels, ports.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A tier of a model that scales by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Tier {
    /// Prefill workers.
    Prefill,
    /// Decode workers.
    Decode,
    /// Expert shards.
    Experts,
}

impl Tier {
    /// All tiers, in the order in which they are shown.
    pub const ALL: [Self; 3] = [Self::Prefill, Self::Decode, Self::Experts];

    /// The tier in names of objects: `<model>-prefill`, `<model>-decode`, `<model>-experts`.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Experts => "experts",
        }
    }

    /// Name of the tier's `MoETier` and of its workload (Deployment or StatefulSet).
    pub fn object_name(self, model: &str) -> String {
        format!("{model}-{}", self.suffix())
    }
}

/// Value of the label [`label::COMPONENT`] on the router's objects; the tiers' are their suffixes.
pub const ROUTER_COMPONENT: &str = "router";

/// `<model>-router`: Deployment and ServiceAccount of the router.
pub fn router(model: &str) -> String {
    format!("{model}-router")
}

/// `<model>-grpc`: the Service for gRPC clients, port [`port::GRPC`].
pub fn grpc_service(model: &str) -> String {
    format!("{model}-grpc")
}

/// `<model>-http`: the Service for OpenAI clients, port [`port::HTTP`].
pub fn http_service(model: &str) -> String {
    format!("{model}-http")
}

/// `<model>-coordinator`: the headless Service under which members find the router before it is ready.
pub fn coordinator_service(model: &str) -> String {
    format!("{model}-coordinator")
}

/// `<model>-layout`: the ConfigMap from which a restarted router learns the layout.
pub fn layout_config_map(model: &str) -> String {
    format!("{model}-layout")
}

/// `<model>-cluster-<hash>`: the Secret with what the model's processes show each other.
pub fn cluster_secret(model: &str, hash: &str) -> String {
    format!("{model}-cluster-{hash}")
}

/// Key of the value in the Secret [`cluster_secret`].
pub const CLUSTER_SECRET_KEY: &str = "secret";

/// Labels and the like.
pub mod label {
    /// The model's name; on every child.
    pub const MODEL: &str = "cadre.dev/model";
    /// Which part of the model: `router`, `prefill`, `decode` or `experts`; on every child.
    pub const COMPONENT: &str = "app.kubernetes.io/component";
    /// Always `cadre`.
    pub const NAME: &str = "app.kubernetes.io/name";
    /// The model's name, as Kubernetes' tools expect it.
    pub const INSTANCE: &str = "app.kubernetes.io/instance";
    /// `cadre` on the operator's own pods.
    pub const PART_OF: &str = "app.kubernetes.io/part-of";
    /// Always `cadre-operator`.
    pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
    /// Hash of a pod template; tells pods that are out of date.
    pub const TEMPLATE_HASH: &str = "cadre.dev/template-hash";
    /// Hash of checkpoint source and numerics class, on pods: processes that differ in it refuse each other.
    pub const CHECKPOINT: &str = "cadre.dev/checkpoint";
}

/// Annotation on children, never on users' objects: hash of the configuration that was applied last. What it adds
/// to a comparison of fields is the field that is not wanted any more.
pub const APPLIED_HASH: &str = "cadre.dev/applied-hash";

/// Key of the layout in the ConfigMap [`layout_config_map`].
pub const LAYOUT_KEY: &str = "layout.json";

/// The readiness gate of workers and shards: the router has admitted the pod and a real step ran through it.
pub const ROUTABLE_GATE: &str = "cadre.dev/Routable";

/// Field manager of everything that the operator applies.
pub const FIELD_MANAGER: &str = "cadre-operator";

/// Container ports.
pub mod port {
    /// gRPC for clients (router).
    pub const GRPC: u16 = 50051;
    /// OpenAI-compatible HTTP for clients (router).
    pub const HTTP: u16 = 8000;
    /// Members and the operator (router).
    pub const COORDINATOR: u16 = 50050;
    /// Router and other workers (workers).
    pub const WORKER: u16 = 50052;
    /// Workers (shards).
    pub const EXPERT: u16 = 50053;
    /// Metrics, health, readiness (all).
    pub const ADMIN: u16 = 9090;
}
