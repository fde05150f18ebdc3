//! The coordinator's state and its transitions. No I/O and no clock of its own: `now` comes in, effects go
//! out, so every rule is tested without a socket.

mod admission;
mod proofs;
mod told;

use std::{collections::BTreeMap, time::Duration};

use cadre_placement::ExpertLoad;
use cadre_types::{
    Generation, LoadProgress, Member, MemberDevice, MemberId, OperatorView, Placement, PlacementEpoch,
    PodRef, Role,
};
use tokio::{sync::oneshot, time::Instant};
use tonic::Status;

use super::{
    WorkerLoad,
    digests::Digests,
    layouts::{Change, Layouts, Stamp},
    load_window::LoadWindow,
    pods::{Pods, Stranger},
    report::MemberReport,
};
pub(super) use admission::Refusal;
use admission::unchanged;
use proofs::Proof;

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
    PodGone(PodRef),
    Stranger(Stranger),
}

impl LossCause {
    /// The label of `cadre_router_members_lost_total`.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Lease(_) => "lease",
            Self::Closed => "closed",
            Self::Replaced => "replaced",
            Self::Refused(_) => "refused",
            Self::PodGone(_) => "pod_gone",
            Self::Stranger(_) => "stranger",
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
            Self::PodGone(pod) => Status::unavailable(format!(
                "member {}: pod {} ({}) does not exist for the operator",
                member.id, pod.name, pod.uid
            )),
            Self::Stranger(why) => Status::unavailable(format!("member {}: {why}", member.id)),
        }
    }
}

/// A registered member.
#[derive(Debug)]
struct Registered {
    connection: ConnectionId,
    /// As reported; [`State::shown`] is what others are told.
    member: Member,
    load: WorkerLoad,
    loading: Option<LoadProgress>,
    device: Option<MemberDevice>,
    applied: Stamp,
    prepared: Stamp,
    proof: Proof,
    /// Number of the last report.
    report: u64,
    since: Instant,
    expires: Instant,
    end: oneshot::Sender<Status>,
}

/// Everything the coordinator knows.
#[derive(Debug)]
pub(super) struct State {
    /// Weights and numerics; the epoch is that of the placement in force.
    generation: Generation,
    layouts: Layouts,
    pods: Pods,
    lease: Duration,
    members: BTreeMap<MemberId, Registered>,
    window: LoadWindow,
    digests: Digests,
    /// Where the router's weights come from, in words.
    weights: String,
    connections: u64,
    reports: u64,
}

impl State {
    pub(super) fn new(
        generation: Generation,
        layouts: Layouts,
        lease: Duration,
        load_window: Duration,
    ) -> Self {
        let window = LoadWindow::new(layouts.planner().load(), load_window);
        Self {
            generation,
            layouts,
            pods: Pods::default(),
            lease,
            members: BTreeMap::new(),
            window,
            digests: Digests::default(),
            weights: String::new(),
            connections: 0,
            reports: 0,
        }
    }

    /// Says where the router's weights come from.
    pub(super) fn with_weights(self, weights: String) -> Self {
        Self { weights, ..self }
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
        if let Some(pod) = report.member.pod.clone().filter(|pod| self.pods.is_gone(Some(pod))) {
            return Err(Refusal::PodGone { id: report.member.id, pod });
        }
        if let Some(why) = self.pods.unwelcome(&report.member) {
            return Err(Refusal::Stranger { id: report.member.id, why });
        }
        self.room(&report.member)?;
        // Before the index is looked at: after a restart it is the member that knows its placement.
        self.adopt(now, &report);
        if let Role::Expert(shard) = report.member.role
            && shard.index() >= self.layouts.known_shards()
        {
            let shards = self.layouts.known_shards();
            return Err(Refusal::Shard { id: report.member.id, shard, shards });
        }
        self.count(now, &report)?;
        self.digests.note(&report.member.id, &report.digests);
        self.doubt(&report.faults);
        self.connections += 1;
        self.reports += 1;
        let connection = ConnectionId(self.connections);
        let registered = Registered {
            connection,
            applied: report.applied(),
            prepared: report.prepared,
            proof: Proof::of_new(self.pods.is_attached()),
            member: report.member.clone(),
            load: report.load,
            loading: report.loading,
            device: report.device,
            report: self.reports,
            since: now,
            expires: now + self.lease,
            end,
        };
        let replaced = self.members.insert(report.member.id, registered);
        Ok((connection, replaced.map(|old| old.lost(LossCause::Replaced))))
    }

    /// Takes a later report of a stream: renews the lease, updates load and state. A shard that a layout
    /// has lost meanwhile stays registered until it leaves.
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
        let (epoch, highest) = (report.generation.epoch, PlacementEpoch(self.layouts.last_epoch()));
        if epoch > highest {
            return Err(Refusal::Epoch { id, epoch, highest });
        }
        self.count(now, &report)?;
        self.digests.note(&id, &report.digests);
        let adopted = self.adopt(now, &report);
        self.doubt(&report.faults);
        self.reports += 1;
        let known = self.members.get_mut(&id).ok_or(Refusal::Gone)?;
        let new_state = known.member.state != report.member.state;
        known.member.state = report.member.state;
        known.applied = report.applied();
        known.prepared = report.prepared;
        known.load = report.load;
        known.loading = report.loading;
        known.device = report.device;
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
        let expired = self.connections_of(|known| known.expires <= now);
        expired
            .into_iter()
            .filter_map(|connection| self.remove(connection, LossCause::Lease(lease)))
            .collect()
    }

    /// Takes the operator's view: its layout is wanted, its pods are those that exist. Returns the members
    /// whose pods do not.
    pub(super) fn operate(&mut self, now: Instant, view: &OperatorView) -> Vec<Loss> {
        self.layouts.want(view.layout);
        let was_attached = self.pods.is_attached();
        self.pods.take(now, view);
        if self.pods.is_attached() && !was_attached {
            self.ask_those_before();
        }
        let gone = self.connections_of(|known| self.pods.removes(&known.member, known.since));
        gone.into_iter()
            .filter_map(|connection| {
                let known = self.members.values().find(|known| known.connection == connection)?;
                let cause = match &known.member.pod {
                    Some(pod) if self.pods.is_gone(Some(pod)) => LossCause::PodGone(pod.clone()),
                    _ => LossCause::Stranger(self.pods.stranger(&known.member)?),
                };
                self.remove(connection, cause)
            })
            .collect()
    }

    /// The operator's stream has ended: its last view stays, and new pods are admitted without it.
    pub(super) fn operator_left(&mut self) {
        self.pods.left();
    }

    /// Another source than the operator wants a layout.
    pub(super) fn want(&mut self, layout: cadre_types::Layout) {
        self.layouts.want(layout);
    }

    /// Moves placements on as far as the members allow.
    pub(super) fn advance(&mut self, now: Instant) -> Vec<Change> {
        let facts = self.facts();
        self.layouts.advance(now, &facts)
    }

    /// When something happens without a report: the next lease runs out, or placements go on.
    pub(super) fn next_expiry(&self, now: Instant) -> Option<Instant> {
        let lease = self.members.values().map(|known| known.expires).min();
        [lease, self.layouts.wake(now), self.next_question(now)].into_iter().flatten().min()
    }

    pub(super) fn layouts(&self) -> &Layouts {
        &self.layouts
    }

    /// Shards of the next placement: prepared, and in all.
    pub(super) fn prepared(&self) -> (usize, usize) {
        self.layouts.prepared(&self.facts())
    }

    pub(super) fn placement(&self) -> Option<&Placement> {
        self.layouts.in_force().map(|placement| &**placement)
    }

    pub(super) fn expert_load(&mut self, now: Instant) -> ExpertLoad {
        self.window.load(now)
    }

    pub(super) fn loading(&self, id: &MemberId) -> Option<LoadProgress> {
        self.members.get(id)?.loading
    }

    /// When the operator's last view came.
    pub(super) fn operator_seen(&self) -> Option<Instant> {
        self.pods.received()
    }

    fn connections_of(&self, wanted: impl Fn(&Registered) -> bool) -> Vec<ConnectionId> {
        self.members.values().filter(|known| wanted(known)).map(|known| known.connection).collect()
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
