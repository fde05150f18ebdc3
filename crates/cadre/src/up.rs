//! `cadre up`: the same processes as in a cluster, on loopback, kept running until told to stop.

use std::{
    ffi::OsString,
    net::TcpListener,
    path::{Path, PathBuf},
    thread::available_parallelism,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use cadre_checkpoint::{Checkpoint, WeightsOptions, inspect::Totals};
use cadre_device::Device;
use cadre_types::NumericsClass;
use clap::{Args, ValueEnum};
use tokio::time::{MissedTickBehavior, interval, sleep};

mod checkpoint;
mod cluster;
mod console;
mod health;
mod layout;
mod process;
mod secret;

use cluster::{Change, Cluster};
use console::{Console, Output};
use layout::{Extra, Layout, Threads};
use secret::SecretFile;

use crate::{chat, client, client::SamplingArgs, output, stop, weights::WeightsArgs};

/// How often readiness is looked at while the cluster starts.
const LOOK: Duration = Duration::from_millis(100);

/// What a role may take to end after its drain, which it bounds itself; one that takes longer is killed.
const CLOSE: Duration = Duration::from_secs(3);

/// Runs a whole cluster on this machine: router, workers and expert shards as processes on loopback.
#[derive(Args, Debug)]
pub(crate) struct UpArgs {
    /// A Hugging Face folder of the DeepSeek-V3 architecture. [default: models/pocket below the working
    /// directory or above the executable]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    #[command(flatten)]
    weights: WeightsArgs,
    /// Prefill workers; 0 lets the decode workers compute prompts themselves. [default: 1, or 0 with shared processes]
    #[arg(long, value_name = "N")]
    prefill: Option<usize>,
    /// Decode workers.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    decode: usize,
    /// Expert shards.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = at_least_one)]
    experts: usize,
    /// Extra slots per layer over all shards; as many as there are experts gives every expert two copies.
    #[arg(long, value_name = "N", default_value_t = 0)]
    redundant_slots: usize,
    /// Numerics class: f32, bf16, fp8 or cuda-fp8 (docs/numerics.md).
    #[arg(long, value_name = "CLASS", default_value_t = NumericsClass::Bf16)]
    numerics: NumericsClass,
    /// Where the router serves gRPC; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50051")]
    grpc: String,
    /// Where the router serves the OpenAI-compatible API; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8000")]
    http: String,
    /// Answer this prompt greedily through the whole cluster, print the text on standard output, and stop.
    #[arg(long, value_name = "PROMPT")]
    exit_after: Option<String>,
    /// Most tokens of the `--exit-after` answer.
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: u32,
    /// What every worker and shard computes on: cpu or cuda:N. [default: what the machine has]
    #[arg(long, value_name = "DEVICE")]
    device: Option<Device>,
    /// Whether each decode worker shares a process with its part of the shards, as is best on a GPU, whose processes take turns. [default: shared on a GPU, separate on a CPU]
    #[arg(long, value_enum)]
    processes: Option<Processes>,
    /// Compute threads of each worker. [default: cores / workers]
    #[arg(long, value_name = "N")]
    worker_threads: Option<usize>,
    /// Compute threads of each shard. [default: cores / shards]
    #[arg(long, value_name = "N")]
    expert_threads: Option<usize>,
    /// How long the cluster may take to become ready, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    ready_timeout: u64,
    /// How long each tier may take to finish its requests after Ctrl-C, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    drain_timeout: u64,
    /// Log filter of every process (`warn`, `info,cadre_router=debug`).
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    log: String,
    /// Events on standard output as text for people or as one JSON object per line.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// File with the cluster's secret, which every process asks of the others. [default: one is drawn]
    #[arg(long, value_name = "FILE")]
    cluster_secret_file: Option<PathBuf>,
    /// Stop when standard input ends, for programs that hold the other end.
    #[arg(long)]
    exit_on_stdin_close: bool,
    /// A flag for the router, as `--router-arg=--max-waiting=8`; may be given several times.
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    router_arg: Vec<OsString>,
    /// A flag for every worker; may be given several times.
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    worker_arg: Vec<OsString>,
    /// A flag for every expert shard; may be given several times.
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    expert_arg: Vec<OsString>,
}

/// How workers and shards are put into processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Processes {
    /// One for each worker and each shard.
    Separate,
    /// One for each decode worker with its part of the shards.
    Shared,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1 is needed".into()),
        Ok(count) => Ok(count),
        Err(error) => Err(format!("{error}")),
    }
}

/// Runs the command.
pub(crate) async fn run(args: UpArgs) -> Result<()> {
    let executable = std::env::current_exe().context("find our own executable")?;
    let directory = std::env::current_dir().context("find the working directory")?;
    let model = checkpoint::find(args.model.clone(), &directory, &executable)?;
    let name = describe(&model, &args.weights.options())?;
    free(&args.grpc, "gRPC", "--grpc")?;
    free(&args.http, "HTTP", "--http")?;

    // Lives as long as the processes that may have to read it again.
    let secret = SecretFile::new(args.cluster_secret_file.clone())?;
    let layout = args.layout(model, secret.path())?;
    let drains = if layout.shared { 2 } else { 1 };
    let mut console = Console::new(args.output, args.exit_after.is_some(), name, layout.processes().len());
    let mut cluster = Cluster::new(layout, executable);
    let outcome = serve(&args, &mut cluster, &mut console).await;
    let patience = if console.was_ready() {
        // A shared process drains its worker and then its shards.
        Duration::from_secs(args.drain_timeout) * drains + CLOSE
    } else {
        // Nobody has been served, so there is nothing to finish and no order to keep.
        cluster.release();
        CLOSE
    };
    let again = stop::requested_again();
    tokio::select! {
        killed = cluster.stop(patience) => console.stopped(&killed),
        // Who asks twice means now: leaving drops the children, which kills them.
        cause = again => console.hurried(cause?),
    }
    outcome
}

impl UpArgs {
    fn layout(&self, model: PathBuf, secret: &Path) -> Result<Layout> {
        // Whether a GPU would be taken is asked only where it matters.
        let on_gpu = || self.device.unwrap_or_else(Device::of_machine).is_gpu();
        let shared = match self.processes {
            Some(processes) => processes == Processes::Shared,
            None => on_gpu(),
        };
        if shared && !self.expert_arg.is_empty() {
            bail!(
                "--expert-arg: shards have no processes of their own; use --processes separate, or --worker-arg"
            );
        }
        let prefill = self.prefill.unwrap_or(if shared { 0 } else { 1 });
        let cores = available_parallelism().map_or(1, usize::from);
        let share = Threads::split(cores, prefill + self.decode, self.experts);
        Ok(Layout {
            prefill,
            shared,
            decode: self.decode,
            shards: self.experts,
            redundant_slots: self.redundant_slots,
            model,
            weights: self.weights.options(),
            numerics: self.numerics.to_string(),
            device: self.device,
            threads: Threads {
                worker: self.worker_threads.unwrap_or(share.worker),
                expert: self.expert_threads.unwrap_or(share.expert),
            },
            grpc: self.grpc.clone(),
            http: self.http.clone(),
            log: self.log.clone(),
            drain_seconds: self.drain_timeout,
            secret: secret.to_owned(),
            extra: Extra {
                router: self.router_arg.clone(),
                worker: self.worker_arg.clone(),
                expert: self.expert_arg.clone(),
            },
        })
    }
}

/// The checkpoint in a few words. Refuses a bad one once and in one place, before every process does.
fn describe(model: &Path, weights: &WeightsOptions) -> Result<String> {
    let checkpoint = Checkpoint::open_with(model, weights)?;
    if !weights.is_plain() {
        output::note(&format!("warning: not the published model: weights {weights}"));
    }
    for warning in checkpoint.warnings() {
        output::note(&format!("warning: {warning}"));
    }
    let totals = Totals::published(checkpoint.config());
    let name = model.canonicalize().ok().and_then(|path| path.file_name().map(|name| name.to_os_string()));
    let name = name.unwrap_or_else(|| model.as_os_str().to_os_string());
    Ok(format!(
        "{} ({:.0} M parameters)",
        name.display(),
        (totals.main_params + totals.mtp_params) as f64 / 1e6
    ))
}

/// Names a busy port before anything is started.
fn free(address: &str, what: &str, flag: &str) -> Result<()> {
    match TcpListener::bind(address) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            bail!("the {what} address {address} is in use (another `cadre up`?): choose another with {flag}")
        }
        Err(error) => Err(error).with_context(|| format!("{flag} {address}")),
    }
}

/// From start to the request to stop. Whatever it returns, the caller stops the cluster.
async fn serve(args: &UpArgs, cluster: &mut Cluster, console: &mut Console) -> Result<()> {
    let stop = stop::requested(args.exit_on_stdin_close)?;
    tokio::pin!(stop);
    let begun = Instant::now();
    let started = tokio::select! {
        started = start(cluster, console, Duration::from_secs(args.ready_timeout)) => started,
        reason = &mut stop => { console.stopping(reason); return Ok(()); }
    };
    started?;
    console.ready(cluster, begun.elapsed());
    if let Some(prompt) = &args.exit_after {
        return tokio::select! {
            answered = answer(cluster, prompt, args.max_tokens) => answered,
            reason = &mut stop => bail!("stopped by {reason} before the answer was complete"),
        };
    }
    loop {
        tokio::select! {
            change = cluster.changed() => console.change(&change, false),
            reason = &mut stop => { console.stopping(reason); return Ok(()); }
        }
    }
}

/// Starts everything and waits until every process is ready. A process that ends before that has a reason
/// that a restart does not cure (it printed it), so the whole start fails.
async fn start(cluster: &mut Cluster, console: &mut Console, limit: Duration) -> Result<()> {
    let deadline = sleep(limit);
    tokio::pin!(deadline);
    console.change(&cluster.start().await?, true);
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            change = cluster.changed() => {
                console.change(&change, true);
                if let Change::Ended { name, status, .. } = change {
                    bail!("{name} ended ({status}) before the cluster was ready; its reason is above");
                }
            }
            _ = looks.tick() => {
                let ready = cluster.look().await;
                console.waiting(cluster);
                if ready {
                    return Ok(());
                }
            }
            () = &mut deadline => bail!("not ready after {} s: {}", limit.as_secs(), cluster.unready()),
        }
    }
}

/// `--exit-after`: one greedy answer.
async fn answer(cluster: &Cluster, prompt: &str, max_tokens: u32) -> Result<()> {
    let router = cluster.router().context("the router does not listen")?;
    let mut client = client::connect(&router.grpc).await?;
    let request = SamplingArgs::greedy(max_tokens).request(vec![client::user(prompt)]);
    chat::print_answer(&mut client, request).await.map(|_| ())
}
