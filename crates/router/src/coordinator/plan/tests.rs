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

fn plan(options: &RouterOptions, config: &ModelConfig) -> Result<Placement, RouterError> {
    let layout = layout(options, config)?;
    Ok(Planner::new(options, config)?.plan(layout, &[], PlacementEpoch(1))?)
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
    // A load with the MTP layer (6), measured while it was placed, is one without: nothing drafts.
    assert!(beside.layer(LayerId(6)).is_none());
    std::fs::write(dir.path().join(LOAD_FILE), hot(7, 1..6)).unwrap();
    assert_eq!(plan(&options(dir.path(), 1), &config).unwrap(), beside);
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
        (hot(0, 1..5).as_str(), "layer 5 of the model is missing"),
        (hot(0, 0..7).as_str(), "layer 0 is no expert layer"),
    ] {
        let error = refused(text);
        assert!(error.contains("load.json") && error.contains(words), "{error}");
    }
    std::fs::remove_file(&path).unwrap();
    let options = RouterOptions { expert_load: Some(path), ..options(dir.path(), 0) };
    assert!(plan(&options, &config).unwrap_err().to_string().contains("load.json"));
}

#[test]
fn the_layout_comes_from_flags_or_from_a_file_and_never_half_of_each() {
    let (dir, config) = (tempfile::tempdir().unwrap(), config());
    let of = |options: RouterOptions| layout(&options, &config);
    let flags = of(options(dir.path(), 32)).unwrap();
    assert_eq!(flags, Layout { shards: 4, redundant_slots: 32, min_copies: 2 }, "what the slots afford");
    let fewer = RouterOptions { min_copies: NonZeroU16::new(1), ..options(dir.path(), 32) };
    assert_eq!(of(fewer).unwrap().min_copies, 1);

    let path = dir.path().join("layout.json");
    let with_file = || RouterOptions { layout_file: Some(path.clone()), ..options(dir.path(), 32) };
    std::fs::write(&path, r#"{"shards": 8, "redundantSlots": 5, "minCopies": 1}"#).unwrap();
    assert_eq!(of(with_file()).unwrap(), Layout { shards: 8, redundant_slots: 5, min_copies: 1 });
    for text in ["{\"shards\": 8}", "{", r#"{"shards": 8, "redundantSlots": 5, "minCopies": 1, "x": 0}"#] {
        std::fs::write(&path, text).unwrap();
        let error = of(with_file()).unwrap_err().to_string();
        assert!(error.contains("layout.json") && error.contains("redundantSlots"), "{error}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(of(with_file()).unwrap_err().to_string().contains("layout.json"));
}

#[test]
fn a_placement_satisfies_layouts_that_ask_for_no_more_copies_than_it_has() {
    let (dir, config) = (tempfile::tempdir().unwrap(), config());
    let planner = Planner::new(&options(dir.path(), 0), &config).unwrap();
    let wanted = Layout { shards: 4, redundant_slots: 32, min_copies: 2 };
    let placement = planner.plan(wanted, &[], PlacementEpoch(3)).unwrap();
    assert_eq!(planner.layout_of(&placement), wanted);
    assert!(planner.fits(&placement).is_ok() && planner.satisfies(&placement, wanted));
    assert!(planner.satisfies(&placement, Layout { min_copies: 1, ..wanted }));
    assert!(!planner.satisfies(&placement, Layout { min_copies: 3, ..wanted }));
    assert!(!planner.satisfies(&placement, Layout { shards: 5, ..wanted }));
    assert!(!planner.satisfies(&placement, Layout { redundant_slots: 33, ..wanted }));
    let one_layer = Placement::new(PlacementEpoch(1), 32, placement.layers()[..1].to_vec()).unwrap();
    assert!(planner.fits(&one_layer).is_err(), "of another model");
}
