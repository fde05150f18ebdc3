//! EPLB against the outputs of the published code (`tests/golden/eplb-golden.json`) and the worked
//! examples of spec §9.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path};

use cadre_placement::eplb::{
    ClusterShape, EplbError, ExpertMap, balanced_packing, rebalance_experts, replicate_experts,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    name: String,
    weight: Option<Vec<Vec<f32>>>,
    num_replicas: usize,
    num_groups: usize,
    num_nodes: usize,
    num_gpus: usize,
    phy2log: Option<Vec<Vec<usize>>>,
    logcnt: Option<Vec<Vec<usize>>>,
    imbalance_max: f64,
    imbalance_mean: f64,
}

fn golden() -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/eplb-golden.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Max / mean of tokens per GPU.
fn imbalance(weight: &[f32], map: &ExpertMap, num_gpus: usize) -> f64 {
    let share = |&expert: &usize| f64::from(weight[expert]) / map.logical_count[expert] as f64;
    let per_gpu = map.physical_to_logical.len() / num_gpus;
    let gpus: Vec<f64> =
        map.physical_to_logical.chunks(per_gpu).map(|gpu| gpu.iter().map(share).sum()).collect();
    let mean = gpus.iter().sum::<f64>() / num_gpus as f64;
    gpus.into_iter().fold(0.0, f64::max) / mean
}

#[test]
fn every_golden_case_is_reproduced() {
    let mut checked = 0;
    for case in golden() {
        // The V3-sized cases carry no weights, only what the published code made of them.
        let Some(weight) = case.weight else { continue };
        let shape = ClusterShape {
            num_replicas: case.num_replicas,
            num_groups: case.num_groups,
            num_nodes: case.num_nodes,
            num_gpus: case.num_gpus,
        };
        let maps = rebalance_experts(&weight, shape).unwrap();
        let physical: Vec<_> = maps.iter().map(|map| map.physical_to_logical.clone()).collect();
        let counts: Vec<_> = maps.iter().map(|map| map.logical_count.clone()).collect();
        assert_eq!(Some(physical), case.phy2log, "{}: physical_to_logical", case.name);
        assert_eq!(Some(counts), case.logcnt, "{}: logical_count", case.name);
        for map in &maps {
            for (expert, copies) in map.logical_to_physical.iter().enumerate() {
                assert_eq!(copies.len(), map.logical_count[expert]);
                assert!(copies.iter().all(|&copy| map.physical_to_logical[copy] == expert));
            }
        }
        let imbalances: Vec<f64> =
            weight.iter().zip(&maps).map(|(w, map)| imbalance(w, map, case.num_gpus)).collect();
        let max = imbalances.iter().copied().fold(0.0, f64::max);
        let mean = imbalances.iter().sum::<f64>() / imbalances.len() as f64;
        // The golden figures were summed in F32.
        assert!((max - case.imbalance_max).abs() < 1e-5, "{}: {max}", case.name);
        assert!((mean - case.imbalance_mean).abs() < 1e-5, "{}: {mean}", case.name);
        checked += 1;
    }
    assert_eq!(checked, 7, "cases with weights in the golden file");
}

const W0: [f32; 12] = [90., 132., 40., 61., 104., 165., 39., 4., 73., 56., 183., 86.];

#[test]
fn the_worked_example_step_by_step() {
    let groups = balanced_packing(&[262., 330., 116., 325.], 2).unwrap();
    assert_eq!((groups.pack, groups.rank), (vec![1, 0, 0, 1], vec![1, 0, 1, 0]));

    let node0 = replicate_experts(&[61., 104., 165., 39., 4., 73.], 8).unwrap();
    assert_eq!(node0.physical_to_logical, [0, 1, 2, 3, 4, 5, 2, 1]);
    assert_eq!(node0.rank, [0, 0, 0, 0, 0, 0, 1, 1]);
    assert_eq!(node0.logical_count, [1, 2, 2, 1, 1, 1]);
}

#[test]
fn the_worked_example_globally() {
    // Three nodes do not divide one group: the global form.
    let shape = ClusterShape { num_replicas: 16, num_groups: 1, num_nodes: 3, num_gpus: 8 };
    let maps = rebalance_experts(&[W0.to_vec()], shape).unwrap();
    let [map] = maps.as_slice() else { panic!("one layer") };
    assert_eq!(map.physical_to_logical, [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1]);
    assert_eq!(map.logical_to_physical[10], [0, 2]);
    let share = |expert: usize| W0[expert] / map.logical_count[expert] as f32;
    let gpus: Vec<f32> = map.physical_to_logical.chunks(2).map(|gpu| share(gpu[0]) + share(gpu[1])).collect();
    assert_eq!(gpus, [130.5, 95.5, 130., 138., 138.5, 134.5, 134., 132.]);
}

#[test]
fn one_item_per_pack_keeps_its_number() {
    let packing = balanced_packing(&[1., 9., 5.], 3).unwrap();
    assert_eq!((packing.pack, packing.rank), (vec![0, 1, 2], vec![0, 0, 0]));
}

#[test]
fn ties_go_to_the_lowest_index() {
    assert_eq!(replicate_experts(&[3., 6., 6., 6.], 6).unwrap().physical_to_logical, [0, 1, 2, 3, 1, 2]);
    let packing = balanced_packing(&[5.; 6], 3).unwrap();
    assert_eq!((packing.pack, packing.rank), (vec![0, 1, 2, 0, 1, 2], vec![0, 0, 0, 1, 1, 1]));
}

#[test]
fn what_does_not_divide_is_refused_by_name() {
    let shape = ClusterShape { num_replicas: 16, num_groups: 4, num_nodes: 2, num_gpus: 8 };
    let refused = |shape| rebalance_experts(&[W0.to_vec()], shape).unwrap_err().to_string();
    assert_eq!(
        refused(ClusterShape { num_replicas: 17, ..shape }),
        "rebalance_experts: 17 replicas do not divide evenly over 8 gpus"
    );
    assert_eq!(
        refused(ClusterShape { num_gpus: 7, ..shape }),
        "rebalance_experts: 7 gpus do not divide evenly over 2 nodes"
    );
    assert_eq!(
        refused(ClusterShape { num_groups: 10, ..shape }),
        "rebalance_experts: 12 experts do not divide evenly over 10 groups"
    );
    assert_eq!(
        refused(ClusterShape { num_replicas: 8, ..shape }),
        "replicate_experts: 4 replicas cannot hold 6 experts"
    );
    assert_eq!(replicate_experts(&[], 3), Err(EplbError::TooFewReplicas { replicas: 3, experts: 0 }));
    assert!(balanced_packing(&[1., f32::NAN], 1).is_err());
    assert!(balanced_packing(&[1., -1.], 1).is_err());
    assert!(balanced_packing(&[1.], 0).is_err());
}
