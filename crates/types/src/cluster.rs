//! What the coordinator knows and every process is told: members and the placement in force.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{generation::Generation, ids::ShardIndex, placement::Placement};

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
}

/// The coordinator's view, sent whole on every change. Members are sorted by id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterView {
    /// Weights, numerics and placement epoch in force.
    pub generation: Generation,
    /// The placement in force.
    pub placement: Arc<Placement>,
    /// Everything that is registered.
    pub members: Vec<Member>,
}

impl ClusterView {
    /// The member that serves a shard, if one is registered. Of two (an old one not yet expired and
    /// its replacement) the one that is ready wins, then the later id.
    pub fn shard(&self, shard: ShardIndex) -> Option<&Member> {
        self.members
            .iter()
            .filter(|member| member.role == Role::Expert(shard))
            .max_by_key(|member| (member.state == MemberState::Ready, &member.id))
    }
}
