#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_types::{ModelHash, NumericsClass, PlacementEpoch};
use proptest::prelude::*;

use super::*;

fn contract(numerics: NumericsClass) -> ShardContract {
    ShardContract {
        shard: ShardIndex(2),
        generation: Generation { model: ModelHash([1; 16]), numerics, epoch: PlacementEpoch(9) },
        hidden: 130,
        slots: vec![(LayerId(3), 4), (LayerId(5), 2)],
    }
}

fn frame(contract: &ShardContract) -> DispatchFrame {
    let format = RowFormat::dispatch(contract.generation.numerics);
    DispatchFrame {
        sequence: 1,
        generation: contract.generation,
        layer: LayerId(3),
        tokens: 2,
        format,
        data: vec![0; 2 * format.row_bytes(130)].into(),
        scales: vec![0; 2 * 4 * format.row_scales(130)].into(),
        pair_tokens: vec![0, 1, 0],
        pair_slots: vec![0, 0, 3],
    }
}

fn refusal(change: impl FnOnce(&mut DispatchFrame)) -> Refusal {
    let contract = contract(NumericsClass::Fp8);
    let mut frame = frame(&contract);
    change(&mut frame);
    contract.check(&frame).unwrap_err()
}

#[test]
fn a_fitting_frame_passes_in_every_class() {
    for class in NumericsClass::ALL {
        let contract = contract(class);
        contract.check(&frame(&contract)).unwrap();
    }
}

#[test]
fn an_empty_frame_passes() {
    let contract = contract(NumericsClass::Bf16);
    let mut probe = frame(&contract);
    (probe.tokens, probe.data, probe.scales) = (0, Bytes::new(), Bytes::new());
    (probe.pair_tokens, probe.pair_slots) = (Vec::new(), Vec::new());
    contract.check(&probe).unwrap();
}

#[test]
fn generations_are_told_apart() {
    let epoch = refusal(|frame| frame.generation.epoch = PlacementEpoch(8));
    assert_eq!(epoch.code, RefusalCode::Epoch);
    assert_eq!(epoch.message, "shard 2, layer 3, epoch 9: placement epoch 8 is not ours (epoch 9)");
    let model = refusal(|frame| frame.generation.model = ModelHash([2; 16]));
    assert_eq!(model.code, RefusalCode::Generation);
    let class = refusal(|frame| frame.generation.numerics = NumericsClass::F32);
    assert_eq!(class.code, RefusalCode::Generation);
}

#[test]
fn sizes_and_indices_that_do_not_fit_are_malformed() {
    type Change = fn(&mut DispatchFrame);
    let cases: [(&str, Change); 9] = [
        ("rows are Bf16", |frame| frame.format = RowFormat::Bf16),
        ("259 activation bytes", |frame| frame.data.truncate(259)),
        ("12 scale bytes", |frame| frame.scales.truncate(12)),
        ("3 tokens", |frame| frame.tokens = 3),
        ("no experts of this layer", |frame| frame.layer = LayerId(4)),
        ("3 pair tokens but 2 pair slots", |frame| frame.pair_slots.truncate(2)),
        ("slot 4 of 4", |frame| frame.pair_slots[2] = 4),
        ("token 2 of 2", |frame| frame.pair_tokens[1] = 2),
        ("out of order", |frame| frame.pair_tokens.swap(0, 1)),
    ];
    for (words, change) in cases {
        let refusal = refusal(change);
        assert_eq!(refusal.code, RefusalCode::Malformed, "{words}");
        assert!(refusal.message.contains(words), "{words:?} not in {:?}", refusal.message);
    }
}

#[test]
fn too_many_tokens_or_bytes_are_oversize() {
    let tokens = refusal(|frame| frame.tokens = MAX_FRAME_TOKENS + 1);
    assert_eq!(tokens.code, RefusalCode::Oversize);
    let bytes = refusal(|frame| frame.data = vec![0; MAX_FRAME_BYTES].into());
    assert_eq!(bytes.code, RefusalCode::Oversize);
    let answer = refusal(|frame| {
        frame.pair_tokens = vec![0; MAX_FRAME_BYTES / 260 + 1];
        frame.pair_slots = vec![0; MAX_FRAME_BYTES / 260 + 1];
    });
    assert_eq!(answer.code, RefusalCode::Oversize);
}

proptest! {
    /// Whatever indices arrive, the check answers and what passes is in range and strictly ascending.
    #[test]
    fn what_passes_is_safe_to_compute(
        tokens in 0_usize..4,
        pairs in prop::collection::vec((0_u32..6, 0_u32..6), 0..6),
    ) {
        let contract = contract(NumericsClass::F32);
        let mut frame = frame(&contract);
        frame.tokens = tokens;
        frame.data = vec![0; tokens * 130 * 4].into();
        frame.scales = Bytes::new();
        frame.pair_slots = pairs.iter().map(|pair| pair.0).collect();
        frame.pair_tokens = pairs.iter().map(|pair| pair.1).collect();
        let safe = pairs.iter().all(|&(slot, token)| slot < 4 && (token as usize) < tokens)
            && pairs.windows(2).all(|pair| pair[0] < pair[1]);
        prop_assert_eq!(contract.check(&frame).is_ok(), safe);
    }
}

#[test]
fn what_is_not_finite_is_found_wherever_it_is() {
    let f32s = |at: usize, value: f32| {
        let mut values = vec![1.0_f32; 3000];
        values[at] = value;
        values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>()
    };
    for at in [0, 1023, 1024, 2999] {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let rows = f32s(at, value);
            assert_eq!(first_not_finite(RowFormat::F32, &rows), Some(at));
            let bf16: Vec<u8> = rows.chunks(4).flat_map(|element| [element[2], element[3]]).collect();
            assert_eq!(first_not_finite(RowFormat::Bf16, &bf16), Some(at));
        }
        assert_eq!(first_not_finite(RowFormat::F32, &f32s(at, f32::MAX)), None);
    }
    assert_eq!(first_not_finite(RowFormat::E4m3, &[0x7E, 0xFE, 0xFF]), Some(2));
    assert_eq!(first_not_finite(RowFormat::Bf16, &[]), None);
}
