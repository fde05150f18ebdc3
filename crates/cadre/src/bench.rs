//! `cadre bench`: how fast, and beside what.

use std::sync::Arc;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde::Serialize;

mod cluster;
mod dispatch;
mod in_process;
mod kernels;
mod load;
mod slow;
mod stats;
mod table;

use cluster::Cluster;
use dispatch::DispatchArgs;
use in_process::{InProcess, InProcessArgs};
use kernels::KernelArgs;
use load::{Shape, Target};
use slow::{Comparison, Slow, SlowArgs};
use stats::Figures;

use crate::{output, progress, runtime, stop};

/// Measures a running cluster, or one engine in this process, under the same load.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    load: LoadArgs,
}

#[derive(Debug, Subcommand)]
enum What {
    Dispatch(DispatchArgs),
    Kernels(KernelArgs),
}

#[derive(Args, Debug)]
struct LoadArgs {
    /// The router's gRPC address.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50051")]
    grpc: String,
    /// Prompt tokens of each stream.
    #[arg(short, long, value_name = "N", default_value_t = 256)]
    prompt: usize,
    /// Tokens to generate in each stream.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64)]
    generate: u32,
    /// Streams at a time, one run each.
    #[arg(short, long, value_name = "N,N", value_delimiter = ',', default_value = "1,8,32")]
    concurrency: Vec<usize>,
    /// Runs per number of streams, after one that warms up.
    #[arg(long, value_name = "N", default_value_t = 2)]
    repeat: usize,
    /// Prompt tokens are drawn below this id.
    #[arg(long, value_name = "ID", default_value_t = 4096)]
    max_token_id: u32,
    #[command(flatten)]
    in_process: InProcessArgs,
    #[command(flatten)]
    slow: SlowArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    target: &'a str,
    model: &'a str,
    runs: &'a [Figures],
    /// With `--slow-shard`: the same loads again, the shard stopped and continued.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    slowed: &'a [Figures],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    comparisons: &'a [Comparison],
}

/// Runs the command.
pub(crate) fn run(args: BenchArgs) -> Result<()> {
    match args.what {
        Some(What::Dispatch(args)) => dispatch::run(&args),
        Some(What::Kernels(args)) => kernels::run(&args),
        None => args.load.run(),
    }
}

impl LoadArgs {
    fn run(&self) -> Result<()> {
        let shape = Shape {
            prompt: self.prompt,
            generate: self.generate,
            repeat: self.repeat,
            max_token_id: self.max_token_id,
        };
        let Some(most) = self.concurrency.iter().copied().max().filter(|most| *most > 0) else {
            bail!("--concurrency: at least one stream is needed");
        };
        if self.in_process.in_process {
            let engine = InProcess::open(&self.in_process, &shape, most)?;
            let model = in_process::model_name(&self.in_process.model);
            runtime::block_on(self.measure(engine, "one engine", &model, &shape, None))
        } else {
            if !self.in_process.weights.options().is_plain() {
                bail!("--weights and --override are of --in-process: a cluster has its own");
            }
            runtime::block_on(async {
                let cluster = Cluster::connect(&self.grpc).await?;
                let model = cluster.model.name.clone();
                let slow = self.slow.find()?;
                self.measure(cluster, "cluster", &model, &shape, slow).await
            })
        }
    }

    async fn measure<T: Target>(
        &self,
        target: T,
        kind: &str,
        model: &str,
        shape: &Shape,
        slow: Option<Slow>,
    ) -> Result<()> {
        let turns = (self.repeat + 1) * if slow.is_some() { 2 } else { 1 };
        let bar = progress::steps("bench", self.concurrency.len() * turns);
        let target = Arc::new(target);
        let mut figures = Vec::with_capacity(self.concurrency.len());
        let (mut slowed, mut comparisons) = (Vec::new(), Vec::new());
        for &streams in self.concurrency.iter().filter(|streams| **streams > 0) {
            let load = load::run(&target, shape, streams, slow.as_ref(), &bar);
            let (undisturbed, disturbed) = interruptible(load).await?;
            if let Some(disturbed) = disturbed {
                comparisons.push(Comparison::of(&undisturbed, &disturbed, self.repeat));
                slowed.push(disturbed);
            }
            figures.push(undisturbed);
        }
        bar.finish_and_clear();
        if self.json {
            let (runs, slowed, comparisons) = (&figures[..], &slowed[..], &comparisons[..]);
            return output::json(&Report { target: kind, model, runs, slowed, comparisons });
        }
        output::line(&format!("{kind}, {model}\n{}", table::render(&figures)));
        if !slowed.is_empty() {
            output::line(&format!("with a slow shard\n{}", table::render(&slowed)));
        }
        comparisons.iter().for_each(|comparison| output::line(&comparison.line()));
        Ok(())
    }
}

/// Runs a load to its end or to SIGTERM or Ctrl-C: then it is dropped like any other, which leaves a slowed shard
/// running.
async fn interruptible<T>(load: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        done = load => done,
        signal = stop::requested(false)? => bail!("interrupted by {signal}"),
    }
}
