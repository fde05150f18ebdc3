//! `cadre router`.

use std::{net::SocketAddr, num::NonZeroU16, path::PathBuf, time::Duration};

use anyhow::Result;
use cadre_router::{Limits, ListenAddresses, RouterOptions};
use clap::Args;

use super::{RoleArgs, Seconds, announce, ended};

/// Where shards come one by one and are told their failure domains by an operator.
const DEFAULT_PLACEMENT_WAIT: Duration = Duration::from_secs(15);

/// Takes requests, gives them to workers, and keeps the members and the placement (coordinator).
#[derive(Args, Debug)]
pub(crate) struct RouterArgs {
    #[command(flatten)]
    role: RoleArgs,
    /// Name under which clients ask for the model. [default: the folder's name]
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Expert shards that the placement spreads over.
    #[arg(long, value_name = "N", default_value = "4")]
    shards: NonZeroU16,
    /// Extra slots per layer over all shards.
    #[arg(long, value_name = "N", default_value_t = 0)]
    redundant_slots: usize,
    /// Copies that every expert has at least, each on another shard. [default: what the redundant slots give everyone]
    #[arg(long, value_name = "N")]
    min_copies: Option<NonZeroU16>,
    /// File with the layout instead: {"shards": 4, "redundantSlots": 32, "minCopies": 2}; followed while it changes.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shards", "redundant_slots", "min_copies"])]
    layout_file: Option<PathBuf>,
    /// Longest wait for all shards and their failure domains, from the first shard on, before the first placement is planned, in seconds. [default: 15 with a layout file, else 0: planned at start]
    #[arg(long, value_name = "SECONDS")]
    placement_wait: Option<Seconds>,
    /// Routed experts per layer that the checkpoint must have.
    #[arg(long, value_name = "N")]
    routed_experts: Option<usize>,
    /// Expert load to plan from. [default: cadre-expert-load.json of the checkpoint, else even]
    #[arg(long, value_name = "FILE")]
    expert_load: Option<PathBuf>,
    /// Where to serve `cadre.v1.Inference`.
    #[arg(long, value_name = "ADDR", default_value_t = ListenAddresses::default().grpc)]
    grpc: SocketAddr,
    /// Where to serve the OpenAI-compatible API.
    #[arg(long, value_name = "ADDR", default_value_t = ListenAddresses::default().http)]
    http: SocketAddr,
    /// Where to serve members.
    #[arg(long, value_name = "ADDR", default_value_t = ListenAddresses::default().coordinator)]
    coordinator: SocketAddr,
    /// Where to serve metrics, health and readiness.
    #[arg(long, value_name = "ADDR", default_value_t = ListenAddresses::default().admin)]
    admin: SocketAddr,
    /// Sequences generated at one time.
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_concurrent)]
    max_concurrent: u32,
    /// Requests that may wait beyond those; more are refused.
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_waiting)]
    max_waiting: u32,
    /// Largest request in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().max_body_bytes)]
    max_body_bytes: usize,
    /// Deadline of a request that brings none, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(Limits::default().default_timeout))]
    default_timeout: Seconds,
    /// Longest deadline, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(Limits::default().max_timeout))]
    max_timeout: Seconds,
    /// Longest wait for a worker to reserve pages, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(Limits::default().reserve_timeout))]
    reserve_timeout: Seconds,
    /// Longest silence of the workers of a request, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(Limits::default().stall_timeout))]
    stall_timeout: Seconds,
    /// Longest wait for requests in flight when asked to stop, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(Limits::default().drain_timeout))]
    drain_timeout: Seconds,
    /// A member that has not reported for so many seconds is removed.
    #[arg(long, value_name = "SECONDS", default_value = "3")]
    lease: Seconds,
}

impl RouterArgs {
    fn options(self) -> RouterOptions {
        RouterOptions {
            served_model_name: self.served_model_name,
            numerics: self.role.numerics,
            redundant_slots: self.redundant_slots,
            min_copies: self.min_copies,
            placement_wait: match (self.placement_wait, &self.layout_file) {
                (Some(wait), _) => wait.0,
                (None, Some(_)) => DEFAULT_PLACEMENT_WAIT,
                (None, None) => Duration::ZERO,
            },
            layout_file: self.layout_file,
            routed_experts: self.routed_experts,
            expert_load: self.expert_load,
            listen: ListenAddresses {
                grpc: self.grpc,
                http: self.http,
                coordinator: self.coordinator,
                admin: self.admin,
            },
            limits: Limits {
                max_concurrent: self.max_concurrent,
                max_waiting: self.max_waiting,
                max_body_bytes: self.max_body_bytes,
                default_timeout: self.default_timeout.0,
                max_timeout: self.max_timeout.0,
                reserve_timeout: self.reserve_timeout.0,
                stall_timeout: self.stall_timeout.0,
                drain_timeout: self.drain_timeout.0,
                ..Limits::default()
            },
            lease: self.lease.0,
            bound: Some(announce()),
            ..RouterOptions::new(self.role.model, self.shards)
        }
    }
}

/// Runs the role until it is asked to stop.
pub(crate) async fn router(args: RouterArgs) -> Result<()> {
    let log = args.role.termination_log.clone();
    let stop = args.role.begin("router")?;
    ended(cadre_router::run(args.options(), stop).await, "router", log.as_deref())
}
