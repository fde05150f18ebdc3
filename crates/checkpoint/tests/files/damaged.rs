//! Damaged checkpoints: every finding names the file, the tensor or field, and a fix; nothing panics.

use std::{fs, num::NonZeroUsize};

use cadre_checkpoint::{
    Checkpoint, CheckpointError, Problem, ProblemKind,
    inspect::{Layout, Options, inspect},
    synth::{SynthSpec, WeightFormat},
};
use cadre_types::{LayerId, LogicalExpert, ModelConfig, config::ScaleFormat};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::fixture::{Fixture, small_spec};

const KV_A: &str = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight";
const KV_A_SCALE: &str = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv";
const UP: &str = "model.layers.1.mlp.experts.3.up_proj.weight";
const BIAS: &str = "model.layers.1.mlp.gate.e_score_correction_bias";

fn fp8() -> Fixture {
    Fixture::new(WeightFormat::Fp8)
}

#[track_caller]
fn assert_names(problem: &Problem, kind: ProblemKind, file: &std::path::Path, parts: &[&str]) {
    assert_eq!(problem.kind, kind, "{problem}");
    assert_eq!(problem.file, file.display().to_string(), "{problem}");
    let text = problem.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert!(text.contains("fix: ") && !problem.fix.is_empty(), "{text}");
}

#[test]
fn truncated_shard() {
    let fixture = fp8();
    let path = fixture.shard_of(UP);
    let len = fs::metadata(&path).unwrap().len();
    fs::File::options().write(true).open(&path).unwrap().set_len(len - 1000).unwrap();
    let (was, is) = (format!("{len} bytes"), format!("{} bytes", len - 1000));
    assert_names(
        &fixture.problem(),
        ProblemKind::Truncated,
        &path,
        &[&was, &is, "tensor `", "fetch it again"],
    );
}

#[test]
fn shard_cut_inside_its_header() {
    let fixture = fp8();
    let path = fixture.shard_of(UP);
    for len in [500, 8, 5, 0] {
        fs::File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        assert_names(&fixture.problem(), ProblemKind::Truncated, &path, &["fix"]);
    }
}

#[test]
fn damaged_header() {
    let fixture = fp8();
    let path = fixture.shard_of(UP);
    let mut bytes = fs::read(&path).unwrap();
    bytes[20] = b'\x01';
    fs::write(&path, bytes).unwrap();
    assert_names(&fixture.problem(), ProblemKind::Malformed, &path, &["header"]);
}

#[test]
fn missing_tensor() {
    let fixture = fp8();
    fixture.edit_index(|map| drop(map.shift_remove(UP)));
    let index = fixture.file("model.safetensors.index.json");
    assert_names(&fixture.problem(), ProblemKind::MissingTensor, &index, &[UP, "F8_E4M3 [128, 256]"]);
}

#[test]
fn missing_scales() {
    let fixture = fp8();
    fixture.edit_index(|map| drop(map.shift_remove(KV_A_SCALE)));
    let index = fixture.file("model.safetensors.index.json");
    assert_names(&fixture.problem(), ProblemKind::MissingTensor, &index, &[KV_A_SCALE, "scales"]);
}

#[test]
fn missing_mtp_layer() {
    let fixture = fp8();
    // All but one of its tensors are gone.
    fixture.edit_index(|map| {
        map.retain(|name, _| !name.starts_with("model.layers.2.") || name.ends_with("enorm.weight"));
    });
    let problems = fixture.problems();
    assert!(problems.total() > 64, "the collection is bounded, the count is not: {}", problems.total());
    assert_eq!(problems.iter().len(), 64);
    assert!(problems.to_string().contains("and "), "{problems}");
    for problem in &problems {
        assert_eq!(problem.kind, ProblemKind::MissingTensor);
        assert!(problem.fix.contains("num_nextn_predict_layers to 0"), "{problem}");
    }
    // Following the advice works.
    fixture.edit_config(|config| drop(config.insert("num_nextn_predict_layers".into(), json!(0))));
    assert_eq!(fixture.open().config().total_layers(), 2);
}

#[test]
fn an_mtp_layer_without_any_tensor_is_left_out_with_one_warning() {
    let fixture = fp8();
    fixture.edit_config(|config| {
        assert_eq!(config["num_nextn_predict_layers"], 1);
        // Also written by transformers 5.
        config["quantization_config"]["scale_fmt"] = json!("float");
    });
    let spec = small_spec(WeightFormat::Fp8);
    let without = Fixture::of(&SynthSpec {
        config: ModelConfig { num_nextn_predict_layers: 0, ..spec.config.clone() },
        ..spec
    });
    fs::copy(fixture.file("config.json"), without.file("config.json")).unwrap();
    let checkpoint = without.open();
    assert_eq!(checkpoint.config().total_layers(), 2);
    let warnings: Vec<&Problem> = checkpoint.warnings().iter().collect();
    assert_eq!(warnings.len(), 1, "{}", checkpoint.warnings());
    let index = without.file("model.safetensors.index.json");
    assert_names(
        warnings[0],
        ProblemKind::MissingTensor,
        &index,
        &["num_nextn_predict_layers", "without its MTP layer"],
    );
    assert_eq!(checkpoint.config().quantization.as_ref().unwrap().scale_fmt, ScaleFormat::F32);
}

#[test]
fn fused_experts_give_one_hint() {
    let fixture = Fixture::new(WeightFormat::Bf16);
    for layer in [1, 2] {
        let prefix = format!("model.layers.{layer}.mlp.experts.");
        let first = format!("{prefix}0.gate_proj.weight");
        let file = fixture.edit_shard(&first, |header, data| {
            for (name, bytes) in [("gate_up_proj", 8), ("down_proj", 4)] {
                let end = data.len();
                data.resize(end + bytes, 0);
                let entry =
                    json!({"dtype": "BF16", "shape": [bytes / 2], "data_offsets": [end, end + bytes]});
                header.insert(format!("{prefix}{name}"), entry);
            }
        });
        let name = json!(file.file_name().unwrap().to_str().unwrap());
        fixture.edit_index(|map| {
            map.retain(|tensor, _| !tensor.starts_with(&prefix));
            for tensor in ["gate_up_proj", "down_proj"] {
                map.insert(format!("{prefix}{tensor}"), name.clone());
            }
        });
    }
    let problem = fixture.problem();
    assert_eq!(problem.kind, ProblemKind::Unsupported);
    assert!(problem.subject.contains("model.layers.1.mlp.experts."), "{problem}");
    assert!(problem.fix.contains("save_original_format=True"), "{problem}");
}

#[test]
fn tensor_that_the_header_lacks() {
    let fixture = fp8();
    let path = fixture.edit_shard(UP, |header, _| {
        let entry = header.shift_remove(UP).unwrap();
        header.insert("renamed".into(), entry);
    });
    assert_names(&fixture.problem(), ProblemKind::MissingTensor, &path, &[UP, "index"]);
}

#[test]
fn wrong_shape() {
    let fixture = fp8();
    let path = fixture.edit_shard(KV_A, |header, _| header[KV_A]["shape"] = json!([256, 160]));
    assert_names(&fixture.problem(), ProblemKind::WrongShape, &path, &[KV_A, "[160, 256]", "[256, 160]"]);
    // A scale tensor of a ragged matrix has a row for the rest.
    let fixture = fp8();
    let path = fixture.edit_shard(KV_A_SCALE, |header, _| header[KV_A_SCALE]["shape"] = json!([1, 4]));
    assert_names(&fixture.problem(), ProblemKind::WrongShape, &path, &[KV_A_SCALE, "[2, 2]", "[1, 4]"]);
}

#[test]
fn wrong_dtype() {
    let fixture = fp8();
    let path = fixture.edit_shard(UP, |header, _| header[UP]["dtype"] = json!("F8_E5M2"));
    assert_names(&fixture.problem(), ProblemKind::WrongDtype, &path, &[UP, "F8_E4M3", "F8_E5M2"]);
    let fixture = fp8();
    let norm = "model.norm.weight";
    let path = fixture.edit_shard(norm, |header, _| header[norm]["dtype"] = json!("F16"));
    assert_names(
        &fixture.problem(),
        ProblemKind::WrongDtype,
        &path,
        &[norm, "BF16 or F32", "F16", "convert"],
    );
}

#[test]
fn configuration_of_another_checkpoint() {
    let fixture = fp8();
    fixture.edit_config(|config| drop(config.shift_remove("quantization_config")));
    for problem in &fixture.problems() {
        assert_eq!(problem.kind, ProblemKind::WrongDtype);
        assert!(problem.fix.contains("quantization_config"), "{problem}");
    }
    let fixture = Fixture::new(WeightFormat::Bf16);
    fixture.edit_config(|config| {
        let fp8 = json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]});
        config.insert("quantization_config".into(), fp8);
    });
    let problems = fixture.problems();
    assert!(problems.iter().any(|problem| problem.kind == ProblemKind::WrongDtype));
}

#[test]
fn nan_scale_names_tensor_and_block() {
    for (bits, shown) in [(f32::NAN, "NaN"), (0.0, "0"), (-1.5, "-1.5"), (f32::INFINITY, "inf")] {
        let fixture = fp8();
        // Element 3 of [2, 2]: the last block, of the ragged row.
        let path = fixture.poke(KV_A_SCALE, 12, &bits.to_le_bytes());
        let checkpoint = fixture.open();
        let error = checkpoint.matrix(KV_A).expect_err("a bad scale");
        let CheckpointError::BadNumber(problem) = error else { panic!("{error}") };
        let parts = [KV_A_SCALE, shown, "block (1, 1)", "rows from 128, columns from 128"];
        assert_names(&problem, ProblemKind::BadScale, &path, &parts);
        let verified = checkpoint.verify(NonZeroUsize::new(2).unwrap(), &|_, _| {});
        assert_eq!(verified.iter().collect::<Vec<_>>(), [&*problem]);
    }
}

#[test]
fn numbers_that_are_none() {
    let fixture = fp8();
    let bias = fixture.poke(BIAS, 8, &f32::NEG_INFINITY.to_le_bytes());
    let code = fixture.poke(UP, 256 + 5, &[0xFF]);
    let norm = fixture.poke("model.norm.weight", 6, &0x7F80u16.to_le_bytes());
    let checkpoint = fixture.open();
    let error = checkpoint.vector_f32(BIAS).expect_err("an infinity");
    assert!(error.to_string().contains("element 2") && error.to_string().contains("-inf"), "{error}");
    let error = checkpoint.vector_f32("model.norm.weight").expect_err("an infinity");
    assert!(error.to_string().contains("element 3"), "{error}");
    // Codes are judged by the backend that repacks them, or here.
    let verified = checkpoint.verify(NonZeroUsize::new(3).unwrap(), &|done, total| assert!(done <= total));
    let of = |name: &str| verified.iter().find(|problem| problem.subject.contains(name)).expect(name);
    assert_eq!(verified.total(), 3, "{verified}");
    assert_names(of(BIAS), ProblemKind::NonFinite, &bias, &["element 2"]);
    assert_names(of(UP), ProblemKind::NonFinite, &code, &["NaN at row 1, column 5"]);
    assert_names(of("model.norm.weight"), ProblemKind::NonFinite, &norm, &["inf at element 3"]);
}

#[test]
fn mtp_copy_that_is_none() {
    let fixture = fp8();
    let copy = "model.layers.2.shared_head.head.weight";
    let path = fixture.poke(copy, 100, &[1, 2]);
    let verified = fixture.open().verify(NonZeroUsize::MIN, &|_, _| {});
    assert_eq!(verified.total(), 1, "{verified}");
    assert_names(verified.iter().next().unwrap(), ProblemKind::Mismatch, &path, &[copy, "lm_head.weight"]);
}

#[test]
fn index_pointing_nowhere() {
    let fixture = fp8();
    fixture.edit_index(|map| drop(map.insert(UP.into(), json!("model-00009-of-000009.safetensors"))));
    let absent = fixture.file("model-00009-of-000009.safetensors");
    assert_names(&fixture.problem(), ProblemKind::Unreadable, &absent, &["No such file", "index"]);
    // Out of the directory is nowhere, too.
    for name in ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "nul\0"] {
        fixture.edit_index(|map| drop(map.insert(UP.into(), json!(name))));
        let index = fixture.file("model.safetensors.index.json");
        assert_names(&fixture.problem(), ProblemKind::BadValue, &index, &["weight_map"]);
    }
}

#[test]
fn index_that_is_none() {
    let fixture = fp8();
    let index = fixture.file("model.safetensors.index.json");
    for text in ["", "{}", "{\"weight_map\": {}}", "{\"weight_map\": {\"a\": 1}}", "[1]"] {
        fs::write(&index, text).unwrap();
        assert_names(&fixture.problem(), ProblemKind::Malformed, &index, &["weight_map"]);
    }
    fs::remove_file(&index).unwrap();
    assert_names(&fixture.problem(), ProblemKind::Unreadable, &index, &["model.safetensors"]);
    fs::create_dir(&index).unwrap();
    assert_names(&fixture.problem(), ProblemKind::Unreadable, &index, &["not a regular file"]);
}

#[test]
fn missing_directory_and_configuration() {
    let error = Checkpoint::open("/nonexistent/model").expect_err("no directory");
    assert!(error.to_string().contains("/nonexistent/model/config.json"), "{error}");
    let fixture = fp8();
    let config = fixture.file("config.json");
    fs::remove_file(&config).unwrap();
    assert_names(&fixture.problem(), ProblemKind::Unreadable, &config, &["No such file"]);
}

#[test]
fn unknown_value_and_missing_field() {
    let fixture = fp8();
    fixture.edit_config(|config| {
        config.insert("topk_method".into(), json!("group_limited_greedy"));
        config.shift_remove("kv_lora_rank");
    });
    let config = fixture.file("config.json");
    let problems = fixture.problems();
    let problems: Vec<&Problem> = problems.iter().collect();
    assert_eq!(problems.len(), 2);
    assert_names(
        problems[0],
        ProblemKind::Unsupported,
        &config,
        &["`topk_method`", "group_limited_greedy", "noaux_tc"],
    );
    assert_names(problems[1], ProblemKind::MissingField, &config, &["`kv_lora_rank`"]);
}

#[test]
fn v32_by_its_tensors() {
    let fixture = fp8();
    let indexer = "model.layers.0.self_attn.indexer.wk.weight";
    let path = fixture.edit_shard(UP, |header, data| {
        let end = data.len();
        data.extend([0; 8]);
        header.insert(
            indexer.into(),
            json!({"dtype": "BF16", "shape": [2, 2], "data_offsets": [end, end + 8]}),
        );
    });
    let file = path.file_name().unwrap().to_str().unwrap().to_owned();
    fixture.edit_index(|map| drop(map.insert(indexer.into(), json!(file))));
    assert_names(&fixture.problem(), ProblemKind::Unsupported, &path, &[indexer, "V3.2"]);
}

#[test]
fn what_does_not_prevent_use_is_a_warning() {
    let fixture = fp8();
    let extra = "model.layers.9.input_layernorm.weight";
    let path = fixture.edit_shard(BIAS, |header, data| {
        let end = data.len();
        data.extend([0; 4]);
        header.insert(extra.into(), json!({"dtype": "BF16", "shape": [2], "data_offsets": [end, end + 4]}));
        header.insert(
            "unlisted".into(),
            json!({"dtype": "U8", "shape": [0], "data_offsets": [end + 4, end + 4]}),
        );
    });
    let file = path.file_name().unwrap().to_str().unwrap().to_owned();
    fixture.edit_index(|map| drop(map.insert(extra.into(), json!(file))));
    let checkpoint = fixture.open();
    let warnings: Vec<&Problem> = checkpoint.warnings().iter().collect();
    assert_eq!(warnings.len(), 2, "{}", checkpoint.warnings());
    assert_names(warnings[0], ProblemKind::ExtraTensor, &path, &["unlisted", "index"]);
    assert_names(warnings[1], ProblemKind::ExtraTensor, &path, &[extra, "num_nextn_predict_layers"]);
    assert!(!checkpoint.contains(extra));
    assert!(matches!(checkpoint.vector_f32(extra), Err(CheckpointError::UnknownTensor { .. })));
}

#[test]
fn bf16_bias_is_used_with_a_warning() {
    let fixture = fp8();
    let path = fixture.edit_shard(BIAS, |header, data| {
        let offsets = header[BIAS]["data_offsets"].clone();
        let (begin, end) = (offsets[0].as_u64().unwrap() as usize, offsets[1].as_u64().unwrap() as usize);
        let halves: Vec<u8> = data[begin..end].chunks_exact(4).flat_map(|b| [b[2], b[3]]).collect();
        let removed = (end - begin) - halves.len();
        data.splice(begin..end, halves);
        for (name, entry) in header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
            let shift = |value: &Value, from: usize| {
                let value = value.as_u64().unwrap() as usize;
                if value >= from { value - removed } else { value }
            };
            let [first, last] = [0, 1].map(|at| shift(&entry["data_offsets"][at], end));
            entry["data_offsets"] = json!([first, last]);
            if name == BIAS {
                entry["dtype"] = json!("BF16");
            }
        }
    });
    let checkpoint = fixture.open();
    assert_eq!(checkpoint.warnings().total(), 1, "{}", checkpoint.warnings());
    let warning = checkpoint.warnings().iter().next().unwrap();
    assert_names(warning, ProblemKind::WrongDtype, &path, &[BIAS, "BF16"]);
    assert_eq!(checkpoint.vector_f32(BIAS).unwrap().len(), 8);
}

#[test]
fn asking_for_what_is_not_there() {
    let checkpoint = fp8().open();
    let missing = checkpoint.expert(LayerId(0), LogicalExpert(0)).expect_err("a dense layer");
    assert!(missing.to_string().contains("layer 0 has no expert 0: MoE layers are 1 to 2"), "{missing}");
    assert!(checkpoint.expert(LayerId(1), LogicalExpert(8)).is_err());
    assert!(checkpoint.expert_bytes(LayerId(3), LogicalExpert(0)).is_err());
    assert!(matches!(checkpoint.matrix("model.norm.weight"), Err(CheckpointError::WrongRank { .. })));
    assert!(matches!(checkpoint.vector_f32(UP), Err(CheckpointError::WrongRank { .. })));
    assert!(matches!(checkpoint.release("nothing"), Err(CheckpointError::UnknownTensor { .. })));
}

#[test]
fn inspect_tells_what_it_can_about_a_wreck() {
    let fixture = fp8();
    fixture.edit_config(|config| drop(config.insert("scoring_func".into(), json!("softmax"))));
    fs::remove_file(fixture.shard_of(UP)).unwrap();
    let options = Options {
        weights: cadre_checkpoint::WeightsOptions::default(),
        layout: Layout { shards: 2, redundant_slots: 0 },
        hash: true,
        verify: Some(NonZeroUsize::MIN),
    };
    let report = inspect(fixture.path(), &options, &|_, _| {});
    assert_eq!(report.problems.total(), 2, "{}", report.problems);
    assert!(report.found.shard_files_read + 1 == report.found.shard_files && report.found.tensors > 50);
    assert!(report.model_hash.is_none() && !report.verified && report.totals.is_none());
    let text = report.to_string();
    assert!(
        text.contains("softmax")
            && text.contains("1 of them unreadable")
            && text.contains("cannot be served"),
        "{text}"
    );
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<cadre_checkpoint::inspect::Report>(&json).unwrap(), report);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any byte of any header, configuration or index may be anything: an answer, never a panic.
    #[test]
    fn random_damage_is_answered(
        target in 0usize..4,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
    ) {
        thread_local!(static FIXTURE: Fixture = Fixture::headers(&crate::fixture::small_spec(WeightFormat::Fp8)));
        FIXTURE.with(|fixture| {
            let path = match target {
                0 => fixture.file("config.json"),
                1 => fixture.file("model.safetensors.index.json"),
                2 => fixture.shard_of(UP),
                _ => fixture.shard_of(BIAS),
            };
            let good = fs::read(&path).unwrap();
            let mut bytes = good.clone();
            let span = if target < 2 { bytes.len() } else { bytes.len().min(16_000) };
            for (at, byte) in &edits {
                bytes[at.index(span)] = *byte;
            }
            fs::write(&path, bytes).unwrap();
            if let Ok(checkpoint) = Checkpoint::open(fixture.path()) {
                for name in [KV_A, UP] {
                    // Holes read as zeros, and a scale of zero is refused.
                    assert!(checkpoint.matrix(name).is_err());
                }
                checkpoint.model_hash();
                let _ = checkpoint.vector_f32(BIAS);
            }
            fs::write(&path, good).unwrap();
        });
    }
}
