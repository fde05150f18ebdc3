//! Named sizes.

use cadre_types::{ModelConfig, config::YarnConfig};

use super::{SynthSpec, WeightFormat};

/// Shards of this size keep even the small presets multi-shard, so that the index is exercised.
const TINY_SHARD_BYTES: u64 = 4 << 20;
const MID_SHARD_BYTES: u64 = 1 << 30;

impl SynthSpec {
    /// Names accepted by [`Self::preset`].
    pub const PRESETS: [&'static str; 2] = ["tiny", "mid"];

    /// A preset by name.
    pub fn preset(name: &str, format: WeightFormat, seed: u64) -> Option<Self> {
        match name {
            "tiny" => Some(Self::tiny(format, seed)),
            "mid" => Some(Self::mid(format, seed)),
            _ => None,
        }
    }

    /// The smallest model with every feature (spec §15): ragged scale rows, a dense layer, MTP, groups,
    /// a correction bias of both signs. The vocabulary fits the bundled tokenizer.
    pub fn tiny(format: WeightFormat, seed: u64) -> Self {
        let config = ModelConfig {
            vocab_size: 4096,
            hidden_size: 256,
            num_hidden_layers: 4,
            num_nextn_predict_layers: 1,
            first_k_dense_replace: 1,
            intermediate_size: 512,
            moe_intermediate_size: 128,
            n_routed_experts: 16,
            n_shared_experts: 1,
            num_experts_per_tok: 4,
            n_group: 4,
            topk_group: 2,
            routed_scaling_factor: 2.5,
            norm_topk_prob: true,
            num_attention_heads: 4,
            q_lora_rank: Some(128),
            kv_lora_rank: 128,
            qk_nope_head_dim: 64,
            qk_rope_head_dim: 32,
            v_head_dim: 64,
            rms_norm_eps: 1e-6,
            max_position_embeddings: 163_840,
            rope_theta: 10_000.0,
            rope_scaling: Some(yarn(40.0)),
            quantization: format.quantization(),
            bos_token_id: 0,
            eos_token_ids: vec![1],
        };
        let bias = (-1.0, 3.0);
        Self { config, seed, max_shard_bytes: TINY_SHARD_BYTES, bias, tokenizer: None }
    }

    /// About 1.6 B parameters, 0.3 B active: large enough that speed is memory speed. Without MTP, and
    /// with a small bias so that load spreads over the experts as it does in a trained model.
    pub fn mid(format: WeightFormat, seed: u64) -> Self {
        let config = ModelConfig {
            vocab_size: 4096,
            hidden_size: 1024,
            num_hidden_layers: 16,
            num_nextn_predict_layers: 0,
            first_k_dense_replace: 1,
            intermediate_size: 4096,
            moe_intermediate_size: 512,
            n_routed_experts: 64,
            n_shared_experts: 1,
            num_experts_per_tok: 6,
            n_group: 8,
            topk_group: 4,
            routed_scaling_factor: 2.5,
            norm_topk_prob: true,
            num_attention_heads: 16,
            q_lora_rank: Some(768),
            kv_lora_rank: 512,
            qk_nope_head_dim: 64,
            qk_rope_head_dim: 64,
            v_head_dim: 64,
            rms_norm_eps: 1e-6,
            max_position_embeddings: 16_384,
            rope_theta: 10_000.0,
            rope_scaling: Some(yarn(4.0)),
            quantization: format.quantization(),
            bos_token_id: 0,
            eos_token_ids: vec![1],
        };
        let bias = (-0.02, 0.02);
        Self { config, seed, max_shard_bytes: MID_SHARD_BYTES, bias, tokenizer: None }
    }

    /// The same model with or without an MTP layer.
    #[must_use]
    pub fn with_mtp(mut self, mtp: bool) -> Self {
        self.config.num_nextn_predict_layers = usize::from(mtp);
        self
    }
}

fn yarn(factor: f32) -> YarnConfig {
    YarnConfig {
        factor,
        original_max_position_embeddings: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: 1.0,
        mscale_all_dim: 1.0,
    }
}
