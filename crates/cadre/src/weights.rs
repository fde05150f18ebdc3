//! `--weights` and `--override`: the same two flags wherever a model is named.

use cadre_checkpoint::{Override, WeightsOptions, WeightsSource};
use clap::Args;

/// Where weights come from.
#[derive(Args, Clone, Debug)]
pub(crate) struct WeightsArgs {
    /// Where weights come from: files, or random:SEED, which draws them and needs only configuration and tokenizer.
    /// The same for every process of a model.
    #[arg(long, value_name = "SOURCE", default_value_t = WeightsSource::Files)]
    weights: WeightsSource,
    /// Another value for a field of config.json, as n_routed_experts=16; may be given several times. Sizes only with
    /// random weights. The same for every process of a model.
    #[arg(long = "override", value_name = "KEY=VALUE")]
    overrides: Vec<Override>,
}

impl WeightsArgs {
    /// What was asked for.
    pub(crate) fn options(&self) -> WeightsOptions {
        WeightsOptions { source: self.weights, overrides: self.overrides.clone() }
    }
}
