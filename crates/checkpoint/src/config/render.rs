//! A [`ModelConfig`] as `config.json`, in the published spelling: what [`super::parse`] reads back.

use cadre_types::{
    ModelConfig,
    config::{ScaleFormat, YarnConfig},
};
use serde_json::{Map, Value, json};

/// The configuration as the JSON object of a published checkpoint.
pub fn to_json(config: &ModelConfig) -> Value {
    let mut json = json!({
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "first_k_dense_replace": config.first_k_dense_replace,
        "moe_layer_freq": 1,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "n_routed_experts": config.n_routed_experts,
        "n_shared_experts": config.n_shared_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "routed_scaling_factor": shortest(config.routed_scaling_factor),
        "norm_topk_prob": config.norm_topk_prob,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "rms_norm_eps": shortest(config.rms_norm_eps),
        "hidden_act": "silu",
        "attention_bias": false,
        "attention_dropout": 0.0,
        "tie_word_embeddings": false,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": shortest(config.rope_theta),
        "rope_scaling": config.rope_scaling.as_ref().map(yarn),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos(&config.eos_token_ids),
        "use_cache": true,
    });
    if let (Some(fp8), Some(object)) = (&config.quantization, json.as_object_mut()) {
        let mut quantization = Map::new();
        quantization.insert("quant_method".into(), "fp8".into());
        quantization.insert("fmt".into(), "e4m3".into());
        quantization.insert("activation_scheme".into(), "dynamic".into());
        quantization.insert("weight_block_size".into(), json!(fp8.weight_block_size));
        if fp8.scale_fmt == ScaleFormat::Ue8m0 {
            quantization.insert("scale_fmt".into(), "ue8m0".into());
        }
        object.insert("quantization_config".into(), quantization.into());
    }
    json
}

fn yarn(yarn: &YarnConfig) -> Value {
    json!({
        "type": "yarn",
        "factor": shortest(yarn.factor),
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": shortest(yarn.beta_fast),
        "beta_slow": shortest(yarn.beta_slow),
        "mscale": shortest(yarn.mscale),
        "mscale_all_dim": shortest(yarn.mscale_all_dim),
    })
}

fn eos(ids: &[u32]) -> Value {
    match ids {
        [single] => json!(single),
        several => json!(several),
    }
}

/// The F32 as the shortest decimal that reads back as it: 1e-6 stays 1e-6 and does not grow the digits
/// of its conversion to F64.
fn shortest(value: f32) -> Value {
    let decimal: f64 = value.to_string().parse().unwrap_or(f64::from(value));
    json!(decimal)
}
