//! Everything that a plan is made from: one model, its children as the watches show them, and what the
//! model's coordinator last said. Plain data, gathered by the executor, invented by tests.

use std::collections::BTreeMap;

use cadre_k8s_api::{MoEModel, MoETier, Tier};
use cadre_types::CoordinatorStatus;
use k8s_openapi::{
    api::core::v1::{PersistentVolumeClaim, Pod},
    jiff::Timestamp,
};

use crate::{allowed::Allowed, kinds::Children};

/// What is there.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The model.
    pub model: MoEModel,
    /// Its tiers; objects of the tiers' names, whoever owns them.
    pub tiers: BTreeMap<Tier, MoETier>,
    /// Everything else that the operator makes: objects of the model's names or labels.
    pub children: Children,
    /// Pods with the model's label.
    pub pods: Vec<Pod>,
    /// Recent refusals to create pods of our workloads (FailedCreate events): workload name → message.
    pub refused_pods: BTreeMap<String, String>,
    /// Recent failures to mount a pod's volumes (FailedMount events): pod name → message.
    pub failed_mounts: BTreeMap<String, String>,
    /// The claim of the checkpoint's source, if the spec names one.
    pub claim: ClaimState,
    /// Nodes that run our pods: name → labels.
    pub nodes: BTreeMap<String, NodeView>,
    /// What the coordinator last said and when it was heard; `None` if it was never reached.
    pub coordinator: Option<CoordinatorReport>,
    /// What the API server refused at the last execution: child → message. Cleared by success.
    pub refused_children: BTreeMap<String, String>,
    /// The Secret with the model's cluster secret; without one its processes ask each other for none.
    pub cluster_secret: Option<String>,
    /// Image of pods whose model names none: the operator's own.
    pub default_image: String,
    /// Namespace of the operator's own pods, if it runs in one.
    pub operator_namespace: Option<String>,
    /// What models may ask for.
    pub allowed: Allowed,
    /// When this process began to observe the model: what is not known yet is not lost for a while after.
    pub watching_since: Timestamp,
    /// The time of observation.
    pub now: Timestamp,
}

impl Observed {
    /// A model of which nothing exists yet, in no cluster: for `cadre operator plan` and for tests.
    pub fn nothing(mut model: MoEModel, default_image: &str) -> Self {
        model.metadata.namespace.get_or_insert_with(|| "default".to_owned());
        // What the API server would assign; owner references need one.
        model.metadata.uid.get_or_insert_with(|| "00000000-0000-0000-0000-000000000000".to_owned());
        Self {
            model,
            tiers: BTreeMap::new(),
            children: Children::default(),
            pods: Vec::new(),
            refused_pods: BTreeMap::new(),
            failed_mounts: BTreeMap::new(),
            claim: ClaimState::NotNamed,
            nodes: BTreeMap::new(),
            coordinator: None,
            refused_children: BTreeMap::new(),
            default_image: default_image.to_owned(),
            operator_namespace: None,
            allowed: Allowed::everything(),
            cluster_secret: None,
            watching_since: Timestamp::UNIX_EPOCH,
            now: Timestamp::UNIX_EPOCH,
        }
    }
}

/// The claim of the checkpoint.
#[derive(Clone, Debug, Default)]
pub enum ClaimState {
    /// The source is no claim.
    #[default]
    NotNamed,
    /// It does not exist.
    Missing,
    /// It exists.
    Found(Box<PersistentVolumeClaim>),
}

/// What matters of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its `Ready` condition is true.
    pub ready: bool,
}

/// The coordinator's word.
#[derive(Clone, Debug)]
pub struct CoordinatorReport {
    /// What it said last. While the stream is up this is the present state: the coordinator tells every change.
    pub status: CoordinatorStatus,
    /// When the stream was last known to be up; without effect while it is.
    pub heard: Timestamp,
    /// The stream is up now; else the reason why it is not.
    pub connected: Result<(), String>,
}
