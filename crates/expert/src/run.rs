//! The process: bind, register, load, prove, serve, drain.
//!
//! Ports are bound and answered first, so that health says "alive, not ready" while weights load. The
//! coordinator learns of us as `Starting`; `Ready` is reported only after a real step through every layer.
//! While the coordinator is away the last placement is served. On the way out `Draining` is reported
//! first, so that workers choose other copies; frames already on their way are still computed, within a
//! bound.
//!
//! **Change of layout.** A view asks for up to two placements, the one in force and the next. Each is loaded
//! on a thread of its own beside what is held, proven by a step of its own, and only then reported, as
//! applied or as prepared. Placements before the view's oldest epoch are dropped. A load is given up when a
//! newer view does not want it any more. A shard that no placement has holds nothing and waits, unready.

use std::{
    future::Future,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use cadre_checkpoint::Checkpoint;
use cadre_device::{BackendOptions, DeviceMetrics, OnBackend, OpenDevice};
use cadre_dispatch::{Driver, ExpertServer, IoThread, Limits, LocalConnector, Membership, tuning};
use cadre_ops::{Backend, OpsError};
use cadre_proto::secret::Admit;
use cadre_shard::{AnyShard, ApplyError, CheckpointSource, SelfTestError, Shard, ShardOptions};
use cadre_telemetry::{Metrics, Readiness, admin, axum};
use cadre_types::{ClusterView, Generation, MemberState, Placement, PlacementEpoch, ShardIndex, advertised};
use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tonic::service::{Routes, interceptor::InterceptedService};

use crate::{
    metrics::{ExpertMetrics, ShardMeter},
    options::{BoundAddresses, ExpertOptions, OptionsError},
};

mod report;
mod server;

use report::{join, layer_digests};
use server::GrpcServer;

/// Conditions of readiness.
const PLACEMENT: &str = "placement";
const WEIGHTS: &str = "weights";
const STEP: &str = "step";
const SERVING: &str = "serving";

/// What they say at first.
const CONDITIONS: [(&str, &str); 4] = [
    (PLACEMENT, "none received from the coordinator yet"),
    (WEIGHTS, "not loaded yet"),
    (STEP, "no step done yet"),
    (SERVING, "starting"),
];

/// The shard's name among the roles of a shared process.
pub fn part_name(shard: ShardIndex) -> String {
    format!("expert {}", shard.0)
}

/// Name of the service in gRPC health checks.
const SERVICE_NAME: &str = "cadre.v1.Expert";

/// How often counters are brought up to date and the compute thread is looked after.
const REFRESH: Duration = Duration::from_millis(500);
/// Pause after a placement could not be loaded while another one is served.
const RETRY: Duration = Duration::from_secs(5);
/// Bound on the step that proves a placement.
const SELF_TEST_BOUND: Duration = Duration::from_secs(60);
/// Frames that workers sent before they learned that we drain are over when none came for this long.
const QUIET: Duration = Duration::from_millis(200);
/// How often a draining shard looks whether frames still come.
const DRAIN_POLL: Duration = Duration::from_millis(20);
/// Runs a shard until `shutdown` resolves (then drains) or something it cannot live without is gone.
pub async fn run(options: ExpertOptions, shutdown: impl Future<Output = ()> + Send) -> Result<()> {
    let drain = options.drain;
    let mut shutdown = std::pin::pin!(shutdown);
    let starting = Expert::start(options);
    let expert = tokio::select! {
        expert = starting => expert?,
        () = &mut shutdown => return Ok(()),
    };
    let ended = tokio::select! {
        ended = expert.work() => ended,
        () = shutdown => Ok(()),
    };
    expert.stop(drain).await;
    ended
}

/// A shard that is bound and registered.
struct Expert {
    index: ShardIndex,
    shard: Arc<dyn AnyShard>,
    membership: Membership,
    readiness: Readiness,
    health: tonic_health::server::HealthReporter,
    metrics: ShardMeter,
    device: OpenDevice,
    /// `None` where the worker of the process has them.
    device_metrics: Option<DeviceMetrics>,
    server: GrpcServer,
    /// `None` where the process serves it.
    _admin: Option<AbortOnDrop>,
    /// Our place among the links of a shared process.
    place: Option<Place>,
}

/// A task that ends with its owner.
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The process's own worker reaches the shard while this lives.
struct Place {
    shards: LocalConnector,
    address: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shards.unregister(&self.address);
    }
}

/// A shard to be, but for its backend.
struct Open {
    identity: ShardOptions,
    checkpoint: Arc<Checkpoint>,
    drive: Arc<Driver>,
}

impl OnBackend for Open {
    type Output = Result<Arc<dyn AnyShard>, OpsError>;

    fn run<B: Backend>(self, backend: Arc<B>) -> Self::Output {
        let Self { identity, checkpoint, drive } = self;
        let source = Arc::new(CheckpointSource::new(backend.clone(), checkpoint));
        Ok(Arc::new(Shard::spawn(identity, backend, source, Some(drive))?))
    }
}

impl Expert {
    async fn start(mut options: ExpertOptions) -> Result<Self> {
        let index = options.shard;
        let (grpc, grpc_address) = bind(options.listen, "listen").await?;
        let shared = options.shared.clone();
        // Before anything that takes time: health is asked from the first second on.
        let (admin_address, readiness, expert_metrics, device_metrics, admin) = match &shared {
            Some(shared) => {
                let readiness = shared.readiness.part(&part_name(index), &CONDITIONS);
                (shared.admin, readiness, shared.expert_metrics.clone(), None, None)
            }
            None => {
                let (listener, address) = bind(options.admin, "admin").await?;
                let (metrics, readiness) = (Metrics::new(), Readiness::new(&CONDITIONS));
                let of_shard = Arc::new(ExpertMetrics::register(&metrics)?);
                let of_device = DeviceMetrics::register(&metrics)?;
                let serving_admin = admin::serve(listener, metrics, readiness.clone(), axum::Router::new());
                let admin = AbortOnDrop(tokio::spawn(serving_admin));
                (address, readiness, of_shard, Some(of_device), Some(admin))
            }
        };
        let address = advertised(options.advertise.as_deref(), options.pod_ip, grpc_address)
            .map_err(OptionsError::from)?
            .to_string();
        let (dir, from) = (options.model_dir.clone(), options.weights.clone());
        if !from.is_plain() {
            tracing::warn!(weights = %from, "not the published model: random weights or an override");
        }
        let numerics = options.numerics;
        let backend = BackendOptions {
            device: options.device,
            threads: options.threads.map(usize::from),
            ..BackendOptions::new(numerics)
        };
        let io = IoThread::start("cadre-expert-io").context("start the dispatch I/O thread")?;
        let drive = Arc::new(Driver::new(io.handle()));
        let of_process = shared.as_ref().map(|shared| shared.device.clone());
        let (device, shard, weights, (intake, limits)) = on_thread("cadre-open", move || -> Result<_> {
            let checkpoint = Arc::new(Checkpoint::open_with(&dir, &from)?);
            let weights = Generation { model: checkpoint.model_hash(), numerics, epoch: PlacementEpoch(0) };
            let config = checkpoint.config();
            let (hidden, chosen) = (config.hidden_size, config.num_experts_per_tok);
            let bounds =
                (tuning::shard_intake(numerics, hidden, chosen), Limits::of_model(numerics, hidden, chosen));
            let identity = ShardOptions { shard: index, weights, hidden };
            let device = of_process.map_or_else(|| OpenDevice::open(&backend), Ok)?;
            let loading = device.loading();
            let shard = device.with(Open { identity, checkpoint, drive })?;
            drop(loading);
            Ok((device, shard, weights, bounds))
        })
        .await??;
        if let Some(bound) = options.bound.take() {
            // Whoever asked may have gone; the shard does not depend on it.
            let _ = bound.send(BoundAddresses { grpc: grpc_address, admin: admin_address });
        }

        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_service_status(SERVICE_NAME, tonic_health::ServingStatus::NotServing).await;
        let services = Routes::new(health_service).add_service(InterceptedService::new(
            ExpertServer::with_limits(shard.clone(), limits).into_service(),
            Admit::new(options.secret.clone()),
        ));
        let server = GrpcServer::start(io, services, grpc, intake, shard.clone())?;
        // Before anybody is told the address.
        let place = shared.map(|shared| {
            shared.shards.register(&*address, shard.clone());
            Place { shards: shared.shards, address: address.clone() }
        });
        let membership = join(&options, address.clone(), weights, &shard, device.meter())?;
        readiness.started();
        tracing::info!(
            shard = index.0, address, admin = %admin_address, model = %weights.model,
            numerics = %weights.numerics, "expert shard started"
        );
        let metrics = ShardMeter::new(expert_metrics);
        Ok(Self {
            index,
            shard,
            membership,
            readiness,
            health,
            metrics,
            device,
            device_metrics,
            server,
            _admin: admin,
            place,
        })
    }

    /// Follows placements and serves. Returns only with what ended it.
    async fn work(&self) -> Result<()> {
        tokio::select! {
            ended = self.follow_views() => ended,
            ended = self.watch_over() => ended,
            refused = self.membership.refused() => Err(anyhow::Error::from(refused).context(self.index)),
        }
    }

    /// Keeps metrics current; returns if the compute thread dies.
    async fn watch_over(&self) -> Result<()> {
        let mut ticks = tokio::time::interval(REFRESH);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut not_finite = 0;
        loop {
            ticks.tick().await;
            self.metrics.refresh(&*self.shard);
            if let Some(metrics) = &self.device_metrics {
                metrics.refresh(&self.device.meter());
            }
            if self.shard.is_dead() {
                bail!("the compute thread of {} is gone", self.index);
            }
            let count = self.shard.stats().not_finite.load(Ordering::Relaxed);
            if std::mem::replace(&mut not_finite, count) != count {
                self.prove_again().await?;
            }
        }
    }

    /// Results were not finite: the activations overflow, or our weights are not what they were when they were
    /// proven. Then the shard ends, so that it counts as a copy no more, and its next life reads them anew.
    async fn prove_again(&self) -> Result<()> {
        for epoch in self.shard.epochs() {
            let shard = self.shard.clone();
            let tested =
                on_thread("cadre-self-test", move || shard.self_test(epoch, SELF_TEST_BOUND)).await?;
            match tested {
                // Released meanwhile.
                Err(SelfTestError::NothingLoaded { .. }) | Ok(()) => {}
                Err(error) => return Err(error).with_context(|| format!("{} under {epoch}", self.index)),
            }
        }
        Ok(())
    }

    /// Holds what each view asks for, one placement after the other.
    async fn follow_views(&self) -> Result<()> {
        let mut views = self.membership.views();
        let mut proven = Vec::new();
        loop {
            let view = views.borrow_and_update().clone();
            let Some(view) = view else {
                views.changed().await.context("the membership has ended")?;
                continue;
            };
            self.readiness.met(PLACEMENT);
            self.shard.release(&|epoch| is_wanted(&view, epoch));
            proven.retain(|proven: &Arc<Placement>| self.shard.holds(proven));
            self.settle(&view, &proven).await;
            match self.missing(&view, &proven) {
                Some(placement) => {
                    if let Some(held) = self.take_up(placement, &mut views).await? {
                        proven.push(held);
                    }
                }
                None => views.changed().await.context("the membership has ended")?,
            }
        }
    }

    /// The first placement of a view that has us and that we do not hold and have not proven: the one in
    /// force before the one to come.
    fn missing(&self, view: &ClusterView, proven: &[Arc<Placement>]) -> Option<Arc<Placement>> {
        let wanted = [Some(&view.placement), view.next.as_ref()].into_iter().flatten();
        wanted
            .filter(|placement| self.is_in(placement))
            .find(|placement| !contains(proven, placement))
            .cloned()
    }

    fn is_in(&self, placement: &Placement) -> bool {
        self.index.index() < placement.num_shards()
    }

    /// Loads a placement and proves it. `None` if a newer view does not want it any more, or if it could
    /// not be loaded while another one is served: then it is tried again, after a pause or for the next
    /// view. An error if nothing can be served.
    async fn take_up(
        &self,
        placement: Arc<Placement>,
        views: &mut watch::Receiver<Option<Arc<ClusterView>>>,
    ) -> Result<Option<Arc<Placement>>> {
        let epoch = placement.epoch();
        let began = Instant::now();
        tracing::info!(shard = self.index.0, %epoch, "loading experts");
        let given_up = Arc::new(AtomicBool::new(false));
        let (shard, wanted, stop) = (self.shard.clone(), placement.clone(), given_up.clone());
        let device = self.device.clone();
        let mut loading = pin!(on_thread("cadre-load", move || {
            let _turn = device.loading();
            shard.hold(&wanted, &stop)
        }));
        let loaded = loop {
            tokio::select! {
                loaded = &mut loading => break loaded?,
                changed = views.changed() => {
                    changed.context("the membership has ended")?;
                    let view = views.borrow_and_update().clone();
                    if view.is_some_and(|view| !asks_for(&view, &placement)) {
                        given_up.store(true, Ordering::Release);
                    }
                }
            }
        };
        // What came meanwhile is looked at by the caller.
        views.mark_changed();
        match loaded {
            Ok(()) => {}
            Err(ApplyError::GivenUp { .. }) => {
                tracing::info!(shard = self.index.0, %epoch, "not wanted any more");
                return Ok(None);
            }
            Err(error) if !self.shard.epochs().is_empty() => {
                tracing::error!(shard = self.index.0, %error, retry = ?RETRY, "placement not loaded; what is held is served");
                tokio::time::sleep(RETRY).await;
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
        let (experts, bytes) = self.shard.resident();
        let seconds = began.elapsed().as_secs_f64();
        tracing::info!(shard = self.index.0, %epoch, experts, bytes, seconds, "experts loaded");
        let shard = self.shard.clone();
        let tested = on_thread("cadre-self-test", move || shard.self_test(epoch, SELF_TEST_BOUND)).await?;
        tested.with_context(|| format!("{} under {epoch}", self.index))?;
        // Before the placement is reported as held: copies that differ are never used.
        self.membership.set_expert_digests(layer_digests(self.shard.digests()));
        Ok(Some(placement))
    }

    /// Says what is held and proven to everybody who asks.
    async fn settle(&self, view: &ClusterView, proven: &[Arc<Placement>]) {
        let next = view.next.as_ref().filter(|next| contains(proven, next));
        if contains(proven, &view.placement) && self.shard.epoch() != Some(view.placement.epoch()) {
            self.shard.put_in_force(view.placement.epoch());
            tracing::info!(shard = self.index.0, epoch = %view.placement.epoch(), "expert shard ready");
        }
        // Applied before prepared, and prepared before ready: what is reported is never more than is held.
        if contains(proven, &view.placement) {
            self.membership.set_applied(&view.placement);
        } else if self.shard.epochs().is_empty() {
            self.membership.clear_applied();
        }
        self.membership.set_prepared(next);
        self.metrics.refresh(&*self.shard);
        if proven.is_empty() {
            let why = match [Some(&view.placement), view.next.as_ref()]
                .into_iter()
                .flatten()
                .any(|p| self.is_in(p))
            {
                true => format!("the experts of {} are being loaded", view.placement.epoch()),
                false => format!(
                    "{} has {} shards and this is {}; waiting for a layout with it",
                    view.placement.epoch(),
                    view.placement.num_shards(),
                    self.index
                ),
            };
            self.readiness.unmet(WEIGHTS, why.clone());
            self.readiness.unmet(STEP, why);
            self.health.set_service_status(SERVICE_NAME, tonic_health::ServingStatus::NotServing).await;
            self.membership.set_state(MemberState::Starting);
        } else {
            for condition in [WEIGHTS, STEP, SERVING] {
                self.readiness.met(condition);
            }
            self.health.set_service_status(SERVICE_NAME, tonic_health::ServingStatus::Serving).await;
            self.membership.set_state(MemberState::Ready);
        }
    }

    /// Lets workers go elsewhere, finishes what they have sent, leaves, closes.
    async fn stop(mut self, drain: Duration) {
        self.readiness.unmet(SERVING, "draining");
        self.health.set_service_status(SERVICE_NAME, tonic_health::ServingStatus::NotServing).await;
        let deadline = Instant::now() + drain;
        if self.place.is_some() {
            // Other workers may be draining as ours has, and have no other copy: they finish first, in most of the time.
            self.wait_quiet(deadline - drain / 4).await;
        }
        self.membership.set_state(MemberState::Draining);
        self.wait_quiet(deadline).await;
        self.shard.drain();
        let shard = self.shard.clone();
        let idle = on_thread("cadre-drain", move || shard.wait_idle(deadline)).await;
        if !matches!(idle, Ok(true)) {
            tracing::warn!(?drain, "frames are left that were not computed in time");
        }
        self.membership.leave().await;
        drop(self.place.take());
        self.server.stop().await;
        tracing::info!(shard = self.index.0, "expert shard stopped");
    }

    /// Waits until no frame has come for [`QUIET`].
    async fn wait_quiet(&self, deadline: Instant) {
        let count = || self.shard.stats().frames.load(Ordering::Relaxed);
        let (mut seen, mut since) = (count(), Instant::now());
        while since.elapsed() < QUIET && Instant::now() < deadline {
            tokio::time::sleep(DRAIN_POLL).await;
            let now = count();
            if now != seen {
                (seen, since) = (now, Instant::now());
            }
        }
    }
}

/// Whether a view has a use for an epoch: the one in force, the one to come, and those that workers may
/// still be on.
fn is_wanted(view: &ClusterView, epoch: PlacementEpoch) -> bool {
    let in_force = view.placement.epoch();
    epoch == in_force
        || view.next.as_ref().is_some_and(|next| next.epoch() == epoch)
        || (view.oldest_epoch..in_force).contains(&epoch)
}

/// Whether a view asks for this very placement.
fn asks_for(view: &ClusterView, placement: &Placement) -> bool {
    [Some(&view.placement), view.next.as_ref()].into_iter().flatten().any(|asked| same(asked, placement))
}

fn contains(placements: &[Arc<Placement>], placement: &Placement) -> bool {
    placements.iter().any(|known| same(known, placement))
}

/// Epoch and slots; the digest first says most often that they differ.
fn same(a: &Placement, b: &Placement) -> bool {
    a.epoch() == b.epoch() && a.digest() == b.digest()
}

async fn bind(address: SocketAddr, option: &str) -> Result<(TcpListener, SocketAddr)> {
    let listener =
        cadre_net::bind(address).await.with_context(|| format!("{option}: cannot bind {address}"))?;
    let bound = listener.local_addr().with_context(|| format!("{option}: {address}"))?;
    Ok((listener, bound))
}

/// Runs blocking work on a thread of its own, which a stopping process does not wait for.
async fn on_thread<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (sender, result) = oneshot::channel();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            // Whoever asked may have gone.
            let _ = sender.send(work());
        })
        .with_context(|| format!("start thread {name}"))?;
    result.await.with_context(|| format!("thread {name} panicked"))
}
