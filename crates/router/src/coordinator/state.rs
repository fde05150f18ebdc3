//! The coordinator's state and its transitions. No I/O and no clock of its own: `now` comes in, effects go
//! out, so every rule is tested without a socket.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cadre_placement::ExpertLoad;
use cadre_types::{
    ClusterView, Generation, Member, MemberId, Placement, PlacementEpoch, Role, ShardIndex,
    generation::GenerationMismatch,
};
use tokio::{sync::oneshot, time::Instant};
use tonic::Status;

use super::{
    WorkerEntry, WorkerLoad, WorkerTable,
    load_window::{LoadMismatch, LoadWindow},
    report::{Loading, MemberReport},
};

/// One Watch stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ConnectionId(u64);

/// What a transition changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing that anybody watches.
    Nothing,
    /// A worker's load.
    Load,
    /// Members or placement.
    View,
}

/// A member that was removed, with the means to end its stream.
#[derive(Debug)]
pub(super) struct Loss {
    pub(super) member: Member,
    pub(super) cause: LossCause,
    pub(super) end: oneshot::Sender<Status>,
}

/// Why a member was removed.
#[derive(Clone, Debug)]
pub(super) enum LossCause {
    Lease(Duration),
    Closed,
    Replaced,
    Refused(Status),
}

impl LossCause {
    /// The label of `cadre_router_members_lost_total`.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Lease(_) => "lease",
            Self::Closed => "closed",
            Self::Replaced => "replaced",
            Self::Refused(_) => "refused",
        }
    }

    /// What the stream ends with.
    pub(super) fn status(self, member: &Member) -> Status {
        match self {
            Self::Lease(lease) => Status::deadline_exceeded(format!(
                "member {} has not reported for {lease:?}; register again",
                member.id
            )),
            Self::Closed => Status::cancelled(format!("member {} closed its stream", member.id)),
            Self::Replaced => {
                Status::aborted(format!("member {} registered again on another stream", member.id))
            }
            Self::Refused(status) => status,
        }
    }
}

/// Why a report is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// Other weights or numerics.
    #[error("member {id}: {mismatch}")]
    Generation { id: MemberId, mismatch: GenerationMismatch },
    /// A shard beyond the placement.
    #[error("member {id}: {shard} does not exist, the placement has {shards} shards")]
    Shard { id: MemberId, shard: ShardIndex, shards: usize },
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
            Refusal::Generation { .. } => Self::failed_precondition(message),
            Refusal::Gone => Self::aborted(message),
            Refusal::Shard { .. } | Refusal::Changed { .. } | Refusal::Load { .. } => {
                Self::invalid_argument(message)
            }
        }
    }
}

/// A registered member.
#[derive(Debug)]
struct Registered {
    connection: ConnectionId,
    member: Member,
    load: WorkerLoad,
    loading: Option<Loading>,
    /// Number of the last report.
    report: u64,
    expires: Instant,
    end: oneshot::Sender<Status>,
}

/// Everything the coordinator knows.
#[derive(Debug)]
pub(super) struct State {
    generation: Generation,
    placement: Arc<Placement>,
    lease: Duration,
    members: BTreeMap<MemberId, Registered>,
    window: LoadWindow,
    connections: u64,
    reports: u64,
}

impl State {
    pub(super) fn new(
        generation: Generation,
        placement: Placement,
        lease: Duration,
        load_window: Duration,
    ) -> Self {
        let window = LoadWindow::new(&placement, load_window);
        Self {
            generation: Generation { epoch: placement.epoch(), ..generation },
            placement: Arc::new(placement),
            lease,
            members: BTreeMap::new(),
            window,
            connections: 0,
            reports: 0,
        }
    }

    /// Registers the member of a stream by its first report. A stream of the same member that is still
    /// registered is replaced.
    pub(super) fn join(
        &mut self,
        now: Instant,
        report: MemberReport,
        end: oneshot::Sender<Status>,
    ) -> Result<(ConnectionId, Option<Loss>), Refusal> {
        self.check(&report)?;
        self.count(now, &report)?;
        self.connections += 1;
        self.reports += 1;
        let connection = ConnectionId(self.connections);
        self.adopt(&report);
        let registered = Registered {
            connection,
            member: report.member.clone(),
            load: report.load,
            loading: report.loading,
            report: self.reports,
            expires: now + self.lease,
            end,
        };
        let replaced = self.members.insert(report.member.id, registered);
        Ok((connection, replaced.map(|old| old.lost(LossCause::Replaced))))
    }

    /// Takes a later report of a stream: renews the lease, updates load and state.
    pub(super) fn report(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        report: MemberReport,
    ) -> Result<Effect, Refusal> {
        self.check(&report)?;
        let id = report.member.id.clone();
        let known = self.members.values().find(|known| known.connection == connection);
        let known = known.ok_or(Refusal::Gone)?;
        unchanged(&known.member, &report.member)?;
        self.count(now, &report)?;
        let adopted = self.adopt(&report);
        self.reports += 1;
        let known = self.members.get_mut(&id).ok_or(Refusal::Gone)?;
        let new_state = known.member.state != report.member.state;
        known.member.state = report.member.state;
        known.load = report.load;
        known.loading = report.loading;
        known.report = self.reports;
        known.expires = now + self.lease;
        Ok(match (adopted || new_state, known.member.role) {
            (true, _) => Effect::View,
            (false, Role::Expert(_)) => Effect::Nothing,
            (false, _) => Effect::Load,
        })
    }

    /// A stream ended.
    pub(super) fn leave(&mut self, connection: ConnectionId) -> Option<Loss> {
        self.remove(connection, LossCause::Closed)
    }

    /// A stream sent what it may not.
    pub(super) fn refuse(&mut self, connection: ConnectionId, status: Status) -> Option<Loss> {
        self.remove(connection, LossCause::Refused(status))
    }

    /// Removes members whose lease has run out.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<Loss> {
        let lease = self.lease;
        let expired: Vec<ConnectionId> = self
            .members
            .values()
            .filter(|known| known.expires <= now)
            .map(|known| known.connection)
            .collect();
        expired
            .into_iter()
            .filter_map(|connection| self.remove(connection, LossCause::Lease(lease)))
            .collect()
    }

    /// When the next lease runs out.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.members.values().map(|known| known.expires).min()
    }

    pub(super) fn placement(&self) -> &Placement {
        &self.placement
    }

    pub(super) fn expert_load(&mut self, now: Instant) -> ExpertLoad {
        self.window.load(now)
    }

    pub(super) fn loading(&self, id: &MemberId) -> Option<Loading> {
        self.members.get(id)?.loading
    }

    pub(super) fn view(&self) -> ClusterView {
        ClusterView {
            generation: self.generation,
            placement: Arc::clone(&self.placement),
            members: self.members.values().map(|known| known.member.clone()).collect(),
        }
    }

    pub(super) fn worker_table(&self) -> WorkerTable {
        let workers = self
            .members
            .values()
            .filter(|known| !matches!(known.member.role, Role::Expert(_)))
            .map(|known| WorkerEntry { member: known.member.clone(), load: known.load, report: known.report })
            .collect();
        WorkerTable { generation: self.generation, workers }
    }

    fn check(&self, report: &MemberReport) -> Result<(), Refusal> {
        let id = || report.member.id.clone();
        self.generation
            .check_weights(&report.generation)
            .map_err(|mismatch| Refusal::Generation { id: id(), mismatch })?;
        match report.member.role {
            Role::Expert(shard) if shard.index() >= self.placement.num_shards() => {
                Err(Refusal::Shard { id: id(), shard, shards: self.placement.num_shards() })
            }
            _ => Ok(()),
        }
    }

    fn count(&mut self, now: Instant, report: &MemberReport) -> Result<(), Refusal> {
        self.window
            .add(now, &report.expert_load)
            .map_err(|mismatch| Refusal::Load { id: report.member.id.clone(), mismatch })
    }

    /// Moves our epoch so that it means our placement to everybody (module header of [`super`]): a larger
    /// epoch under which a member has applied the same placement is taken over; one under which it has
    /// applied another placement is passed. True if the epoch changed.
    fn adopt(&mut self, report: &MemberReport) -> bool {
        let (ours, applied) = (self.generation.epoch, report.generation.epoch);
        let same = report.placement_digest == self.placement.digest();
        let next = match (applied.0, same) {
            (0, _) => return false,
            (_, true) if applied > ours => applied,
            (_, false) if applied >= ours => PlacementEpoch(applied.0.saturating_add(1)),
            _ => return false,
        };
        tracing::info!(before = ours.0, after = next.0, member = %report.member.id, same, "epoch moved by a member's report");
        self.placement = Arc::new(self.placement.with_epoch(next));
        self.generation.epoch = next;
        true
    }

    fn remove(&mut self, connection: ConnectionId, cause: LossCause) -> Option<Loss> {
        let id = self
            .members
            .iter()
            .find(|(_, known)| known.connection == connection)
            .map(|(id, _)| id.clone())?;
        self.members.remove(&id).map(|known| known.lost(cause))
    }
}

impl Registered {
    fn lost(self, cause: LossCause) -> Loss {
        Loss { member: self.member, cause, end: self.end }
    }
}

fn unchanged(before: &Member, after: &Member) -> Result<(), Refusal> {
    for (what, before_text, after_text) in [
        ("id", before.id.to_string(), after.id.to_string()),
        ("role", before.role.to_string(), after.role.to_string()),
        ("address", before.address.clone(), after.address.clone()),
    ] {
        if before_text != after_text {
            let id = before.id.clone();
            return Err(Refusal::Changed { id, what, before: before_text, after: after_text });
        }
    }
    Ok(())
}
