//! `cadre expert`.

use std::{net::SocketAddr, num::NonZeroUsize};

use anyhow::Result;
use cadre_device::Device;
use cadre_expert::ExpertOptions;
use cadre_types::ShardIndex;
use clap::Args;

use super::{PodArgs, RoleArgs, Seconds, announce, ended, loopback};

/// Holds the slots of one expert shard and answers workers' frames.
#[derive(Args, Debug)]
pub(crate) struct ExpertArgs {
    #[command(flatten)]
    role: RoleArgs,
    /// Which shard it is, from 0.
    #[arg(long, value_name = "INDEX", env = "CADRE_SHARD")]
    shard: u16,
    #[command(flatten)]
    pod: PodArgs,
    /// `host:port` of the router's coordinator.
    #[arg(long, value_name = "ADDR", default_value_t = loopback(50050).to_string())]
    coordinator: String,
    /// Where to serve workers; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value_t = loopback(0))]
    listen: SocketAddr,
    /// `host:port` under which workers reach it. [default: where it listens]
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
    /// Longest wait for frames in hand when asked to stop, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "5")]
    drain_timeout: Seconds,
}

impl ExpertArgs {
    fn options(self) -> Result<ExpertOptions> {
        Ok(ExpertOptions {
            secret: self.role.secret(self.listen)?,
            weights: self.role.weights.options(),
            listen: self.listen,
            advertise: self.advertise,
            admin: self.admin,
            numerics: self.role.numerics,
            device: self.device,
            threads: self.threads,
            drain: self.drain_timeout.0,
            pod_ip: self.pod.pod_ip,
            pod: self.pod.pod(),
            bound: Some(announce()),
            ..ExpertOptions::new(self.role.model, ShardIndex(self.shard), self.coordinator)
        })
    }
}

/// Runs the role until it is asked to stop.
pub(crate) async fn expert(args: ExpertArgs) -> Result<()> {
    let name = format!("expert {}", args.shard);
    let log = args.role.termination_log.clone();
    let device = args.device;
    let stop = args.role.begin(&name)?;
    let run = async { cadre_expert::run(args.options()?, stop).await };
    ended(run.await, &name, log.as_deref(), device)
}
