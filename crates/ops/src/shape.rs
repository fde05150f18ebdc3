//! Shapes and batch descriptions that operations take.

use cadre_types::{ModelConfig, PageId, Position};

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

/// The gate's rule (spec §6).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateShape {
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
            experts: config.n_routed_experts,
            n_group: config.n_group,
            topk_group: config.topk_group,
            top_k: config.num_experts_per_tok,
            norm_topk_prob: config.norm_topk_prob,
            routed_scaling_factor: config.routed_scaling_factor,
        }
    }
}

/// Consecutive rows of a batch that are a chunk of one sequence's prompt, attended in naive form.
#[derive(Clone, Copy, Debug)]
pub struct PrefillSegment<'a> {
    /// First row of the batch.
    pub first_row: usize,
    /// Rows.
    pub rows: usize,
    /// Position of the first row.
    pub first_position: Position,
    /// Pages of the sequence; entry `i` holds positions `64 i .. 64 i + 64`.
    pub block_table: &'a [PageId],
}

/// One row of a batch that is a generated token, attended in absorbed form.
#[derive(Clone, Copy, Debug)]
pub struct DecodeRow<'a> {
    /// Row of the batch.
    pub row: usize,
    /// Its position.
    pub position: Position,
    /// Pages of the sequence.
    pub block_table: &'a [PageId],
}

/// Consecutive input rows that go through one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowGroup {
    /// Index into the experts given.
    pub expert: usize,
    /// First row.
    pub first_row: usize,
    /// Rows; may be 0.
    pub rows: usize,
}
