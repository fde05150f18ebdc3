//! The table against the published listing's figures and the bundled checkpoint's index.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeSet, path::Path};

use cadre_types::{LayerId, LogicalExpert, ModelConfig};

use super::{SCALE_SUFFIX, TensorSpec, Tier, expert_names, table};
use crate::{
    config,
    header::Dtype,
    synth::{SynthSpec, WeightFormat},
};

fn v3() -> ModelConfig {
    let bytes = include_bytes!("../../tests/data/deepseek_v3.json");
    config::parse(Path::new("config.json"), bytes).unwrap().config
}

fn params(specs: &[TensorSpec], keep: impl Fn(&TensorSpec) -> bool) -> u64 {
    specs.iter().filter(|spec| !spec.is_scale() && keep(spec)).map(TensorSpec::elements).sum()
}

#[test]
fn v3_has_the_published_numbers() {
    let specs: Vec<TensorSpec> = table(&v3()).collect();
    assert_eq!(specs.len(), 91_991);
    assert_eq!(specs.iter().map(TensorSpec::elements).sum::<u64>(), 684_531_386_000);
    let scales = specs.iter().filter(|spec| spec.is_scale()).map(TensorSpec::elements).sum::<u64>();
    assert_eq!(scales, 41_540_496);
    let in_layer = |at, tier| params(&specs, |spec| spec.layer == Some(LayerId(at)) && spec.tier == tier);
    assert_eq!(in_layer(0, Tier::Attention), 187_105_280 + 1536 + 512);
    assert_eq!(in_layer(0, Tier::DenseMlp), 396_361_728);
    assert_eq!(in_layer(3, Tier::Gate), 1_835_264);
    assert_eq!(in_layer(3, Tier::SharedExpert), 44_040_192);
    assert_eq!(in_layer(3, Tier::Expert), 256 * 44_040_192);
    let names: BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    assert_eq!(names.len(), specs.len(), "no name twice");
    let kv_a = "model.layers.60.self_attn.kv_a_proj_with_mqa.weight_scale_inv";
    assert_eq!(specs.iter().find(|spec| spec.name == kv_a).unwrap().shape, [5, 56]);
}

#[test]
fn the_bundled_index_is_the_table() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/pocket");
    let bytes = std::fs::read(dir.join("config.json")).unwrap();
    let config = config::parse(&dir, &bytes).unwrap().config;
    let index = std::fs::read(dir.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    let named: BTreeSet<String> = index["weight_map"].as_object().unwrap().keys().cloned().collect();
    let expected: BTreeSet<String> = table(&config).map(|spec| spec.name).collect();
    assert_eq!(named, expected);
}

#[test]
fn experts_are_named_and_marked() {
    let specs: Vec<TensorSpec> = table(&v3()).collect();
    for name in expert_names(LayerId(61), LogicalExpert(255)) {
        for name in [name.clone(), format!("{name}{SCALE_SUFFIX}")] {
            let spec = specs.iter().find(|spec| spec.name == name).expect(&name);
            assert_eq!((spec.layer, spec.expert), (Some(LayerId(61)), Some(LogicalExpert(255))));
        }
    }
    assert!(specs.iter().all(|spec| spec.expert.is_some() == (spec.tier == Tier::Expert)));
}

#[test]
fn without_q_lora_there_is_one_query_projection() {
    let config = ModelConfig { q_lora_rank: None, ..v3() };
    let queries: Vec<TensorSpec> =
        table(&config).filter(|spec| spec.name.starts_with("model.layers.0.self_attn.q_")).collect();
    assert_eq!(queries.len(), 2);
    assert_eq!(queries[0].name, "model.layers.0.self_attn.q_proj.weight");
    assert_eq!(queries[0].shape, [128 * 192, 7168]);
}

#[test]
fn bf16_models_have_no_scales_and_no_fp8() {
    let config = SynthSpec::tiny(WeightFormat::Bf16, 0).config;
    assert!(table(&config).all(|spec| !spec.is_scale() && !spec.dtypes.contains(&Dtype::E4m3)));
    let without_mtp = SynthSpec::tiny(WeightFormat::Bf16, 0).with_mtp(false).config;
    assert!(table(&without_mtp).all(|spec| !spec.optional && spec.layer != Some(LayerId(4))));
}
