//! `cadre synth`: a random checkpoint of the architecture, for tests and benches.

use std::path::PathBuf;

use anyhow::{Context, Result};
use cadre_checkpoint::synth::{self, SynthSpec, WeightFormat};
use clap::{Args, ValueEnum};

use crate::{output, progress};

/// Writes a random checkpoint: seeded, with sane activations at any depth, and no meaning at all.
#[derive(Args, Debug)]
pub(crate) struct SynthArgs {
    /// Where to write; absent or empty.
    out: PathBuf,
    /// Sizes to start from: the smallest model with every feature, or about 1.6 B parameters.
    #[arg(long, value_enum, default_value_t = Preset::Tiny)]
    preset: Preset,
    /// How matrices are stored.
    #[arg(long, value_enum, default_value_t = Dtype::Fp8)]
    dtype: Dtype,
    /// Same seed and sizes, same bytes.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Folder to copy the tokenizer from (models/pocket fits both presets); without one, only token ids
    /// can be served.
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Width of the residual stream. [default: the preset's]
    #[arg(long, value_name = "N")]
    hidden_size: Option<usize>,
    /// Main layers. [default: the preset's]
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// MTP layers, 0 or 1. [default: the preset's]
    #[arg(long, value_name = "N")]
    mtp_layers: Option<usize>,
    /// Routed experts per layer. [default: the preset's]
    #[arg(long, value_name = "N")]
    routed_experts: Option<usize>,
    /// Experts chosen per token. [default: the preset's]
    #[arg(long, value_name = "N")]
    experts_per_token: Option<usize>,
    /// Inner width of a routed expert. [default: the preset's]
    #[arg(long, value_name = "N")]
    moe_intermediate_size: Option<usize>,
    /// Longest sequence in tokens. [default: the preset's]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Preset {
    Tiny,
    Mid,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    Fp8,
    Bf16,
}

/// Runs the command.
pub(crate) fn run(args: SynthArgs) -> Result<()> {
    let spec = args.spec();
    let bar = progress::bytes("writing");
    let written = synth::write(&args.out, &spec, &|done, total| progress::set(&bar, done, total))
        .with_context(|| format!("write {}", args.out.display()))?;
    bar.finish_and_clear();
    output::line(&format!(
        "{}: {} tensors, {} bytes in {} files",
        args.out.display(),
        written.tensors,
        written.bytes,
        written.shards
    ));
    Ok(())
}

impl SynthArgs {
    fn spec(&self) -> SynthSpec {
        let format = match self.dtype {
            Dtype::Fp8 => WeightFormat::Fp8,
            Dtype::Bf16 => WeightFormat::Bf16,
        };
        let mut spec = match self.preset {
            Preset::Tiny => SynthSpec::tiny(format, self.seed),
            Preset::Mid => SynthSpec::mid(format, self.seed),
        };
        spec.tokenizer = self.tokenizer.clone();
        let config = &mut spec.config;
        let overrides = [
            (self.hidden_size, &mut config.hidden_size),
            (self.layers, &mut config.num_hidden_layers),
            (self.mtp_layers, &mut config.num_nextn_predict_layers),
            (self.routed_experts, &mut config.n_routed_experts),
            (self.experts_per_token, &mut config.num_experts_per_tok),
            (self.moe_intermediate_size, &mut config.moe_intermediate_size),
            (self.context, &mut config.max_position_embeddings),
        ];
        for (given, field) in overrides {
            *field = given.unwrap_or(*field);
        }
        spec
    }
}
