//! Membership: a worker's or shard's lasting connection to the coordinator.
//!
//! [`join`] opens `Coordinator.Watch`, registers with the first report, reports every interval and at once
//! when the state changes, and publishes each [`ClusterView`] that arrives. When the coordinator goes away
//! it reconnects for ever with bounded back-off, and the last view stays published: the data plane serves
//! on it. Only a refusal of our weights or numerics (`FAILED_PRECONDITION`) is final; [`Membership::refused`]
//! resolves with its reason and the role should exit with it. Every other refusal (a shard that the layout
//! does not have yet, a pod that the operator has not seen yet) is tried again.
//!
//! The first report of every stream carries the whole placement that this process has applied: a restarted
//! coordinator takes it over instead of planning anew.

use std::{sync::Arc, time::Duration};

use cadre_proto::{
    connection::{ConnectionEnd, with_causes},
    secret::{ClusterSecret, Present},
    v1,
};
use cadre_types::{ClusterView, Generation, Member, MemberState, Placement, PlacementEpoch};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::MissedTickBehavior,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::{
    backoff::{Backoff, BackoffPolicy},
    tuning,
};

/// Reports that wait for the connection's send window. The task writes one at a time and skips ticks while
/// it waits, so two (a tick's and a state change's) is all that can be pending.
const PENDING_REPORTS: usize = 2;

/// Bound on a clean farewell.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// Where and how often to report.
#[derive(Clone, Debug)]
pub struct MembershipOptions {
    /// `host:port` (or URI) of the coordinator.
    pub coordinator: String,
    /// Time between reports; the coordinator's lease is a multiple of it.
    pub interval: Duration,
    /// Reconnection delays.
    pub backoff: BackoffPolicy,
    /// The cluster's secret, if it has one.
    pub secret: Option<ClusterSecret>,
    /// Where our weights come from and what is overridden, in words.
    pub weights: String,
}

impl MembershipOptions {
    /// Reports every 500 ms.
    pub fn new(coordinator: impl Into<String>) -> Self {
        Self {
            coordinator: coordinator.into(),
            interval: Duration::from_millis(500),
            backoff: BackoffPolicy::default(),
            secret: None,
            weights: String::new(),
        }
    }
}

/// The load part of a report; who we are, our state and our epoch are filled in by the membership.
#[derive(Clone, Debug, Default)]
pub struct LoadReport {
    /// Workers: sequences and pages.
    pub worker: Option<v1::WorkerLoad>,
    /// Shards: weight loading.
    pub loading: Option<v1::LoadProgress>,
    /// What the member computes on; absent before the device is open.
    pub device: Option<v1::MemberDevice>,
    /// Workers: tokens per (layer, expert) since the previous call.
    pub expert_load: Vec<v1::LayerLoad>,
    /// Workers: shards whose rows were not finite.
    pub faults: Vec<v1::ShardFault>,
}

/// Why a membership could not begin.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// The address is no URI.
    #[error("coordinator address {address:?}: {source}")]
    Address {
        /// What was given.
        address: String,
        /// Why it is refused.
        source: tonic::transport::Error,
    },
}

/// The coordinator serves other weights or numerics than this process: no retry will change that.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the coordinator refused this member: {reason}")]
pub struct GenerationRefused {
    /// The coordinator's words, which name both values.
    pub reason: String,
}

/// A running membership. Dropping it leaves without a farewell.
#[derive(Debug)]
pub struct Membership {
    /// Kept, so that no reader takes a refused (ended) membership for a closed channel.
    views: watch::Sender<Option<Arc<ClusterView>>>,
    standing: watch::Sender<Standing>,
    refusal: watch::Receiver<Option<String>>,
    task: JoinHandle<()>,
}

/// The part of a report that this process decides.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Standing {
    state: MemberState,
    applied: Stamp,
    prepared: Stamp,
    digests: Digests,
    leaving: bool,
}

/// What the weights that this process holds are, byte by byte.
#[derive(Clone, Debug, Default)]
struct Digests {
    experts: Arc<Vec<v1::LayerDigests>>,
    weights: u64,
}

impl PartialEq for Digests {
    /// Digests that were made anew are worth telling again.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.experts, &other.experts) && self.weights == other.weights
    }
}

impl Eq for Digests {}

/// Names a placement; the default names none.
#[derive(Clone, Debug, Default)]
struct Stamp {
    epoch: PlacementEpoch,
    digest: u64,
    placement: Option<Arc<Placement>>,
}

impl Stamp {
    fn of(placement: &Arc<Placement>) -> Self {
        let (epoch, digest) = (placement.epoch(), placement.digest());
        Self { epoch, digest, placement: Some(Arc::clone(placement)) }
    }
}

impl PartialEq for Stamp {
    /// Epoch and digest are the placement.
    fn eq(&self, other: &Self) -> bool {
        (self.epoch, self.digest) == (other.epoch, other.digest)
    }
}

impl Eq for Stamp {}

struct Session<L> {
    options: MembershipOptions,
    member: Member,
    generation: Generation,
    load: L,
    views: watch::Sender<Option<Arc<ClusterView>>>,
    standing: watch::Receiver<Standing>,
    /// The digests that this stream's reports have carried.
    told: Option<Digests>,
    refusal: watch::Sender<Option<String>>,
}

/// How a session ended.
enum Ended {
    Left,
    Refused(String),
    /// Without the cluster's secret.
    Stranger(String),
    Lost {
        reason: String,
        had_view: bool,
    },
}

/// Joins the cluster; must be called inside a tokio runtime. `member.state` is the first state reported and
/// `generation.epoch` is ignored (nothing is applied yet). `load` is called once per report.
pub fn join(
    options: MembershipOptions,
    member: Member,
    generation: Generation,
    load: impl FnMut() -> LoadReport + Send + 'static,
) -> Result<Membership, MembershipError> {
    let endpoint = tuning::endpoint(&options.coordinator)
        .map_err(|source| MembershipError::Address { address: options.coordinator.clone(), source })?;
    let views = watch::Sender::new(None);
    let (refusal_tx, refusal) = watch::channel(None);
    let first = Standing {
        state: member.state,
        applied: Stamp::default(),
        prepared: Stamp::default(),
        digests: Digests::default(),
        leaving: false,
    };
    let (standing, standing_rx) = watch::channel(first);
    let session = Session {
        options,
        member,
        generation,
        load,
        views: views.clone(),
        standing: standing_rx,
        told: None,
        refusal: refusal_tx,
    };
    let task = tokio::spawn(session.run(endpoint));
    Ok(Membership { views, standing, refusal, task })
}

impl Membership {
    /// The coordinator's latest view; `None` until the first arrives. Open as long as the membership lives.
    pub fn views(&self) -> watch::Receiver<Option<Arc<ClusterView>>> {
        self.views.subscribe()
    }

    /// Changes the reported state and reports it at once.
    pub fn set_state(&self, state: MemberState) {
        self.standing.send_if_modified(|standing| replace(&mut standing.state, state));
    }

    /// Changes the reported (applied) placement and reports it at once.
    pub fn set_applied(&self, placement: &Arc<Placement>) {
        self.standing.send_if_modified(|standing| replace(&mut standing.applied, Stamp::of(placement)));
    }

    /// Reports at once that no placement is applied any more (a shard that the layout no longer has).
    pub fn clear_applied(&self) {
        self.standing.send_if_modified(|standing| replace(&mut standing.applied, Stamp::default()));
    }

    /// Changes the placement that is held and proven beside the applied one, and reports it at once.
    pub fn set_prepared(&self, placement: Option<&Arc<Placement>>) {
        let prepared = placement.map(Stamp::of).unwrap_or_default();
        self.standing.send_if_modified(|standing| replace(&mut standing.prepared, prepared));
    }

    /// Shards: the digests of every expert held, from which the coordinator tells copies that differ. Reported at
    /// once, and first thing on every new stream.
    pub fn set_expert_digests(&self, experts: Vec<v1::LayerDigests>) {
        self.standing.send_modify(|standing| standing.digests.experts = Arc::new(experts));
    }

    /// Workers: the digest of the weights that they have read. Reported at once, and first thing on every new stream.
    pub fn set_weights_digest(&self, digest: u64) {
        self.standing.send_if_modified(|standing| replace(&mut standing.digests.weights, digest));
    }

    /// Resolves when the coordinator refuses our generation, with its words. Pending otherwise.
    pub async fn refused(&self) -> GenerationRefused {
        let mut refusal = self.refusal.clone();
        loop {
            if let Some(reason) = refusal.borrow_and_update().clone() {
                return GenerationRefused { reason };
            }
            if refusal.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Closes the stream, so that the coordinator removes us now and not when the lease expires.
    pub async fn leave(mut self) {
        self.standing.send_modify(|standing| standing.leaving = true);
        if tokio::time::timeout(LEAVE_TIMEOUT, &mut self.task).await.is_err() {
            tracing::debug!("coordinator did not close the watch in time");
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn replace<T: PartialEq>(slot: &mut T, value: T) -> bool {
    let changed = *slot != value;
    *slot = value;
    changed
}

impl<L: FnMut() -> LoadReport + Send + 'static> Session<L> {
    async fn run(mut self, endpoint: tonic::transport::Endpoint) {
        let mut backoff = Backoff::new(self.options.backoff, &self.member.id);
        loop {
            match self.watch(&endpoint).await {
                Ended::Left => return,
                Ended::Refused(reason) => {
                    tracing::error!(member = %self.member.id, reason, "the coordinator refused this member");
                    self.refusal.send_replace(Some(reason));
                    return;
                }
                Ended::Stranger(reason) => {
                    // It may be mounted or changed in a moment; a person must learn of it at once.
                    let delay = backoff.next_delay();
                    tracing::error!(
                        coordinator = self.options.coordinator,
                        reason,
                        ?delay,
                        "not admitted; trying again"
                    );
                    if self.leaving_within(delay).await {
                        return;
                    }
                }
                Ended::Lost { reason, had_view } => {
                    if had_view {
                        backoff.reset();
                    }
                    let delay = backoff.next_delay();
                    tracing::info!(
                        coordinator = self.options.coordinator,
                        reason,
                        ?delay,
                        "not in the coordinator's cluster; trying again"
                    );
                    if self.leaving_within(delay).await {
                        return;
                    }
                }
            }
        }
    }

    /// Waits out a back-off; true if we are told to leave meanwhile.
    async fn leaving_within(&mut self, delay: Duration) -> bool {
        let leaving = self.standing.wait_for(|standing| standing.leaving);
        // A closed channel means that the membership was dropped, which aborts this task anyway.
        tokio::time::timeout(delay, leaving).await.is_ok()
    }

    /// One connection: register, then report and receive until either end stops.
    async fn watch(&mut self, endpoint: &tonic::transport::Endpoint) -> Ended {
        let lost = |reason: String| Ended::Lost { reason, had_view: false };
        let channel = match endpoint.connect().await {
            Ok(channel) => channel,
            Err(error) => return lost(with_causes(&error)),
        };
        let present = Present::new(self.options.secret.as_ref());
        let (reports, outgoing) = mpsc::channel(PENDING_REPORTS);
        // The coordinator answers the call only after it has seen a report, so the first is queued before.
        if reports.try_send(self.first_report()).is_err() {
            return lost("report queue is full at birth".to_owned());
        }
        let mut client = v1::coordinator_client::CoordinatorClient::with_interceptor(channel, present)
            .max_decoding_message_size(cadre_proto::MAX_MESSAGE_BYTES);
        let opened =
            tokio::time::timeout(tuning::KEEP_ALIVE_TIMEOUT, client.watch(ReceiverStream::new(outgoing)));
        match opened.await {
            Ok(Ok(response)) => self.serve(reports, response.into_inner()).await,
            Ok(Err(status)) => ended(&status, false),
            Err(_) => lost("no answer to Watch".to_owned()),
        }
    }

    async fn serve(
        &mut self,
        reports: mpsc::Sender<v1::Report>,
        mut incoming: tonic::Streaming<v1::ClusterView>,
    ) -> Ended {
        let mut had_view = false;
        let mut ticks = tokio::time::interval(self.options.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.reset();
        let mut standing = self.standing.clone();
        loop {
            tokio::select! {
                message = incoming.message() => match message {
                    Ok(Some(view)) => {
                        had_view |= self.publish(&view);
                        continue;
                    }
                    Ok(None) => return Ended::Lost { reason: "the coordinator closed the watch".to_owned(), had_view },
                    Err(status) => return ended(&status, had_view),
                },
                _ = ticks.tick() => {}
                changed = standing.changed() => {
                    if changed.is_err() || standing.borrow_and_update().leaving {
                        return Ended::Left;
                    }
                }
            }
            // A full queue means that the last report has not left yet; the next tick carries the same state,
            // and state changes wait for room: two reports are pending at most.
            if reports.capacity() > 0 && reports.try_send(self.report()).is_err() {
                return Ended::Lost { reason: "the watch's request side closed".to_owned(), had_view };
            }
        }
    }

    fn first_report(&mut self) -> v1::Report {
        self.told = None;
        let report = self.report();
        let applied = self.standing.borrow().applied.clone();
        // Read twice, so it may have changed in between; then epoch and digest of the whole one hold.
        let stamp = Generation { epoch: applied.epoch, ..self.generation };
        v1::Report {
            generation: Some(stamp.into()),
            placement_digest: applied.digest,
            applied_placement: applied.placement.as_deref().map(v1::Placement::from),
            ..report
        }
    }

    fn report(&mut self) -> v1::Report {
        let standing = self.standing.borrow().clone();
        let load = (self.load)();
        let member = Member { state: standing.state, ..self.member.clone() };
        let news = self.told.as_ref() != Some(&standing.digests);
        let expert_digests = if news { standing.digests.experts.to_vec() } else { Vec::new() };
        let weights_digest = standing.digests.weights;
        self.told = Some(standing.digests);
        v1::Report {
            member: Some((&member).into()),
            generation: Some(Generation { epoch: standing.applied.epoch, ..self.generation }.into()),
            worker: load.worker,
            loading: load.loading,
            device: load.device,
            weights: self.options.weights.clone(),
            expert_load: load.expert_load,
            placement_digest: standing.applied.digest,
            prepared_digest: standing.prepared.digest,
            prepared_epoch: standing.prepared.epoch.0,
            applied_placement: None,
            expert_digests,
            weights_digest,
            faults: load.faults,
        }
    }

    /// Publishes a view that fits us; true if it did.
    fn publish(&self, wire: &v1::ClusterView) -> bool {
        let view = match ClusterView::try_from(wire) {
            Ok(view) => view,
            Err(error) => {
                tracing::error!(%error, "view from the coordinator refused");
                return false;
            }
        };
        if let Err(error) = self.generation.check_weights(&view.generation) {
            tracing::error!(%error, "view from the coordinator refused");
            return false;
        }
        self.views.send_replace(Some(Arc::new(view)));
        true
    }
}

fn ended(status: &tonic::Status, had_view: bool) -> Ended {
    if let Some(end) = ConnectionEnd::of_status(status) {
        return Ended::Lost { reason: format!("{end}: {}", with_causes(status)), had_view };
    }
    match status.code() {
        Code::FailedPrecondition => Ended::Refused(status.message().to_owned()),
        Code::Unauthenticated => Ended::Stranger(status.message().to_owned()),
        code => Ended::Lost { reason: format!("{code:?}: {}", status.message()), had_view },
    }
}

#[cfg(test)]
mod tests;
