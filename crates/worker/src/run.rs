//! The process: bind, register, load, prove, serve, drain.
//!
//! Order matters for who is told what when. Ports are bound and answered first, so that health says
//! "alive, not ready" while weights load; the coordinator learns of us as `Starting`, with loading
//! progress; `Ready` is reported only after a real step went through every layer and every shard of the
//! placement can be reached. On the way out `Draining` is reported first, sequences are finished within a
//! bound, and only then is the membership left and the port closed.
//!
//! Loading and stopping the engine happen on threads of their own: nothing here computes on the reactor,
//! and a process told to stop while it loads does not wait for the end of it.

use std::{
    future::Future,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use cadre_checkpoint::Checkpoint;
use cadre_device::{BackendOptions, DeviceMetrics};
use cadre_dispatch::{
    Connect, DispatchConfig, DispatchHandle, Dispatcher, ExpertLoadWindow, GrpcConnector, IoThread,
    Membership, tuning,
};
use cadre_engine::{Engine, EngineHandle, MAX_KV_FRAME_BYTES};
use cadre_scheduler::SchedulerConfig;
use cadre_telemetry::{Metrics, Readiness, admin, axum};
use cadre_types::{ClusterView, Generation, MemberState, PlacementEpoch, Role, advertised};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use tonic::service::Routes;

use crate::{
    dispatch_metrics::DispatchMetrics,
    metrics::WorkerMetrics,
    options::{BoundAddresses, OptionsError, WorkerOptions, scheduler_config},
    service::{ServiceOptions, WorkerService},
};

mod load;
mod report;

use load::Load;
use report::{Report, join};

/// Conditions of readiness.
const WEIGHTS: &str = "weights";
const PLACEMENT: &str = "placement";
const EXPERTS: &str = "experts";
const STEP: &str = "step";
const SERVING: &str = "serving";

/// What they say at first.
const CONDITIONS: [(&str, &str); 5] = [
    (WEIGHTS, "not loaded yet"),
    (PLACEMENT, "none received from the coordinator yet"),
    (EXPERTS, "no shard reached yet"),
    (STEP, "no step done yet"),
    (SERVING, "starting"),
];

/// How often counters are brought up to date.
const REFRESH: Duration = Duration::from_millis(500);
/// Pause between self-tests while shards are missing; a test itself waits for them up to its own bound.
const SELF_TEST_PAUSE: Duration = Duration::from_millis(100);
/// How often a draining worker looks whether it is empty.
const DRAIN_POLL: Duration = Duration::from_millis(20);
/// Bound on closing connections after the last sequence has ended.
const CLOSE_BOUND: Duration = Duration::from_secs(2);

/// Runs a worker until `shutdown` resolves (then drains) or something it cannot live without is gone.
pub async fn run(options: WorkerOptions, shutdown: impl Future<Output = ()> + Send) -> Result<()> {
    let drain = options.timeouts.drain;
    let mut shutdown = pin!(shutdown);
    let starting = Worker::start(options);
    let (mut worker, options) = tokio::select! {
        started = starting => started?,
        () = &mut shutdown => return Ok(()),
    };
    let ended = tokio::select! {
        ended = worker.work(&options) => ended,
        () = shutdown => Ok(()),
    };
    worker.stop(drain).await;
    ended
}

/// A worker that is bound and registered.
struct Worker {
    role: Role,
    checkpoint: Option<Arc<Checkpoint>>,
    generation: Generation,
    scheduler: SchedulerConfig,
    metrics: Metrics,
    worker_metrics: Arc<WorkerMetrics>,
    readiness: Readiness,
    health: tonic_health::server::HealthReporter,
    service: WorkerService,
    report: Arc<Report>,
    membership: Membership,
    server: JoinHandle<()>,
    close_server: Option<oneshot::Sender<()>>,
    background: Vec<AbortOnDrop>,
    engine: Option<Engine>,
    dispatch: Option<DispatchHandle>,
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Worker {
    async fn start(mut options: WorkerOptions) -> Result<(Self, WorkerOptions)> {
        let role = Role::from(options.role);
        // Before anything that takes time: health is asked from the first second on.
        let (grpc, grpc_address) = bind(options.listen, "listen").await?;
        let (admin_address, metrics, readiness, mut background) = match &options.shared {
            Some(shared) => {
                let readiness = shared.readiness.part("worker", &CONDITIONS);
                (shared.admin, shared.metrics.clone(), readiness, Vec::new())
            }
            None => {
                let (listener, address) = bind(options.admin, "admin").await?;
                let (metrics, readiness) = (Metrics::new(), Readiness::new(&CONDITIONS));
                let served = admin::serve(listener, metrics.clone(), readiness.clone(), axum::Router::new());
                (address, metrics, readiness, vec![AbortOnDrop(tokio::spawn(served))])
            }
        };
        let (dir, weights) = (options.model_dir.clone(), options.weights.clone());
        let checkpoint =
            Arc::new(on_thread("cadre-open", move || Checkpoint::open_with(&dir, &weights)).await??);
        if !options.weights.is_plain() {
            tracing::warn!(weights = %options.weights, "not the published model: random weights or an override");
        }
        for warning in checkpoint.warnings().iter() {
            tracing::warn!(%warning, "checkpoint");
        }
        let generation = Generation {
            model: checkpoint.model_hash(),
            numerics: options.numerics,
            epoch: PlacementEpoch(0),
        };
        let scheduler = scheduler_config(
            checkpoint.config(),
            options.numerics,
            options.kv_bytes,
            options.max_step_tokens,
        )?;
        let address = advertised(options.advertise.as_deref(), options.pod_ip, grpc_address)
            .map_err(OptionsError::from)?
            .to_string();
        if let Some(bound) = options.bound.take() {
            // Whoever asked may have gone; the worker does not depend on it.
            let _ = bound.send(BoundAddresses { grpc: grpc_address, admin: admin_address });
        }

        let worker_metrics = Arc::new(WorkerMetrics::register(&metrics)?);
        let service = WorkerService::new(ServiceOptions {
            generation,
            role,
            handoff_timeout: options.timeouts.handoff,
            secret: options.secret.clone(),
        });
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_service_status(SERVICE_NAME, tonic_health::ServingStatus::NotServing).await;
        let (close_server, closed) = oneshot::channel::<()>();
        let services = Routes::new(health_service).add_service(service.clone().into_server());
        let intake = tuning::worker_intake(checkpoint.config().max_position_embeddings, MAX_KV_FRAME_BYTES);
        let server = tokio::spawn(tuning::serve("worker", grpc, services, intake, async move {
            // Resolves on the signal and when the worker is dropped.
            let _ = closed.await;
        }));
        let report = Arc::new(Report::default());
        background.push(keep_device(DeviceMetrics::register(&metrics)?, Arc::clone(&report)));

        let membership = join(&options, role, address.clone(), generation, &report, &worker_metrics)?;
        service.hand_off_to_members_of(membership.views());
        readiness.started();
        tracing::info!(
            %role, address, admin = %admin_address, model = %generation.model, numerics = %generation.numerics,
            kv_pages = scheduler.pages, "worker started"
        );
        let worker = Self {
            role,
            checkpoint: Some(checkpoint),
            generation,
            scheduler,
            metrics,
            worker_metrics,
            readiness,
            health,
            service,
            report,
            membership,
            server,
            close_server: Some(close_server),
            background,
            engine: None,
            dispatch: None,
        };
        Ok((worker, options))
    }

    /// Loads, proves itself, serves. Returns only with what ended it.
    async fn work(&mut self, options: &WorkerOptions) -> Result<()> {
        let engine = self.load(options).await?;
        self.background.push(self.keep_metrics(engine.clone()));
        tokio::select! {
            ended = self.ended(&engine) => ended,
            ended = self.follow_views() => ended,
            ended = self.serve(&engine) => ended,
        }
    }

    /// Proves the engine, takes requests; returns only if proving is impossible.
    async fn serve(&self, engine: &EngineHandle) -> Result<()> {
        self.prove(engine).await?;
        // From here on: the steps of the self-test are nobody's traffic, and imbalance is measured over traffic.
        let stats = self.dispatch.as_ref().map(DispatchHandle::stats);
        *self.report.expert_load.lock().unwrap_or_else(PoisonError::into_inner) =
            stats.map(ExpertLoadWindow::new);
        self.service.serve_with(engine.clone());
        self.health.set_service_status(SERVICE_NAME, tonic_health::ServingStatus::Serving).await;
        self.readiness.met(SERVING);
        self.membership.set_state(MemberState::Ready);
        tracing::info!(role = %self.role, "worker ready");
        std::future::pending().await
    }

    /// What a worker cannot live without.
    async fn ended(&self, engine: &EngineHandle) -> Result<()> {
        tokio::select! {
            refused = self.membership.refused() => Err(refused.into()),
            () = engine.stopped() => bail!("the engine has stopped"),
        }
    }

    /// Loads the weights and starts the engine.
    async fn load(&mut self, options: &WorkerOptions) -> Result<EngineHandle> {
        let io = IoThread::start("cadre-dispatch-io").context("start the dispatch I/O thread")?;
        let config = DispatchConfig {
            frame_timeout: options.timeouts.dispatch,
            uncovered_wait: options.timeouts.uncovered,
            ..DispatchConfig::default()
        };
        let remote = Arc::new(GrpcConnector::new(io.handle()).with_secret(options.secret.as_ref()));
        let connector: Arc<dyn Connect> = match &options.shared {
            Some(shared) => Arc::new(shared.shards.or(remote)),
            None => remote,
        };
        let dispatcher = Dispatcher::new(config, self.generation, connector);
        let dispatch = dispatcher.handle();
        let checkpoint = self.checkpoint.take().ok_or_else(|| anyhow!("weights are loaded once"))?;
        let load = Load {
            checkpoint,
            backend: BackendOptions {
                device: options.device,
                threads: options.threads.map(std::num::NonZeroUsize::get),
                ..BackendOptions::new(options.numerics)
            },
            device: options.shared.as_ref().map(|shared| shared.device.clone()),
            scheduler: self.scheduler.clone(),
            dispatcher,
            io,
            timeouts: (options.timeouts.handoff, options.timeouts.handoff_begin),
            report: Arc::clone(&self.report),
            metrics: Arc::clone(&self.worker_metrics),
        };
        let loading = on_thread("cadre-load", move || load.run());
        let engine = tokio::select! {
            engine = loading => engine??,
            refused = self.membership.refused() => return Err(refused.into()),
        };
        self.readiness.met(WEIGHTS);
        self.membership.set_weights_digest(self.report.weights_digest.load(Ordering::Relaxed));
        let handle = engine.handle();
        self.engine = Some(engine);
        // Set once: this is the only engine of the process.
        let _ = self.report.engine.set(handle.clone());
        self.dispatch = Some(dispatch);
        Ok(handle)
    }

    /// Keeps metrics up to date with the counters.
    fn keep_metrics(&self, engine: EngineHandle) -> AbortOnDrop {
        let worker = Arc::clone(&self.worker_metrics);
        let dispatch = self
            .dispatch
            .as_ref()
            .and_then(|dispatch| DispatchMetrics::register(&self.metrics, dispatch.stats()).ok());
        AbortOnDrop(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(REFRESH);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                worker.refresh(engine.stats());
                if let Some(dispatch) = &dispatch {
                    dispatch.refresh();
                }
            }
        }))
    }

    /// Gives every view to the dispatcher, and tells the coordinator which placement it has taken up.
    async fn follow_views(&self) -> Result<()> {
        let Some(dispatch) = &self.dispatch else { bail!("views are followed once weights are loaded") };
        let (mut views, mut taken) = (self.membership.views(), dispatch.taken());
        loop {
            if let Some(view) = views.borrow_and_update().clone() {
                dispatch.update(view);
            }
            if let Some(placement) = taken.borrow_and_update().clone() {
                self.readiness.met(PLACEMENT);
                self.membership.set_applied(&placement);
            }
            tokio::select! {
                changed = views.changed() => changed.context("the membership has ended")?,
                changed = taken.changed() => changed.context("the dispatcher has ended")?,
            }
        }
    }

    /// Runs self-tests until one succeeds and every shard of the placement can be reached.
    async fn prove(&self, engine: &EngineHandle) -> Result<()> {
        let Some(dispatch) = &self.dispatch else { bail!("nothing is proven before weights are loaded") };
        // A step without a placement fails, and says nothing about this worker.
        dispatch.taken().wait_for(Option::is_some).await.context("the dispatcher has ended")?;
        let views = self.membership.views();
        let mut told = Vec::new();
        for nth in 0.. {
            let step = engine.self_test(nth).await.map_err(|error| error.to_string());
            let stepped = step.is_ok();
            self.readiness.set(STEP, step);
            let view = views.borrow().clone();
            let missing = self.unreached(view.as_deref());
            self.readiness.set(EXPERTS, missing.map_or(Ok(()), Err));
            let mut unmet = self.readiness.missing();
            unmet.retain(|unmet| unmet.condition != SERVING);
            if stepped && unmet.is_empty() {
                return Ok(());
            }
            if unmet != told {
                for unmet in &unmet {
                    tracing::info!(condition = unmet.condition, reason = unmet.reason, "not ready yet");
                }
                told = unmet;
            }
            tokio::time::sleep(SELF_TEST_PAUSE).await;
        }
        Ok(())
    }

    /// Which shards of the placement cannot be reached, in words.
    fn unreached(&self, view: Option<&ClusterView>) -> Option<String> {
        let shards = view.map_or(0, |view| view.placement.num_shards());
        let stats = self.dispatch.as_ref().map(|dispatch| dispatch.stats().shards()).unwrap_or_default();
        let usable =
            |shard: &usize| stats.get(*shard).is_some_and(|stats| stats.usable.load(Ordering::Relaxed) == 1);
        let missing: Vec<String> =
            (0..shards).filter(|shard| !usable(shard)).map(|shard| shard.to_string()).collect();
        (!missing.is_empty()).then(|| format!("shards {} of {shards} are not reached", missing.join(", ")))
    }

    /// Drains what runs, leaves, closes.
    async fn stop(mut self, drain: Duration) {
        self.service.drain();
        self.readiness.unmet(SERVING, "draining");
        self.health.set_service_status(SERVICE_NAME, tonic_health::ServingStatus::NotServing).await;
        self.membership.set_state(MemberState::Draining);
        // Before anything was served, the only sequence can be our own self-test, which nobody waits for.
        if let Some(engine) = &self.engine
            && self.service.has_served()
        {
            let left = drained(&engine.handle(), &self.service, drain).await;
            if left > 0 {
                tracing::warn!(sequences = left, ?drain, "not drained in time; what still runs is ended");
            }
        }
        // Ends the waits of a step in progress, so that the engine's thread comes to its end.
        if let Some(dispatch) = &self.dispatch {
            dispatch.close();
        }
        if let Some(engine) = self.engine.take()
            && tokio::time::timeout(CLOSE_BOUND, on_thread("cadre-stop", move || engine.stop()))
                .await
                .is_err()
        {
            tracing::warn!("the step in progress outlived its bound");
        }
        self.membership.leave().await;
        drop(self.close_server.take());
        if tokio::time::timeout(CLOSE_BOUND, &mut self.server).await.is_err() {
            self.server.abort();
        }
        tracing::info!(role = %self.role, "worker stopped");
    }
}

/// Keeps the device's metrics up to date, while weights load too.
fn keep_device(metrics: DeviceMetrics, report: Arc<Report>) -> AbortOnDrop {
    AbortOnDrop(tokio::spawn(async move {
        let mut ticks = tokio::time::interval(REFRESH);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Some(device) = report.device.get() {
                metrics.refresh(device);
            }
        }
    }))
}

/// Waits until the engine has no sequences and no call is open; returns how many are left after the bound.
async fn drained(engine: &EngineHandle, service: &WorkerService, bound: Duration) -> u64 {
    let deadline = Instant::now() + bound;
    loop {
        let left = engine.in_flight().max(service.open_calls());
        if left == 0 || Instant::now() >= deadline {
            return left;
        }
        tokio::time::sleep(DRAIN_POLL).await;
    }
}

/// Name of the service in gRPC health checks.
const SERVICE_NAME: &str = "cadre.v1.Worker";

async fn bind(address: SocketAddr, option: &str) -> Result<(TcpListener, SocketAddr)> {
    let listener =
        cadre_net::bind(address).await.with_context(|| format!("{option}: cannot bind {address}"))?;
    let bound = listener.local_addr().with_context(|| format!("{option}: {address}"))?;
    Ok((listener, bound))
}

/// Runs blocking work on a thread of its own, which a stopping process does not wait for.
pub(crate) async fn on_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
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
