//! Frames of the dispatch wire, in both directions. A shard answers every frame once: with rows of the right size, the
//! same ones each time, or with a refusal; and a message says the same after a way through the types.

use std::{
    path::PathBuf,
    sync::{Arc, LazyLock},
};

use bytes::Bytes;
use cadre_checkpoint::{
    Checkpoint,
    synth::{self, SynthSpec, WeightFormat},
};
use cadre_dispatch::{
    Answer, AnswerSink, DispatchFrame, RefusalCode, Reply, ShardService,
    frame::{first_not_finite, frame_of_ones},
    wire,
};
use cadre_ops::RowFormat;
use cadre_ops_cpu::{CpuBackend, CpuOptions};
use cadre_proto::v1;
use cadre_shard::{CheckpointSource, Shard, ShardOptions};
use cadre_types::{
    Generation, LayerId, LayerPlacement, LogicalExpert, NumericsClass, Placement, PlacementEpoch, ShardIndex,
};
use prost::Message;

use crate::draw::Draw;

struct Rig {
    shard: Shard<CpuBackend>,
    generation: Generation,
    hidden: usize,
    layers: Vec<LayerId>,
    slots: usize,
}

/// One shard for each class that a shard on this machine computes in.
static RIGS: LazyLock<Vec<Rig>> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    let dir: PathBuf = folder.path().join("tiny");
    synth::write(&dir, &SynthSpec::tiny(WeightFormat::Fp8, 1), &|_, _| {}).expect("a checkpoint");
    let checkpoint = Arc::new(Checkpoint::open(&dir).expect("a right checkpoint"));
    [NumericsClass::F32, NumericsClass::Bf16, NumericsClass::Fp8].map(|class| rig(&checkpoint, class)).into()
});

fn rig(checkpoint: &Arc<Checkpoint>, class: NumericsClass) -> Rig {
    let config = checkpoint.config();
    let options = CpuOptions { threads: Some(1), ..CpuOptions::new(class) };
    let backend = Arc::new(CpuBackend::new(options).expect("a backend"));
    let slots: Vec<LogicalExpert> = (0..config.n_routed_experts as u16).map(LogicalExpert).collect();
    let layers: Vec<LayerId> = config.served_moe_layers().collect();
    let placed = layers.iter().map(|&layer| LayerPlacement { layer, slots: vec![slots.clone()] });
    let placement =
        Placement::new(PlacementEpoch(1), config.n_routed_experts, placed.collect()).expect("a placement");
    let generation = Generation { model: checkpoint.model_hash(), numerics: class, epoch: placement.epoch() };
    let options = ShardOptions { shard: ShardIndex(0), weights: generation, hidden: config.hidden_size };
    let source = CheckpointSource::new(Arc::clone(&backend), Arc::clone(checkpoint));
    let shard = Shard::inline(options, backend, Arc::new(source)).expect("a shard");
    shard.apply(&placement).expect("the placement");
    Rig { shard, generation, hidden: config.hidden_size, layers, slots: slots.len() }
}

#[derive(Default)]
struct Sink(std::sync::Mutex<Vec<(u64, Answer)>>);

impl AnswerSink for Sink {
    fn deliver(&self, sequence: u64, answer: Answer) {
        self.0.lock().unwrap().push((sequence, answer));
    }

    fn is_cancelled(&self) -> bool {
        false
    }
}

pub(crate) fn run(bytes: &[u8]) {
    let mut draw = Draw::new(bytes);
    let rig = &RIGS[draw.below(RIGS.len())];
    match draw.below(4) {
        0 => answer(draw.rest()),
        1 => {
            if let Ok(message) = v1::DispatchFrame::decode(draw.rest()) {
                frame(rig, message);
            }
        }
        _ => frame(rig, drawn(rig, draw)),
    }
}

/// A frame that is right but for what the input changes.
fn drawn(rig: &Rig, mut draw: Draw<'_>) -> v1::DispatchFrame {
    let layer = rig.layers[draw.below(rig.layers.len())];
    let pairs = draw.below(6);
    let tokens = 1 + draw.below(4);
    let mut pair: Vec<(u32, u32)> =
        (0..pairs).map(|_| (draw.below(rig.slots) as u32, draw.below(tokens) as u32)).collect();
    if !draw.one_in(8) {
        pair.sort_unstable();
        pair.dedup();
    }
    let ones = frame_of_ones(rig.generation, layer, rig.hidden, pair.iter().map(|(slot, _)| *slot).collect());
    let mut message = v1::DispatchFrame::from(DispatchFrame {
        tokens,
        data: ones.data.repeat(tokens).into(),
        scales: ones.scales.repeat(tokens).into(),
        pair_tokens: pair.iter().map(|(_, token)| *token).collect(),
        ..ones
    });
    while !draw.is_empty() {
        match draw.below(9) {
            0 => message.sequence = draw.number(),
            1 => message.layer = draw.number() as u32,
            2 => message.num_tokens = draw.number() as u32,
            3 => message.dtype = draw.number() as i32,
            4 => message.activations = changed(&message.activations, &mut draw),
            5 => message.scales = changed(&message.scales, &mut draw),
            6 => message.pair_tokens.push(draw.number() as u32),
            7 => message.pair_slots.push(draw.number() as u32),
            _ => {
                if let Some(generation) = &mut message.generation {
                    match draw.below(3) {
                        0 => generation.epoch = draw.number(),
                        1 => generation.numerics = draw.number() as i32,
                        _ => generation.model_hash = Bytes::copy_from_slice(draw.bytes()),
                    }
                }
            }
        }
    }
    message
}

fn changed(original: &Bytes, draw: &mut Draw<'_>) -> Bytes {
    let mut bytes = original.to_vec();
    let new = draw.bytes();
    let at = (draw.below(256) * 16).min(bytes.len());
    match draw.below(3) {
        0 => bytes.truncate(at),
        1 => bytes.extend_from_slice(new),
        _ => {
            let end = (at + new.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&new[..end - at]);
        }
    }
    bytes.into()
}

fn frame(rig: &Rig, message: v1::DispatchFrame) {
    let Ok(frame) = DispatchFrame::try_from(message.clone()) else { return };
    let again =
        DispatchFrame::try_from(v1::DispatchFrame::from(frame.clone())).expect("what was read is written");
    assert_eq!(frame, again);
    let [first, second] = [0, 1].map(|_| {
        let sink = Arc::new(Sink::default());
        rig.shard.submit(frame.clone(), Reply::new(sink.clone(), frame.sequence));
        let mut answers = std::mem::take(&mut *sink.0.lock().unwrap());
        assert_eq!(answers.len(), 1, "an inline shard answers once, before it returns");
        let (sequence, answer) = answers.remove(0);
        assert_eq!(sequence, frame.sequence);
        answer
    });
    match (&first, &second) {
        (Ok(first), Ok(second)) => {
            assert_eq!(first.rows, second.rows, "the same frame, the same bits");
            let format = RowFormat::combine(rig.generation.numerics);
            assert_eq!(first.rows.len(), frame.pairs() * format.row_bytes(rig.hidden));
            assert_eq!(first_not_finite(format, &first.rows), first_not_finite(format, &second.rows));
        }
        (Err(first), Err(second)) => {
            assert_eq!(first, second);
            let is_internal = matches!(first, cadre_dispatch::LinkError::Refused(refusal) if refusal.code == RefusalCode::Internal);
            assert!(!is_internal, "a frame that passed the checks is computed: {first}");
        }
        _ => panic!("{first:?} and then {second:?}"),
    }
    answer(&wire::encode_answer(frame.sequence, first).encode_to_vec());
}

/// What a worker makes of an answer.
fn answer(bytes: &[u8]) {
    let Ok(message) = v1::CombineFrame::decode(bytes) else { return };
    let (sequence, answer) = wire::decode_answer(message);
    if let Ok(frame) = &answer {
        first_not_finite(frame.format, &frame.rows);
    }
    let again = wire::decode_answer(wire::encode_answer(sequence, answer.clone()));
    assert_eq!(again, (sequence, answer));
}
