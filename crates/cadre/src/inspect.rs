//! `cadre inspect`: what a checkpoint is, what each tier and shard would hold, and what is wrong with it.

use std::{num::NonZeroUsize, path::PathBuf, thread::available_parallelism};

use anyhow::{Result, bail};
use cadre_checkpoint::{
    Problem, ProblemKind,
    inspect::{self, Layout, Options},
};
use cadre_device::Device;
use cadre_types::NumericsClass;
use cadre_worker::options::DEFAULT_KV_BYTES;
use clap::Args;
use serde::Serialize;

mod memory;

use crate::{output, progress, weights::WeightsArgs};

/// Describes a checkpoint from its headers and its text files.
#[derive(Args, Debug)]
pub(crate) struct InspectArgs {
    /// A Hugging Face folder.
    dir: PathBuf,
    #[command(flatten)]
    weights: WeightsArgs,
    /// Expert shards of the layout to describe.
    #[arg(long, value_name = "N", default_value_t = 4)]
    shards: usize,
    /// Extra slots per layer over all shards.
    #[arg(long, value_name = "N", default_value_t = 0)]
    redundant_slots: usize,
    /// Also say what a worker and each shard take of this device (cpu or cuda:N), which need not be in this machine.
    #[arg(long, value_name = "DEVICE")]
    device: Option<Device>,
    /// Numerics class of that device: f32, bf16, fp8 or cuda-fp8.
    #[arg(long, value_name = "CLASS", default_value_t = NumericsClass::Bf16)]
    numerics: NumericsClass,
    /// Bytes of the latent KV cache of that worker.
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_KV_BYTES)]
    kv_bytes: u64,
    /// Most rows of a step of that worker. [default: the scheduler's]
    #[arg(long, value_name = "N")]
    max_step_tokens: Option<usize>,
    /// Read every weight and judge every number (NaN codes, bad scales), not only the headers.
    #[arg(long)]
    verify: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The report, and memory beside its fields.
#[derive(Serialize)]
struct Described<'a> {
    #[serde(flatten)]
    report: &'a inspect::Report,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<&'a memory::Memory>,
}

/// A finding about the text files, as one of the checkpoint.
fn problem(finding: cadre_text::Finding) -> Problem {
    let cadre_text::Finding { file, subject, expected, found, fix } = finding;
    Problem { kind: ProblemKind::Mismatch, file: file.display().to_string(), subject, expected, found, fix }
}

/// Runs the command; a checkpoint with problems is an error.
pub(crate) fn run(args: &InspectArgs) -> Result<()> {
    let threads = available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let options = Options {
        weights: args.weights.options(),
        layout: Layout { shards: args.shards, redundant_slots: args.redundant_slots },
        hash: true,
        verify: args.verify.then_some(threads),
    };
    let bar = progress::bytes("verifying");
    let mut report = inspect::inspect(&args.dir, &options, &|done, total| progress::set(&bar, done, total));
    bar.finish_and_clear();
    if let Some(config) = &report.config {
        let text = cadre_text::survey(&args.dir, config);
        text.problems.into_iter().for_each(|finding| report.problems.push(problem(finding)));
        text.warnings.into_iter().for_each(|finding| report.warnings.push(problem(finding)));
    }
    let memory = match (args.device, &report.config) {
        (Some(device), Some(config)) if report.problems.is_empty() => {
            Some(memory::of(device, args, config, report.layout.as_ref())?)
        }
        _ => None,
    };
    if args.json {
        output::json(&Described { report: &report, memory: memory.as_ref() })?;
    } else {
        if !options.weights.is_plain() {
            output::line(&format!("weights       {}: not the published model", options.weights));
        }
        output::line(&report.to_string());
        if let Some(memory) = &memory {
            output::line(&memory.to_string());
        }
    }
    match report.problems.total() {
        0 => Ok(()),
        total => bail!("{} has {total} problems", args.dir.display()),
    }
}
