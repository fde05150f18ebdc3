//! Start, serve, drain: binds the four listeners, starts the coordinator's owner and the servers, and takes
//! them down in order.
//!
//! The admin port is served before anything is read, so that health is asked from the first second on; the process has
//! started when the checkpoint is read and the front doors are open.
//!
//! Shutdown: readiness goes first (a load balancer looks away), then new requests are refused and the
//! listeners close, then requests in flight get `drain_timeout`, and the coordinator and admin servers go
//! last, because members and probes still need them while requests run.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use cadre_net::{IntakeOptions, ServerOptions};
use cadre_proto::{
    secret::Admit,
    v1::{coordinator_server::CoordinatorServer, inference_server::InferenceServer},
};
use cadre_telemetry::{Metrics, Readiness, admin};
use cadre_types::PlacementEpoch;
use tokio::{
    net::TcpListener,
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use tonic::service::{Routes, interceptor::InterceptedService};

use crate::{
    admission::Admission,
    coordinator::{Coordinator, CoordinatorOptions, CoordinatorService, Planner, layout, read_layout},
    error::RouterError,
    grpc::InferenceService,
    http,
    metrics::RouterMetrics,
    model::ServedModel,
    options::{BoundAddresses, Limits, ListenAddresses, RouterOptions},
    ready::{self, Outage},
    service::Service,
    workers::WorkerPool,
};

/// Bytes of incomplete messages of members: reports and layouts, each at most a message's bound.
const COORDINATOR_INTAKE_BYTES: usize = 2 * cadre_proto::MAX_MESSAGE_BYTES;

/// Largest report or operator's view. V3's largest placement (16 slots for each of 256 experts in 61 layers, 2 bytes a
/// slot) is half a MiB and as many digests of 10 bytes are 2.5; a pod of an operator's view is some 150 bytes.
const MAX_REPORT_BYTES: usize = 8 << 20;

/// How often the layout file is looked at; a mounted ConfigMap itself follows within a minute.
const LAYOUT_FILE_INTERVAL: Duration = Duration::from_secs(3);

/// Time for answers to leave after the last request ended.
const FLUSH: Duration = Duration::from_secs(1);

/// Bound sockets, before anything is served.
#[derive(Debug)]
pub struct Listeners {
    grpc: TcpListener,
    http: TcpListener,
    coordinator: TcpListener,
    admin: TcpListener,
}

impl Listeners {
    /// Binds all four.
    pub async fn bind(addresses: &ListenAddresses) -> Result<Self, RouterError> {
        Ok(Self {
            grpc: bind("gRPC", addresses.grpc).await?,
            http: bind("HTTP", addresses.http).await?,
            coordinator: bind("the coordinator", addresses.coordinator).await?,
            admin: bind("admin", addresses.admin).await?,
        })
    }

    /// Where they are.
    pub fn addresses(&self) -> std::io::Result<BoundAddresses> {
        Ok(BoundAddresses {
            grpc: self.grpc.local_addr()?,
            http: self.http.local_addr()?,
            coordinator: self.coordinator.local_addr()?,
            admin: self.admin.local_addr()?,
        })
    }
}

async fn bind(what: &'static str, address: SocketAddr) -> Result<TcpListener, RouterError> {
    cadre_net::bind(address).await.map_err(|source| RouterError::Bind { what, address, source })
}

/// Runs a router until `shutdown` resolves and it has drained.
pub async fn run(
    mut options: RouterOptions,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), RouterError> {
    let listeners = Listeners::bind(&options.listen).await?;
    if let Some(bound) = options.bound.take() {
        let addresses = listeners.addresses();
        let addresses =
            addresses.map_err(|error| RouterError::Server { what: "router", problem: error.to_string() })?;
        tracing::info!(
            grpc = %addresses.grpc, http = %addresses.http, coordinator = %addresses.coordinator,
            admin = %addresses.admin, "listening"
        );
        // Whoever wanted to know may have gone.
        let _ = bound.send(addresses);
    }
    serve(options, listeners, shutdown).await
}

/// As [`run`], on sockets that are bound already.
pub async fn serve(
    options: RouterOptions,
    listeners: Listeners,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), RouterError> {
    let RouterOptions { model_dir, weights, served_model_name, numerics, .. } = &options;
    let (dir, weights) = (model_dir.clone(), weights.clone());
    let (name, numerics) = (served_model_name.clone(), *numerics);
    let mut shutdown = std::pin::pin!(shutdown);
    let Listeners { grpc, http, coordinator: coordinator_listener, admin } = listeners;
    let metrics = Metrics::new();
    let router_metrics = RouterMetrics::register(&metrics)?;
    let readiness = ready::conditions();
    let known = Known::default();
    let admin_server = admin::serve(admin, metrics, readiness.clone(), admin_routes(known.clone()));
    // Ends with this function, whichever way.
    let background = Background(vec![tokio::spawn(admin_server)]);
    let loading = tokio::task::spawn_blocking(move || ServedModel::load(&dir, &weights, name, numerics));
    // Files may be on a disk that does not answer; the process is ended all the same.
    let loaded = tokio::select! {
        loaded = loading => loaded,
        () = &mut shutdown => return Ok(()),
    };
    let model = Arc::new(loaded.map_err(|error| RouterError::Server {
        what: "router",
        problem: format!("loading the tokenizer: {error}"),
    })??);
    if let Some(expected) = options.routed_experts
        && expected != model.config.n_routed_experts
    {
        let found = model.config.n_routed_experts;
        return Err(RouterError::RoutedExperts { path: options.model_dir, found, expected });
    }
    let layout = layout(&options, &model.config)?;
    let planner = Planner::new(&options, &model.config)?;
    // A layout that cannot be planned is refused here and not when the last shard has come.
    planner.plan(layout, &[], PlacementEpoch(1))?;
    let hidden = model.config.hidden_size;
    let (coordinator, owner) = Coordinator::spawn(CoordinatorOptions {
        generation: model.generation(),
        weights: model.weights.to_string(),
        planner,
        layout,
        placement_wait: options.placement_wait,
        lease: options.lease,
        load_window: options.load_window,
        readiness: readiness.clone(),
        hidden,
        secret: options.secret.clone(),
        metrics: router_metrics.clone(),
    });
    // Set once: this is the only coordinator of the process.
    let _ = known.0.set(coordinator.clone());
    let admission = Admission::new(&options.limits, router_metrics.clone());
    let pool = WorkerPool::new(coordinator.workers(), options.limits.connect_timeout)
        .with_secret(options.secret.as_ref());
    let outage = Outage::default();
    let service = Service::new(model, admission.clone(), pool, router_metrics, options.limits.clone())
        .refusing_during(outage.clone());
    let parts = Parts { service, coordinator, admission, readiness, outage, options };
    let ended = parts.serve(Doors { grpc, http, coordinator: coordinator_listener }, owner, shutdown).await;
    drop(background);
    ended
}

/// The sockets that are served once the checkpoint is read.
struct Doors {
    grpc: TcpListener,
    http: TcpListener,
    coordinator: TcpListener,
}

/// Everything that is running.
struct Parts {
    service: Service,
    coordinator: Coordinator,
    admission: Admission,
    readiness: Readiness,
    outage: Outage,
    options: RouterOptions,
}

impl Parts {
    async fn serve(
        self,
        listeners: Doors,
        owner: JoinHandle<()>,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), RouterError> {
        let Doors { grpc, http, coordinator } = listeners;
        let readiness = self.readiness.clone();
        let (health, health_service) = tonic_health::server::health_reporter();
        let follow = ready::follow(
            readiness.clone(),
            health.clone(),
            self.coordinator.views(),
            self.coordinator.workers(),
            self.outage.clone(),
        );
        let follow_file = follow_layout_file(self.options.layout_file.clone(), self.coordinator.clone());
        let background = Background(vec![
            owner,
            tokio::spawn(follow),
            tokio::spawn(follow_file),
            tokio::spawn(self.coordinator_server(coordinator)),
        ]);
        let (stop, stopped) = watch::channel(false);
        let mut doors = JoinSet::new();
        let limits = self.options.limits.clone();
        doors.spawn(self.grpc_server(grpc, health_service, stopped.clone())?);
        let http_routes = http::routes(self.service.clone(), readiness.clone());
        doors.spawn(http::serve(http, http_routes, self.service.clone(), told_to_stop(stopped)));
        readiness.met(ready::ACCEPTING);
        readiness.started();
        ready::report_health(&readiness, &health).await;

        let ended = tokio::select! {
            () = shutdown => None,
            ended = doors.join_next() => ended,
        };
        readiness.unmet(ready::ACCEPTING, "draining");
        ready::report_health(&readiness, &health).await;
        self.drain(stop, doors, &limits).await;
        drop(background);
        match ended {
            None => Ok(()),
            Some(Ok(())) => Err(RouterError::Server { what: "front door", problem: "it returned".into() }),
            Some(Err(error)) => Err(RouterError::Server { what: "front door", problem: error.to_string() }),
        }
    }

    /// Refuses new requests, lets those in flight finish, closes the front doors.
    async fn drain(&self, stop: watch::Sender<bool>, mut doors: JoinSet<()>, limits: &Limits) {
        tracing::info!(in_flight = self.admission.in_router(), "draining");
        stop.send_replace(true);
        let drained = tokio::time::timeout(limits.drain_timeout, self.admission.drain()).await;
        if drained.is_err() {
            let left = self.admission.in_router();
            tracing::warn!(left, after = ?limits.drain_timeout, "requests were cut off");
            return;
        }
        // Idle connections (a health watch, a browser) would hold their server open; the answers have
        // left or are in the sockets' buffers.
        let closed = async { while doors.join_next().await.is_some() {} };
        if tokio::time::timeout(FLUSH, closed).await.is_err() {
            tracing::debug!("idle connections were closed");
        }
    }

    fn grpc_server<H>(
        &self,
        listener: TcpListener,
        health: tonic_health::pb::health_server::HealthServer<H>,
        stopped: watch::Receiver<bool>,
    ) -> Result<impl Future<Output = ()> + Send + use<H>, RouterError>
    where
        H: tonic_health::pb::health_server::Health,
    {
        let failed = |error: tonic_reflection::server::Error| RouterError::Server {
            what: "gRPC",
            problem: error.to_string(),
        };
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(cadre_proto::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let limits = &self.options.limits;
        let inference = InferenceServer::new(InferenceService::new(self.service.clone()))
            .max_decoding_message_size(limits.max_body_bytes);
        let services = Routes::new(inference)
            .add_service(health)
            .add_service(reflection().build_v1().map_err(failed)?)
            // The reflection client of Python's grpcio speaks only this.
            .add_service(reflection().build_v1alpha().map_err(failed)?);
        let intake = IntakeOptions {
            timeout: limits.body_timeout,
            max_message_bytes: limits.max_body_bytes,
            // Reflection is a conversation; every other call has one message.
            whole: |path| !path.starts_with("/grpc.reflection."),
            ..IntakeOptions::new(limits.text_budget_bytes())
        };
        let mut options = ServerOptions::grpc("gRPC", intake);
        options.first_request = limits.first_request_timeout;
        let routes = http::identified(services.into_axum_router(), &self.service);
        Ok(cadre_net::serve(listener, routes, options, told_to_stop(stopped)))
    }

    fn coordinator_server(&self, listener: TcpListener) -> impl Future<Output = ()> + Send + use<> {
        let service = CoordinatorService::new(self.coordinator.clone(), self.options.lease);
        let service = CoordinatorServer::new(service)
            .max_decoding_message_size(MAX_REPORT_BYTES)
            .max_encoding_message_size(cadre_proto::MAX_MESSAGE_BYTES);
        let service = InterceptedService::new(service, Admit::new(self.options.secret.clone()));
        let intake = IntakeOptions::streams(COORDINATOR_INTAKE_BYTES, MAX_REPORT_BYTES);
        let mut options = ServerOptions::grpc("coordinator", intake);
        options.first_request = self.options.limits.first_request_timeout;
        let routes = Routes::new(service).into_axum_router();
        cadre_net::serve(listener, routes, options, std::future::pending())
    }
}

/// The coordinator once there is one. Clones share it.
#[derive(Clone, Debug, Default)]
struct Known(Arc<OnceLock<Coordinator>>);

fn admin_routes(known: Known) -> Router {
    Router::new().route("/expert-load", get(expert_load)).route("/cluster", get(cluster)).with_state(known)
}

async fn told_to_stop(mut stopped: watch::Receiver<bool>) {
    // The sender outlives the servers or the process is ending anyway.
    let _ = stopped.wait_for(|stop| *stop).await;
}

/// Passes changes of the layout file on. A file that is missing or broken for a while changes nothing.
async fn follow_layout_file(path: Option<PathBuf>, coordinator: Coordinator) {
    let Some(path) = path else { return std::future::pending().await };
    let mut known = None;
    let mut told = None;
    let mut ticks = tokio::time::interval(LAYOUT_FILE_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let file = path.clone();
        let Ok(read) = tokio::task::spawn_blocking(move || read_layout(&file)).await else { continue };
        match read {
            Ok(layout) => {
                told = None;
                // The first is what the router began with.
                if known.replace(layout).is_some_and(|known| known != layout) {
                    coordinator.layout_file(layout).await;
                }
            }
            Err(error) => {
                let problem = error.to_string();
                if told.as_ref() != Some(&problem) {
                    tracing::error!(problem, "layout file not read; the layout stays");
                    told = Some(problem);
                }
            }
        }
    }
}

/// Tasks that end with the router.
struct Background(Vec<JoinHandle<()>>);

impl Drop for Background {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// The aggregated expert load, in the form that `--expert-load` takes.
async fn expert_load(State(known): State<Known>) -> Response {
    let Some(coordinator) = known.0.get() else { return starting() };
    match coordinator.expert_load().await {
        Some(load) => Json(load).into_response(),
        None => gone(),
    }
}

/// Members, placement and coverage.
async fn cluster(State(known): State<Known>) -> Response {
    let Some(coordinator) = known.0.get() else { return starting() };
    match coordinator.describe().await {
        Some(description) => Json(description).into_response(),
        None => gone(),
    }
}

fn starting() -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, "the router is starting\n").into_response()
}

fn gone() -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, "the coordinator has stopped\n").into_response()
}
