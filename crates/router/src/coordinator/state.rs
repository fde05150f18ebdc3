//! The coordinator's state and its transitions. No I/O and no clock of its own: `now` comes in, effects go
//! out, so every rule is tested without a socket.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use cadre_placement::ExpertLoad;
use cadre_types::{
    ClusterView, CoordinatorStatus, Coverage, Generation, LoadProgress, Member, MemberId, MemberState,
    MemberStatus, NextLayout, OperatorView, Placement, PlacementEpoch, PodRef, Role, ShardIndex,
    generation::GenerationMismatch,
};
use tokio::{sync::oneshot, time::Instant};
use tonic::Status;

use super::{
    WorkerEntry, WorkerLoad, WorkerTable,
    coverage::{Routable, coverage},
    digests::{DigestMismatch, Digests},
    layouts::{Change, Facts, Holders, Layouts, Stamp},
    load_window::{LoadMismatch, LoadWindow},
    pods::{Pods, Stranger},
    report::MemberReport,
};

/// Most members: each costs everybody a line of every view (some 100 bytes) and workers a connection. Clusters have
/// hundreds.
const MAX_MEMBERS: usize = 4096;

/// Most members of one shard: the one that serves, its successor, and a few that are not seen to be gone yet.
const MAX_MEMBERS_PER_SHARD: usize = 8;

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

/// Why a report is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// Other weights or numerics.
    #[error("member {id}: {mismatch}")]
    Generation { id: MemberId, mismatch: GenerationMismatch },
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
            Refusal::Generation { id, mismatch } => {
                Self::failed_precondition(format!("member {id}: {}", mismatch.to_peer()))
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
    pub(super) fn name(&self) -> &'static str {
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

/// A registered member.
#[derive(Debug)]
struct Registered {
    connection: ConnectionId,
    /// As reported; [`State::shown`] is what others are told.
    member: Member,
    load: WorkerLoad,
    loading: Option<LoadProgress>,
    applied: Stamp,
    prepared: Stamp,
    /// A step is still to be asked of it before it is shown as ready.
    must_prove: bool,
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
        self.connections += 1;
        self.reports += 1;
        let connection = ConnectionId(self.connections);
        let registered = Registered {
            connection,
            applied: report.applied(),
            prepared: report.prepared,
            must_prove: self.pods.is_attached() && matches!(report.member.role, Role::Decode | Role::Both),
            member: report.member.clone(),
            load: report.load,
            loading: report.loading,
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
        self.reports += 1;
        let known = self.members.get_mut(&id).ok_or(Refusal::Gone)?;
        let new_state = known.member.state != report.member.state;
        known.member.state = report.member.state;
        known.applied = report.applied();
        known.prepared = report.prepared;
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
        self.pods.take(now, view);
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
        [lease, self.layouts.wake(now)].into_iter().flatten().min()
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

    /// The stamp in force; epoch 0 before the first placement.
    pub(super) fn generation(&self) -> Generation {
        let epoch = self.placement().map_or(cadre_types::PlacementEpoch(0), Placement::epoch);
        Generation { epoch, ..self.generation }
    }

    /// What members are told; nothing before the first placement.
    pub(super) fn view(&self) -> Option<ClusterView> {
        Some(ClusterView {
            generation: self.generation(),
            placement: Arc::clone(self.layouts.in_force()?),
            next: self.layouts.next().cloned(),
            oldest_epoch: self.layouts.oldest(),
            members: self.shown_members(),
        })
    }

    /// Everybody who is registered, as others are told.
    pub(super) fn shown_members(&self) -> Vec<Member> {
        self.members.values().map(|known| self.shown(known)).collect()
    }

    /// A member as others are told: whose pod is going away, or who has not proven itself, gets nothing new, whatever
    /// it says itself.
    fn shown(&self, known: &Registered) -> Member {
        let mut member = known.member.clone();
        if self.pods.is_withdrawn(member.pod.as_ref()) {
            member.state = MemberState::Draining;
        } else if known.must_prove && member.state == MemberState::Ready {
            member.state = MemberState::Starting;
        }
        member
    }

    /// Workers that say they are ready and have not done the step that is asked of them.
    pub(super) fn unproven(&self) -> Vec<(ConnectionId, Member)> {
        let unproven = |known: &&Registered| known.must_prove && known.member.state == MemberState::Ready;
        let unproven = self.members.values().filter(unproven);
        unproven.map(|known| (known.connection, known.member.clone())).collect()
    }

    /// A worker has done its step. Its id, if it is still there.
    pub(super) fn proven(&mut self, connection: ConnectionId) -> Option<MemberId> {
        let known = self.members.values_mut().find(|known| known.connection == connection)?;
        known.must_prove = false;
        Some(known.member.id.clone())
    }

    pub(super) fn worker_table(&self) -> WorkerTable {
        let workers = self
            .members
            .values()
            .filter(|known| !matches!(known.member.role, Role::Expert(_)))
            .map(|known| WorkerEntry { member: self.shown(known), load: known.load, report: known.report })
            .collect();
        WorkerTable { generation: self.generation(), workers }
    }

    /// How well experts are covered; everything is uncovered before the first placement.
    pub(super) fn coverage(&self) -> Coverage {
        let Some(placement) = self.placement() else { return Coverage::default() };
        let mut routable = Routable::new();
        for known in self.members.values() {
            if let Role::Expert(shard) = known.member.role
                && self.is_routable(known)
            {
                let domain = self.pods.domain(known.member.pod.as_ref());
                let at = routable.entry(shard.0).or_insert(domain);
                *at = at.or(domain);
            }
        }
        coverage(placement, self.layouts.layout().min_copies, &routable)
    }

    /// Whether work is routed to a member: it has proven itself, is not on its way out, and, for a shard,
    /// a placement in use has it.
    fn is_routable(&self, known: &Registered) -> bool {
        let placed = |shard: ShardIndex| {
            let has = |placement: &Arc<Placement>| shard.index() < placement.num_shards();
            self.layouts.in_force().is_some_and(has) || self.layouts.next().is_some_and(has)
        };
        self.shown(known).state == MemberState::Ready
            && match known.member.role {
                Role::Expert(shard) => placed(shard),
                Role::Prefill | Role::Decode | Role::Both => true,
            }
    }

    /// Everything, for the operator.
    pub(super) fn status(&self, now: Instant, imbalance: Option<f64>, serving: bool) -> CoordinatorStatus {
        let members = self.members.values().map(|known| MemberStatus {
            member: self.shown(known),
            routable: self.is_routable(known),
            applied: known.applied.epoch,
            loading: known.loading,
            sequences: known.load.running_sequences.saturating_add(known.load.waiting_sequences),
            stranger: self.pods.stranger(&known.member).map(|why| why.to_string()),
        });
        let next = self.layouts.waiting_for(now, &self.facts()).map(|waiting_for| NextLayout {
            layout: self.layouts.wanted(),
            epoch: self.layouts.next().map(|next| next.epoch()),
            waiting_for,
        });
        CoordinatorStatus {
            generation: self.generation(),
            layout: self.layouts.layout(),
            next,
            members: members.collect(),
            coverage: self.coverage(),
            imbalance,
            serving,
        }
    }

    fn facts(&self) -> Facts {
        let mut facts = Facts::default();
        for known in self.members.values() {
            let applied = known.applied;
            let Role::Expert(shard) = known.member.role else {
                if applied.epoch.0 > 0 {
                    facts.workers.push(applied.epoch);
                }
                continue;
            };
            let member = self.shown(known);
            if member.state == MemberState::Draining {
                continue;
            }
            let pod = member.pod.as_ref();
            let shard = facts.shards.entry(shard.0).or_default();
            if member.state == MemberState::Ready {
                shard.held.extend([applied, known.prepared].into_iter().filter(|stamp| stamp.epoch.0 > 0));
            }
            let domain = self.pods.domain(pod);
            shard.domain_settled |= pod.is_none() || domain.is_some();
            if let Some(domain) = domain {
                shard.domain = Some(domain.to_owned());
            }
        }
        facts
    }

    fn check(&self, report: &MemberReport) -> Result<(), Refusal> {
        let id = || report.member.id.clone();
        self.generation
            .check_weights(&report.generation)
            .map_err(|mismatch| Refusal::Generation { id: id(), mismatch })?;
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
        self.digests.check(&report.member.id, &report.digests).map_err(Refusal::Digest)
    }

    /// Everybody is told of every member, and workers link to each: their number is bounded.
    fn room(&self, member: &Member) -> Result<(), Refusal> {
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
    fn adopt(&mut self, now: Instant, report: &MemberReport) -> bool {
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

    fn count(&mut self, now: Instant, report: &MemberReport) -> Result<(), Refusal> {
        self.window
            .add(now, &report.expert_load)
            .map_err(|mismatch| Refusal::Load { id: report.member.id.clone(), mismatch })
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

fn unchanged(before: &Member, after: &Member) -> Result<(), Refusal> {
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
