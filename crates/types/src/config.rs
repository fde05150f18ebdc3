//! `config.json` of a DeepSeek-V3-architecture checkpoint, parsed strictly.

use serde::{Deserialize, Serialize};

use crate::ids::{LayerId, TokenId};

/// The architecture, in the checkpoint's own words. Every field is what `config.json` says or the
/// published default written down in docs/checkpoint.md; nothing is guessed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Entries of the vocabulary (rows of the embedding and of the head).
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Main transformer layers, without MTP.
    pub num_hidden_layers: usize,
    /// MTP modules after the main layers (0 or 1).
    pub num_nextn_predict_layers: usize,
    /// Layers below this index have a dense MLP.
    pub first_k_dense_replace: usize,
    /// Inner width of a dense MLP.
    pub intermediate_size: usize,
    /// Inner width of one routed expert.
    pub moe_intermediate_size: usize,
    /// Routed experts per MoE layer.
    pub n_routed_experts: usize,
    /// Shared experts per MoE layer; their common inner width is this times `moe_intermediate_size`.
    pub n_shared_experts: usize,
    /// Experts chosen per token.
    pub num_experts_per_tok: usize,
    /// Expert groups.
    pub n_group: usize,
    /// Groups kept per token.
    pub topk_group: usize,
    /// Factor on the gate's weights.
    pub routed_scaling_factor: f32,
    /// Whether the chosen weights are normalised to sum 1 before the factor.
    pub norm_topk_prob: bool,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Rank of the query's low-rank projection; `None` means one `q_proj`.
    pub q_lora_rank: Option<usize>,
    /// Width of the latent KV.
    pub kv_lora_rank: usize,
    /// Per-head query/key width without position.
    pub qk_nope_head_dim: usize,
    /// Rotary query/key width, shared by all heads on the key side.
    pub qk_rope_head_dim: usize,
    /// Per-head value width.
    pub v_head_dim: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Longest sequence in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// YaRN, if configured; `None` is plain rotary embedding.
    pub rope_scaling: Option<YarnConfig>,
    /// Block scaling of FP8 weights; `None` means BF16 weights.
    pub quantization: Option<Fp8Config>,
    /// Beginning-of-sequence token.
    pub bos_token_id: TokenId,
    /// End-of-sequence tokens (at least one).
    pub eos_token_ids: Vec<TokenId>,
}

/// YaRN parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct YarnConfig {
    /// Context extension factor.
    pub factor: f32,
    /// Context of the unscaled model in tokens.
    pub original_max_position_embeddings: usize,
    /// Rotations above which a frequency is kept.
    pub beta_fast: f32,
    /// Rotations below which a frequency is interpolated.
    pub beta_slow: f32,
    /// Magnitude scale of cos/sin (numerator).
    pub mscale: f32,
    /// Magnitude scale of the softmax (and denominator of cos/sin).
    pub mscale_all_dim: f32,
}

/// Static block quantisation of weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fp8Config {
    /// Rows and columns that share a scale; `[128, 128]`.
    pub weight_block_size: [usize; 2],
    /// How activation scales are rounded where the `fp8` numerics class quantises activations.
    #[serde(default)]
    pub scale_fmt: ScaleFormat,
}

/// Rounding of FP8 scales. Weight scales are stored as F32 multipliers either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleFormat {
    /// Any F32 (V3, R1): the field is absent from `config.json`.
    #[default]
    F32,
    /// Powers of two, rounded up (V3.1: `"scale_fmt": "ue8m0"`).
    Ue8m0,
}

impl ModelConfig {
    /// Width of a query/key head: `qk_nope_head_dim + qk_rope_head_dim`.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Width of a cached row: `kv_lora_rank + qk_rope_head_dim`.
    pub fn kv_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// Main layers plus MTP layers.
    pub fn total_layers(&self) -> usize {
        self.num_hidden_layers + self.num_nextn_predict_layers
    }

    /// Whether a layer (main or MTP) has experts.
    pub fn is_moe(&self, layer: LayerId) -> bool {
        layer.index() >= self.first_k_dense_replace && layer.index() < self.total_layers()
    }

    /// The layers that have experts, MTP included, ascending.
    pub fn moe_layers(&self) -> impl Iterator<Item = LayerId> + use<> {
        (self.first_k_dense_replace..self.total_layers()).map(|layer| LayerId(layer as u16))
    }

    /// Whether anything drafts tokens with the MTP module. The engine does not yet: this is the one place that says
    /// so, for the workers (which would load the module), the placement (which would count its experts) and what
    /// `inspect` tells.
    pub const fn drafts(&self) -> bool {
        false
    }

    /// The layers whose experts shards hold, ascending: an MTP layer's only if something drafts with it, since for
    /// V3 they are 11 GB that nobody asks for.
    pub fn served_moe_layers(&self) -> impl Iterator<Item = LayerId> + use<> {
        let end = if self.drafts() { self.total_layers() } else { self.num_hidden_layers };
        (self.first_k_dense_replace..end).map(|layer| LayerId(layer as u16))
    }

    /// Factor on attention scores: `qk_head_dim^-0.5 * m^2`, `m = 0.1 * mscale_all_dim * ln(factor) + 1`
    /// (spec §4.3; 0.13523378 for V3).
    pub fn softmax_scale(&self) -> f32 {
        let m = self
            .rope_scaling
            .as_ref()
            .map_or(1.0, |yarn| yarn_magnitude(f64::from(yarn.factor), f64::from(yarn.mscale_all_dim)));
        ((self.qk_head_dim() as f64).powf(-0.5) * m * m) as f32
    }
}

/// `0.1 * mscale * ln(factor) + 1`, or 1 where the context is not extended.
pub fn yarn_magnitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
