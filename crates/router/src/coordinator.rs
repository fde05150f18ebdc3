//! The coordinator: who is in the cluster, and which placement is in force.
//!
//! One task owns the state ([`state::State`]); everybody else has receivers: members get the whole
//! [`ClusterView`] on every change (a `watch` channel, so a slow receiver skips to the newest), the
//! router's own [`WorkerTable`] follows every report. Commands reach the owner through one bounded queue.
//!
//! **Leases.** A member that has not reported for a lease is removed and its stream is ended; a stream
//! that closes removes its member at once. A second stream of the same member (it reconnected before the
//! first was seen to close) replaces the first.
//!
//! **Epochs after a restart.** State is soft. The placement is a pure function of the checkpoint, the
//! number of shards and slots, and the expert-load file, so a restarted router usually computes the same
//! one. It begins at epoch 1 and moves by what members report as applied, epoch and digest: the largest
//! epoch of the same placement is taken over, so that members which hold it have nothing to do; if the
//! inputs have changed meanwhile, ours gets an epoch above theirs. One epoch never means two placements.

mod load_window;
mod plan;
mod report;
mod service;
mod state;

use std::{sync::Arc, time::Duration};

use cadre_placement::{ExpertLoad, explain};
use cadre_proto::v1;
use cadre_types::{ClusterView, Generation, Member, MemberId, MemberState, Placement, Role};
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tonic::Status;

pub(crate) use plan::plan;
pub(crate) use service::CoordinatorService;

use crate::metrics::RouterMetrics;
use report::MemberReport;
use state::{ConnectionId, Effect, Loss, State};

/// Commands that may wait for the owner. Each of a few hundred members has at most one report and one
/// goodbye on the way, because a stream's reader waits until its report is taken.
const COMMAND_QUEUE: usize = 1024;

/// How often imbalance is computed from the load window.
const IMBALANCE_INTERVAL: Duration = Duration::from_secs(5);

/// Work that a worker reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerLoad {
    /// Sequences in its batch.
    pub running_sequences: u32,
    /// Sequences that wait there for pages.
    pub waiting_sequences: u32,
    /// KV pages free.
    pub free_pages: u64,
    /// KV pages in all.
    pub total_pages: u64,
}

/// A registered worker with its last report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerEntry {
    /// The worker.
    pub member: Member,
    /// What it reported last.
    pub load: WorkerLoad,
    /// Number of that report; grows over all members.
    pub report: u64,
}

/// The registered workers, sorted by id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerTable {
    /// The generation in force.
    pub generation: Generation,
    /// The workers.
    pub workers: Vec<WorkerEntry>,
}

/// A view in both of its forms; encoded once, sent to all.
#[derive(Debug)]
pub(crate) struct PublishedView {
    /// For this process.
    pub(crate) view: ClusterView,
    /// For members.
    pub(crate) wire: v1::ClusterView,
}

/// What the owner is asked to do.
enum Command {
    Join { report: MemberReport, reply: oneshot::Sender<Result<Joined, Status>> },
    Report { connection: ConnectionId, report: MemberReport },
    Refused { connection: ConnectionId, status: Status },
    Leave { connection: ConnectionId },
    ExpertLoad { reply: oneshot::Sender<ExpertLoad> },
    Describe { reply: oneshot::Sender<Value> },
}

/// A member's side of its registration.
struct Joined {
    connection: ConnectionId,
    views: watch::Receiver<Arc<PublishedView>>,
    /// Resolves when the owner ends the stream; an error when the owner is gone.
    ended: oneshot::Receiver<Status>,
}

/// Access to the owner. Clones share it; the owner stops when all are gone.
#[derive(Clone, Debug)]
pub(crate) struct Coordinator {
    commands: mpsc::Sender<Command>,
    views: watch::Receiver<Arc<PublishedView>>,
    workers: watch::Receiver<Arc<WorkerTable>>,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Join { .. } => "Join",
            Self::Report { .. } => "Report",
            Self::Refused { .. } => "Refused",
            Self::Leave { .. } => "Leave",
            Self::ExpertLoad { .. } => "ExpertLoad",
            Self::Describe { .. } => "Describe",
        })
    }
}

impl Coordinator {
    /// Starts the owner task. Aborting it ends every member's stream.
    pub(crate) fn spawn(
        generation: Generation,
        placement: Placement,
        lease: Duration,
        load_window: Duration,
        metrics: RouterMetrics,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let state = State::new(generation, placement, lease, load_window);
        let (views_sender, views) = watch::channel(Arc::new(publish(state.view())));
        let (workers_sender, workers) = watch::channel(Arc::new(state.worker_table()));
        let (commands, inbox) = mpsc::channel(COMMAND_QUEUE);
        let owner = Owner { state, views: views_sender, workers: workers_sender, metrics };
        let task = tokio::spawn(owner.run(inbox));
        (Self { commands, views, workers }, task)
    }

    /// The view, as members see it.
    pub(crate) fn views(&self) -> watch::Receiver<Arc<PublishedView>> {
        self.views.clone()
    }

    /// The workers with their load.
    pub(crate) fn workers(&self) -> watch::Receiver<Arc<WorkerTable>> {
        self.workers.clone()
    }

    /// The aggregated expert load of the window; `None` when the owner is gone.
    pub(crate) async fn expert_load(&self) -> Option<ExpertLoad> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::ExpertLoad { reply }).await.ok()?;
        answer.await.ok()
    }

    /// Members and placement as JSON for the admin port; `None` when the owner is gone.
    pub(crate) async fn describe(&self) -> Option<Value> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Describe { reply }).await.ok()?;
        answer.await.ok()
    }
}

fn publish(view: ClusterView) -> PublishedView {
    let wire = v1::ClusterView::from(&view);
    PublishedView { view, wire }
}

/// The owner of the state.
struct Owner {
    state: State,
    views: watch::Sender<Arc<PublishedView>>,
    workers: watch::Sender<Arc<WorkerTable>>,
    metrics: RouterMetrics,
}

impl Owner {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let mut imbalance = tokio::time::interval(IMBALANCE_INTERVAL);
        imbalance.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.publish_view();
        loop {
            let expiry = self.state.next_expiry();
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(command) => self.take(command),
                    None => return,
                },
                () = sleep_until(expiry) => {
                    let lost = self.state.expire(Instant::now());
                    self.lost(lost);
                }
                _ = imbalance.tick() => self.publish_imbalance(),
            }
        }
    }

    fn take(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::Join { report, reply } => self.join(now, report, reply),
            Command::Report { connection, report } => match self.state.report(now, connection, report) {
                Ok(effect) => self.publish(effect),
                Err(refusal) => self.refuse(connection, refusal.into()),
            },
            Command::Refused { connection, status } => self.refuse(connection, status),
            Command::Leave { connection } => {
                let lost = self.state.leave(connection);
                self.lost(lost.into_iter().collect());
            }
            // A receiver that is gone does not want the answer any more.
            Command::ExpertLoad { reply } => drop(reply.send(self.state.expert_load(now))),
            Command::Describe { reply } => drop(reply.send(self.describe())),
        }
    }

    fn join(&mut self, now: Instant, report: MemberReport, reply: oneshot::Sender<Result<Joined, Status>>) {
        let member = report.member.clone();
        let (end, ended) = oneshot::channel();
        match self.state.join(now, report, end) {
            Ok((connection, replaced)) => {
                tracing::info!(id = %member.id, role = %member.role, address = %member.address, "member joined");
                self.lost(replaced.into_iter().collect());
                self.publish(Effect::View);
                let joined = Joined { connection, views: self.views.subscribe(), ended };
                if reply.send(Ok(joined)).is_err() {
                    let lost = self.state.leave(connection);
                    self.lost(lost.into_iter().collect());
                }
            }
            Err(refusal) => {
                tracing::warn!(id = %member.id, role = %member.role, %refusal, "member refused");
                // The member may be gone already; it is not registered either way.
                let _ = reply.send(Err(refusal.into()));
            }
        }
    }

    fn refuse(&mut self, connection: ConnectionId, status: Status) {
        let lost = self.state.refuse(connection, status);
        self.lost(lost.into_iter().collect());
    }

    fn lost(&mut self, lost: Vec<Loss>) {
        if lost.is_empty() {
            return;
        }
        for loss in lost {
            tracing::warn!(id = %loss.member.id, role = %loss.member.role, cause = loss.cause.name(), "member left");
            self.metrics.members_lost.with(&[loss.cause.name()]).inc();
            // The stream may have ended by itself.
            let _ = loss.end.send(loss.cause.status(&loss.member));
        }
        self.publish(Effect::View);
    }

    fn publish(&self, effect: Effect) {
        match effect {
            Effect::Nothing => {}
            Effect::Load => drop(self.workers.send_replace(Arc::new(self.state.worker_table()))),
            Effect::View => {
                self.workers.send_replace(Arc::new(self.state.worker_table()));
                self.publish_view();
            }
        }
    }

    fn publish_view(&self) {
        let view = self.state.view();
        for role in ["prefill", "decode", "both", "expert"] {
            for state in ["starting", "ready", "draining"] {
                let count = view.members.iter().filter(|m| labels(m) == (role, state)).count();
                self.metrics.members.with(&[role, state]).set(count as f64);
            }
        }
        self.metrics.epoch.set(view.generation.epoch.0 as f64);
        self.views.send_replace(Arc::new(publish(view)));
    }

    fn publish_imbalance(&mut self) {
        let load = self.state.expert_load(Instant::now());
        match explain(self.state.placement(), &load) {
            Ok(report) => {
                for layer in report.layers {
                    let name = layer.layer.0.to_string();
                    self.metrics.imbalance.with(&[&name]).set(layer.imbalance);
                }
            }
            // Both are built from the same layers and experts.
            Err(error) => tracing::error!(%error, "imbalance of the placement in force"),
        }
    }

    fn describe(&self) -> Value {
        let view = self.state.view();
        let members: Vec<Value> = view
            .members
            .iter()
            .map(|member| {
                let (role, state) = labels(member);
                let shard = match member.role {
                    Role::Expert(shard) => Some(shard.0),
                    _ => None,
                };
                json!({
                    "id": member.id, "role": role, "shard": shard, "state": state,
                    "address": member.address, "loading": self.state.loading(&member.id),
                })
            })
            .collect();
        let uncovered = uncovered(&view);
        json!({
            "model_hash": view.generation.model.to_string(),
            "numerics": view.generation.numerics.name(),
            "epoch": view.generation.epoch.0,
            "shards": view.placement.num_shards(),
            "covered": uncovered.is_none(),
            "uncovered": uncovered,
            "members": members,
        })
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn labels(member: &Member) -> (&'static str, &'static str) {
    let role = match member.role {
        Role::Prefill => "prefill",
        Role::Decode => "decode",
        Role::Both => "both",
        Role::Expert(_) => "expert",
    };
    let state = match member.state {
        MemberState::Starting => "starting",
        MemberState::Ready => "ready",
        MemberState::Draining => "draining",
    };
    (role, state)
}

/// The first expert without a ready copy, in words; `None` when all are covered.
pub(crate) fn uncovered(view: &ClusterView) -> Option<String> {
    let ready: Vec<bool> = (0..view.placement.num_shards())
        .map(|shard| {
            view.members.iter().any(|member| {
                member.state == MemberState::Ready
                    && matches!(member.role, Role::Expert(index) if index.index() == shard)
            })
        })
        .collect();
    if ready.iter().all(|ready| *ready) {
        return None;
    }
    let missing: Vec<String> =
        ready.iter().enumerate().filter(|(_, ready)| !**ready).map(|(shard, _)| shard.to_string()).collect();
    for layer in view.placement.layers() {
        for expert in (0..view.placement.num_experts()).map_while(|e| u16::try_from(e).ok()) {
            let expert = cadre_types::LogicalExpert(expert);
            let covered = view
                .placement
                .replicas(layer.layer, expert)
                .iter()
                .any(|replica| ready.get(replica.shard.index()).copied().unwrap_or(false));
            if !covered {
                return Some(format!(
                    "{expert} of {} has no ready copy; shards not ready: {}",
                    layer.layer,
                    missing.join(", ")
                ));
            }
        }
    }
    None
}

impl WorkerTable {
    /// The entry of a worker.
    pub fn worker(&self, id: &MemberId) -> Option<&WorkerEntry> {
        self.workers.iter().find(|entry| entry.member.id == *id)
    }
}

#[cfg(test)]
mod tests;
