//! Good checkpoints: what the accessors hand out, and what they touch.

use std::{fs, num::NonZeroUsize};

use cadre_checkpoint::{Checkpoint, MatrixBytes, MatrixView, synth::WeightFormat};
use cadre_types::{LayerId, LogicalExpert};

use crate::fixture::{Fixture, pocket, resident_bytes, small_spec};

#[test]
fn the_bundled_checkpoint_opens_and_verifies() {
    let checkpoint = Checkpoint::open(pocket()).unwrap();
    assert_eq!(checkpoint.config().n_routed_experts, 32);
    assert!(checkpoint.warnings().is_empty(), "{}", checkpoint.warnings());
    let problems = checkpoint.verify(NonZeroUsize::new(2).unwrap(), &|_, _| {});
    assert!(problems.is_empty(), "{problems}");

    let MatrixView { rows, cols, data } =
        checkpoint.matrix("model.layers.6.self_attn.kv_a_proj_with_mqa.weight").unwrap();
    assert_eq!((rows, cols), (160, 256));
    let MatrixBytes::E4m3 { codes, scales } = data else { panic!("FP8") };
    assert_eq!((codes.len(), scales.len()), (160 * 256, 4));
    let head = checkpoint.matrix("lm_head.weight").unwrap();
    assert!(matches!(head.data, MatrixBytes::Bf16(bytes) if bytes.len() == 4096 * 256 * 2));
    assert_eq!(checkpoint.vector_f32("model.norm.weight").unwrap().len(), 256);
    assert_eq!(checkpoint.vector_f32("model.layers.1.mlp.gate.e_score_correction_bias").unwrap().len(), 32);
}

/// The bytes against the reference reader of the format.
#[test]
fn matrices_are_what_the_reference_reader_sees() {
    let fixture = Fixture::new(WeightFormat::Fp8);
    let checkpoint = fixture.open();
    let (layer, expert) = (LayerId(1), LogicalExpert(5));
    let views = checkpoint.expert(layer, expert).unwrap();
    let ranges = checkpoint.expert_bytes(layer, expert).unwrap();
    assert_eq!(ranges.len(), 6);
    for (at, (view, matrix)) in views.iter().zip(["gate_proj", "up_proj", "down_proj"]).enumerate() {
        let name = format!("model.layers.1.mlp.experts.5.{matrix}.weight");
        let bytes = fs::read(fixture.shard_of(&name)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensor = file.tensor(&name).unwrap();
        assert_eq!(tensor.shape(), [view.rows, view.cols]);
        let MatrixBytes::E4m3 { codes, scales } = &view.data else { panic!("FP8") };
        assert!(tensor.data() == *codes);
        let both = checkpoint.tensor_bytes(&name).unwrap();
        assert_eq!(both as usize, codes.len() + 4 * scales.len());
        let scale = file.tensor(&format!("{name}_scale_inv")).unwrap();
        let stored: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        assert_eq!(scale.data(), stored);
        for (range, data) in [(&ranges[2 * at], tensor.data()), (&ranges[2 * at + 1], scale.data())] {
            assert_eq!(fixture.file(&range.file), fixture.shard_of(&name));
            assert!(&bytes[range.range.start as usize..range.range.end as usize] == data);
        }
    }
}

#[test]
fn an_expert_touches_its_own_pages_and_gives_them_back() {
    let mut spec = small_spec(WeightFormat::Fp8);
    spec.config.n_routed_experts = 64;
    spec.max_shard_bytes = 64 << 20;
    let fixture = Fixture::of(&spec);
    let checkpoint = fixture.open();
    let file = fixture.shard_of("lm_head.weight");
    let opened = resident_bytes(&file);
    assert!(opened <= 256 << 10, "{opened} bytes resident after opening");
    let (layer, expert) = (LayerId(1), LogicalExpert(40));
    let mut sum = 0u64;
    for view in checkpoint.expert(layer, expert).unwrap() {
        let MatrixBytes::E4m3 { codes, .. } = view.data else { panic!("FP8") };
        sum += codes.iter().map(|&code| u64::from(code)).sum::<u64>();
    }
    assert!(sum > 0);
    let own: u64 =
        checkpoint.expert_bytes(layer, expert).unwrap().iter().map(|r| r.range.end - r.range.start).sum();
    let touched = resident_bytes(&file);
    // Six ranges, each widened by the kernel's 64 KiB fault window at both ends, out of 19 MB.
    assert!(touched >= own as usize && touched <= opened + own as usize + 6 * (128 << 10), "{touched}");
    checkpoint.release_expert(layer, expert).unwrap();
    let left = resident_bytes(&file);
    assert!(left <= opened, "{left} bytes left, {opened} before");
    checkpoint.will_need("lm_head.weight").unwrap();
}

#[test]
fn a_single_file_needs_no_index() {
    let mut spec = small_spec(WeightFormat::Bf16);
    spec.max_shard_bytes = 1 << 30;
    let fixture = Fixture::of(&spec);
    let sharded = fixture.open().model_hash();
    fs::rename(fixture.file("model-00001-of-000001.safetensors"), fixture.file("model.safetensors")).unwrap();
    fs::remove_file(fixture.file("model.safetensors.index.json")).unwrap();
    let checkpoint = fixture.open();
    assert!(matches!(checkpoint.matrix("lm_head.weight").unwrap().data, MatrixBytes::Bf16(_)));
    assert_ne!(checkpoint.model_hash(), sharded, "file names are part of the identity");
}

#[test]
fn mtp_copies_may_be_absent() {
    let fixture = Fixture::new(WeightFormat::Fp8);
    let copies = ["model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"];
    assert!(copies.iter().all(|name| fixture.open().contains(name)));
    fixture.edit_index(|map| map.retain(|name, _| !copies.contains(&name.as_str())));
    let checkpoint = fixture.open();
    assert!(copies.iter().all(|name| !checkpoint.contains(name)));
}

#[test]
fn f32_tensors_are_read_where_bf16_is_published() {
    let fixture = Fixture::new(WeightFormat::Fp8);
    let norm = "model.layers.0.input_layernorm.weight";
    let published = fixture.open().vector_f32(norm).unwrap();
    // The wide copy goes to the end of the shard under the same name.
    fixture.edit_shard(norm, |header, data| {
        let begin = data.len();
        data.extend(published.iter().flat_map(|value| value.to_le_bytes()));
        let old = header[norm]["data_offsets"].clone();
        header.insert(
            "unused".into(),
            serde_json::json!({"dtype": "BF16", "shape": [256], "data_offsets": old}),
        );
        header[norm] =
            serde_json::json!({"dtype": "F32", "shape": [256], "data_offsets": [begin, data.len()]});
    });
    assert_eq!(fixture.open().vector_f32(norm).unwrap(), published);
}

#[test]
fn the_hash_follows_the_content_and_not_the_place() {
    let fixture = Fixture::new(WeightFormat::Fp8);
    let hash = fixture.open().model_hash();
    assert_eq!(fixture.open().model_hash(), hash);

    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture.path()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    // The index's spelling does not matter; what it says does.
    let index = copy.path().join("model.safetensors.index.json");
    let value: serde_json::Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    fs::write(&index, serde_json::to_string(&value).unwrap()).unwrap();
    assert_eq!(Checkpoint::open(copy.path()).unwrap().model_hash(), hash);

    // The first byte of a shard's last sample.
    let path = fixture.shard_of("lm_head.weight");
    let good = fs::read(&path).unwrap();
    let mut bytes = good.clone();
    let at = bytes.len() - 4096;
    bytes[at] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert_ne!(fixture.open().model_hash(), hash);
    fs::write(&path, &good).unwrap();
    assert_eq!(fixture.open().model_hash(), hash);
    fixture.edit_config(|config| drop(config.insert("note".into(), "other".into())));
    assert_ne!(fixture.open().model_hash(), hash);
}
