//! What the coordinator knows and every process is told: members and the placement in force.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    generation::Generation,
    ids::{LayerId, LogicalExpert, PlacementEpoch, ShardIndex},
    placement::Placement,
};

/// Names a process for as long as it lives; a restarted process has a new one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MemberId(pub String);

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a member does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Computes prompts and hands their KV to decode workers.
    Prefill,
    /// Generates tokens; its prompts come from prefill workers.
    Decode,
    /// Does both, prompt by prompt, without hand-off.
    Both,
    /// Holds the slots of one shard.
    Expert(ShardIndex),
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefill => f.write_str("prefill"),
            Self::Decode => f.write_str("decode"),
            Self::Both => f.write_str("both"),
            Self::Expert(shard) => write!(f, "expert {}", shard.0),
        }
    }
}

/// How far a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberState {
    /// Registered; weights are loading or peers are not all reached.
    Starting,
    /// Proven by one real step; may be given work.
    Ready,
    /// Finishes what it has; gets nothing new.
    Draining,
}

/// One registered process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub id: MemberId,
    /// What it does.
    pub role: Role,
    /// `host:port` of its gRPC server.
    pub address: String,
    /// How far it is.
    pub state: MemberState,
    /// The pod that it runs in; `None` outside Kubernetes.
    pub pod: Option<PodRef>,
}

/// The pod of a member, as the downward API tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRef {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`: a pod made again under the same name is another pod.
    pub uid: String,
}

/// How the experts of a model are to be laid out: what a placement is planned from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Layout {
    /// Expert shards that the placement spreads over.
    pub shards: u16,
    /// Extra slots per layer over all shards.
    pub redundant_slots: u32,
    /// Copies that every expert has at least, each on another shard.
    pub min_copies: u16,
}

/// What the operator tells the coordinator: always everything, never a difference, so that a lost message
/// or a missed deletion is repaired by the next one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperatorView {
    /// The layout wanted.
    pub layout: Layout,
    /// Every pod of the model that exists, sorted by uid. A member whose pod is not among them is gone, or a
    /// stranger. An empty list says nothing.
    pub pods: Vec<PodView>,
}

/// A pod as the operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodView {
    /// Which pod.
    pub pod: PodRef,
    /// Failure domain: the value of the node label that the model spreads by; `None` before the pod is on
    /// a node, or if the node lacks the label.
    pub domain: Option<String>,
    /// The pod is going away (deletion asked for, or about to be): it gets no new work.
    pub withdrawn: bool,
    /// Its addresses (`status.podIPs`), empty before it has any.
    pub ips: Vec<String>,
}

/// What the coordinator tells the operator, whole on every change.
#[derive(Clone, Debug, PartialEq)]
pub struct CoordinatorStatus {
    /// Weights, numerics and placement epoch in force.
    pub generation: Generation,
    /// The layout of the placement in force.
    pub layout: Layout,
    /// The layout being prepared, if the wanted one is not in force yet, and why it is not.
    pub next: Option<NextLayout>,
    /// Everything that is registered, sorted by id.
    pub members: Vec<MemberStatus>,
    /// Which experts have how many copies.
    pub coverage: Coverage,
    /// Largest over mean tokens per shard, averaged over layers by their tokens; `None` without traffic.
    pub imbalance: Option<f64>,
    /// The router itself takes requests.
    pub serving: bool,
}

/// A layout on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextLayout {
    /// What is prepared.
    pub layout: Layout,
    /// Its epoch once it is planned.
    pub epoch: Option<PlacementEpoch>,
    /// What it waits for, in words ("shards 4, 5 have not loaded their experts").
    pub waiting_for: String,
}

/// A member as the coordinator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Who.
    pub member: Member,
    /// Admitted, proven by a real step and not withdrawn: work is routed to it.
    pub routable: bool,
    /// The placement it has applied; 0 before the first.
    pub applied: PlacementEpoch,
    /// Weight bytes it has read and will have read.
    pub loading: Option<LoadProgress>,
    /// Sequences it has, running and waiting (workers).
    pub sequences: u32,
    /// Why the operator does not know it; `None` if it does, or before there was a view.
    pub stranger: Option<String>,
    /// What it computes on, as last reported; `None` before the device is open.
    pub device: Option<MemberDevice>,
    /// What failed when the coordinator asked it for a real step; no work is routed to it until one has passed.
    pub failed_proof: Option<String>,
}

/// The device that a member computes on. Its numerics class is that of the generation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemberDevice {
    /// As `--device` names it: `cpu`, `cuda:0`.
    pub device: String,
    /// What it is: `NVIDIA H200`; `cpu` for a processor.
    pub name: String,
    /// What its code is compiled for: `sm_90`, `avx512`.
    pub architecture: String,
    /// Bytes in use: by everybody on a GPU, by the member's process on a processor.
    pub memory_used: u64,
    /// Bytes that there are (of a container, its limit); 0 if nobody can say.
    pub memory_total: u64,
}

/// Progress of loading weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadProgress {
    /// Read so far.
    pub bytes_read: u64,
    /// To be read in all.
    pub bytes_expected: u64,
}

/// How well the experts are covered by routable copies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// (layer, expert) pairs of the placement.
    pub experts: u64,
    /// Pairs without a routable copy.
    pub uncovered: u64,
    /// Pairs that one more loss uncovers although the layout asks for more copies: fewer routable copies
    /// than `min_copies`, or all of them in one failure domain.
    pub at_risk: u64,
    /// The first few uncovered ones, then the first few at risk, each in (layer, expert) order.
    pub examples: Vec<CoverageExample>,
}

/// An expert that is uncovered or at risk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoverageExample {
    /// Its layer.
    pub layer: LayerId,
    /// The expert.
    pub expert: LogicalExpert,
    /// Routable copies.
    pub copies: u32,
    /// Why it is named, in words ("no routable copy", "1 of 2 copies", "all copies in zone-a").
    pub reason: String,
}

/// The coordinator's view, sent whole on every change. Members are sorted by id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterView {
    /// Weights, numerics and placement epoch in force.
    pub generation: Generation,
    /// The placement in force.
    pub placement: Arc<Placement>,
    /// The placement that will be in force as soon as its shards hold it; shards load it beside the one in
    /// force.
    pub next: Option<Arc<Placement>>,
    /// Shards keep answering frames of this epoch and later ones: workers may still be on it.
    pub oldest_epoch: PlacementEpoch,
    /// Everything that is registered.
    pub members: Vec<Member>,
}

impl ClusterView {
    /// A view in which nothing is on its way.
    pub fn settled(generation: Generation, placement: Arc<Placement>, members: Vec<Member>) -> Self {
        Self { generation, placement, next: None, oldest_epoch: generation.epoch, members }
    }
}
