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
//! **Placements.** Which one is in force, how a change of layout comes about without a lost request, and what
//! happens after a restart: [`layouts`]. Without a placement members get no view and wait.
//!
//! **The operator** keeps one `Operate` stream open: its whole view in ([`pods`] says what follows for
//! members), the whole status out, at once and then at most every [`owner::STATUS_INTERVAL`]. A newer stream
//! replaces an older one. Without an operator (`cadre up`, or while it is away) everything goes on.

mod coverage;
mod digests;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod layouts;
mod load_window;
mod owner;
mod plan;
mod pods;
mod proof;
mod report;
mod service;
mod state;

use std::{sync::Arc, time::Duration};

use cadre_placement::ExpertLoad;
use cadre_proto::{secret::ClusterSecret, v1};
use cadre_telemetry::Readiness;
use cadre_types::{ClusterView, Generation, Layout, Member, MemberId, MemberState, OperatorView, Role};
use serde_json::Value;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tonic::Status;

pub(crate) use plan::{Planner, layout, read_layout};
pub(crate) use service::CoordinatorService;

use crate::metrics::RouterMetrics;
use layouts::Layouts;
use owner::Owner;
use proof::{Prover, Verdict};
use report::MemberReport;
use state::{ConnectionId, State};

/// Commands that may wait for the owner. Each of a few hundred members has at most one report and one
/// goodbye on the way, because a stream's reader waits until its report is taken.
const COMMAND_QUEUE: usize = 1024;

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

/// A view in both of its forms; each member's stream clones and encodes the second.
#[derive(Debug)]
pub(crate) struct PublishedView {
    /// For this process.
    pub(crate) view: ClusterView,
    /// For members.
    pub(crate) wire: v1::ClusterView,
}

impl PublishedView {
    fn new(view: ClusterView) -> Arc<Self> {
        let wire = v1::ClusterView::from(&view);
        Arc::new(Self { view, wire })
    }
}

/// What the owner is asked to do.
enum Command {
    Join { report: MemberReport, reply: oneshot::Sender<Result<Joined, Status>> },
    Report { connection: ConnectionId, report: MemberReport },
    Refused { connection: ConnectionId, status: Status },
    Leave { connection: ConnectionId },
    Operate { view: OperatorView, reply: oneshot::Sender<Operating> },
    OperatorView { stream: OperatorStream, view: OperatorView },
    OperatorGone { stream: OperatorStream },
    LayoutFile { layout: Layout },
    Judged { connection: ConnectionId, verdict: Verdict },
    ExpertLoad { reply: oneshot::Sender<ExpertLoad> },
    Describe { reply: oneshot::Sender<Value> },
}

/// A member's side of its registration.
struct Joined {
    connection: ConnectionId,
    views: watch::Receiver<Option<Arc<PublishedView>>>,
    /// Resolves when the owner ends the stream; an error when the owner is gone.
    ended: oneshot::Receiver<Status>,
}

/// One Operate stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OperatorStream(u64);

/// The operator's side of its stream.
struct Operating {
    stream: OperatorStream,
    statuses: watch::Receiver<Arc<v1::CoordinatorStatus>>,
    /// As for members.
    ended: oneshot::Receiver<Status>,
}

/// How a coordinator is set up.
pub(crate) struct CoordinatorOptions {
    /// Weights and numerics.
    pub(crate) generation: Generation,
    /// Where the weights come from, in words.
    pub(crate) weights: String,
    /// Plans placements.
    pub(crate) planner: Planner,
    /// The layout wanted at start.
    pub(crate) layout: Layout,
    /// Longest wait for shards and their failure domains before the first plan.
    pub(crate) placement_wait: Duration,
    /// A member that has not reported for this long is removed.
    pub(crate) lease: Duration,
    /// How far back the expert load reaches.
    pub(crate) load_window: Duration,
    /// Whether the router takes requests, for the operator.
    pub(crate) readiness: Readiness,
    /// Width of the model's rows.
    pub(crate) hidden: usize,
    /// The cluster's secret, shown to workers and shards.
    pub(crate) secret: Option<ClusterSecret>,
    /// Where to count.
    pub(crate) metrics: RouterMetrics,
}

/// Access to the owner. Clones share it; the owner stops when all are gone.
#[derive(Clone, Debug)]
pub(crate) struct Coordinator {
    commands: mpsc::Sender<Command>,
    views: watch::Receiver<Option<Arc<PublishedView>>>,
    workers: watch::Receiver<Arc<WorkerTable>>,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Join { .. } => "Join",
            Self::Report { .. } => "Report",
            Self::Refused { .. } => "Refused",
            Self::Leave { .. } => "Leave",
            Self::Operate { .. } => "Operate",
            Self::OperatorView { .. } => "OperatorView",
            Self::OperatorGone { .. } => "OperatorGone",
            Self::LayoutFile { .. } => "LayoutFile",
            Self::Judged { .. } => "Judged",
            Self::ExpertLoad { .. } => "ExpertLoad",
            Self::Describe { .. } => "Describe",
        })
    }
}

impl Coordinator {
    /// Starts the owner task. Aborting it ends every member's stream.
    pub(crate) fn spawn(options: CoordinatorOptions) -> (Self, tokio::task::JoinHandle<()>) {
        let CoordinatorOptions { generation, planner, layout, placement_wait, .. } = options;
        let layouts = Layouts::new(planner, layout, placement_wait);
        let state =
            State::new(generation, layouts, options.lease, options.load_window).with_weights(options.weights);
        let prover = |commands| Prover::new(options.secret.as_ref(), options.hidden, commands);
        Self::spawn_over(state, options.readiness, options.metrics, prover)
    }

    fn spawn_over(
        mut state: State,
        readiness: Readiness,
        metrics: RouterMetrics,
        prover: impl FnOnce(mpsc::WeakSender<Command>) -> Prover,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        // A plan that need not wait for anybody is there before anybody asks.
        state.advance(Instant::now());
        let (views_sender, views) = watch::channel(state.view().map(PublishedView::new));
        let (workers_sender, workers) = watch::channel(Arc::new(state.worker_table()));
        let (commands, inbox) = mpsc::channel(COMMAND_QUEUE);
        let prover = prover(commands.downgrade());
        let owner = Owner::new(state, views_sender, workers_sender, readiness, metrics, prover);
        let task = tokio::spawn(owner.run(inbox));
        (Self { commands, views, workers }, task)
    }

    /// The view, as members see it; `None` before the first placement.
    pub(crate) fn views(&self) -> watch::Receiver<Option<Arc<PublishedView>>> {
        self.views.clone()
    }

    /// The workers with their load.
    pub(crate) fn workers(&self) -> watch::Receiver<Arc<WorkerTable>> {
        self.workers.clone()
    }

    /// The layout file says this now. Counts unless an operator is there.
    pub(crate) async fn layout_file(&self, layout: Layout) {
        // The owner being gone ends everything anyway.
        let _ = self.commands.send(Command::LayoutFile { layout }).await;
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

/// Said where a placement is missing.
pub(crate) const NO_PLACEMENT: &str = "no placement yet: the coordinator waits for shards";

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
