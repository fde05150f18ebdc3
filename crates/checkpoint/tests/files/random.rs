//! Random weights from a folder without weights, and overridden configurations.

use std::{fs, path::Path};

use cadre_checkpoint::{
    Checkpoint, CheckpointError, DrawnData, MatrixSource, WeightsOptions, WeightsSource, table::table,
};
use cadre_types::{LayerId, LogicalExpert};

use crate::fixture::pocket;

/// What a user has before the download.
fn config_only() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(pocket().join("config.json"), dir.path().join("config.json")).unwrap();
    dir
}

fn options(seed: Option<u64>, overrides: &[&str]) -> WeightsOptions {
    WeightsOptions {
        source: seed.map_or(WeightsSource::Files, |seed| WeightsSource::Random { seed }),
        overrides: overrides.iter().map(|text| text.parse().unwrap()).collect(),
    }
}

fn refused(dir: &Path, options: &WeightsOptions) -> String {
    let error = Checkpoint::open_with(dir, options).expect_err("refused");
    assert_eq!(matches!(error, CheckpointError::Overridden { .. }), !options.overrides.is_empty());
    error.to_string()
}

/// Mean square of what a matrix means, over its first elements.
fn deviation(checkpoint: &Checkpoint, name: &str) -> f64 {
    let MatrixSource::Drawn(view) = checkpoint.source(name).unwrap() else { panic!("{name} is stored") };
    let count = (view.rows * view.cols).min(1 << 16);
    let square = |at: usize| {
        let value = view.draw.value(at as u64);
        let value = match &view.data {
            DrawnData::E4m3 { scales } => {
                let block = at / view.cols / 128 * view.cols.div_ceil(128) + at % view.cols / 128;
                cadre_numerics::e4m3::round(value) * scales[block]
            }
            DrawnData::F32 | DrawnData::Bf16 => value,
        };
        f64::from(value).powi(2)
    };
    ((0..count).map(square).sum::<f64>() / count as f64).sqrt()
}

#[test]
fn every_tensor_of_a_folder_without_weights_is_there_and_right_in_scale() {
    let dir = config_only();
    assert!(
        matches!(Checkpoint::open(dir.path()), Err(CheckpointError::Invalid { .. })),
        "there are no files"
    );
    for format in ["f32", "ue8m0"] {
        let changes =
            if format == "ue8m0" { vec!["quantization_config.scale_fmt=ue8m0"] } else { Vec::new() };
        let checkpoint = Checkpoint::open_with(dir.path(), &options(Some(1), &changes)).unwrap();
        let mut bytes = 0;
        for spec in table(checkpoint.config()).filter(|spec| !spec.is_scale()) {
            assert!(checkpoint.contains(&spec.name), "{}", spec.name);
            bytes += checkpoint.tensor_bytes(&spec.name).unwrap();
            if spec.shape.len() == 1 {
                let values = checkpoint.vector_f32(&spec.name).unwrap();
                assert_eq!(values.len(), spec.shape[0]);
                assert!(values.iter().all(|value| value.is_finite() && value.abs() < 2.0));
                continue;
            }
            let wanted = (spec.shape[1] as f64).recip().sqrt();
            let found = deviation(&checkpoint, &spec.name);
            // Some matrices have a few blocks only, whose scales differ by a factor of two.
            assert!(
                (0.6..1.4).contains(&(found / wanted)),
                "{format}, {}: {found}, wanted {wanted}",
                spec.name
            );
            if let MatrixSource::Drawn(view) = checkpoint.source(&spec.name).unwrap()
                && let DrawnData::E4m3 { scales } = &view.data
                && format == "ue8m0"
            {
                assert!(scales.iter().all(|scale| scale.to_bits() & 0x7F_FFFF == 0), "powers of two");
            }
        }
        let published: u64 = table(checkpoint.config()).map(|spec| spec.published_bytes()).sum();
        assert_eq!(bytes, published);
        let expert = checkpoint.expert_size(LayerId(1), LogicalExpert(0)).unwrap();
        assert_eq!(expert, 3 * (256 * 128 + 2 * 4));
        assert!(matches!(checkpoint.matrix("lm_head.weight"), Err(CheckpointError::Drawn { .. })));
        assert!(matches!(checkpoint.source("nothing"), Err(CheckpointError::UnknownTensor { .. })));
        assert!(matches!(checkpoint.source("model.norm.weight"), Err(CheckpointError::WrongRank { .. })));
    }
}

#[test]
fn the_hash_covers_seed_and_overrides() {
    let dir = config_only();
    let hash = |options: &WeightsOptions| Checkpoint::open_with(dir.path(), options).unwrap().model_hash();
    let first = hash(&options(Some(1), &[]));
    assert_eq!(first, hash(&options(Some(1), &[])));
    assert_ne!(first, hash(&options(Some(2), &[])));
    assert_ne!(first, hash(&options(Some(1), &["n_routed_experts=16"])));
    assert_ne!(first, hash(&options(Some(1), &["num_experts_per_tok=2"])));
    let both = ["n_routed_experts=16", "num_hidden_layers=3"];
    let turned = ["num_hidden_layers=3", "n_routed_experts=16"];
    assert_eq!(hash(&options(Some(1), &both)), hash(&options(Some(1), &turned)));

    // Files: a field that changes no tensor can be overridden, and is another model.
    let plain = Checkpoint::open(pocket()).unwrap().model_hash();
    let changed = options(None, &["num_experts_per_tok=2"]);
    let checkpoint = Checkpoint::open_with(pocket(), &changed).unwrap();
    assert_eq!(checkpoint.config().num_experts_per_tok, 2);
    assert_ne!(checkpoint.model_hash(), plain);
    assert_eq!(checkpoint.weights().to_string(), "files with num_experts_per_tok=2");
}

#[test]
fn overrides_that_make_no_model_are_refused_by_name() {
    let dir = config_only();
    for (change, words) in [
        ("n_experts=16", "n_routed_experts"),
        ("n_routed_experts=true", "n_routed_experts"),
        ("n_routed_experts=\"many\"", "n_routed_experts"),
        ("n_routed_experts=30", "n_group"),
        ("num_hidden_layers=0", "num_hidden_layers"),
        ("norm_topk_prob=1", "norm_topk_prob"),
        ("rope_scaling.factr=8", "rope_scaling.factor"),
        ("nothing.inside=8", "object"),
        ("scoring_func=softmax", "sigmoid"),
    ] {
        let error = refused(dir.path(), &options(Some(1), &[change]));
        let key = change.split('=').next().unwrap();
        for words in [key, words, "random:1"] {
            assert!(error.contains(words), "{change}: {words} not in {error}");
        }
    }
    let twice = refused(dir.path(), &options(Some(1), &["n_group=4", "n_group=2"]));
    assert!(twice.contains("n_group=4 and n_group=2"), "{twice}");
    // Files have the sizes that they have.
    let error = refused(&pocket(), &options(None, &["n_routed_experts=16"]));
    for words in
        ["files with n_routed_experts=16", "random:SEED", "mlp.gate.weight", "[16, 256]", "[32, 256]"]
    {
        assert!(error.contains(words), "{words} not in {error}");
    }
}
