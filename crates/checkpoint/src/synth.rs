//! Random checkpoints of the architecture: for tests, benches and for trying a layout without weights.
//!
//! The files are what a published checkpoint has: config.json, an index, shards of bounded size, FP8
//! with block scales or BF16. Bytes depend on the spec alone (seed and tensor name key a counter-based
//! generator), not on threads or platform. Matrices are drawn with variance 1/inputs and norms near 1,
//! so every sublayer adds a bounded share to the residual stream and activations stay sane at any depth.
//!
//! Shards are streamed band by band; memory stays at a few bands per thread whatever the model's size.
//! config.json is written last: a directory that has one is complete.

use std::{
    fs, io,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    thread,
};

use cadre_types::{
    ModelConfig,
    config::{Fp8Config, ScaleFormat},
};
use serde_json::{Map, Value, json};

use crate::{
    config::{self, Finding},
    listing::{CONFIG_FILE, INDEX_FILE},
    table::BLOCK,
};

mod draw;
mod presets;
mod shards;
mod tokenizer;

use draw::Draw;
use shards::{ShardPlan, Writer};

/// How matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// FP8 e4m3 with 128x128 block scales, where published checkpoints have it.
    Fp8,
    /// BF16 throughout.
    Bf16,
}

impl WeightFormat {
    fn quantization(self) -> Option<Fp8Config> {
        match self {
            Self::Fp8 => Some(Fp8Config { weight_block_size: [BLOCK; 2], scale_fmt: ScaleFormat::F32 }),
            Self::Bf16 => None,
        }
    }
}

/// What to write.
#[derive(Clone, Debug, PartialEq)]
pub struct SynthSpec {
    /// Sizes. `quantization` says whether matrices are FP8.
    pub config: ModelConfig,
    /// Keys every draw.
    pub seed: u64,
    /// Most bytes of tensors per shard; a single larger tensor gets a shard of its own.
    pub max_shard_bytes: u64,
    /// Range of `e_score_correction_bias`, drawn uniformly.
    pub bias: (f32, f32),
    /// Directory from which tokenizer files are copied.
    pub tokenizer: Option<PathBuf>,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Shard files.
    pub shards: usize,
    /// Tensors.
    pub tensors: usize,
    /// Bytes of tensors.
    pub bytes: u64,
}

/// Why nothing usable was written.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// The sizes make no model.
    #[error("synth: {}", findings.iter().map(describe).collect::<Vec<_>>().join("; "))]
    Config {
        /// The broken rules.
        findings: Vec<Finding>,
    },
    /// A spec value outside the configuration is unusable.
    #[error("synth: {field}: expected {expected}, found {found}")]
    Spec {
        /// The field.
        field: &'static str,
        /// The rule.
        expected: String,
        /// The value.
        found: String,
    },
    /// The target holds files, which may be somebody's checkpoint.
    #[error("synth: {dir} is not empty; choose a new directory, or empty this one first", dir = dir.display())]
    NotEmpty {
        /// The directory.
        dir: PathBuf,
    },
    /// The tokenizer directory is unusable.
    #[error("synth: tokenizer {path}: {reason}", path = path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file operation failed.
    #[error("synth: {operation} {path}: {source}", path = path.display())]
    Io {
        /// What was done.
        operation: &'static str,
        /// To which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

fn describe(finding: &Finding) -> String {
    format!("{}: expected {}, found {}", finding.field, finding.expected, finding.found)
}

/// Writes the checkpoint into `dir`, which must be absent or empty. `progress(done, total)` is told
/// bytes, from any thread.
pub fn write(
    dir: &Path,
    spec: &SynthSpec,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Written, SynthError> {
    let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    write_with(dir, spec, Fill::Random(threads), progress)
}

/// As [`write()`], but the weights are holes: files of the right length that occupy no disk and read as
/// zeros. Enough for everything that works from headers.
pub fn write_headers(dir: &Path, spec: &SynthSpec) -> Result<Written, SynthError> {
    write_with(dir, spec, Fill::Holes, &|_, _| {})
}

/// What goes into the data part of a shard.
#[derive(Clone, Copy, Debug)]
enum Fill {
    Random(NonZeroUsize),
    Holes,
}

fn write_with(
    dir: &Path,
    spec: &SynthSpec,
    fill: Fill,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Written, SynthError> {
    check(spec)?;
    prepare(dir)?;
    if let Some(from) = &spec.tokenizer {
        tokenizer::copy(from, dir, spec.config.vocab_size)?;
    }
    let plans = shards::plan(&spec.config, spec.max_shard_bytes);
    let written = Written {
        shards: plans.len(),
        tensors: plans.iter().map(ShardPlan::tensors).sum(),
        bytes: plans.iter().map(ShardPlan::bytes).sum(),
    };
    let draw = Draw::new(spec.seed, spec.bias);
    let writer = Writer::new(dir, &draw, written.bytes, progress);
    for plan in &plans {
        match fill {
            Fill::Random(threads) => writer.random(plan, threads)?,
            Fill::Holes => writer.holes(plan)?,
        }
    }
    save(&dir.join(INDEX_FILE), &index(&plans, written.bytes))?;
    save(&dir.join(CONFIG_FILE), &config::to_json(&spec.config))?;
    Ok(written)
}

fn check(spec: &SynthSpec) -> Result<(), SynthError> {
    let findings = config::validate(&spec.config);
    if !findings.is_empty() {
        return Err(SynthError::Config { findings });
    }
    if spec.max_shard_bytes == 0 {
        let found = "0".to_owned();
        let expected = "at least 1 byte".to_owned();
        return Err(SynthError::Spec { field: "max_shard_bytes", expected, found });
    }
    let (low, high) = spec.bias;
    if !(low.is_finite() && high.is_finite() && low <= high) {
        let found = format!("{low} to {high}");
        let expected = "a finite, ascending range".to_owned();
        return Err(SynthError::Spec { field: "bias", expected, found });
    }
    Ok(())
}

fn prepare(dir: &Path) -> Result<(), SynthError> {
    let failed = |operation| move |source| SynthError::Io { operation, path: dir.to_owned(), source };
    fs::create_dir_all(dir).map_err(failed("create"))?;
    let mut entries = fs::read_dir(dir).map_err(failed("list"))?;
    match entries.next() {
        None => Ok(()),
        Some(_) => Err(SynthError::NotEmpty { dir: dir.to_owned() }),
    }
}

fn index(plans: &[ShardPlan], bytes: u64) -> Value {
    let mut map: Vec<(&str, &str)> = plans.iter().flat_map(ShardPlan::names).collect();
    map.sort_unstable();
    let map: Map<String, Value> =
        map.into_iter().map(|(name, file)| (name.to_owned(), file.into())).collect();
    json!({ "metadata": { "total_size": bytes }, "weight_map": map })
}

fn save(path: &Path, value: &Value) -> Result<(), SynthError> {
    fs::write(path, format!("{value:#}\n")).map_err(|source| SynthError::Io {
        operation: "write",
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests;
