//! Shapes of the model that operations take.

use cadre_types::ModelConfig;

/// The latent cache's geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers that have a cache (main layers, and MTP layers if they are used).
    pub layers: usize,
    /// Pages in the pool.
    pub pages: usize,
    /// Tokens per page; [`KvLayout::PAGE_TOKENS`].
    pub page_tokens: usize,
    /// Width of the normalised latent `c`.
    pub kv_lora_rank: usize,
    /// Width of the rotated shared key `k_pe`, in the checkpoint's interleaved pair order.
    pub qk_rope_head_dim: usize,
}

impl KvLayout {
    /// Tokens per page (FlashMLA's page; spec §4).
    pub const PAGE_TOKENS: usize = 64;
}

/// What attention needs to know of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Query/key width without position.
    pub nope: usize,
    /// Rotary width.
    pub rope: usize,
    /// Value width.
    pub v: usize,
    /// Latent width.
    pub kv_lora: usize,
    /// Factor on scores.
    pub softmax_scale: f32,
    /// Angle per position of each rotary pair, F32 `[rope / 2]`: YaRN applied (spec §5). The angle of
    /// pair `i` at position `p` is `p as f32 * inv_freq[i]` in F32; cos and sin are tabulated on the host
    /// from that F32 angle in F64 and rounded once, then multiplied by `rope_magnitude`.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin: `m(mscale) / m(mscale_all_dim)`.
    pub rope_magnitude: f32,
    /// Longest position plus one; backends tabulate cos/sin up to it.
    pub max_positions: usize,
}

/// How logits of the gate become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scoring {
    /// `1 / (1 + exp(-logit))`, expert by expert (V3).
    Sigmoid,
    /// `exp(logit - largest) / sum`, over all experts (V2).
    Softmax,
}

/// How a group of experts is judged when only some groups are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupScore {
    /// Sum of its two largest selections (`noaux_tc`).
    TwoLargest,
    /// Its largest selection (`group_limited_greedy`).
    Largest,
}

/// The gate's rule (spec §6).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateShape {
    /// Scores of logits.
    pub scoring: Scoring,
    /// Scores of groups.
    pub group_score: GroupScore,
    /// Routed experts.
    pub experts: usize,
    /// Groups.
    pub n_group: usize,
    /// Groups kept.
    pub topk_group: usize,
    /// Experts chosen.
    pub top_k: usize,
    /// Normalise the chosen weights.
    pub norm_topk_prob: bool,
    /// Factor on the weights.
    pub routed_scaling_factor: f32,
}

impl GateShape {
    /// The gate of a model.
    pub fn of(config: &ModelConfig) -> Self {
        Self {
            scoring: Scoring::Sigmoid,
            group_score: GroupScore::TwoLargest,
            experts: config.n_routed_experts,
            n_group: config.n_group,
            topk_group: config.topk_group,
            top_k: config.num_experts_per_tok,
            norm_topk_prob: config.norm_topk_prob,
            routed_scaling_factor: config.routed_scaling_factor,
        }
    }
}
