//! `config.json`, parsed strictly.
//!
//! Every field that changes what the network computes is required, or has a published default that is
//! written down in docs/checkpoint.md and reported as used; a value that names something cadre does not
//! compute is refused by name, with the values that it does compute. Unknown fields are accepted:
//! checkpoints carry training and framework settings that mean nothing here.
//!
//! [`validate()`] bounds every size, so that no product of sizes overflows and no later stage divides by
//! zero: a [`ModelConfig`] that went through it can be used without further checks.

use std::{cell::RefCell, path::Path};

use cadre_types::ModelConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    problem::{About, ProblemKind, Problems},
    weights::WeightsOptions,
};

mod fields;
mod quantization;
mod render;
mod rope;
mod validate;

pub use fields::DefaultedField;
pub use render::to_json;
pub use validate::{Finding, MAX_EXPERTS, MAX_LAYERS, validate};

use fields::Fields;

/// A configuration and what was assumed to complete it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParsedConfig {
    /// The configuration.
    pub config: ModelConfig,
    /// Fields that were absent and have a published default.
    pub defaults: Vec<DefaultedField>,
}

/// Architectures (the `architectures` list) that this table and these kernels are for.
const ARCHITECTURES: &[&str] = &["DeepseekV3ForCausalLM"];
/// Values of `model_type` that mean the same computation.
const MODEL_TYPES: &[&str] = &["deepseek_v3", "kimi_k2"];
/// Fields that only DeepSeek-V3.2 and its kin (sparse attention by an indexer) have.
const INDEXER_FIELDS: &[&str] = &["index_topk", "index_n_heads", "index_head_dim"];
const INDEXER_FIX: &str =
    "DeepSeek-V3.2 (sparse attention with an indexer) is not served; use V3, V3-0324, R1 or V3.1";

/// Parses the bytes of the configuration at `file`; all that is wrong with it comes back at once.
pub fn parse(file: &Path, bytes: &[u8]) -> Result<ParsedConfig, Problems> {
    parse_with(file, bytes, &WeightsOptions::default())
}

/// As [`parse`], with some fields overridden. Only fields that are read can be.
pub fn parse_with(file: &Path, bytes: &[u8], weights: &WeightsOptions) -> Result<ParsedConfig, Problems> {
    let about = About::new(file);
    let mut problems = Problems::default();
    let mut object = match serde_json::from_slice::<Value>(bytes) {
        Ok(Value::Object(object)) => object,
        other => {
            let found = match other {
                Ok(value) => format!("JSON of another type ({})", fields::show(&value)),
                Err(error) => error.to_string(),
            };
            problems.push(about.file(
                ProblemKind::Malformed,
                "one JSON object",
                found,
                "copy config.json from the published checkpoint again",
            ));
            return Err(problems);
        }
    };
    for (field, expected, found) in weights.apply(&mut object) {
        let fix = "give each --override once, for a field that config.json can have";
        problems.push(about.field(ProblemKind::BadValue, &field, expected, found, fix));
    }
    let (mut defaults, read_fields) = (Vec::new(), RefCell::default());
    let mut fields = Fields::new(&about, &object, "", &mut problems, &mut defaults, &read_fields);
    let config = read(&mut fields, &object);
    let read_fields = read_fields.into_inner();
    for change in weights.overrides.iter().filter(|change| !read_fields.contains(&change.key)) {
        let known: Vec<&str> = read_fields.iter().map(String::as_str).collect();
        let expected = format!("a field that is read: {}", known.join(", "));
        let fix = "correct the name after --override";
        problems.push(about.field(
            ProblemKind::BadValue,
            &change.key,
            expected,
            format!("--override {change}"),
            fix,
        ));
    }
    let Some(config) = config.filter(|_| problems.is_empty()) else {
        return Err(problems);
    };
    for Finding { field, expected, found, fix } in validate(&config) {
        problems.push(about.field(ProblemKind::BadValue, &field, expected, found, fix));
    }
    if problems.is_empty() { Ok(ParsedConfig { config, defaults }) } else { Err(problems) }
}

/// Reads every field before giving up on any, so that all findings are made.
fn read(fields: &mut Fields<'_>, object: &Map<String, Value>) -> Option<ModelConfig> {
    check_family(fields, object);
    fields.only_text("topk_method", &["noaux_tc"], Some("noaux_tc"));
    fields.only_text("scoring_func", &["sigmoid"], Some("sigmoid"));
    fields.only_text("hidden_act", &["silu"], Some("silu"));
    fields.only_flag("attention_bias", false);
    fields.only_flag("tie_word_embeddings", false);
    fields.only_flag("rope_interleave", true);
    fields.only_integer("moe_layer_freq", 1);

    let vocab_size = fields.integer("vocab_size");
    let hidden_size = fields.integer("hidden_size");
    let num_hidden_layers = fields.integer("num_hidden_layers");
    let num_nextn_predict_layers = fields.integer_or("num_nextn_predict_layers", 0);
    let first_k_dense_replace = fields.integer("first_k_dense_replace");
    let intermediate_size = fields.integer("intermediate_size");
    let moe_intermediate_size = fields.integer("moe_intermediate_size");
    let n_routed_experts = fields.integer("n_routed_experts");
    let n_shared_experts = fields.integer("n_shared_experts");
    let num_experts_per_tok = fields.integer("num_experts_per_tok");
    let n_group = fields.integer("n_group");
    let topk_group = fields.integer("topk_group");
    let routed_scaling_factor = fields.number("routed_scaling_factor");
    let norm_topk_prob = fields.flag("norm_topk_prob");
    let num_attention_heads = fields.integer("num_attention_heads");
    let q_lora_rank = fields.nullable_integer("q_lora_rank");
    let kv_lora_rank = fields.integer("kv_lora_rank");
    let qk_nope_head_dim = fields.integer("qk_nope_head_dim");
    let qk_rope_head_dim = fields.integer("qk_rope_head_dim");
    let v_head_dim = fields.integer("v_head_dim");
    let rms_norm_eps = fields.number("rms_norm_eps");
    let max_position_embeddings = fields.integer("max_position_embeddings");
    let rope = rope::read(fields);
    let quantization = quantization::read(fields);
    let bos_token_id = fields.token("bos_token_id");
    let eos_token_ids = fields.tokens("eos_token_id");
    let rope = rope?;
    Some(ModelConfig {
        vocab_size: vocab_size?,
        hidden_size: hidden_size?,
        num_hidden_layers: num_hidden_layers?,
        num_nextn_predict_layers: num_nextn_predict_layers?,
        first_k_dense_replace: first_k_dense_replace?,
        intermediate_size: intermediate_size?,
        moe_intermediate_size: moe_intermediate_size?,
        n_routed_experts: n_routed_experts?,
        n_shared_experts: n_shared_experts?,
        num_experts_per_tok: num_experts_per_tok?,
        n_group: n_group?,
        topk_group: topk_group?,
        routed_scaling_factor: routed_scaling_factor?,
        norm_topk_prob: norm_topk_prob?,
        num_attention_heads: num_attention_heads?,
        q_lora_rank: q_lora_rank?,
        kv_lora_rank: kv_lora_rank?,
        qk_nope_head_dim: qk_nope_head_dim?,
        qk_rope_head_dim: qk_rope_head_dim?,
        v_head_dim: v_head_dim?,
        rms_norm_eps: rms_norm_eps?,
        max_position_embeddings: max_position_embeddings?,
        rope_theta: rope.theta,
        rope_scaling: rope.yarn,
        quantization: quantization?,
        bos_token_id: bos_token_id?,
        eos_token_ids: eos_token_ids?,
    })
}

/// The family is told by `model_type` and `architectures`; V3.2 also by the fields of its indexer.
fn check_family(fields: &mut Fields<'_>, object: &Map<String, Value>) {
    for name in INDEXER_FIELDS {
        if let Some(value) = object.get(*name).filter(|value| !value.is_null()) {
            let found = fields::show(value);
            fields.problem(ProblemKind::Unsupported, name, "no indexer field", found, INDEXER_FIX);
        }
    }
    fields.only_text("model_type", MODEL_TYPES, None);
    let Some(list) = object.get("architectures").filter(|value| !value.is_null()) else {
        return;
    };
    let known = list.as_array().is_some_and(|names| {
        names.iter().any(|name| name.as_str().is_some_and(|name| ARCHITECTURES.contains(&name)))
    });
    if !known {
        fields.problem(
            ProblemKind::Unsupported,
            "architectures",
            format!("a list with {}", ARCHITECTURES.join(" or ")),
            fields::show(list),
            "serve a checkpoint of the DeepSeek-V3 architecture",
        );
    }
}

#[cfg(test)]
mod tests;
