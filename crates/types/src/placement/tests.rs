#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

fn layer(layer: u16, slots: &[&[u16]]) -> LayerPlacement {
    let experts = |ids: &&[u16]| ids.iter().map(|&id| LogicalExpert(id)).collect();
    LayerPlacement { layer: LayerId(layer), slots: slots.iter().map(experts).collect() }
}

fn placement(layers: Vec<LayerPlacement>) -> Result<Placement, PlacementError> {
    Placement::new(PlacementEpoch(3), 3, layers)
}

#[test]
fn replicas_are_found_by_ascending_shard() {
    let placement = placement(vec![layer(2, &[&[0, 1], &[2, 0]]), layer(5, &[&[2], &[1, 0]])]).unwrap();
    let at = |shard, slot| Replica { shard: ShardIndex(shard), slot: SlotIndex(slot) };
    assert_eq!(placement.replicas(LayerId(2), LogicalExpert(0)), [at(0, 0), at(1, 1)]);
    assert_eq!(placement.replicas(LayerId(5), LogicalExpert(0)), [at(1, 1)]);
    assert!(placement.replicas(LayerId(3), LogicalExpert(0)).is_empty(), "layer 3 is not placed");
    assert!(placement.replicas(LayerId(2), LogicalExpert(9)).is_empty(), "there is no expert 9");
    assert_eq!(placement.num_shards(), 2);
    let held: Vec<_> =
        placement.shard_slots(ShardIndex(0)).map(|(layer, slots)| (layer.0, slots.len())).collect();
    assert_eq!(held, [(2, 2), (5, 1)]);
    assert_eq!(placement.shard_slots(ShardIndex(7)).count(), 0);
}

#[test]
fn what_is_no_placement_is_refused_by_name() {
    let refused = |layers| placement(layers).unwrap_err().to_string();
    let good = || layer(2, &[&[0, 1, 2]]);
    assert_eq!(refused(vec![good(), good()]), "placement: layer 2 is out of order or given twice");
    assert_eq!(
        refused(vec![good(), layer(1, &[&[0, 1, 2]])]),
        "placement: layer 1 is out of order or given twice"
    );
    assert_eq!(
        refused(vec![good(), layer(3, &[&[0, 1], &[2]])]),
        "placement of layer 3: 2 shards, expected 1"
    );
    assert_eq!(
        refused(vec![layer(2, &[&[0, 1, 2, 3]])]),
        "placement of layer 2: expert 3 does not exist, the model has 3"
    );
    assert_eq!(
        refused(vec![layer(2, &[&[0, 1, 2, 1]])]),
        "placement of layer 2: shard 0 holds expert 1 twice"
    );
    assert_eq!(refused(vec![layer(2, &[&[0, 2]])]), "placement of layer 2: no slot holds expert 1");
}

#[test]
fn the_digest_is_of_the_slots_and_not_of_the_epoch() {
    let one = placement(vec![layer(2, &[&[0, 1], &[2, 0]])]).unwrap();
    assert_eq!(one.digest(), one.with_epoch(PlacementEpoch(8)).digest());
    assert_eq!(one.with_epoch(PlacementEpoch(8)).epoch(), PlacementEpoch(8));
    for other in [
        vec![layer(3, &[&[0, 1], &[2, 0]])],
        vec![layer(2, &[&[1, 0], &[2, 0]])],
        vec![layer(2, &[&[0, 1, 2], &[0]])],
        vec![layer(2, &[&[0, 1], &[2, 0], &[]])],
    ] {
        assert_ne!(placement(other.clone()).unwrap().digest(), one.digest(), "{other:?}");
    }
}
