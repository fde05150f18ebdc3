//! Which processes a local cluster has and how each is started. Pure: no I/O, no clock.

use std::{ffi::OsString, fmt, path::PathBuf};

use cadre_checkpoint::WeightsOptions;
use cadre_device::Device;
use serde::Deserialize;

/// What the user asked for.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// Prefill workers; 0 makes the decode workers compute prompts themselves.
    pub(crate) prefill: usize,
    /// Decode workers.
    pub(crate) decode: usize,
    /// Expert shards.
    pub(crate) shards: usize,
    /// Extra slots per layer over all shards.
    pub(crate) redundant_slots: usize,
    /// The checkpoint.
    pub(crate) model: PathBuf,
    /// Where its weights come from, and overrides.
    pub(crate) weights: WeightsOptions,
    /// Numerics class by name.
    pub(crate) numerics: String,
    /// What workers and shards compute on, if it was said.
    pub(crate) device: Option<Device>,
    /// Whether the decode workers' processes hold the shards too.
    pub(crate) shared: bool,
    /// Threads of each process.
    pub(crate) threads: Threads,
    /// Client addresses of the router.
    pub(crate) grpc: String,
    /// See `grpc`.
    pub(crate) http: String,
    /// Log filter of every role.
    pub(crate) log: String,
    /// How long each role may take to finish its requests, in seconds.
    pub(crate) drain_seconds: u64,
    /// The file of the cluster's secret.
    pub(crate) secret: PathBuf,
    /// Flags handed to one tier as they are.
    pub(crate) extra: Extra,
}

/// Flags that `up` passes on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Extra {
    /// To the router.
    pub(crate) router: Vec<OsString>,
    /// To every worker.
    pub(crate) worker: Vec<OsString>,
    /// To every shard.
    pub(crate) expert: Vec<OsString>,
}

/// Compute threads per process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Threads {
    /// Of each worker.
    pub(crate) worker: usize,
    /// Of each shard.
    pub(crate) expert: usize,
}

impl Threads {
    /// Splits the cores of this machine. Each tier gets all of them: while the experts of a layer compute,
    /// the worker that asked waits. Inside a tier the processes run side by side and share.
    pub(crate) fn split(cores: usize, workers: usize, shards: usize) -> Self {
        let share = |processes: usize| (cores / processes.max(1)).max(1);
        Self { worker: share(workers), expert: share(shards) }
    }
}

/// The tiers in the order in which they are drained: who takes work first, who serves it last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tier {
    /// The router with its coordinator.
    Router,
    /// Attention workers.
    Worker,
    /// Expert shards.
    Expert,
}

impl Tier {
    /// Drain order.
    pub(crate) const ALL: [Self; 3] = [Self::Router, Self::Worker, Self::Expert];
}

/// A process to keep running.
#[derive(Clone, Debug)]
pub(crate) struct ProcessSpec {
    /// As shown to the user: `router`, `prefill 0`, `expert 3`, `decode 0 with expert 0, 2`.
    pub(crate) name: String,
    /// Its tier.
    pub(crate) tier: Tier,
    /// Its command line, without the addresses that are known only once others run.
    args: Vec<OsString>,
}

impl fmt::Display for ProcessSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// The line of JSON that a role prints on standard output once its servers listen.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Bound {
    /// gRPC server: the client API of the router, the internal API of a worker or shard.
    pub(crate) grpc: String,
    /// `/metrics`, `/healthz`, `/readyz`.
    pub(crate) admin: String,
    /// The router's OpenAI-compatible API.
    pub(crate) http: Option<String>,
    /// The router's coordinator, which members register with.
    pub(crate) coordinator: Option<String>,
}

/// Any free port, on loopback.
const EPHEMERAL: &str = "127.0.0.1:0";

impl Layout {
    /// Every process, router first.
    pub(crate) fn processes(&self) -> Vec<ProcessSpec> {
        let worker_role = if self.prefill == 0 { "both" } else { "decode" };
        let prefill = (0..self.prefill).map(|index| self.worker("prefill", "prefill", index));
        let decode = (0..self.decode).map(|index| match self.shards_of(index) {
            Some(shards) => self.worker_with_experts(worker_role, index, &shards),
            None => self.worker("decode", worker_role, index),
        });
        let alone = if self.shared { 0 } else { self.shards };
        let experts = (0..alone).map(|shard| self.expert(shard));
        std::iter::once(self.router()).chain(prefill).chain(decode).chain(experts).collect()
    }

    fn router(&self) -> ProcessSpec {
        let mut args = self.common("router");
        args.extend(words(["--shards", &self.shards.to_string()]));
        args.extend(words(["--redundant-slots", &self.redundant_slots.to_string()]));
        args.extend(self.extra.router.iter().cloned());
        ProcessSpec { name: "router".into(), tier: Tier::Router, args }
    }

    fn worker(&self, tier: &str, role: &str, index: usize) -> ProcessSpec {
        let mut args = self.common("worker");
        args.extend(words(["--role", role, "--threads", &self.threads.worker.to_string()]));
        args.extend(self.device_args());
        args.extend(self.extra.worker.iter().cloned());
        ProcessSpec { name: format!("{tier} {index}"), tier: Tier::Worker, args }
    }

    /// The shards in the process of a decode worker, dealt out in turn.
    fn shards_of(&self, decode: usize) -> Option<Vec<usize>> {
        let shards = || (decode..self.shards).step_by(self.decode.max(1)).collect::<Vec<_>>();
        self.shared.then(shards).filter(|shards| !shards.is_empty())
    }

    fn worker_with_experts(&self, role: &str, index: usize, shards: &[usize]) -> ProcessSpec {
        let ProcessSpec { name, tier, mut args } = self.worker("decode", role, index);
        let indices =
            |separator: &str| shards.iter().map(usize::to_string).collect::<Vec<_>>().join(separator);
        args.extend(words(["--with-expert", &indices(","), "--expert-listen", EPHEMERAL]));
        args.extend(words(["--expert-drain-timeout", &self.drain_seconds.to_string()]));
        ProcessSpec { name: format!("{name} with expert {}", indices(", ")), tier, args }
    }

    fn expert(&self, shard: usize) -> ProcessSpec {
        let mut args = self.common("expert");
        args.extend(words(["--shard", &shard.to_string(), "--threads", &self.threads.expert.to_string()]));
        args.extend(self.device_args());
        args.extend(self.extra.expert.iter().cloned());
        ProcessSpec { name: format!("expert {shard}"), tier: Tier::Expert, args }
    }

    fn device_args(&self) -> impl Iterator<Item = OsString> {
        self.device.into_iter().flat_map(|device| words(["--device", &device.to_string()]))
    }

    fn common(&self, role: &str) -> Vec<OsString> {
        let mut args = words([role, "--exit-on-stdin-close", "--model"]);
        args.push(self.model.clone().into());
        args.extend(self.weights.arguments().into_iter().map(OsString::from));
        args.extend(words(["--numerics", &self.numerics, "--log", &self.log, "--admin", EPHEMERAL]));
        args.extend(words(["--drain-timeout", &self.drain_seconds.to_string(), "--cluster-secret-file"]));
        args.push(self.secret.clone().into());
        args
    }

    /// The command line of a process. `before` is where it listened in its last life: a router keeps its
    /// addresses, because clients and members know them; the others announce new ones.
    pub(crate) fn command_line(
        &self,
        process: &ProcessSpec,
        coordinator: Option<&str>,
        before: Option<&Bound>,
    ) -> Vec<OsString> {
        let mut args = process.args.clone();
        match process.tier {
            Tier::Router => {
                let http = before.and_then(|bound| bound.http.as_deref()).unwrap_or(&self.http);
                let coordinator = before.and_then(|bound| bound.coordinator.as_deref()).unwrap_or(EPHEMERAL);
                args.extend(words(["--grpc", before.map_or(&self.grpc, |bound| &bound.grpc)]));
                args.extend(words(["--http", http, "--coordinator", coordinator]));
            }
            Tier::Worker | Tier::Expert => {
                args.extend(words(["--listen", EPHEMERAL]));
                args.extend(coordinator.into_iter().flat_map(|address| words(["--coordinator", address])));
            }
        }
        args
    }
}

fn words<const N: usize>(words: [&str; N]) -> Vec<OsString> {
    words.into_iter().map(Into::into).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout {
            prefill: 1,
            decode: 2,
            shards: 3,
            redundant_slots: 0,
            model: "models/pocket".into(),
            weights: WeightsOptions::default(),
            numerics: "bf16".into(),
            device: None,
            shared: false,
            threads: Threads { worker: 1, expert: 1 },
            grpc: "127.0.0.1:50051".into(),
            http: "127.0.0.1:8000".into(),
            log: "warn".into(),
            drain_seconds: 10,
            secret: "secret".into(),
            extra: Extra::default(),
        }
    }

    #[test]
    fn a_device_that_was_named_reaches_workers_and_shards_alone() {
        let flags = |layout: &Layout| -> Vec<bool> {
            let named = |args: &Vec<OsString>| args.windows(2).any(|pair| pair == ["--device", "cuda:1"]);
            layout.processes().iter().map(|process| named(&process.args)).collect()
        };
        assert_eq!(flags(&layout()), [false; 7]);
        let named = Layout { device: Some(Device::Cuda(1)), ..layout() };
        assert_eq!(flags(&named), [false, true, true, true, true, true, true]);
    }

    fn names(layout: &Layout) -> Vec<String> {
        layout.processes().into_iter().map(|process| process.name).collect()
    }

    fn after(args: &[OsString], flag: &str) -> Option<String> {
        let at = args.iter().position(|word| word == flag)?;
        args.get(at + 1).map(|word| word.to_string_lossy().into_owned())
    }

    #[test]
    fn one_process_per_replica_router_first() {
        assert_eq!(
            names(&layout()),
            ["router", "prefill 0", "decode 0", "decode 1", "expert 0", "expert 1", "expert 2"]
        );
    }

    #[test]
    fn shards_are_dealt_out_over_the_decode_workers_that_share_a_process_with_them() {
        let layout = Layout { shared: true, prefill: 0, ..layout() };
        assert_eq!(names(&layout), ["router", "decode 0 with expert 0, 2", "decode 1 with expert 1"]);
        let args = layout.command_line(&layout.processes()[1], Some("127.0.0.1:7"), None);
        assert_eq!(after(&args, "--with-expert").as_deref(), Some("0,2"));
        assert_eq!(after(&args, "--role").as_deref(), Some("both"));
        let few = Layout { shards: 1, ..layout };
        assert_eq!(names(&few), ["router", "decode 0 with expert 0", "decode 1"]);
    }

    #[test]
    fn every_process_is_told_the_secrets_file_and_not_the_secret() {
        let layout = layout();
        for process in layout.processes() {
            let args = layout.command_line(&process, None, None);
            assert_eq!(after(&args, "--cluster-secret-file").as_deref(), Some("secret"), "{process}");
        }
    }

    #[test]
    fn without_prefill_workers_the_decode_workers_do_both() {
        let layout = Layout { prefill: 0, ..layout() };
        let decode = layout.processes().remove(1);
        let args = layout.command_line(&decode, Some("127.0.0.1:7"), None);
        assert_eq!(after(&args, "--role").as_deref(), Some("both"));
        assert_eq!(after(&args, "--coordinator").as_deref(), Some("127.0.0.1:7"));
    }

    #[test]
    fn a_restarted_router_keeps_its_addresses() {
        let layout = Layout { grpc: "127.0.0.1:0".into(), ..layout() };
        let router = layout.processes().remove(0);
        let before = Bound {
            grpc: "127.0.0.1:41000".into(),
            admin: "127.0.0.1:41001".into(),
            http: Some("127.0.0.1:41002".into()),
            coordinator: Some("127.0.0.1:41003".into()),
        };
        let args = layout.command_line(&router, None, Some(&before));
        assert_eq!(after(&args, "--grpc").as_deref(), Some("127.0.0.1:41000"));
        assert_eq!(after(&args, "--http").as_deref(), Some("127.0.0.1:41002"));
        assert_eq!(after(&args, "--coordinator").as_deref(), Some("127.0.0.1:41003"));
    }

    #[test]
    fn cores_are_shared_inside_a_tier_and_never_run_out() {
        assert_eq!(Threads::split(2, 2, 4), Threads { worker: 1, expert: 1 });
        assert_eq!(Threads::split(64, 2, 4), Threads { worker: 32, expert: 16 });
        assert_eq!(Threads::split(1, 9, 9), Threads { worker: 1, expert: 1 });
    }
}
