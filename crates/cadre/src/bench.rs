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
mod stats;
mod table;

use cluster::Cluster;
use dispatch::DispatchArgs;
use in_process::{InProcess, InProcessArgs};
use kernels::KernelArgs;
use load::{Shape, Target};
use stats::Figures;

use crate::{output, progress, runtime};

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
            runtime::block_on(self.measure(engine, "one engine", &model, &shape))
        } else {
            runtime::block_on(async {
                let cluster = Cluster::connect(&self.grpc).await?;
                let model = cluster.model.name.clone();
                self.measure(cluster, "cluster", &model, &shape).await
            })
        }
    }

    async fn measure<T: Target>(&self, target: T, kind: &str, model: &str, shape: &Shape) -> Result<()> {
        let bar = progress::steps("bench", self.concurrency.len() * (self.repeat + 1));
        let target = Arc::new(target);
        let mut figures = Vec::with_capacity(self.concurrency.len());
        for &streams in self.concurrency.iter().filter(|streams| **streams > 0) {
            figures.push(load::run(&target, shape, streams, &bar).await?);
        }
        bar.finish_and_clear();
        if self.json {
            output::json(&Report { target: kind, model, runs: &figures })
        } else {
            output::line(&format!("{kind}, {model}\n{}", table::render(&figures)));
            Ok(())
        }
    }
}
