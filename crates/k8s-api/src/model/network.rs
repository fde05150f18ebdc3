//! Who may connect to a model's pods, and how clients find its router.

use std::collections::BTreeMap;

use k8s_openapi::api::networking::v1::NetworkPolicyPeer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{rules, schema};

/// Who may connect to the model's pods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NetworkSpec {
    /// Managed: NetworkPolicies let workers be reached by the model's router and workers only, shards by its workers,
    /// the coordinator by its pods and the operator. None: there are no policies.
    #[serde(default)]
    pub policy: PolicyMode,
    /// Who may send requests to the router, beside the pods of the model's namespace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::peers")]
    pub clients: Vec<NetworkPolicyPeer>,
    /// Who may read metrics of the pods; everybody if empty. Probes of the node always may.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::peers")]
    pub metrics: Vec<NetworkPolicyPeer>,
}

/// Whether the operator makes NetworkPolicies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PolicyMode {
    /// It makes them.
    #[default]
    Managed,
    /// It makes none.
    None,
}

/// The two Services for clients.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::service()))]
pub struct ServiceSpec {
    /// How they are reached.
    #[serde(default, rename = "type")]
    pub type_: ServiceType,
    /// Annotations, for instance of a load balancer's controller.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "schema::annotations")]
    pub annotations: BTreeMap<String, String>,
    /// Class of the load balancer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 317), regex(pattern = schema::LABEL_KEY))]
    pub load_balancer_class: Option<String>,
    /// Whether traffic from outside goes to pods of other nodes; Cluster if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external_traffic_policy: Option<TrafficPolicy>,
}

/// How a Service is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ServiceType {
    /// From inside the cluster.
    #[default]
    ClusterIP,
    /// Also at a port of every node.
    NodePort,
    /// Also at a load balancer.
    LoadBalancer,
}

/// Where traffic from outside goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TrafficPolicy {
    /// To any pod.
    Cluster,
    /// To pods of the node that it came to: clients' addresses stay.
    Local,
}

impl NetworkSpec {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl ServiceSpec {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl ServiceType {
    /// As Kubernetes writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ClusterIP => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
        }
    }
}

impl TrafficPolicy {
    /// As Kubernetes writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Local => "Local",
        }
    }
}
