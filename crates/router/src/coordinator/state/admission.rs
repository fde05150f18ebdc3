//! Who is admitted, and what a report may say: every rule by which a member is refused, each with its code.

use std::{collections::BTreeSet, fmt};

use cadre_types::{
    Member, MemberId, Placement, PlacementEpoch, PodRef, Role, ShardIndex, generation::GenerationMismatch,
};
use tonic::Status;

use super::{
    super::{
        digests::DigestMismatch, layouts::Holders, load_window::LoadMismatch, pods::Stranger,
        report::MemberReport,
    },
    State,
};
use tokio::time::Instant;

/// Most members: each costs everybody a line of every view (some 100 bytes) and workers a connection. Clusters have
/// hundreds.
const MAX_MEMBERS: usize = 4096;

/// Most members of one shard: the one that serves, its successor, and a few that are not seen to be gone yet.
const MAX_MEMBERS_PER_SHARD: usize = 8;

/// Where weights of another model come from, if that is what differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::coordinator) struct OtherWeights(Option<(String, String)>);

impl fmt::Display for OtherWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some((theirs, ours)) => write!(f, " (member: weights {theirs}; router: weights {ours})"),
            None => Ok(()),
        }
    }
}

/// Why a report is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::coordinator) enum Refusal {
    /// Other weights or numerics.
    #[error("member {id}: {mismatch}{weights}")]
    Generation { id: MemberId, mismatch: GenerationMismatch, weights: OtherWeights },
    /// A shard that no layout has, yet or any more.
    #[error("member {id}: there is no {shard} now, the layout has {shards} shards; try again")]
    Shard { id: MemberId, shard: ShardIndex, shards: usize },
    /// The pod of the member has been deleted.
    #[error("member {id}: pod {} ({}) has been deleted", pod.name, pod.uid)]
    PodGone { id: MemberId, pod: PodRef },
    /// The operator does not know the member.
    #[error("member {id}: {why}")]
    Stranger { id: MemberId, why: Stranger },
    /// There are as many as one can use.
    #[error("member {id}: there are {count} {what} already, more are not admitted")]
    Full { id: MemberId, what: String, count: usize },
    /// A placement that no coordinator plans, or a part of none.
    #[error("member {id}: {problem}")]
    Placement { id: MemberId, problem: String },
    /// Bytes that another member has read differently.
    #[error("{0}")]
    Digest(DigestMismatch),
    /// It cannot have applied what nobody has told it on this stream.
    #[error(
        "member {id}: {epoch} is reported and was never given out, the highest is {highest}; register again"
    )]
    Epoch { id: MemberId, epoch: PlacementEpoch, highest: PlacementEpoch },
    /// Id, role or address changed on one stream.
    #[error("member {id}: {what} changed from {before} to {after} on one stream; open another")]
    Changed { id: MemberId, what: &'static str, before: String, after: String },
    /// Counts that do not fit the model.
    #[error("member {id}: {mismatch}")]
    Load { id: MemberId, mismatch: LoadMismatch },
    /// The stream's member has been removed.
    #[error("the stream is not registered any more; register again")]
    Gone,
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::Generation { id, mismatch, weights } => {
                Self::failed_precondition(format!("member {id}: {}{weights}", mismatch.to_peer()))
            }
            Refusal::Digest(_) => Self::failed_precondition(message),
            Refusal::Gone => Self::aborted(message),
            // May be otherwise soon: members try again for ever.
            Refusal::Shard { .. } | Refusal::PodGone { .. } | Refusal::Stranger { .. } => {
                Self::unavailable(message)
            }
            Refusal::Full { .. } => Self::resource_exhausted(message),
            Refusal::Changed { .. }
            | Refusal::Load { .. }
            | Refusal::Placement { .. }
            | Refusal::Epoch { .. } => Self::invalid_argument(message),
        }
    }
}

impl Refusal {
    /// The label of `cadre_router_members_refused_total`.
    pub(in crate::coordinator) fn name(&self) -> &'static str {
        match self {
            Self::Generation { .. } => "generation",
            Self::Shard { .. } => "shard",
            Self::PodGone { .. } => "pod_gone",
            Self::Stranger { .. } => "stranger",
            Self::Full { .. } => "full",
            Self::Digest(_) => "digest",
            Self::Changed { .. } | Self::Load { .. } | Self::Placement { .. } | Self::Epoch { .. } => {
                "malformed"
            }
            Self::Gone => "gone",
        }
    }
}

impl State {
    pub(super) fn check(&self, report: &MemberReport) -> Result<(), Refusal> {
        let id = || report.member.id.clone();
        self.generation.check_weights(&report.generation).map_err(|mismatch| {
            let (theirs, ours) = (&report.weights, &self.weights);
            let told = !theirs.is_empty() && theirs != ours;
            let weights = OtherWeights(told.then(|| (theirs.clone(), ours.clone())));
            Refusal::Generation { id: id(), mismatch, weights }
        })?;
        if let Some(whole) = &report.applied_placement {
            let checked = self.layouts.check(report.applied(), whole);
            checked.map_err(|problem| Refusal::Placement {
                id: id(),
                problem: format!("report.applied_placement: {problem}"),
            })?;
        }
        let experts = report.digests.experts.iter();
        if let Some((layer, expert, _)) =
            experts.clone().find(|(layer, expert, _)| !self.window.has(*layer, *expert))
        {
            let problem = format!("report.expert_digests: the model has no {expert} of {layer}");
            return Err(Refusal::Placement { id: id(), problem });
        }
        let is_worker = !matches!(report.member.role, Role::Expert(_));
        let unknown =
            report.faults.iter().find(|fault| !is_worker || !self.window.has(fault.layer, fault.expert));
        if let Some(fault) = unknown {
            let problem = match is_worker {
                true => format!("report.faults: the model has no {} of {}", fault.expert, fault.layer),
                false => "report.faults: only workers see rows".to_owned(),
            };
            return Err(Refusal::Placement { id: id(), problem });
        }
        self.digests.check(&report.member.id, &report.digests).map_err(Refusal::Digest)
    }

    /// Everybody is told of every member, and workers link to each: their number is bounded.
    pub(super) fn room(&self, member: &Member) -> Result<(), Refusal> {
        let full = |what: String, count| Refusal::Full { id: member.id.clone(), what, count };
        if self.members.contains_key(&member.id) {
            return Ok(());
        }
        if self.members.len() >= MAX_MEMBERS {
            return Err(full("members".to_owned(), self.members.len()));
        }
        if let Role::Expert(shard) = member.role {
            let count = self.members.values().filter(|known| known.member.role == member.role).count();
            if count >= MAX_MEMBERS_PER_SHARD {
                return Err(full(format!("members for {shard}"), count));
            }
        }
        Ok(())
    }

    /// Learns from the placement that a report names. True if the view changed.
    pub(super) fn adopt(&mut self, now: Instant, report: &MemberReport) -> bool {
        let applied = report.applied();
        let in_force = self.placement().map_or(0, Placement::digest);
        let holders = |digest: u64| {
            let mut shards = BTreeSet::new();
            for known in self.members.values() {
                if let Role::Expert(shard) = known.member.role
                    && known.member.id != report.member.id
                    && [known.applied.digest, known.prepared.digest].contains(&digest)
                {
                    shards.insert(shard.0);
                }
            }
            if let Role::Expert(shard) = report.member.role
                && [applied.digest, report.prepared.digest].contains(&digest)
            {
                shards.insert(shard.0);
            }
            shards.len()
        };
        let holders = Holders { reported: holders(applied.digest), in_force: holders(in_force) };
        self.layouts.adopt(now, applied, report.applied_placement.as_ref(), holders)
    }

    pub(super) fn count(&mut self, now: Instant, report: &MemberReport) -> Result<(), Refusal> {
        self.window
            .add(now, &report.expert_load)
            .map_err(|mismatch| Refusal::Load { id: report.member.id.clone(), mismatch })
    }
}

pub(super) fn unchanged(before: &Member, after: &Member) -> Result<(), Refusal> {
    for (what, before_text, after_text) in [
        ("id", before.id.to_string(), after.id.to_string()),
        ("role", before.role.to_string(), after.role.to_string()),
        ("address", before.address.clone(), after.address.clone()),
        ("pod", pod_name(before), pod_name(after)),
    ] {
        if before_text != after_text {
            let id = before.id.clone();
            return Err(Refusal::Changed { id, what, before: before_text, after: after_text });
        }
    }
    Ok(())
}

fn pod_name(member: &Member) -> String {
    member.pod.as_ref().map_or_else(|| "none".to_owned(), |pod| format!("{} ({})", pod.name, pod.uid))
}
