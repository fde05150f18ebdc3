//! The process: bind, register, load, prove, serve, drain.
//!
//! Ports are bound and answered first, so that health says "alive, not ready" while weights load. The
//! coordinator learns of us as `Starting`; each view with a new placement is loaded on a thread of its own
//! while the former placement goes on serving; `Ready` is reported only after a real step through every
//! layer. While the coordinator is away the last placement is served. On the way out `Draining` is
//! reported first, so that workers choose other copies; frames already on their way are still computed,
//! within a bound.

use std::{
    future::Future,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use cadre_checkpoint::Checkpoint;
use cadre_dispatch::{ExpertServer, LoadReport, Membership, MembershipOptions, membership, tuning};
use cadre_ops::Backend;
use cadre_ops_cpu::{CpuBackend, CpuOptions};
use cadre_proto::v1;
use cadre_shard::{ApplyError, CheckpointSource, Shard, ShardOptions};
use cadre_telemetry::{Metrics, Readiness, admin, axum};
use cadre_types::{Generation, Member, MemberId, MemberState, Placement, PlacementEpoch, Role, ShardIndex};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

use crate::{
    metrics::ExpertMetrics,
    options::{BoundAddresses, ExpertOptions, advertised},
};

/// Conditions of readiness.
const PLACEMENT: &str = "placement";
const WEIGHTS: &str = "weights";
const STEP: &str = "step";
const SERVING: &str = "serving";

/// Name of the service in gRPC health checks.
const SERVICE_NAME: &str = "cadre.v1.Expert";

/// How often counters are brought up to date and the compute thread is looked after.
const REFRESH: Duration = Duration::from_millis(500);
/// Bound on the step that proves a placement.
const SELF_TEST_BOUND: Duration = Duration::from_secs(60);
/// Frames that workers sent before they learned that we drain are over when none came for this long.
const QUIET: Duration = Duration::from_millis(200);
/// How often a draining shard looks whether frames still come.
const DRAIN_POLL: Duration = Duration::from_millis(20);
/// Bound on writing the last answers and closing connections. Workers keep their streams open for ever, so
/// this always runs out while they live.
const CLOSE_BOUND: Duration = Duration::from_millis(300);

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
    shard: Arc<Shard<CpuBackend>>,
    membership: Membership,
    readiness: Readiness,
    health: tonic_health::server::HealthReporter,
    metrics: ExpertMetrics,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    close_server: oneshot::Sender<()>,
    admin: JoinHandle<()>,
}

impl Expert {
    async fn start(mut options: ExpertOptions) -> Result<Self> {
        let index = options.shard;
        let (grpc, grpc_address) = bind(options.listen, "listen").await?;
        let (admin_listener, admin_address) = bind(options.admin, "admin").await?;
        let address = advertised(options.advertise.as_deref(), grpc_address)?;
        let dir = options.model_dir.clone();
        let (numerics, threads) = (options.numerics, options.threads);
        let (shard, weights) = on_thread("cadre-open", move || -> Result<_> {
            let checkpoint = Arc::new(Checkpoint::open(&dir)?);
            let cpu = CpuOptions { threads: threads.map(usize::from), ..CpuOptions::new(numerics) };
            let backend = Arc::new(CpuBackend::new(cpu)?);
            tracing::info!(backend = backend.describe(), model = %dir.display(), "opened");
            let weights = Generation { model: checkpoint.model_hash(), numerics, epoch: PlacementEpoch(0) };
            let hidden = checkpoint.config().hidden_size;
            let source = Arc::new(CheckpointSource::new(backend.clone(), checkpoint));
            let shard = Shard::spawn(ShardOptions { shard: index, weights, hidden }, backend, source)?;
            Ok((Arc::new(shard), weights))
        })
        .await??;
        if let Some(bound) = options.bound.take() {
            // Whoever asked may have gone; the shard does not depend on it.
            let _ = bound.send(BoundAddresses { grpc: grpc_address, admin: admin_address });
        }

        let metrics = Metrics::new();
        let expert_metrics = ExpertMetrics::register(&metrics)?;
        let readiness = Readiness::new(&[
            (PLACEMENT, "none received from the coordinator yet"),
            (WEIGHTS, "not loaded yet"),
            (STEP, "no step done yet"),
            (SERVING, "starting"),
        ]);
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_service_status(SERVICE_NAME, tonic_health::ServingStatus::NotServing).await;
        let (close_server, closed) = oneshot::channel::<()>();
        let server = tokio::spawn(
            tuning::server()
                .add_service(health_service)
                .add_service(ExpertServer::new(shard.clone()).into_service())
                .serve_with_incoming_shutdown(tuning::incoming(grpc), async move {
                    // Resolves on the signal and when the shard is dropped.
                    let _ = closed.await;
                }),
        );
        let serving_admin = admin::serve(admin_listener, metrics, readiness.clone(), axum::Router::new());
        let admin = tokio::spawn(async move {
            if let Err(error) = serving_admin.await {
                tracing::error!(%error, "the admin server ended");
            }
        });
        let membership = join(&options, address.clone(), weights, &shard)?;
        tracing::info!(
            shard = index.0, address, admin = %admin_address, model = %weights.model,
            numerics = %weights.numerics, "expert shard started"
        );
        Ok(Self {
            index,
            shard,
            membership,
            readiness,
            health,
            metrics: expert_metrics,
            server,
            close_server,
            admin,
        })
    }

    /// Follows placements and serves. Returns only with what ended it.
    async fn work(&self) -> Result<()> {
        tokio::select! {
            ended = self.follow_views() => ended,
            ended = self.watch_over() => ended,
            reason = self.membership.refused() => {
                bail!("the coordinator refused {}: {reason}", self.index)
            }
        }
    }

    /// Keeps metrics current; returns if the compute thread dies.
    async fn watch_over(&self) -> Result<()> {
        let mut ticks = tokio::time::interval(REFRESH);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.metrics.refresh(&self.shard);
            if self.shard.is_dead() {
                bail!("the compute thread of {} is gone", self.index);
            }
        }
    }

    async fn follow_views(&self) -> Result<()> {
        let mut views = self.membership.views();
        loop {
            let view = views.borrow_and_update().clone();
            if let Some(view) = view {
                self.follow(&view.placement).await?;
            }
            views.changed().await.context("the membership has ended")?;
        }
    }

    /// Loads a placement and proves it. An error if nothing can be served; a placement that fails while
    /// another is in force is logged, and the other stays.
    async fn follow(&self, placement: &Arc<Placement>) -> Result<()> {
        self.readiness.met(PLACEMENT);
        let epoch = placement.epoch();
        if self.shard.epoch() == Some(epoch) {
            return Ok(());
        }
        let began = Instant::now();
        tracing::info!(%epoch, "loading experts");
        let (shard, wanted) = (self.shard.clone(), placement.clone());
        let applied = on_thread("cadre-load", move || shard.apply(&wanted)).await?;
        match applied {
            Ok(()) => {}
            Err(error @ ApplyError::UnknownShard { .. }) => {
                // Not ours to decide: the next placement may have us again.
                tracing::error!(%error, "placement not applied");
                self.readiness.unmet(WEIGHTS, error.to_string());
                return Ok(());
            }
            Err(error) if self.shard.epoch().is_some() => {
                tracing::error!(%error, "placement not applied; the former one stays");
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
        self.readiness.met(WEIGHTS);
        let (experts, bytes) = self.shard.resident();
        tracing::info!(%epoch, experts, bytes, seconds = began.elapsed().as_secs_f64(), "experts loaded");

        let shard = self.shard.clone();
        let tested = on_thread("cadre-self-test", move || shard.self_test(SELF_TEST_BOUND)).await?;
        tested.with_context(|| format!("{} under {epoch}", self.index))?;
        self.readiness.met(STEP);
        self.readiness.met(SERVING);
        self.health.set_service_status(SERVICE_NAME, tonic_health::ServingStatus::Serving).await;
        self.metrics.refresh(&self.shard);
        self.membership.set_applied(placement);
        self.membership.set_state(MemberState::Ready);
        tracing::info!(shard = self.index.0, %epoch, "expert shard ready");
        Ok(())
    }

    /// Lets workers go elsewhere, finishes what they have sent, leaves, closes.
    async fn stop(self, drain: Duration) {
        self.readiness.unmet(SERVING, "draining");
        self.health.set_service_status(SERVICE_NAME, tonic_health::ServingStatus::NotServing).await;
        self.membership.set_state(MemberState::Draining);
        let deadline = Instant::now() + drain;
        self.wait_quiet(deadline).await;
        self.shard.drain();
        let shard = self.shard.clone();
        let idle = on_thread("cadre-drain", move || shard.wait_idle(deadline)).await;
        if !matches!(idle, Ok(true)) {
            tracing::warn!(?drain, "frames are left that were not computed in time");
        }
        self.membership.leave().await;
        drop(self.close_server);
        let mut server = self.server;
        if tokio::time::timeout(CLOSE_BOUND, &mut server).await.is_err() {
            server.abort();
        }
        self.admin.abort();
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

fn join(
    options: &ExpertOptions,
    address: String,
    weights: Generation,
    shard: &Arc<Shard<CpuBackend>>,
) -> Result<Membership> {
    let born = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let member = Member {
        // Unique per process life, and later for a later life: of two members of one shard the later wins.
        id: MemberId(format!("shard-{}-{:013x}-{address}", options.shard.0, born.as_millis())),
        role: Role::Expert(options.shard),
        address,
        state: MemberState::Starting,
    };
    let shard = Arc::downgrade(shard);
    let load = move || {
        let progress = shard.upgrade().map(|shard| shard.progress()).unwrap_or_default();
        let loading =
            v1::LoadProgress { bytes_read: progress.bytes_read, bytes_expected: progress.bytes_expected };
        LoadReport { loading: Some(loading), ..LoadReport::default() }
    };
    Ok(membership::join(MembershipOptions::new(&options.coordinator), member, weights, load)?)
}

async fn bind(address: SocketAddr, option: &str) -> Result<(TcpListener, SocketAddr)> {
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("{option}: cannot bind {address}"))?;
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
