//! `cadre worker`.

use std::{net::SocketAddr, num::NonZeroUsize};

use anyhow::{Result, ensure};
use cadre_device::Device;
use cadre_expert::ExpertOptions;
use cadre_types::ShardIndex;
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
    #[command(flatten)]
    experts: WithExpertsArgs,
}

/// Expert shards in the worker's process, on its device.
#[derive(Args, Clone, Debug)]
struct WithExpertsArgs {
    /// Hold this expert shard too, on the same device, as a member of its own; several by commas.
    #[arg(long, value_name = "INDEX", env = "CADRE_WITH_EXPERT", value_delimiter = ',')]
    with_expert: Vec<u16>,
    /// Where each of them serves workers of other processes; one address with port 0 does for all.
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:0",
        value_delimiter = ',',
        requires = "with_expert"
    )]
    expert_listen: Vec<SocketAddr>,
    /// `host:port` under which workers reach each of them. [default: where it listens]
    #[arg(
        long,
        value_name = "ADDR",
        env = "CADRE_EXPERT_ADVERTISE",
        value_delimiter = ',',
        requires = "with_expert"
    )]
    expert_advertise: Vec<String>,
    /// Longest wait for frames of other workers once ours has drained, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "5", requires = "with_expert")]
    expert_drain_timeout: Seconds,
}

impl WithExpertsArgs {
    /// One shard's options each, in the order given.
    fn options(&self, worker: &WorkerOptions) -> Result<Vec<ExpertOptions>> {
        let shards = self.with_expert.len();
        for (index, shard) in self.with_expert.iter().enumerate() {
            ensure!(!self.with_expert[..index].contains(shard), "--with-expert {shard} is given twice");
        }
        let any_port = self.expert_listen.len() == 1 && self.expert_listen[0].port() == 0;
        ensure!(
            any_port || self.expert_listen.len() == shards,
            "--expert-listen: {} addresses for {shards} shards of --with-expert; give one each, or one with port 0",
            self.expert_listen.len()
        );
        ensure!(
            self.expert_advertise.is_empty() || self.expert_advertise.len() == shards,
            "--expert-advertise: {} addresses for {shards} shards of --with-expert; give one each",
            self.expert_advertise.len()
        );
        let options = |(index, shard): (usize, &u16)| {
            let defaults =
                ExpertOptions::new(worker.model_dir.clone(), ShardIndex(*shard), worker.coordinator.clone());
            ExpertOptions {
                listen: self.expert_listen[if any_port { 0 } else { index }],
                advertise: self.expert_advertise.get(index).cloned(),
                numerics: worker.numerics,
                weights: worker.weights.clone(),
                drain: self.expert_drain_timeout.0,
                pod: worker.pod.clone(),
                pod_ip: worker.pod_ip,
                secret: worker.secret.clone(),
                ..defaults
            }
        };
        Ok(self.with_expert.iter().enumerate().map(options).collect())
    }
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
        let listens = [&[self.listen], self.experts.expert_listen.as_slice()].concat();
        let internal = listens.iter().find(|address| !address.ip().is_loopback()).unwrap_or(&self.listen);
        let secret = self.role_args.secret(*internal)?;
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
    let run = async {
        let with_experts = args.experts.clone();
        let options = args.options()?;
        let experts = with_experts.options(&options)?;
        if experts.is_empty() {
            cadre_worker::run(WorkerOptions { bound: Some(announce()), ..options }, stop).await
        } else {
            cadre_worker::run_with_experts(options, experts, announce(), stop).await
        }
    };
    ended(run.await, name, log.as_deref(), device)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        worker: WorkerArgs,
    }

    fn experts(flags: &[&str]) -> Result<Vec<ExpertOptions>> {
        let words = ["worker", "--model", "models/pocket"].iter().chain(flags);
        let Line { worker } = Line::try_parse_from(words)?;
        let experts = worker.experts.clone();
        experts.options(&worker.options()?)
    }

    #[test]
    fn shards_of_the_process_have_its_flags_and_addresses_of_their_own() {
        let found =
            experts(&["--with-expert", "3,5", "--numerics", "fp8", "--coordinator", "c:7"]).expect("two");
        let shards: Vec<u16> = found.iter().map(|options| options.shard.0).collect();
        assert_eq!(shards, [3, 5]);
        assert!(found.iter().all(|options| options.coordinator == "c:7" && options.listen.port() == 0));
        assert!(found.iter().all(|options| options.numerics.to_string() == "fp8"));
        let listen = ["--with-expert", "3,5", "--expert-listen", "127.0.0.1:7,127.0.0.1:8"];
        let found = experts(&listen).expect("two");
        assert_eq!(found.iter().map(|options| options.listen.port()).collect::<Vec<_>>(), [7, 8]);
        assert!(experts(&[]).expect("none").is_empty());
    }

    #[test]
    fn shards_that_do_not_fit_their_addresses_are_refused() {
        for (flags, words) in [
            (&["--with-expert", "3,3"][..], "--with-expert 3 is given twice"),
            (&["--with-expert", "3,5", "--expert-listen", "127.0.0.1:7"], "1 addresses for 2 shards"),
            (&["--with-expert", "3", "--expert-advertise", "a:1,b:2"], "2 addresses for 1 shards"),
            (&["--expert-listen", "127.0.0.1:7"], "--with-expert"),
        ] {
            let error = experts(flags).expect_err("refused").to_string();
            assert!(error.contains(words), "{flags:?}: {error}");
        }
    }
}
