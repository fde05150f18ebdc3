//! The ranges and relations that make a configuration a model.
//!
//! The upper bounds are several times what any published model of the architecture has. With them the
//! element count of any one tensor stays below 2^42 and of the whole model below 2^58, so sizes are
//! multiplied without checks from here on.

use cadre_types::{ModelConfig, config::YarnConfig};

/// Most layers, MTP included (V3 has 62).
pub const MAX_LAYERS: usize = 512;
/// Most routed experts per layer (V3 has 256, Kimi K2 384).
pub const MAX_EXPERTS: usize = 2048;
const MAX_VOCABULARY: usize = 1 << 22;
const MAX_WIDTH: usize = 1 << 17;
const MAX_INNER: usize = 1 << 18;
const MAX_RANK: usize = 1 << 15;
const MAX_HEADS: usize = 1024;
const MAX_HEAD_DIM: usize = 1024;
const MAX_CONTEXT: usize = 1 << 24;

/// One broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The field that breaks it.
    pub field: String,
    /// The rule.
    pub expected: String,
    /// The value.
    pub found: String,
    /// What to do.
    pub fix: String,
}

const FIX: &str = "copy the field from the published config.json of this checkpoint";

/// Every rule that the configuration breaks.
pub fn validate(config: &ModelConfig) -> Vec<Finding> {
    let mut findings = Findings(Vec::new());
    sizes(config, &mut findings);
    // Relations between sizes that are themselves out of range would only repeat the finding.
    if findings.0.is_empty() {
        layers(config, &mut findings);
        gate(config, &mut findings);
        tokens(config, &mut findings);
    }
    numbers(config, &mut findings);
    if let Some(yarn) = &config.rope_scaling {
        yarn_rules(yarn, &mut findings);
    }
    findings.0
}

struct Findings(Vec<Finding>);

impl Findings {
    fn rule(&mut self, holds: bool, field: &str, expected: impl Into<String>, found: impl ToString) {
        if !holds {
            self.0.push(Finding {
                field: field.to_owned(),
                expected: expected.into(),
                found: found.to_string(),
                fix: FIX.to_owned(),
            });
        }
    }

    fn within(&mut self, field: &str, value: usize, min: usize, max: usize) {
        self.rule((min..=max).contains(&value), field, format!("{min} to {max}"), value);
    }
}

fn sizes(config: &ModelConfig, findings: &mut Findings) {
    findings.within("vocab_size", config.vocab_size, 1, MAX_VOCABULARY);
    findings.within("hidden_size", config.hidden_size, 1, MAX_WIDTH);
    findings.within("num_hidden_layers", config.num_hidden_layers, 1, MAX_LAYERS - 1);
    findings.within("num_nextn_predict_layers", config.num_nextn_predict_layers, 0, 1);
    findings.within("intermediate_size", config.intermediate_size, 1, MAX_INNER);
    findings.within("moe_intermediate_size", config.moe_intermediate_size, 1, MAX_INNER);
    findings.within("n_routed_experts", config.n_routed_experts, 1, MAX_EXPERTS);
    findings.within("n_shared_experts", config.n_shared_experts, 1, 64);
    findings.within("num_experts_per_tok", config.num_experts_per_tok, 1, MAX_EXPERTS);
    findings.within("n_group", config.n_group, 1, MAX_EXPERTS);
    findings.within("topk_group", config.topk_group, 1, MAX_EXPERTS);
    findings.within("num_attention_heads", config.num_attention_heads, 1, MAX_HEADS);
    if let Some(rank) = config.q_lora_rank {
        findings.within("q_lora_rank", rank, 1, MAX_RANK);
    }
    findings.within("kv_lora_rank", config.kv_lora_rank, 1, MAX_RANK);
    findings.within("qk_nope_head_dim", config.qk_nope_head_dim, 1, MAX_HEAD_DIM);
    findings.within("qk_rope_head_dim", config.qk_rope_head_dim, 2, MAX_HEAD_DIM);
    findings.within("v_head_dim", config.v_head_dim, 1, MAX_HEAD_DIM);
    findings.within("max_position_embeddings", config.max_position_embeddings, 1, MAX_CONTEXT);
    let rope = config.qk_rope_head_dim;
    findings.rule(rope.is_multiple_of(2), "qk_rope_head_dim", "an even number", rope);
}

fn layers(config: &ModelConfig, findings: &mut Findings) {
    let (dense, layers) = (config.first_k_dense_replace, config.num_hidden_layers);
    findings.rule(
        dense < layers,
        "first_k_dense_replace",
        format!("fewer than num_hidden_layers = {layers}, so that a layer has experts"),
        dense,
    );
}

fn gate(config: &ModelConfig, findings: &mut Findings) {
    let (experts, groups) = (config.n_routed_experts, config.n_group);
    let (kept, chosen) = (config.topk_group, config.num_experts_per_tok);
    if !experts.is_multiple_of(groups) {
        let expected = format!("a divisor of n_routed_experts = {experts}");
        return findings.rule(false, "n_group", expected, groups);
    }
    let members = experts / groups;
    if groups > 1 && members < 2 {
        // A group is scored by its two best members.
        let expected = format!("groups of at least 2 of the {experts} experts");
        return findings.rule(false, "n_group", expected, groups);
    }
    let expected = format!("at most n_group = {groups}");
    findings.rule(kept <= groups, "topk_group", expected, kept);
    findings.rule(
        chosen <= kept.min(groups) * members,
        "num_experts_per_tok",
        format!("at most the {} experts of topk_group = {kept} groups", kept.min(groups) * members),
        chosen,
    );
}

fn numbers(config: &ModelConfig, findings: &mut Findings) {
    let positive = |value: f32| value.is_finite() && value > 0.0;
    let scale = config.routed_scaling_factor;
    findings.rule(positive(scale), "routed_scaling_factor", "a positive number", scale);
    let eps = config.rms_norm_eps;
    findings.rule(positive(eps) && eps < 1.0, "rms_norm_eps", "between 0 and 1", eps);
    let theta = config.rope_theta;
    findings.rule(theta.is_finite() && theta > 1.0, "rope_theta", "greater than 1", theta);
    if let Some(fp8) = &config.quantization {
        findings.rule(
            fp8.weight_block_size == [crate::table::BLOCK; 2],
            "quantization_config.weight_block_size",
            "[128,128]",
            format!("{:?}", fp8.weight_block_size),
        );
    }
}

fn tokens(config: &ModelConfig, findings: &mut Findings) {
    let vocabulary = config.vocab_size;
    let expected = || format!("below vocab_size = {vocabulary}");
    let known = |id: u32| (id as usize) < vocabulary;
    findings.rule(known(config.bos_token_id), "bos_token_id", expected(), config.bos_token_id);
    findings.rule(!config.eos_token_ids.is_empty(), "eos_token_id", "at least one id", "none");
    for &id in &config.eos_token_ids {
        findings.rule(known(id), "eos_token_id", expected(), id);
    }
}

fn yarn_rules(yarn: &YarnConfig, findings: &mut Findings) {
    let field = |name: &str| format!("rope_scaling.{name}");
    let factor = yarn.factor;
    findings.rule((1.0..=1e6).contains(&factor), &field("factor"), "1 to 1000000", factor);
    findings.within(
        &field("original_max_position_embeddings"),
        yarn.original_max_position_embeddings,
        1,
        MAX_CONTEXT,
    );
    let (fast, slow) = (yarn.beta_fast, yarn.beta_slow);
    findings.rule(slow.is_finite() && slow > 0.0, &field("beta_slow"), "a positive number", slow);
    // Equal ones (Kimi K2 has 1 and 1) are a ramp of one pair or none.
    let expected = format!("at least beta_slow = {slow}");
    findings.rule(fast.is_finite() && fast >= slow, &field("beta_fast"), expected, fast);
    for (name, value) in [("mscale", yarn.mscale), ("mscale_all_dim", yarn.mscale_all_dim)] {
        findings.rule((0.0..=100.0).contains(&value), &field(name), "0 to 100", value);
    }
}
