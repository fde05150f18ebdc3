#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_types::{LayerPlacement, PlacementEpoch, SlotIndex};
use proptest::prelude::*;

use super::*;

const LAYER: LayerId = LayerId(2);

fn placement(slots: Vec<Vec<u16>>, experts: usize) -> Placement {
    let slots = slots.into_iter().map(|shard| shard.into_iter().map(LogicalExpert).collect()).collect();
    Placement::new(PlacementEpoch(1), experts, vec![LayerPlacement { layer: LAYER, slots }]).unwrap()
}

fn pairs_of(topk: &[&[u16]]) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for (row, experts) in topk.iter().enumerate() {
        for &expert in *experts {
            let target = pairs.len() as u32;
            pairs.push(Pair { row: row as u32, expert: LogicalExpert(expert), target });
        }
    }
    pairs
}

fn limits() -> FrameLimits {
    FrameLimits::of(RowFormat::E4m3, RowFormat::Bf16, 256)
}

#[test]
fn a_token_goes_once_to_a_shard_and_pairs_ascend_by_slot() {
    let placement = placement(vec![vec![3, 0], vec![1, 2]], 4);
    let pairs = pairs_of(&[&[0, 3], &[1, 2], &[0, 1]]);
    let plan = Planner::default().plan(LAYER, &placement, &pairs, limits(), |_, _, _| Some(0));
    assert_eq!(plan.unplaced, []);
    let [first, second] = plan.frames.try_into().unwrap();
    // Shard 0 has expert 3 in slot 0 and expert 0 in slot 1; row 0 wants both and is sent once.
    assert_eq!((first.shard, first.rows), (ShardIndex(0), vec![0, 2]));
    assert_eq!((first.pair_slots, first.pair_tokens), (vec![0, 1, 1], vec![0, 0, 1]));
    assert_eq!(first.targets, [1, 0, 4]);
    assert_eq!((second.shard, second.rows), (ShardIndex(1), vec![1, 2]));
    assert_eq!((second.pair_slots, second.pair_tokens), (vec![0, 0, 1], vec![0, 1, 0]));
    assert_eq!(second.targets, [2, 5, 3]);
}

#[test]
fn few_tokens_of_an_expert_stay_together_and_many_split_evenly() {
    let placement = placement(vec![vec![0], vec![0]], 1);
    let topk: Vec<&[u16]> = vec![&[0]; RUN_TOKENS + 1];
    for (rows, expected) in [(RUN_TOKENS, vec![64]), (RUN_TOKENS + 1, vec![33, 32])] {
        let mut runs = Vec::new();
        Planner::default().plan(LAYER, &placement, &pairs_of(&topk[..rows]), limits(), |_, copies, n| {
            assert_eq!(copies.len(), 2);
            runs.push(n);
            Some(runs.len() % 2)
        });
        assert_eq!(runs, expected);
    }
}

#[test]
fn without_a_copy_pairs_are_unplaced_and_the_rest_goes() {
    let placement = placement(vec![vec![0], vec![1]], 2);
    let pairs = pairs_of(&[&[0, 1], &[1]]);
    let usable = |_: LogicalExpert, copies: &[Replica], _| (copies[0].shard.0 == 0).then_some(0);
    let plan = Planner::default().plan(LAYER, &placement, &pairs, limits(), usable);
    assert_eq!(plan.frames.len(), 1);
    assert_eq!(plan.unplaced, [pairs[1], pairs[2]]);
}

#[test]
fn the_wire_limits_hold_a_prefill_chunk_of_v3() {
    let limits = FrameLimits::of(RowFormat::Bf16, RowFormat::Bf16, 7168);
    assert!(limits.fits(4096, 4096));
    assert!(!limits.fits(4097, 4097), "tokens");
    assert!(!limits.fits(4096, 8 * 4096), "answer bytes");
}

#[derive(Debug, Clone)]
struct Case {
    slots: Vec<Vec<u16>>,
    experts: u16,
    topk: Vec<Vec<u16>>,
    choices: Vec<u8>,
    max_tokens: usize,
    max_bytes: usize,
}

fn cases() -> impl Strategy<Value = Case> {
    (1_u16..12, 1_usize..5).prop_flat_map(|(experts, shards)| {
        // Home of every expert, then which further shards hold a copy.
        let homes = prop::collection::vec((0..shards, any::<u8>()), experts as usize);
        let tokens = prop::collection::vec(
            prop::collection::btree_set(0..experts, 0..=usize::from(experts).min(4)),
            0..40,
        );
        (homes, tokens, prop::collection::vec(any::<u8>(), 1..20), 1_usize..10, 1_usize..4000).prop_map(
            move |(homes, tokens, choices, max_tokens, max_bytes)| {
                let mut slots = vec![Vec::new(); shards];
                for (expert, (home, copies)) in homes.iter().enumerate() {
                    for (shard, held) in slots.iter_mut().enumerate() {
                        if shard == *home || copies & (1 << shard) != 0 {
                            held.push(expert as u16);
                        }
                    }
                }
                let topk = tokens.into_iter().map(|set| set.into_iter().collect()).collect();
                Case { slots, experts, topk, choices, max_tokens, max_bytes }
            },
        )
    })
}

proptest! {
    /// Every pair is computed exactly once, by a slot that holds its expert, within the limits; and
    /// gathering, computing and putting the rows in their places give what computing each pair alone gives.
    #[test]
    fn plan_compute_scatter_is_the_direct_computation(case in cases()) {
        let placement = placement(case.slots.clone(), usize::from(case.experts));
        let topk: Vec<&[u16]> = case.topk.iter().map(Vec::as_slice).collect();
        let pairs = pairs_of(&topk);
        let limits = FrameLimits {
            row_bytes: 2, answer_bytes: 2, max_tokens: case.max_tokens, max_bytes: case.max_bytes,
        };
        let mut asked = 0;
        let plan = Planner::default().plan(LAYER, &placement, &pairs, limits, |_, copies, run| {
            assert!(run > 0 && (copies.len() == 1 || run <= RUN_TOKENS));
            asked += 1;
            let choice = case.choices[asked % case.choices.len()] as usize;
            // One choice in eight finds no usable copy.
            (choice % 8 != 7).then_some(choice % copies.len())
        });

        let activations: Vec<u8> = (0..topk.len()).flat_map(|row| [row as u8, 0xA0]).collect();
        let source = HostRows {
            format: RowFormat::Bf16, rows: topk.len(), cols: 1, data: &activations, scales: &[],
        };
        let mut out = vec![0xFF; pairs.len() * 2];
        let mut computed = 0;
        for frame in &plan.frames {
            prop_assert!(frame.rows.windows(2).all(|rows| rows[0] < rows[1]));
            prop_assert!(frame.rows.len() == 1 || frame.rows.len() <= case.max_tokens);
            prop_assert!(frame.rows.len() == 1 || frame.targets.len() * 2 <= case.max_bytes);
            let order: Vec<_> = frame.pair_slots.iter().zip(&frame.pair_tokens).collect();
            prop_assert!(order.windows(2).all(|pair| pair[0] < pair[1]));
            let mut data = Vec::new();
            gather(source, &frame.rows, &mut data, &mut Vec::new());
            let answer: Vec<u8> = order.iter().flat_map(|(slot, token)| {
                let held = &case.slots[frame.shard.index()];
                [data[**token as usize * 2], held[**slot as usize] as u8]
            }).collect();
            for (row, &target) in answer.chunks(2).zip(&frame.targets) {
                out[target as usize * 2..][..2].copy_from_slice(row);
            }
            computed += frame.targets.len();
        }
        prop_assert_eq!(computed + plan.unplaced.len(), pairs.len());
        for pair in &pairs {
            let at = pair.target as usize * 2;
            let row = [pair.row as u8, pair.expert.0 as u8];
            if plan.unplaced.contains(pair) {
                prop_assert_eq!(&out[at..at + 2], &[0xFF, 0xFF]);
            } else {
                prop_assert_eq!(&out[at..at + 2], &row);
            }
        }
    }

    /// A gather of rows is those rows, whether they are a range or not.
    #[test]
    fn gather_takes_rows_and_their_scales(rows in prop::collection::btree_set(0_u32..20, 0..20)) {
        let data: Vec<u8> = (0..20_u8).flat_map(|row| vec![row; 130]).collect();
        let scales: Vec<u8> = (0..20_u8).flat_map(|row| vec![row; 8]).collect();
        let source = HostRows {
            format: RowFormat::E4m3, rows: 20, cols: 130, data: &data, scales: &scales,
        };
        let rows: Vec<u32> = rows.into_iter().collect();
        let (mut got, mut got_scales) = (Vec::new(), Vec::new());
        gather(source, &rows, &mut got, &mut got_scales);
        let wanted: Vec<u8> = rows.iter().flat_map(|&row| vec![row as u8; 130]).collect();
        let wanted_scales: Vec<u8> = rows.iter().flat_map(|&row| vec![row as u8; 8]).collect();
        prop_assert_eq!(&got, &wanted);
        prop_assert_eq!(&got_scales, &wanted_scales);
        // A range is slices of the very memory.
        let source = EncodedRows {
            format: RowFormat::E4m3, rows: 20, cols: 130, data: data.into(), scales: scales.into(),
        };
        let range = rows.windows(2).all(|pair| pair[0] + 1 == pair[1]) && !rows.is_empty();
        match slice(&source, &rows) {
            None => prop_assert!(!range),
            Some(rows_of) => {
                prop_assert!(range && rows_of.rows == rows.len());
                prop_assert_eq!(&rows_of.data, &wanted);
                prop_assert_eq!(&rows_of.scales, &wanted_scales);
                prop_assert_eq!(rows_of.data.as_ptr(), source.data[rows[0] as usize * 130..].as_ptr());
            }
        }
    }
}

#[test]
fn replicas_carry_the_slot_that_a_frame_names() {
    let placement = placement(vec![vec![1, 0], vec![0]], 2);
    let copies = placement.replicas(LAYER, LogicalExpert(0));
    assert_eq!(copies[0].slot, SlotIndex(1));
    let pairs = pairs_of(&[&[0]]);
    let plan = Planner::default().plan(LAYER, &placement, &pairs, limits(), |_, _, _| Some(0));
    assert_eq!(plan.frames[0].pair_slots, [1]);
}
