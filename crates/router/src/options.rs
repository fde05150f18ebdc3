//! Everything the router can be told, with its defaults in one place. Nothing below `main` reads flags
//! or the environment.

use std::{
    net::{Ipv4Addr, SocketAddr},
    num::NonZeroU16,
    path::PathBuf,
    time::Duration,
};

use cadre_checkpoint::WeightsOptions;
use cadre_proto::secret::ClusterSecret;
use cadre_types::NumericsClass;
use serde::Serialize;
use tokio::sync::oneshot;

/// How a router is set up.
#[derive(Debug)]
pub struct RouterOptions {
    /// The checkpoint: tokenizer, chat template, configuration and hash are read from it.
    pub model_dir: PathBuf,
    /// Where its weights come from, and what is changed of its configuration. The same in every process of a model.
    pub weights: WeightsOptions,
    /// Name under which clients ask for the model; absent is the folder's name.
    pub served_model_name: Option<String>,
    /// The numerics class that every member must run.
    pub numerics: NumericsClass,
    /// Expert shards that the placement spreads over.
    pub shards: NonZeroU16,
    /// Extra slots per layer, over all shards.
    pub redundant_slots: usize,
    /// Copies that every expert has at least; absent is as many as the redundant slots give everyone.
    pub min_copies: Option<NonZeroU16>,
    /// Where the layout is read from instead, at start and whenever it changes.
    pub layout_file: Option<PathBuf>,
    /// Longest wait, from the first shard's registration, for all shards and their failure domains before
    /// the first placement is planned. Zero plans at start.
    pub placement_wait: Duration,
    /// Routed experts per layer that the checkpoint must have.
    pub routed_experts: Option<usize>,
    /// Expert load to plan from; absent takes `cadre-expert-load.json` of the checkpoint if there is
    /// one, else every expert counts the same.
    pub expert_load: Option<PathBuf>,
    /// Where to listen.
    pub listen: ListenAddresses,
    /// Bounds of queues and waits.
    pub limits: Limits,
    /// A member that has not reported for this long is removed.
    pub lease: Duration,
    /// The cluster's secret: asked of members and the operator, shown to workers.
    pub secret: Option<ClusterSecret>,
    /// How far back the aggregated expert load reaches.
    pub load_window: Duration,
    /// Receives the real addresses once every port is bound.
    pub bound: Option<oneshot::Sender<BoundAddresses>>,
}

impl RouterOptions {
    /// The defaults for a checkpoint and a number of shards.
    pub fn new(model_dir: PathBuf, shards: NonZeroU16) -> Self {
        Self {
            model_dir,
            weights: WeightsOptions::default(),
            served_model_name: None,
            numerics: NumericsClass::default(),
            shards,
            redundant_slots: 0,
            min_copies: None,
            layout_file: None,
            placement_wait: Duration::ZERO,
            routed_experts: None,
            expert_load: None,
            listen: ListenAddresses::default(),
            limits: Limits::default(),
            lease: Duration::from_secs(3),
            secret: None,
            load_window: Duration::from_secs(600),
            bound: None,
        }
    }
}

/// Where the router listens. Port 0 takes any free one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenAddresses {
    /// `cadre.v1.Inference`, health and reflection.
    pub grpc: SocketAddr,
    /// The OpenAI-compatible API.
    pub http: SocketAddr,
    /// `cadre.v1.Coordinator`, for members.
    pub coordinator: SocketAddr,
    /// Metrics, health, readiness, expert load.
    pub admin: SocketAddr,
}

impl Default for ListenAddresses {
    fn default() -> Self {
        let loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self {
            grpc: loopback(50051),
            http: loopback(8000),
            coordinator: loopback(50050),
            admin: loopback(9090),
        }
    }
}

/// Where the router listens indeed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BoundAddresses {
    /// gRPC.
    pub grpc: SocketAddr,
    /// HTTP.
    pub http: SocketAddr,
    /// Coordinator.
    pub coordinator: SocketAddr,
    /// Admin.
    pub admin: SocketAddr,
}

/// Bounds of queues and waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences generated at one time. Default 256: what one decode worker batches at its default
    /// limits, times four; a larger cluster raises it.
    pub max_concurrent: u32,
    /// Requests that may wait beyond those. Default 1024: at V3's 163,840 positions of 4 bytes a waiting
    /// prompt is at most 640 KiB, so the queue is at most 640 MiB; typical prompts are a thousandth.
    pub max_waiting: u32,
    /// Largest request body (HTTP) or message (gRPC) in bytes. Default 8 MiB, the chat template's own
    /// bound on text.
    pub max_body_bytes: usize,
    /// A request (body or message) must be complete within this, on every front door.
    pub body_timeout: Duration,
    /// A connection to a front door must bring its first request head within this.
    pub first_request_timeout: Duration,
    /// Longest time that a connection to the HTTP front door is kept without a request. Load balancers and
    /// client pools keep idle connections for up to 75 s and must be the first to let go.
    pub idle_timeout: Duration,
    /// Deadline of a request that brings none.
    pub default_timeout: Duration,
    /// Longest deadline; a longer one is cut to it.
    pub max_timeout: Duration,
    /// Longest wait for a connection to a worker.
    pub connect_timeout: Duration,
    /// Longest wait for a decode worker to reserve pages. It may have to finish others first.
    pub reserve_timeout: Duration,
    /// Longest silence of both workers of a request. Covers the bounded wait for a restarted expert
    /// shard (engine side) with room to spare.
    pub stall_timeout: Duration,
    /// Longest wait for requests in flight at shutdown.
    pub drain_timeout: Duration,
    /// Origins whose pages may use the HTTP API from a browser (CORS); `*` is any, none answers no preflight.
    pub cors_origins: Vec<String>,
    /// Interval of comments that keep an idle event stream open through proxies.
    pub sse_keep_alive: Duration,
}

impl Limits {
    /// Bytes of incomplete requests of a front door, and of complete ones whose prompts are not tokens yet:
    /// sixteen of the largest, as many as could be read or tokenized at one time with profit.
    pub fn text_budget_bytes(&self) -> usize {
        self.max_body_bytes.saturating_mul(16)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_concurrent: 256,
            max_waiting: 1024,
            max_body_bytes: 8 << 20,
            body_timeout: Duration::from_secs(30),
            first_request_timeout: Duration::from_secs(20),
            idle_timeout: Duration::from_secs(120),
            default_timeout: Duration::from_secs(600),
            max_timeout: Duration::from_secs(3600),
            connect_timeout: Duration::from_secs(2),
            reserve_timeout: Duration::from_secs(60),
            stall_timeout: Duration::from_secs(90),
            drain_timeout: Duration::from_secs(30),
            cors_origins: Vec::new(),
            sse_keep_alive: Duration::from_secs(15),
        }
    }
}
