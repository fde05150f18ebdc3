//! The coordinator's owner task: takes one command after the other, publishes what each changed, and keeps the
//! operator's status and the metrics current.

use std::{sync::Arc, time::Duration};

use cadre_placement::explain;
use cadre_proto::v1;
use cadre_telemetry::Readiness;
use cadre_types::{Member, MemberState, OperatorView, Role};
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tonic::Status;

use super::{
    Command, Joined, NO_PLACEMENT, Operating, OperatorStream, PublishedView, WorkerTable,
    layouts::Change,
    proof::{Prover, Verdict},
    report::MemberReport,
    state::{ConnectionId, Effect, Loss, Refusal, State},
    uncovered,
};
use crate::metrics::RouterMetrics;

/// How often imbalance is computed from the load window.
pub(super) const IMBALANCE_INTERVAL: Duration = Duration::from_secs(5);

/// Pairs that a shard has had in a layer, on the mean, before imbalance says anything: the proofs of members are a few, and
/// the largest of a few counts is far from their mean by chance.
const TELLING_PAIRS: f64 = 64.0;

/// Imbalance over layers of (imbalance, pairs per shard), weighted by their pairs; `None` while there are too few.
fn overall<'a>(layers: impl Iterator<Item = (f64, &'a [f64])>) -> Option<f64> {
    let (mut weighted, mut total, mut counts) = (0.0, 0.0, 0_usize);
    for (imbalance, pairs) in layers {
        let of_layer: f64 = pairs.iter().sum();
        weighted += imbalance * of_layer;
        total += of_layer;
        counts += pairs.len();
    }
    (total > 0.0 && total >= TELLING_PAIRS * counts as f64).then(|| weighted / total)
}

/// Least time between two statuses for the operator, after the first.
pub(super) const STATUS_INTERVAL: Duration = Duration::from_millis(500);

/// The owner's side of an operator's stream.
struct Operator {
    stream: OperatorStream,
    statuses: watch::Sender<Arc<v1::CoordinatorStatus>>,
    end: oneshot::Sender<Status>,
    /// When the next status may be sent.
    due: Instant,
}

/// The owner of the state.
pub(super) struct Owner {
    state: State,
    views: watch::Sender<Option<Arc<PublishedView>>>,
    workers: watch::Sender<Arc<WorkerTable>>,
    readiness: Readiness,
    metrics: RouterMetrics,
    prover: Prover,
    operator: Option<Operator>,
    operator_streams: u64,
    /// Of the last look at the load window.
    imbalance: Option<f64>,
}

impl Owner {
    pub(super) fn new(
        state: State,
        views: watch::Sender<Option<Arc<PublishedView>>>,
        workers: watch::Sender<Arc<WorkerTable>>,
        readiness: Readiness,
        metrics: RouterMetrics,
        prover: Prover,
    ) -> Self {
        Self {
            state,
            views,
            workers,
            readiness,
            metrics,
            prover,
            operator: None,
            operator_streams: 0,
            imbalance: None,
        }
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let mut imbalance = tokio::time::interval(IMBALANCE_INTERVAL);
        imbalance.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.publish_view();
        loop {
            let now = Instant::now();
            let expiry = self.state.next_expiry(now);
            let status = self.operator.as_ref().map(|operator| operator.due);
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(command) => self.take(command),
                    None => return,
                },
                () = sleep_until(expiry) => {
                    let lost = self.state.expire(Instant::now());
                    self.lost(lost);
                }
                () = sleep_until(status) => self.tell_operator(),
                _ = imbalance.tick() => self.measure(),
            }
            self.advance();
            self.prover.follow(self.state.questions(Instant::now()));
        }
    }

    fn take(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::Join { report, reply } => self.join(now, report, reply),
            Command::Report { connection, report } => match self.state.report(now, connection, report) {
                Ok(effect) => self.publish(effect),
                Err(refusal) => {
                    self.count_refusal(&refusal);
                    self.refuse(connection, refusal.into());
                }
            },
            Command::Refused { connection, status } => {
                self.metrics.members_refused.with(&["malformed"]).inc();
                self.refuse(connection, status);
            }
            Command::Leave { connection } => {
                let lost = self.state.leave(connection);
                self.lost(lost.into_iter().collect());
            }
            Command::Operate { view, reply } => self.operate(now, &view, reply),
            Command::OperatorView { stream, view } => {
                if self.is_operator(stream) {
                    self.take_operator_view(now, &view);
                }
            }
            Command::OperatorGone { stream } => {
                if self.is_operator(stream) {
                    self.operator = None;
                    self.state.operator_left();
                    tracing::info!("the operator has left; its last view stays");
                }
            }
            Command::LayoutFile { layout } => match self.operator {
                Some(_) => tracing::info!(?layout, "layout file changed; the operator's view counts"),
                None => self.state.want(layout),
            },
            Command::Judged { connection, verdict } => self.judge(now, connection, verdict),
            // A receiver that is gone does not want the answer any more.
            Command::ExpertLoad { reply } => drop(reply.send(self.state.expert_load(now))),
            Command::Describe { reply } => drop(reply.send(self.describe())),
        }
    }

    /// A member has answered our question, or has not.
    fn judge(&mut self, now: Instant, connection: ConnectionId, verdict: Verdict) {
        self.prover.answered(connection);
        match self.state.judge(now, connection, verdict) {
            None => {}
            Some((member, None)) => {
                tracing::info!(id = %member, "the member has done a step; work is routed to it");
                self.publish(Effect::View);
            }
            Some((member, Some(failed))) => {
                tracing::warn!(id = %member, failed, "no work is routed to a member that says it is ready");
                self.publish(Effect::View);
            }
        }
    }

    fn join(&mut self, now: Instant, report: MemberReport, reply: oneshot::Sender<Result<Joined, Status>>) {
        let member = report.member.clone();
        let (end, ended) = oneshot::channel();
        match self.state.join(now, report, end) {
            Ok((connection, replaced)) => {
                tracing::info!(id = %member.id, role = %member.role, address = %member.address, "member joined");
                self.lost(replaced.into_iter().collect());
                // What the member brings along may decide the view that it gets first.
                self.advance();
                self.publish(Effect::View);
                let joined = Joined { connection, views: self.views.subscribe(), ended };
                if reply.send(Ok(joined)).is_err() {
                    let lost = self.state.leave(connection);
                    self.lost(lost.into_iter().collect());
                }
            }
            Err(refusal) => {
                self.count_refusal(&refusal);
                tracing::warn!(id = %member.id, role = %member.role, %refusal, "member refused");
                // The member may be gone already; it is not registered either way.
                let _ = reply.send(Err(refusal.into()));
            }
        }
    }

    fn count_refusal(&self, refusal: &Refusal) {
        self.metrics.members_refused.with(&[refusal.name()]).inc();
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

    // --- the operator ----------------------------------------------------------------------------

    fn operate(&mut self, now: Instant, view: &OperatorView, reply: oneshot::Sender<Operating>) {
        self.operator_streams += 1;
        let stream = OperatorStream(self.operator_streams);
        tracing::info!(pods = view.pods.len(), layout = ?view.layout, "an operator is here");
        self.take_operator_view(now, view);
        self.advance();
        let (statuses, receiver) = watch::channel(Arc::new(self.status(now)));
        let (end, ended) = oneshot::channel();
        let operator = Operator { stream, statuses, end, due: now + STATUS_INTERVAL };
        if let Some(older) = self.operator.replace(operator) {
            // It may have ended by itself.
            let _ = older.end.send(Status::aborted("a newer operator stream has taken over"));
        }
        if reply.send(Operating { stream, statuses: receiver, ended }).is_err() {
            self.operator = None;
            self.state.operator_left();
        }
    }

    fn is_operator(&self, stream: OperatorStream) -> bool {
        self.operator.as_ref().is_some_and(|operator| operator.stream == stream)
    }

    fn take_operator_view(&mut self, now: Instant, view: &OperatorView) {
        let lost = self.state.operate(now, view);
        self.lost(lost);
        self.publish(Effect::View);
    }

    fn status(&self, now: Instant) -> v1::CoordinatorStatus {
        (&self.state.status(now, self.imbalance, self.readiness.is_ready())).into()
    }

    /// Sends the status if it differs from the last one.
    fn tell_operator(&mut self) {
        let now = Instant::now();
        let status = Arc::new(self.status(now));
        if let Some(operator) = &mut self.operator {
            operator.due = now + STATUS_INTERVAL;
            operator.statuses.send_if_modified(|last| {
                let changed = *last != status;
                *last = status;
                changed
            });
        }
    }

    // --- what others see -------------------------------------------------------------------------

    /// Moves placements on and says so.
    fn advance(&mut self) {
        let changes = self.state.advance(Instant::now());
        if changes.is_empty() {
            return;
        }
        let layouts = self.state.layouts();
        let epoch = layouts.in_force().map_or(0, |placement| placement.epoch().0);
        let next = layouts.next().map(|next| next.epoch().0);
        for change in changes {
            let (outcome, what) = match change {
                Change::Planned => ("planned", "a placement is being prepared"),
                Change::InForce => ("in_force", "a placement is in force"),
                Change::GivenUp => ("given_up", "a placement was given up for another layout"),
                Change::Settled => ("settled", "nobody uses older placements any more"),
            };
            self.metrics.layout_changes.with(&[outcome]).inc();
            tracing::info!(epoch, next, layout = ?layouts.layout(), wanted = ?layouts.wanted(), "{what}");
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
        let members = self.state.shown_members();
        for role in ["prefill", "decode", "both", "expert"] {
            for state in ["starting", "ready", "draining"] {
                let count = members.iter().filter(|m| labels(m) == (role, state)).count();
                self.metrics.members.with(&[role, state]).set(count as f64);
            }
        }
        let layouts = self.state.layouts();
        self.metrics.epoch.set(self.state.generation().epoch.0 as f64);
        self.metrics.oldest_epoch.set(layouts.oldest().0 as f64);
        let (prepared, shards) = self.state.prepared();
        self.metrics.next_shards.with(&["prepared"]).set(prepared as f64);
        self.metrics.next_shards.with(&["all"]).set(shards as f64);
        let coverage = self.state.coverage();
        self.metrics.uncovered_experts.set(coverage.uncovered as f64);
        self.metrics.at_risk_experts.set(coverage.at_risk as f64);
        self.metrics.failed_proofs.set(self.state.failed_proofs() as f64);
        self.views.send_replace(self.state.view().map(PublishedView::new));
    }

    /// What is measured by the clock: imbalance of the load window, age of the operator's view.
    fn measure(&mut self) {
        let now = Instant::now();
        let age = self.state.operator_seen().map_or(-1.0, |at| (now - at).as_secs_f64());
        self.metrics.operator_view_age.set(age);
        let load = self.state.expert_load(now);
        let Some(placement) = self.state.placement() else { return };
        let report = match explain(placement, &load) {
            Ok(report) => report,
            // Both are built from the same layers and experts.
            Err(error) => return tracing::error!(%error, "imbalance of the placement in force"),
        };
        for layer in &report.layers {
            let name = layer.layer.0.to_string();
            self.metrics.imbalance.with(&[&name]).set(layer.imbalance);
        }
        let layers = report.layers.iter();
        self.imbalance = overall(layers.map(|layer| (layer.imbalance, layer.tokens_per_shard.as_slice())));
    }

    fn describe(&self) -> Value {
        let view = self.state.view();
        let generation = self.state.generation();
        let layouts = self.state.layouts();
        let members: Vec<Value> = self
            .state
            .shown_members()
            .iter()
            .map(|member| {
                let (role, state) = labels(member);
                let shard = match member.role {
                    Role::Expert(shard) => Some(shard.0),
                    _ => None,
                };
                json!({
                    "id": member.id, "role": role, "shard": shard, "state": state,
                    "address": member.address,
                    "failed_proof": self.state.failed_proof(&member.id),
                    "loading": self.state.loading(&member.id).map(|loading| json!({
                        "bytes_read": loading.bytes_read, "bytes_expected": loading.bytes_expected,
                    })),
                })
            })
            .collect();
        let uncovered = match &view {
            Some(view) => uncovered(view),
            None => Some(NO_PLACEMENT.to_owned()),
        };
        let status = self.state.status(Instant::now(), self.imbalance, self.readiness.is_ready());
        json!({
            "model_hash": generation.model.to_string(),
            "numerics": generation.numerics.name(),
            "epoch": generation.epoch.0,
            "oldest_epoch": layouts.oldest().0,
            "shards": view.as_ref().map_or(0, |view| view.placement.num_shards()),
            "layout": layouts.layout(),
            "next": status.next.map(|next| json!({
                "layout": next.layout, "epoch": next.epoch, "waiting_for": next.waiting_for,
            })),
            "covered": uncovered.is_none(),
            "uncovered": uncovered,
            "at_risk_experts": status.coverage.at_risk,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_pairs_are_no_imbalance() {
        let over = |pairs: &[f64]| overall([(1.5, pairs), (1.1, pairs)].into_iter());
        assert_eq!(overall(std::iter::empty()), None);
        assert_eq!((over(&[0.0, 0.0]), over(&[3.0, 1.0]), over(&[96.0, 31.0])), (None, None, None));
        let told = over(&[96.0, 32.0]).unwrap_or_default();
        assert!((told - 1.3).abs() < 1e-9, "{told}");
    }
}
