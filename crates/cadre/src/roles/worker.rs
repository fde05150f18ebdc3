//! `cadre worker`.

use std::{net::SocketAddr, num::NonZeroUsize};

use anyhow::Result;
use cadre_device::Device;
use cadre_worker::{WorkerOptions, WorkerRole, WorkerTimeouts, options::DEFAULT_KV_BYTES};
use clap::{Args, ValueEnum};

use super::{PodArgs, RoleArgs, Seconds, announce, ended, loopback};

/// Runs attention and everything else of the model but the routed experts.
#[derive(Args, Debug)]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    role_args: RoleArgs,
    /// What it does.
    #[arg(long, value_enum, default_value_t = RoleName::Both)]
    role: RoleName,
    #[command(flatten)]
    pod: PodArgs,
    /// `host:port` of the router's coordinator.
    #[arg(long, value_name = "ADDR", default_value_t = loopback(50050).to_string())]
    coordinator: String,
    /// Where to serve the router and other workers; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value_t = loopback(0))]
    listen: SocketAddr,
    /// `host:port` under which the router and other workers reach it. [default: where it listens]
    #[arg(long, value_name = "ADDR", env = "CADRE_ADVERTISE")]
    advertise: Option<String>,
    /// Where to serve metrics, health and readiness; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value_t = loopback(0))]
    admin: SocketAddr,
    /// What to compute on: cpu or cuda:N. [default: what the machine has]
    #[arg(long, value_name = "DEVICE")]
    device: Option<Device>,
    /// Compute threads. [default: what the machine or its container allows]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Bytes of the latent KV cache.
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_KV_BYTES)]
    kv_bytes: u64,
    /// Most rows of a step, decode rows and prompt tokens together. [default: the scheduler's]
    #[arg(long, value_name = "N")]
    max_step_tokens: Option<usize>,
    /// How long a shard may take to answer a frame before its pairs go to another copy, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(WorkerTimeouts::default().dispatch))]
    dispatch_timeout: Seconds,
    /// How long an expert without a live copy is waited for before its sequences fail, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(WorkerTimeouts::default().uncovered))]
    uncovered_timeout: Seconds,
    /// A hand-off in which nothing moves for so many seconds has failed.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(WorkerTimeouts::default().handoff))]
    handoff_timeout: Seconds,
    /// How long a hand-off may wait for its prefill worker to begin, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(WorkerTimeouts::default().handoff_begin))]
    handoff_begin_timeout: Seconds,
    /// Longest wait for running sequences when asked to stop, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(WorkerTimeouts::default().drain))]
    drain_timeout: Seconds,
}

/// A role on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoleName {
    /// Computes prompts and hands them off.
    Prefill,
    /// Decodes what it is handed.
    Decode,
    /// Both.
    Both,
}

impl From<RoleName> for WorkerRole {
    fn from(name: RoleName) -> Self {
        match name {
            RoleName::Prefill => Self::Prefill,
            RoleName::Decode => Self::Decode,
            RoleName::Both => Self::Both,
        }
    }
}

impl WorkerArgs {
    fn options(self) -> Result<WorkerOptions> {
        let secret = self.role_args.secret(self.listen)?;
        let weights = self.role_args.weights.options();
        let defaults = WorkerOptions::new(self.role_args.model, self.role.into(), self.coordinator);
        Ok(WorkerOptions {
            secret,
            weights,
            listen: self.listen,
            advertise: self.advertise,
            admin: self.admin,
            numerics: self.role_args.numerics,
            device: self.device,
            threads: self.threads,
            kv_bytes: self.kv_bytes,
            max_step_tokens: self.max_step_tokens.unwrap_or(defaults.max_step_tokens),
            timeouts: WorkerTimeouts {
                handoff: self.handoff_timeout.0,
                handoff_begin: self.handoff_begin_timeout.0,
                drain: self.drain_timeout.0,
                uncovered: self.uncovered_timeout.0,
                dispatch: self.dispatch_timeout.0,
            },
            pod_ip: self.pod.pod_ip,
            pod: self.pod.pod(),
            bound: Some(announce()),
            ..defaults
        })
    }
}

/// Runs the role until it is asked to stop.
pub(crate) async fn worker(args: WorkerArgs) -> Result<()> {
    let name = match args.role {
        RoleName::Prefill => "prefill",
        RoleName::Decode => "decode",
        RoleName::Both => "worker",
    };
    let log = args.role_args.termination_log.clone();
    let device = args.device;
    let stop = args.role_args.begin(name)?;
    let run = async { cadre_worker::run(args.options()?, stop).await };
    ended(run.await, name, log.as_deref(), device)
}
