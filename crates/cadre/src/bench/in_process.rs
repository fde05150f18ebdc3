//! One engine in this process as the target of a load: what a cluster is compared with.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context, Result, bail};
use cadre_device::Device;
use cadre_engine::{EngineEvent, EngineHandle, PrefillPlace, SequenceRequest};
use cadre_types::{FinishReason, NumericsClass, SamplingParams, StopConditions};
use cadre_worker::inprocess::{InProcess as Parts, InProcessOptions};
use clap::Args;

use crate::weights::WeightsArgs;

use super::load::{Shape, Target};

/// Tokens of a KV page.
const PAGE_TOKENS: usize = 64;

/// Flags of `--in-process`.
#[derive(Args, Clone, Debug)]
pub(crate) struct InProcessArgs {
    /// Measure one engine in this process instead of a cluster.
    #[arg(long)]
    pub(crate) in_process: bool,
    /// The checkpoint of the engine.
    #[arg(long, value_name = "DIR", default_value = "models/pocket", requires = "in_process")]
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) weights: WeightsArgs,
    /// What the engine computes on: cpu or cuda:N. [default: what the machine has]
    #[arg(long, value_name = "DEVICE", requires = "in_process")]
    device: Option<Device>,
    /// Compute threads of the engine. [default: what the machine or its container allows]
    #[arg(long, value_name = "N", requires = "in_process")]
    threads: Option<NonZeroUsize>,
    /// Expert shards of the engine, called directly.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "in_process")]
    shards: usize,
    /// Numerics class of the engine.
    #[arg(long, value_name = "CLASS", default_value_t = NumericsClass::Bf16, requires = "in_process")]
    numerics: NumericsClass,
}

/// An engine.
pub(crate) struct InProcess {
    handle: EngineHandle,
    /// Ends the engine when dropped.
    _parts: Parts,
    requests: AtomicU64,
}

impl InProcess {
    /// Loads the checkpoint, with a cache for so many streams of a shape. Blocks.
    pub(crate) fn open(args: &InProcessArgs, shape: &Shape, streams: usize) -> Result<Self> {
        let pages_each = (shape.prompt + shape.generate as usize).div_ceil(PAGE_TOKENS);
        let pages = u32::try_from(pages_each * streams).context("the KV cache of this load is too large")?;
        let options = InProcessOptions {
            weights: args.weights.options(),
            device: args.device,
            threads: args.threads.map(NonZeroUsize::get),
            shards: args.shards,
            kv_pages: pages,
            ..InProcessOptions::new(args.numerics)
        };
        let parts = Parts::open(&args.model, &options)?;
        Ok(Self { handle: parts.handle(), _parts: parts, requests: AtomicU64::new(0) })
    }
}

/// A name for the report.
pub(crate) fn model_name(dir: &Path) -> String {
    dir.file_name().unwrap_or(dir.as_os_str()).to_string_lossy().into_owned()
}

impl Target for InProcess {
    async fn generate(
        &self,
        prompt: Vec<u32>,
        generate: u32,
        mut on_token: impl FnMut() + Send,
    ) -> Result<()> {
        let request = SequenceRequest {
            request_id: format!("bench-{}", self.requests.fetch_add(1, Ordering::Relaxed)),
            prompt,
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            stop: StopConditions { max_tokens: generate, ignore_eos: true, ..StopConditions::default() },
            prefill: PrefillPlace::Local,
            deadline: None,
        };
        let mut stream = self.handle.submit(request)?;
        while let Some(event) = stream.recv().await {
            match event {
                EngineEvent::Token(_) => on_token(),
                EngineEvent::Finished(FinishReason::Length) => return Ok(()),
                EngineEvent::Finished(reason) => bail!("a stream ended with {reason:?}"),
                EngineEvent::Failed(error) => return Err(error.into()),
                EngineEvent::Reserved | EngineEvent::Computed(_) => {}
            }
        }
        bail!("the engine stopped")
    }
}
