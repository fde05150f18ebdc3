//! A placement small enough to check by hand.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::LayerLoad;

/// Layer 3: shard 0 holds 0 1 2, shard 1 holds 0 3. Layer 4: shard 0 holds 0 1, shard 1 holds 2 3 0.
fn placement() -> Placement {
    let slots = |shards: [&[u16]; 2]| -> Vec<Vec<LogicalExpert>> {
        shards.map(|slots| slots.iter().copied().map(LogicalExpert).collect()).to_vec()
    };
    let layers = vec![
        LayerPlacement { layer: LayerId(3), slots: slots([&[0, 1, 2], &[0, 3]]) },
        LayerPlacement { layer: LayerId(4), slots: slots([&[0, 1], &[2, 3, 0]]) },
    ];
    Placement::new(PlacementEpoch(9), 4, layers).unwrap()
}

fn load(third: [u64; 4], fourth: [u64; 4]) -> ExpertLoad {
    ExpertLoad::new(vec![
        LayerLoad { layer: LayerId(3), tokens: third.to_vec() },
        LayerLoad { layer: LayerId(4), tokens: fourth.to_vec() },
    ])
    .unwrap()
}

#[test]
fn a_report_says_balance_copies_and_risk() {
    let report = explain(&placement(), &load([20, 5, 5, 0], [0, 0, 10, 10])).unwrap();
    assert_eq!(report.layers[0].tokens_per_shard, [20.0, 10.0]);
    assert_eq!(report.layers[1].tokens_per_shard, [0.0, 20.0]);
    assert_eq!([report.layers[0].imbalance, report.layers[1].imbalance], [4.0 / 3.0, 2.0]);
    assert_eq!(report.worst_layer_imbalance, 2.0);
    assert_eq!(report.imbalance, 1.2);
    assert_eq!(report.min_copies(), 1);
    let text = report.to_string();
    let expected = "\
placement epoch 9: 4 experts in each of 2 layers over 2 shards
slots per shard and layer: 2 to 3
copies: 6 experts x 1, 2 experts x 2
imbalance (max/mean tokens per shard): 1.200 over all layers
  layer 3: 1.333
  layer 4: 2.000
losing shard 0 uncovers: 3 experts in 2 layers (layer 3: 1 2 and 1 more)
losing shard 1 uncovers: 3 experts in 2 layers (layer 3: 3 and 2 more)
";
    assert_eq!(text, expected);
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<PlacementReport>(&json).unwrap(), report);
}

#[test]
fn an_idle_model_is_balanced() {
    let report = explain(&placement(), &load([0; 4], [0; 4])).unwrap();
    assert_eq!((report.imbalance, report.worst_layer_imbalance), (1.0, 1.0));
}

#[test]
fn a_shard_without_lone_experts_uncovers_nothing() {
    let all: Vec<LogicalExpert> = (0..4).map(LogicalExpert).collect();
    let layers = vec![LayerPlacement { layer: LayerId(3), slots: vec![all; 2] }];
    let placement = Placement::new(PlacementEpoch(1), 4, layers).unwrap();
    let report = explain(&placement, &load([1; 4], [1; 4])).unwrap();
    assert_eq!(report.copies, [CopyCount { copies: 2, experts: 4 }]);
    assert_eq!(report.shard_loss[1].to_string(), "losing shard 1 uncovers: nothing");
}

#[test]
fn a_load_of_something_else_is_refused() {
    let missing = ExpertLoad::uniform([LayerId(3)], 4).unwrap();
    assert_eq!(explain(&placement(), &missing).unwrap_err(), ReportError::MissingLayer { layer: LayerId(4) });
    let other = ExpertLoad::uniform([LayerId(3), LayerId(4)], 5).unwrap();
    assert_eq!(
        explain(&placement(), &other).unwrap_err(),
        ReportError::ExpertCount { found: 5, expected: 4 }
    );
}
