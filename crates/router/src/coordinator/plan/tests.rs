#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::num::NonZeroU16;

use cadre_checkpoint::Checkpoint;
use cadre_types::{LayerId, LogicalExpert};
use serde_json::json;

use super::*;

fn config() -> ModelConfig {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/pocket");
    Checkpoint::open(dir).unwrap().config().clone()
}

fn options(dir: &Path, redundant_slots: usize) -> RouterOptions {
    RouterOptions { redundant_slots, ..RouterOptions::new(dir.to_owned(), NonZeroU16::new(4).unwrap()) }
}

/// A load in which one expert of every layer is far hotter than the rest.
fn hot(expert: usize, layers: std::ops::Range<u16>) -> String {
    let mut tokens = vec![1; 32];
    tokens[expert] = 1000;
    let layers: Vec<_> = layers.map(|layer| json!({"layer": layer, "tokens": tokens})).collect();
    json!({ "layers": layers }).to_string()
}

fn copies(placement: &Placement, expert: u16) -> usize {
    placement.replicas(LayerId(3), LogicalExpert(expert)).len()
}

#[test]
fn the_load_decides_who_gets_the_extra_slot_and_a_named_file_comes_first() {
    let (dir, config) = (tempfile::tempdir().unwrap(), config());
    let uniform = plan(&options(dir.path(), 1), &config).unwrap();
    assert_eq!((uniform.epoch(), uniform.num_shards()), (PlacementEpoch(1), 4));
    assert_eq!((copies(&uniform, 7), copies(&uniform, 9)), (1, 1));
    std::fs::write(dir.path().join(LOAD_FILE), hot(7, 1..7)).unwrap();
    let beside = plan(&options(dir.path(), 1), &config).unwrap();
    assert_eq!((copies(&beside, 7), copies(&beside, 9)), (2, 1));
    let named = dir.path().join("other.json");
    std::fs::write(&named, hot(9, 1..7)).unwrap();
    let options = RouterOptions { expert_load: Some(named), ..options(dir.path(), 1) };
    let placement = plan(&options, &config).unwrap();
    assert_eq!((copies(&placement, 7), copies(&placement, 9)), (1, 2));
    assert_eq!(plan(&options, &config).unwrap(), placement, "the same inputs give the same placement");
}

#[test]
fn a_bad_load_file_is_named() {
    let (dir, config) = (tempfile::tempdir().unwrap(), config());
    let path = dir.path().join("load.json");
    let refused = |text: &str| {
        std::fs::write(&path, text).unwrap();
        let options = RouterOptions { expert_load: Some(path.clone()), ..options(dir.path(), 0) };
        plan(&options, &config).unwrap_err().to_string()
    };
    for (text, words) in [
        ("{\"layers\": [", "EOF"),
        (hot(0, 1..6).as_str(), "layer 6 of the model is missing"),
        (hot(0, 0..7).as_str(), "layer 0 is no expert layer"),
    ] {
        let error = refused(text);
        assert!(error.contains("load.json") && error.contains(words), "{error}");
    }
    std::fs::remove_file(&path).unwrap();
    let options = RouterOptions { expert_load: Some(path), ..options(dir.path(), 0) };
    assert!(plan(&options, &config).unwrap_err().to_string().contains("load.json"));
}
