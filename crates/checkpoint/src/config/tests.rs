//! The strict parser: what it accepts, what it refuses, and that nothing makes it panic.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use cadre_types::config::ScaleFormat;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{ParsedConfig, parse, to_json, validate};
use crate::{
    problem::{Problem, ProblemKind, Problems},
    synth::{SynthSpec, WeightFormat},
    table::table,
};

const FILE: &str = "/models/v3/config.json";
const V3: &str = include_str!("../../tests/data/deepseek_v3.json");

fn v3() -> Value {
    serde_json::from_str(V3).unwrap()
}

fn parse_value(value: &Value) -> Result<ParsedConfig, Problems> {
    parse(Path::new(FILE), value.to_string().as_bytes())
}

/// Sets a dotted path; `Value::Null` under the key `"-"` is not needed, see [`without`].
fn with(path: &str, value: Value) -> Value {
    let mut config = v3();
    set(&mut config, path, Some(value));
    config
}

fn without(path: &str) -> Value {
    let mut config = v3();
    set(&mut config, path, None);
    config
}

fn set(config: &mut Value, path: &str, value: Option<Value>) {
    let (parents, name) = path.rsplit_once('.').unwrap_or(("", path));
    let parents = parents.split('.').filter(|parent| !parent.is_empty());
    let object = parents.fold(config, |object, parent| &mut object[parent]);
    let object = object.as_object_mut().unwrap();
    match value {
        Some(value) => drop(object.insert(name.to_owned(), value)),
        None => drop(object.shift_remove(name)),
    }
}

/// The only finding about `config`, which must name the file, the field and a fix.
fn only_problem(config: &Value, field: &str) -> Problem {
    let problems = parse_value(config).expect_err(field);
    assert_eq!(problems.total(), 1, "{field}: {problems}");
    let problem = problems.iter().next().unwrap().clone();
    assert_eq!(problem.file, FILE);
    assert_eq!(problem.subject, format!("field `{field}`"), "{problem}");
    assert!(!problem.fix.is_empty() && !problem.expected.is_empty(), "{problem}");
    problem
}

#[test]
fn v3_reads_as_published() {
    let ParsedConfig { config, defaults } = parse_value(&v3()).unwrap();
    assert_eq!((config.hidden_size, config.num_hidden_layers, config.vocab_size), (7168, 61, 129_280));
    assert_eq!((config.n_group, config.topk_group, config.num_experts_per_tok), (8, 4, 8));
    assert_eq!(config.q_lora_rank, Some(1536));
    assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-6, 10_000.0));
    assert_eq!(config.eos_token_ids, [1]);
    let yarn = config.rope_scaling.as_ref().unwrap();
    assert_eq!((yarn.factor, yarn.beta_fast, yarn.mscale_all_dim), (40.0, 32.0, 1.0));
    assert_eq!(config.quantization.as_ref().unwrap().scale_fmt, ScaleFormat::F32);
    assert!((config.softmax_scale() - 0.135_233_78).abs() < 1e-7);
    // The published file leaves out one field that has a default.
    let names: Vec<_> = defaults.iter().map(|d| (d.field.as_str(), d.value.as_str())).collect();
    assert_eq!(names, [("rope_interleave", "true")]);
}

/// The fields in which Kimi K2's published configuration differs from V3's.
#[test]
fn kimi_k2_reads_as_published() {
    let mut kimi = v3();
    for (field, value) in [
        ("model_type", json!("kimi_k2")),
        ("vocab_size", json!(163_840)),
        ("n_routed_experts", json!(384)),
        ("n_group", json!(1)),
        ("topk_group", json!(1)),
        ("num_attention_heads", json!(64)),
        ("first_k_dense_replace", json!(1)),
        ("routed_scaling_factor", json!(2.827)),
        ("rope_theta", json!(50_000.0)),
        ("max_position_embeddings", json!(131_072)),
        ("num_nextn_predict_layers", json!(0)),
        ("rope_scaling.beta_fast", json!(1.0)),
        ("rope_scaling.beta_slow", json!(1.0)),
        ("rope_scaling.factor", json!(32.0)),
        ("bos_token_id", json!(163_584)),
        ("eos_token_id", json!(163_585)),
    ] {
        set(&mut kimi, field, Some(value));
    }
    let yarn = parse_value(&kimi).unwrap().config.rope_scaling.unwrap();
    assert_eq!((yarn.beta_fast, yarn.beta_slow, yarn.factor), (1.0, 1.0, 32.0));
}

#[test]
fn rendering_reads_back_as_the_same() {
    let v3 = parse_value(&v3()).unwrap().config;
    let presets = [WeightFormat::Fp8, WeightFormat::Bf16]
        .into_iter()
        .flat_map(|format| [SynthSpec::tiny(format, 0).config, SynthSpec::mid(format, 0).config]);
    for config in presets.chain([v3]) {
        assert_eq!(parse_value(&to_json(&config)).unwrap().config, config);
    }
    assert_eq!(
        to_json(&parse_value(&with("rms_norm_eps", json!(1e-6))).unwrap().config)["rms_norm_eps"],
        json!(1e-6)
    );
}

#[test]
fn every_architectural_field_is_required() {
    const REQUIRED: &[&str] = &[
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "first_k_dense_replace",
        "intermediate_size",
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "norm_topk_prob",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_theta",
        "bos_token_id",
        "eos_token_id",
        "rope_scaling.factor",
        "rope_scaling.original_max_position_embeddings",
        "quantization_config.quant_method",
        "quantization_config.activation_scheme",
        "quantization_config.weight_block_size",
    ];
    for field in REQUIRED {
        let problem = only_problem(&without(field), field);
        assert_eq!(problem.kind, ProblemKind::MissingField, "{problem}");
    }
    let problem = only_problem(&without("rope_scaling.type"), "rope_scaling.rope_type");
    assert_eq!(problem.kind, ProblemKind::MissingField);
}

#[test]
fn absent_fields_with_a_published_default_are_reported() {
    const DEFAULTS: &[(&str, &str)] = &[
        ("topk_method", "\"noaux_tc\""),
        ("scoring_func", "\"sigmoid\""),
        ("hidden_act", "\"silu\""),
        ("attention_bias", "false"),
        ("tie_word_embeddings", "false"),
        ("moe_layer_freq", "1"),
        ("num_nextn_predict_layers", "0"),
        ("rope_scaling.beta_fast", "32.0"),
        ("rope_scaling.beta_slow", "1.0"),
        ("rope_scaling.mscale", "1.0"),
        ("rope_scaling.mscale_all_dim", "0.0"),
        ("quantization_config.fmt", "\"e4m3\""),
    ];
    for (field, value) in DEFAULTS {
        let defaults = parse_value(&without(field)).unwrap().defaults;
        let found = defaults.iter().find(|default| default.field == *field).expect(field);
        assert_eq!(found.value, *value);
    }
    assert_eq!(parse_value(&without("num_nextn_predict_layers")).unwrap().config.num_nextn_predict_layers, 0);
}

#[test]
fn unknown_values_are_refused_with_the_allowed_ones() {
    let cases: &[(&str, Value, &str)] = &[
        ("topk_method", json!("greedy"), "noaux_tc"),
        ("scoring_func", json!("softmax"), "sigmoid"),
        ("hidden_act", json!("gelu"), "silu"),
        ("model_type", json!("deepseek_v2"), "deepseek_v3"),
        ("architectures", json!(["DeepseekV2ForCausalLM"]), "DeepseekV3ForCausalLM"),
        ("attention_bias", json!(true), "false"),
        ("tie_word_embeddings", json!(true), "false"),
        ("rope_interleave", json!(false), "true"),
        ("moe_layer_freq", json!(2), "1"),
        ("rope_scaling.type", json!("longrope"), "yarn"),
        ("rope_scaling.attention_factor", json!(1.2), "no such field"),
        ("rope_scaling.truncate", json!(false), "true"),
        ("quantization_config.quant_method", json!("gptq"), "fp8"),
        ("quantization_config.fmt", json!("e5m2"), "e4m3"),
        ("quantization_config.activation_scheme", json!("static"), "dynamic"),
        ("quantization_config.weight_block_size", json!([64, 128]), "[128,128]"),
        ("quantization_config.scale_fmt", json!("e8m3"), "ue8m0"),
    ];
    for (field, value, allowed) in cases {
        let problem = only_problem(&with(field, value.clone()), field);
        assert_eq!(problem.kind, ProblemKind::Unsupported, "{problem}");
        assert!(problem.expected.contains(allowed), "{problem}");
        let text = problem.to_string();
        assert!(text.contains(&problem.found) && text.contains(FILE), "{text}");
    }
}

#[test]
fn values_that_make_no_model_are_refused() {
    let cases: &[(&str, Value)] = &[
        ("vocab_size", json!(0)),
        ("vocab_size", json!(1u64 << 40)),
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-1)),
        ("hidden_size", json!("7168")),
        ("hidden_size", json!(7168.5)),
        ("num_hidden_layers", json!(0)),
        ("num_hidden_layers", json!(100_000)),
        ("num_nextn_predict_layers", json!(2)),
        ("first_k_dense_replace", json!(61)),
        ("n_routed_experts", json!(257)),
        ("n_shared_experts", json!(0)),
        ("num_experts_per_tok", json!(129)),
        ("num_experts_per_tok", json!(0)),
        ("n_group", json!(0)),
        ("n_group", json!(256)),
        ("topk_group", json!(9)),
        ("routed_scaling_factor", json!(0.0)),
        ("routed_scaling_factor", json!(1e300)),
        ("norm_topk_prob", json!(1)),
        ("q_lora_rank", json!(0)),
        ("qk_rope_head_dim", json!(63)),
        ("qk_rope_head_dim", json!(0)),
        ("v_head_dim", json!(u64::MAX)),
        ("rms_norm_eps", json!(0.0)),
        ("rms_norm_eps", json!(-1e-6)),
        ("rope_theta", json!(1.0)),
        ("max_position_embeddings", json!(0)),
        ("rope_scaling.factor", json!(0.5)),
        ("rope_scaling.original_max_position_embeddings", json!(0)),
        ("rope_scaling.beta_fast", json!(0.5)),
        ("rope_scaling.beta_slow", json!(0)),
        ("rope_scaling.mscale", json!(-1)),
        ("rope_scaling", json!("yarn")),
        ("quantization_config", json!([])),
        ("bos_token_id", json!(129_280)),
        ("eos_token_id", json!(129_280)),
        ("eos_token_id", json!([])),
        ("eos_token_id", json!([1, "2"])),
    ];
    for (field, value) in cases {
        // The relation between experts and groups is reported at the groups.
        let named = if *field == "n_routed_experts" { "n_group" } else { field };
        let problem = only_problem(&with(field, value.clone()), named);
        assert_eq!(problem.kind, ProblemKind::BadValue, "{problem}");
    }
}

#[test]
fn all_findings_come_at_once() {
    let mut config = with("topk_method", json!("greedy"));
    set(&mut config, "hidden_size", None);
    set(&mut config, "quantization_config.fmt", Some(json!("int8")));
    let problems = parse_value(&config).unwrap_err();
    assert_eq!(problems.total(), 3, "{problems}");
    let text = problems.to_string();
    for named in ["topk_method", "hidden_size", "quantization_config.fmt", "greedy", "int8"] {
        assert!(text.contains(named), "{text}");
    }
}

#[test]
fn v32_is_named() {
    let mut config = with("model_type", json!("deepseek_v32"));
    set(&mut config, "architectures", Some(json!(["DeepseekV32ForCausalLM"])));
    set(&mut config, "index_topk", Some(json!(2048)));
    let text = parse_value(&config).unwrap_err().to_string();
    assert!(text.contains("`index_topk`") && text.contains("V3.2") && text.contains("indexer"), "{text}");
}

#[test]
fn every_spelling_of_rope_means_the_same() {
    let published = parse_value(&v3()).unwrap().config;
    let scaling = v3()["rope_scaling"].clone();

    let mut renamed = scaling.clone();
    set(&mut renamed, "type", None);
    set(&mut renamed, "rope_type", Some(json!("yarn")));
    assert_eq!(parse_value(&with("rope_scaling", renamed.clone())).unwrap().config, published);

    let mut newest = without("rope_scaling");
    set(&mut newest, "rope_theta", None);
    set(&mut renamed, "rope_theta", Some(json!(10000.0)));
    set(&mut newest, "rope_parameters", Some(renamed.clone()));
    assert_eq!(parse_value(&newest).unwrap().config, published);

    // Said twice, the same way.
    set(&mut newest, "rope_scaling", Some(scaling));
    set(&mut newest, "rope_theta", Some(json!(10000)));
    assert_eq!(parse_value(&newest).unwrap().config, published);

    // Said twice, differently.
    set(&mut newest, "rope_scaling.factor", Some(json!(4)));
    assert!(parse_value(&newest).unwrap_err().to_string().contains("`rope_scaling`"));
    set(&mut newest, "rope_scaling.factor", Some(json!(40)));
    set(&mut newest, "rope_theta", Some(json!(50000)));
    assert!(parse_value(&newest).unwrap_err().to_string().contains("`rope_theta`"));

    for plain in [json!(null), json!({"rope_type": "default"})] {
        assert_eq!(parse_value(&with("rope_scaling", plain)).unwrap().config.rope_scaling, None);
    }
    assert_eq!(parse_value(&without("rope_scaling")).unwrap().config.rope_scaling, None);
}

#[test]
fn variants_within_the_architecture_are_read() {
    let config = parse_value(&with("eos_token_id", json!([1, 128_001]))).unwrap().config;
    assert_eq!(config.eos_token_ids, [1, 128_001]);
    let config = parse_value(&with("q_lora_rank", Value::Null)).unwrap().config;
    assert_eq!(config.q_lora_rank, None);
    let config = parse_value(&with("quantization_config", Value::Null)).unwrap().config;
    assert_eq!(config.quantization, None);
    assert_eq!(parse_value(&without("quantization_config")).unwrap().config, config);
    let v31 = parse_value(&with("quantization_config.scale_fmt", json!("ue8m0"))).unwrap().config;
    assert_eq!(v31.quantization.as_ref().unwrap().scale_fmt, ScaleFormat::Ue8m0);
    assert_eq!(parse_value(&to_json(&v31)).unwrap().config, v31);
    // Unknown fields mean nothing.
    assert!(parse_value(&with("some_new_training_knob", json!({"a": [1]}))).is_ok());
    // Kimi K2's shape: one group.
    let mut k2 = with("n_group", json!(1));
    set(&mut k2, "topk_group", Some(json!(1)));
    set(&mut k2, "n_routed_experts", Some(json!(384)));
    set(&mut k2, "model_type", Some(json!("kimi_k2")));
    assert_eq!(parse_value(&k2).unwrap().config.n_routed_experts, 384);
}

#[test]
fn files_that_are_no_configuration_are_named() {
    for bytes in [&b""[..], b"[]", b"null", b"{", b"\xff\xfe", b"{\"a\": NaN}"] {
        let problems = parse(Path::new(FILE), bytes).unwrap_err();
        assert_eq!(problems.total(), 1);
        let problem = problems.iter().next().unwrap();
        assert_eq!((problem.kind, problem.file.as_str()), (ProblemKind::Malformed, FILE));
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u64..5000).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z0-9_]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::hash_map("[a-z_]{1,8}", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn paths() -> Vec<String> {
    let mut paths = Vec::new();
    for (name, value) in v3().as_object().unwrap() {
        paths.push(name.clone());
        let nested = value.as_object().into_iter().flatten().map(|(key, _)| format!("{name}.{key}"));
        paths.extend(nested);
    }
    paths.push("rope_parameters".into());
    paths.push("rope_scaling.rope_type".into());
    paths
}

proptest! {
    /// Whatever stands in whatever field: an answer, and an accepted one is a model.
    #[test]
    fn any_value_in_any_field_is_answered(
        edits in prop::collection::vec((prop::sample::select(paths()), any_json()), 1..4),
    ) {
        let mut config = v3();
        for (path, value) in edits {
            let parent = path.split_once('.').map(|(parent, _)| parent);
            if parent.is_none_or(|parent| config[parent].is_object()) {
                set(&mut config, &path, Some(value));
            }
        }
        match parse_value(&config) {
            Ok(parsed) => {
                prop_assert!(validate(&parsed.config).is_empty());
                let first = table(&parsed.config).take(1000);
                prop_assert!(first.map(|spec| spec.elements()).all(|elements| elements < 1 << 42));
            }
            Err(problems) => {
                prop_assert!(!problems.is_empty());
                prop_assert!(problems.iter().all(|problem| problem.file == FILE));
            }
        }
    }

    #[test]
    fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(parse(Path::new(FILE), &bytes).is_err());
    }

    #[test]
    fn a_damaged_file_is_answered(at in 0..V3.len(), byte: u8, cut in 0..V3.len()) {
        let mut bytes = V3.as_bytes().to_vec();
        bytes[at] = byte;
        let _ = parse(Path::new(FILE), &bytes);
        bytes.truncate(cut);
        prop_assert!(parse(Path::new(FILE), &bytes).is_err());
    }
}
