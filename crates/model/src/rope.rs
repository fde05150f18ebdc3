//! Rotary frequencies, with YaRN where the checkpoint configures it (spec §5).

use cadre_ops::AttentionShape;
use cadre_types::{ModelConfig, config::YarnConfig, config::yarn_magnitude};

/// The attention geometry of a model: dimensions, softmax scale and rotary frequencies.
pub fn attention_shape(config: &ModelConfig) -> AttentionShape {
    AttentionShape {
        heads: config.num_attention_heads,
        nope: config.qk_nope_head_dim,
        rope: config.qk_rope_head_dim,
        v: config.v_head_dim,
        kv_lora: config.kv_lora_rank,
        softmax_scale: config.softmax_scale(),
        inv_freq: inv_freq(config),
        rope_magnitude: config.rope_scaling.as_ref().map_or(1.0, rope_magnitude),
        max_positions: config.max_position_embeddings,
    }
}

/// Factor on cos and sin: `m(mscale) / m(mscale_all_dim)`; 1 for every released checkpoint.
fn rope_magnitude(yarn: &YarnConfig) -> f32 {
    let factor = f64::from(yarn.factor);
    (yarn_magnitude(factor, f64::from(yarn.mscale)) / yarn_magnitude(factor, f64::from(yarn.mscale_all_dim)))
        as f32
}

/// Angle per position of each rotary pair, `[rope / 2]`, computed in F64 and rounded once. YaRN applies
/// at every length when it is configured.
pub fn inv_freq(config: &ModelConfig) -> Vec<f32> {
    let dim = config.qk_rope_head_dim;
    let base = f64::from(config.rope_theta);
    let plain = (0..dim / 2).map(|pair| base.powf(-((2 * pair) as f64) / dim as f64));
    match &config.rope_scaling {
        None => plain.map(|frequency| frequency as f32).collect(),
        Some(yarn) => {
            let (low, high) = correction_range(yarn, dim, base);
            plain
                .enumerate()
                .map(|(pair, frequency)| {
                    let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    let stretched = frequency / f64::from(yarn.factor);
                    (stretched * ramp + frequency * (1.0 - ramp)) as f32
                })
                .collect()
        }
    }
}

/// Pairs between which YaRN blends from kept to interpolated frequencies.
fn correction_range(yarn: &YarnConfig, dim: usize, base: f64) -> (f64, f64) {
    let pair_of = |rotations: f32| {
        let wavelength = yarn.original_max_position_embeddings as f64
            / (f64::from(rotations) * 2.0 * std::f64::consts::PI);
        dim as f64 * wavelength.ln() / (2.0 * base.ln())
    };
    let low = pair_of(yarn.beta_fast).floor().max(0.0);
    let high = pair_of(yarn.beta_slow).ceil().min(dim as f64 - 1.0);
    // A ramp of zero width is a step; the published code widens it the same way.
    if high > low { (low, high) } else { (low, low + 0.001) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v3() -> ModelConfig {
        ModelConfig {
            vocab_size: 129_280,
            hidden_size: 7168,
            num_hidden_layers: 61,
            num_nextn_predict_layers: 1,
            first_k_dense_replace: 3,
            intermediate_size: 18_432,
            moe_intermediate_size: 2048,
            n_routed_experts: 256,
            n_shared_experts: 1,
            num_experts_per_tok: 8,
            n_group: 8,
            topk_group: 4,
            routed_scaling_factor: 2.5,
            norm_topk_prob: true,
            num_attention_heads: 128,
            q_lora_rank: Some(1536),
            kv_lora_rank: 512,
            qk_nope_head_dim: 128,
            qk_rope_head_dim: 64,
            v_head_dim: 128,
            rms_norm_eps: 1e-6,
            max_position_embeddings: 163_840,
            rope_theta: 10_000.0,
            rope_scaling: Some(YarnConfig {
                factor: 40.0,
                original_max_position_embeddings: 4096,
                beta_fast: 32.0,
                beta_slow: 1.0,
                mscale: 1.0,
                mscale_all_dim: 1.0,
            }),
            quantization: None,
            bos_token_id: 0,
            eos_token_ids: vec![1],
        }
    }

    /// Published parameters; pair 20 is 10^-2.5 x (0.25) by hand: its ramp is 10/13.
    #[test]
    fn yarn_frequencies_of_v3() {
        let frequencies = inv_freq(&v3());
        assert_eq!(frequencies.len(), 32);
        for (pair, expected) in [
            (0, 1.0),
            (9, 0.074_989_42),
            (10, 0.056_234_13),
            (11, 0.039_006_93),
            (16, 0.0055),
            (20, 7.905_694e-4),
            (22, 1.778_279e-4),
            (23, 3.333_804e-5),
            (24, 2.5e-5),
            (31, 3.333_804e-6),
        ] {
            let relative = (frequencies[pair] - expected).abs() / expected;
            assert!(relative < 1e-6, "pair {pair}: {} is not {expected}", frequencies[pair]);
        }
    }

    /// Kimi K2 publishes equal betas: floor and ceiling of one place, 19.16, between which nothing lies.
    #[test]
    fn yarn_with_equal_betas_is_a_step() {
        let yarn = YarnConfig {
            factor: 32.0,
            original_max_position_embeddings: 4096,
            beta_fast: 1.0,
            beta_slow: 1.0,
            mscale: 1.0,
            mscale_all_dim: 1.0,
        };
        let config = ModelConfig { rope_theta: 50_000.0, rope_scaling: Some(yarn), ..v3() };
        for (pair, frequency) in inv_freq(&config).into_iter().enumerate() {
            let plain = 50_000_f64.powf(-((2 * pair) as f64) / 64.0);
            let expected = if pair <= 19 { plain } else { plain / 32.0 };
            let relative = (f64::from(frequency) - expected).abs() / expected;
            assert!(relative < 1e-6, "pair {pair}: {frequency} is not {expected}");
        }
    }

    /// Spec §4.3.
    #[test]
    fn softmax_scale_of_v3_has_the_squared_magnitude() {
        let shape = attention_shape(&v3());
        assert!((shape.softmax_scale - 0.135_233_78).abs() < 1e-7, "{}", shape.softmax_scale);
        assert_eq!(shape.rope_magnitude, 1.0);
    }

    #[test]
    fn without_scaling_frequencies_are_powers_of_the_base() {
        let config = ModelConfig { rope_scaling: None, ..v3() };
        let frequencies = inv_freq(&config);
        assert!((frequencies[16] - 0.01).abs() < 1e-9);
        assert_eq!(attention_shape(&config).softmax_scale, (192f64.powf(-0.5)) as f32);
    }
}
