//! Invented checkpoints: complete, sane, and the same in both formats.

use std::{fs, num::NonZeroUsize};

use cadre_checkpoint::{
    Checkpoint, MatrixBytes, MatrixView,
    synth::{SynthSpec, WeightFormat},
    table::{BLOCK, table},
};
use cadre_numerics::{bf16, e4m3};

use crate::fixture::{Fixture, pocket, small_spec};

fn values(view: &MatrixView<'_>) -> Vec<f32> {
    match &view.data {
        MatrixBytes::Bf16(bytes) => {
            bytes.chunks_exact(2).map(|b| bf16::decode(u16::from_le_bytes([b[0], b[1]]))).collect()
        }
        MatrixBytes::F32(_) => panic!("synth writes no F32 matrices"),
        MatrixBytes::E4m3 { codes, scales } => {
            let blocks = view.cols.div_ceil(BLOCK);
            let value = |(at, &code): (usize, &u8)| {
                let (row, col) = (at / view.cols, at % view.cols);
                e4m3::decode(code) * scales[row / BLOCK * blocks + col / BLOCK]
            };
            codes.iter().enumerate().map(value).collect()
        }
    }
}

#[test]
fn tiny_is_complete_and_keeps_its_bytes() {
    let spec = SynthSpec { tokenizer: Some(pocket()), ..SynthSpec::tiny(WeightFormat::Fp8, 1) };
    let fixture = Fixture::of(&spec);
    let checkpoint = fixture.open();
    assert_eq!(*checkpoint.config(), spec.config);
    assert!(checkpoint.warnings().is_empty());
    let problems = checkpoint.verify(NonZeroUsize::new(2).unwrap(), &|_, _| {});
    assert!(problems.is_empty(), "{problems}");
    for layer in 1..=4 {
        let name = format!("model.layers.{layer}.mlp.gate.e_score_correction_bias");
        let bias = checkpoint.vector_f32(&name).unwrap();
        assert!(bias.iter().all(|value| (-1.0..=3.0).contains(value)), "{name}: {bias:?}");
        // A gate that masks with 0 instead of -inf shows only where a score is negative.
        assert!(bias.iter().any(|&value| value < -0.25), "{name}: {bias:?}");
    }
    // Released bytes: a change here changes every recorded result that names this preset.
    assert_eq!(checkpoint.model_hash().to_string(), "9708e5067333a706fb6e401793ef2c87");
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(fs::read(fixture.file(name)).unwrap(), fs::read(pocket().join(name)).unwrap());
    }
}

#[test]
fn seeds_differ() {
    let hash = |seed| {
        let mut spec = small_spec(WeightFormat::Bf16);
        spec.seed = seed;
        Fixture::of(&spec).open().model_hash()
    };
    assert_eq!(hash(1), hash(1));
    assert_ne!(hash(1), hash(2));
}

/// Both formats draw the same numbers; FP8 then rounds to three mantissa bits.
#[test]
fn formats_are_twins() {
    let (fp8, bf16) = (Fixture::new(WeightFormat::Fp8).open(), Fixture::new(WeightFormat::Bf16).open());
    for name in [
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.2.mlp.experts.7.gate_proj.weight",
    ] {
        let (coarse, fine) = (fp8.matrix(name).unwrap(), bf16.matrix(name).unwrap());
        let MatrixBytes::E4m3 { codes, scales } = &coarse.data else { panic!("FP8") };
        assert_eq!(scales.len(), coarse.rows.div_ceil(BLOCK) * coarse.cols.div_ceil(BLOCK));
        // Every block, ragged ones too, is scaled to use the whole range.
        let blocks = coarse.cols.div_ceil(BLOCK);
        let mut largest = vec![0.0f32; scales.len()];
        for (at, &code) in codes.iter().enumerate() {
            let (row, col) = (at / coarse.cols, at % coarse.cols);
            let block = &mut largest[row / BLOCK * blocks + col / BLOCK];
            *block = block.max(e4m3::decode(code).abs());
        }
        assert!(largest.iter().all(|&value| value == e4m3::MAX), "{name}: {largest:?}");
        let deviation = (fine.cols as f32).recip().sqrt();
        let (coarse, fine) = (values(&coarse), values(&fine));
        for (a, b) in coarse.iter().zip(&fine) {
            // Half a step of e4m3 (1/16 of the value, or the subnormal step) and of bf16.
            assert!((a - b).abs() <= b.abs() / 15.0 + deviation * 1e-3, "{name}: {a} {b}");
        }
        let square = fine.iter().map(|&v| f64::from(v * v)).sum::<f64>() / fine.len() as f64;
        assert!((square.sqrt() / f64::from(deviation) - 1.0).abs() < 0.02, "{name}: {square}");
    }
    let norm = "model.layers.1.post_attention_layernorm.weight";
    let weights = fp8.vector_f32(norm).unwrap();
    assert_eq!(weights, bf16.vector_f32(norm).unwrap());
    assert!(
        weights.iter().all(|weight| (0.8..1.2).contains(weight))
            && weights.iter().any(|&weight| weight != 1.0)
    );
    let bias = fp8.vector_f32("model.layers.1.mlp.gate.e_score_correction_bias").unwrap();
    assert_eq!(bias, bf16.vector_f32("model.layers.1.mlp.gate.e_score_correction_bias").unwrap());
}

#[test]
fn presets_are_models() {
    for name in SynthSpec::PRESETS {
        for format in [WeightFormat::Fp8, WeightFormat::Bf16] {
            for mtp in [false, true] {
                let spec = SynthSpec::preset(name, format, 0).unwrap().with_mtp(mtp);
                let checkpoint = Checkpoint::open(Fixture::headers(&spec).path()).unwrap();
                assert_eq!(*checkpoint.config(), spec.config);
                assert_eq!(table(&spec.config).any(|spec| spec.name.contains("eh_proj")), mtp);
            }
        }
    }
    let mid = SynthSpec::mid(WeightFormat::Fp8, 0);
    let totals = cadre_checkpoint::inspect::Totals::published(&mid.config);
    assert!((1_550_000_000..1_750_000_000).contains(&totals.main_params), "{}", totals.main_params);
    assert_eq!(SynthSpec::preset("huge", WeightFormat::Fp8, 0), None);
}
