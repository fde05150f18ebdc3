//! The tensors of the architecture: what a configuration says must be in the files.
//!
//! Pure: one [`TensorSpec`] per tensor of spec §2, computed layer by layer, so that even the table of
//! the 671 B model costs one layer of memory. Everything that checks, counts, lays out or invents a
//! checkpoint walks this table; no tensor name is spelled anywhere else in this crate.

use cadre_types::{LayerId, LogicalExpert, ModelConfig};
use serde::{Deserialize, Serialize};

use crate::header::Dtype;

/// Rows and columns that share one scale.
pub const BLOCK: usize = 128;
/// Appended to the name of an FP8 weight for its scales. Despite the name they are multipliers.
pub const SCALE_SUFFIX: &str = "_scale_inv";

/// What a tensor is for, in the order in which reports list them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Token embedding.
    Embedding,
    /// Attention projections and their norms.
    Attention,
    /// MLP of the first, dense layers.
    DenseMlp,
    /// Gate weights and correction bias.
    Gate,
    /// Shared experts, computed where attention is.
    SharedExpert,
    /// Norms of the residual stream.
    Norm,
    /// Logits.
    Head,
    /// What only an MTP layer has: eh_proj and its three norms.
    Mtp,
    /// The MTP layer's copies of embedding and head, which nobody loads.
    MtpDuplicate,
    /// Routed experts, held by expert shards.
    Expert,
}

impl Tier {
    /// Every tier, in order.
    pub const ALL: [Self; 10] = [
        Self::Embedding,
        Self::Attention,
        Self::DenseMlp,
        Self::Gate,
        Self::SharedExpert,
        Self::Norm,
        Self::Head,
        Self::Mtp,
        Self::MtpDuplicate,
        Self::Expert,
    ];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Attention => "attention",
            Self::DenseMlp => "dense MLP",
            Self::Gate => "gate",
            Self::SharedExpert => "shared experts",
            Self::Norm => "norms",
            Self::Head => "head",
            Self::Mtp => "MTP projection and norms",
            Self::MtpDuplicate => "MTP copies of embedding and head (not loaded)",
            Self::Expert => "routed experts",
        }
    }

    /// Whether an attention worker loads it.
    pub fn on_workers(self) -> bool {
        !matches!(self, Self::Expert | Self::MtpDuplicate)
    }
}

/// What a tensor contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A matrix `[outputs, inputs]`.
    Matrix,
    /// The embedding: a matrix whose rows are looked up, not multiplied.
    Lookup,
    /// Weights of an RMSNorm.
    Norm,
    /// `e_score_correction_bias`.
    Bias,
    /// Block scales of the FP8 matrix `[rows, cols]`.
    Scale {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
}

/// One tensor as the configuration wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Element types that are accepted, the published one first.
    pub dtypes: &'static [Dtype],
    /// What it contains.
    pub content: Content,
    /// What it is for.
    pub tier: Tier,
    /// Its layer, unless it belongs to the whole model.
    pub layer: Option<LayerId>,
    /// Its expert, if it belongs to a routed one.
    pub expert: Option<LogicalExpert>,
    /// Whether a checkpoint may leave it out.
    pub optional: bool,
}

impl TensorSpec {
    /// Number of elements. Cannot overflow for a validated configuration (docs/checkpoint.md).
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&dim| dim as u64).product()
    }

    /// Bytes in the published element type.
    pub fn published_bytes(&self) -> u64 {
        self.elements() * self.dtypes[0].bytes() as u64
    }

    /// Whether it holds scales, which are not counted as parameters.
    pub fn is_scale(&self) -> bool {
        matches!(self.content, Content::Scale { .. })
    }
}

/// Quantised matrices are FP8 and nothing else: their scales would have no meaning otherwise.
const QUANTISED: &[Dtype] = &[Dtype::E4m3];
/// BF16 as published; F32 is accepted because it loses nothing.
const PLAIN: &[Dtype] = &[Dtype::Bf16, Dtype::F32];
/// F32 as published; BF16 is accepted, with a warning, because derived files have it.
const BIAS: &[Dtype] = &[Dtype::F32, Dtype::Bf16];
const SCALE: &[Dtype] = &[Dtype::F32];

/// Every tensor of the model, global ones first, then layer by layer.
pub fn table(config: &ModelConfig) -> impl Iterator<Item = TensorSpec> + '_ {
    global(config).into_iter().chain((0..config.total_layers()).flat_map(|at| layer(config, at)))
}

/// The names of a routed expert's gate, up and down matrices.
pub fn expert_names(layer: LayerId, expert: LogicalExpert) -> [String; 3] {
    let prefix = format!("model.layers.{}.mlp.experts.{}", layer.0, expert.0);
    FFN.map(|matrix| format!("{prefix}.{matrix}.weight"))
}

const FFN: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Collects the specs of one owner (the model or a layer).
struct Specs<'a> {
    config: &'a ModelConfig,
    layer: Option<LayerId>,
    prefix: String,
    specs: Vec<TensorSpec>,
}

impl Specs<'_> {
    fn push(
        &mut self,
        name: &str,
        shape: Vec<usize>,
        dtypes: &'static [Dtype],
        content: Content,
        tier: Tier,
    ) {
        self.specs.push(TensorSpec {
            name: format!("{}{name}", self.prefix),
            shape,
            dtypes,
            content,
            tier,
            layer: self.layer,
            expert: None,
            optional: false,
        });
    }

    fn norm(&mut self, name: &str, width: usize, tier: Tier) {
        self.push(name, vec![width], PLAIN, Content::Norm, tier);
    }

    /// A matrix that stays BF16 in an FP8 checkpoint.
    fn plain(&mut self, name: &str, rows: usize, cols: usize, content: Content, tier: Tier) {
        self.push(name, vec![rows, cols], PLAIN, content, tier);
    }

    /// A matrix that an FP8 checkpoint quantises, and then its scales.
    fn quantisable(&mut self, name: &str, rows: usize, cols: usize, tier: Tier) {
        if self.config.quantization.is_none() {
            return self.plain(name, rows, cols, Content::Matrix, tier);
        }
        self.push(name, vec![rows, cols], QUANTISED, Content::Matrix, tier);
        let blocks = vec![rows.div_ceil(BLOCK), cols.div_ceil(BLOCK)];
        self.push(&format!("{name}{SCALE_SUFFIX}"), blocks, SCALE, Content::Scale { rows, cols }, tier);
    }

    fn ffn(&mut self, prefix: &str, inner: usize, tier: Tier) {
        let hidden = self.config.hidden_size;
        for matrix in FFN {
            let (rows, cols) = if matrix == "down_proj" { (hidden, inner) } else { (inner, hidden) };
            self.quantisable(&format!("{prefix}.{matrix}.weight"), rows, cols, tier);
        }
    }
}

fn global(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut specs = Specs { config, layer: None, prefix: String::new(), specs: Vec::new() };
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    specs.plain("model.embed_tokens.weight", vocab, hidden, Content::Lookup, Tier::Embedding);
    specs.norm("model.norm.weight", hidden, Tier::Norm);
    specs.plain("lm_head.weight", vocab, hidden, Content::Matrix, Tier::Head);
    specs.specs
}

fn layer(config: &ModelConfig, at: usize) -> Vec<TensorSpec> {
    // A validated configuration has at most `config::MAX_LAYERS` layers.
    let id = LayerId(u16::try_from(at).unwrap_or(u16::MAX));
    let prefix = format!("model.layers.{at}.");
    let mut specs = Specs { config, layer: Some(id), prefix, specs: Vec::new() };
    let hidden = config.hidden_size;
    specs.norm("input_layernorm.weight", hidden, Tier::Norm);
    attention(&mut specs);
    specs.norm("post_attention_layernorm.weight", hidden, Tier::Norm);
    if config.is_moe(id) {
        moe(&mut specs);
    } else {
        specs.ffn("mlp", config.intermediate_size, Tier::DenseMlp);
    }
    if at >= config.num_hidden_layers {
        mtp(&mut specs);
    }
    specs.specs
}

fn attention(specs: &mut Specs<'_>) {
    const TIER: Tier = Tier::Attention;
    let config = specs.config;
    let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
    let query_rows = heads * config.qk_head_dim();
    match config.q_lora_rank {
        Some(rank) => {
            specs.quantisable("self_attn.q_a_proj.weight", rank, hidden, TIER);
            specs.norm("self_attn.q_a_layernorm.weight", rank, TIER);
            specs.quantisable("self_attn.q_b_proj.weight", query_rows, rank, TIER);
        }
        None => specs.quantisable("self_attn.q_proj.weight", query_rows, hidden, TIER),
    }
    specs.quantisable("self_attn.kv_a_proj_with_mqa.weight", config.kv_width(), hidden, TIER);
    specs.norm("self_attn.kv_a_layernorm.weight", config.kv_lora_rank, TIER);
    let kv_rows = heads * (config.qk_nope_head_dim + config.v_head_dim);
    specs.quantisable("self_attn.kv_b_proj.weight", kv_rows, config.kv_lora_rank, TIER);
    specs.quantisable("self_attn.o_proj.weight", hidden, heads * config.v_head_dim, TIER);
}

fn moe(specs: &mut Specs<'_>) {
    let config = specs.config;
    let experts = config.n_routed_experts;
    specs.plain("mlp.gate.weight", experts, config.hidden_size, Content::Matrix, Tier::Gate);
    specs.push("mlp.gate.e_score_correction_bias", vec![experts], BIAS, Content::Bias, Tier::Gate);
    let inner = config.moe_intermediate_size;
    specs.ffn("mlp.shared_experts", inner * config.n_shared_experts, Tier::SharedExpert);
    for expert in 0..experts {
        let first = specs.specs.len();
        specs.ffn(&format!("mlp.experts.{expert}"), inner, Tier::Expert);
        // A validated configuration has at most `config::MAX_EXPERTS` experts.
        let id = LogicalExpert(u16::try_from(expert).unwrap_or(u16::MAX));
        specs.specs[first..].iter_mut().for_each(|spec| spec.expert = Some(id));
    }
}

fn mtp(specs: &mut Specs<'_>) {
    let (vocab, hidden) = (specs.config.vocab_size, specs.config.hidden_size);
    specs.norm("enorm.weight", hidden, Tier::Mtp);
    specs.norm("hnorm.weight", hidden, Tier::Mtp);
    specs.plain("eh_proj.weight", hidden, 2 * hidden, Content::Matrix, Tier::Mtp);
    specs.norm("shared_head.norm.weight", hidden, Tier::Mtp);
    let first = specs.specs.len();
    specs.plain("embed_tokens.weight", vocab, hidden, Content::Lookup, Tier::MtpDuplicate);
    specs.plain("shared_head.head.weight", vocab, hidden, Content::Matrix, Tier::MtpDuplicate);
    specs.specs[first..].iter_mut().for_each(|spec| spec.optional = true);
}

/// The global tensor of which an MTP layer's tensor is a copy.
pub(crate) fn duplicate_of(spec: &TensorSpec) -> Option<&'static str> {
    match (spec.tier, spec.content) {
        (Tier::MtpDuplicate, Content::Lookup) => Some("model.embed_tokens.weight"),
        (Tier::MtpDuplicate, _) => Some("lm_head.weight"),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
