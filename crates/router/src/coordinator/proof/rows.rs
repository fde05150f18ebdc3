//! The rows of shards.

use bytes::Bytes;
use cadre_proto::{
    secret::Present,
    v1::{self, expert_client::ExpertClient},
};
use cadre_types::{Generation, LayerId, NumericsClass};
use tokio_stream::StreamExt as _;
use tonic::{Status, transport::Channel};

use super::Verdict;

/// Columns that share a scale (docs/numerics.md).
const SCALED_COLUMNS: usize = 128;

/// A row of ones through each slot, one frame each; the answers come in any order.
pub(super) async fn ask(
    channel: Channel,
    present: Present,
    generation: Generation,
    slots: &[(LayerId, u32)],
    hidden: usize,
) -> Result<Verdict, Status> {
    let frames: Vec<v1::DispatchFrame> = slots
        .iter()
        .zip(1..)
        .map(|(&(layer, slot), sequence)| frame(sequence, generation, layer, slot, hidden))
        .collect();
    let mut client = ExpertClient::with_interceptor(channel, present)
        .max_decoding_message_size(cadre_proto::MAX_MESSAGE_BYTES);
    let asking = tokio_stream::iter(frames).chain(tokio_stream::pending());
    let mut answers = client.dispatch(asking).await?.into_inner();
    let mut open: Vec<u64> = (1..=slots.len() as u64).collect();
    while !open.is_empty() {
        let Some(answer) = answers.message().await? else {
            return Ok(Verdict::Unanswered(format!("the stream ended, {} rows are missing", open.len())));
        };
        let Some(at) = open.iter().position(|sequence| *sequence == answer.sequence) else {
            return Ok(Verdict::Wrong(format!(
                "an answer to frame {}, which was not asked",
                answer.sequence
            )));
        };
        open.swap_remove(at);
        let (layer, slot) = slots[answer.sequence as usize - 1];
        if let Some(error) = answer.error {
            return Ok(Verdict::Unanswered(format!("{layer}, slot {slot}: {}", error.message)));
        }
        if let Some(problem) = wrong(generation.numerics, &answer, hidden) {
            return Ok(Verdict::Wrong(format!("a row of ones through slot {slot} of {layer}: {problem}")));
        }
    }
    Ok(Verdict::Passed)
}

fn frame(
    sequence: u64,
    generation: Generation,
    layer: LayerId,
    slot: u32,
    hidden: usize,
) -> v1::DispatchFrame {
    let (dtype, one, scales): (_, &[u8], _) = match generation.numerics {
        NumericsClass::F32 => (v1::Dtype::F32, &[0x00, 0x00, 0x80, 0x3F], 0),
        NumericsClass::Bf16 => (v1::Dtype::Bf16, &[0x80, 0x3F], 0),
        NumericsClass::Fp8 | NumericsClass::CudaFp8 => {
            (v1::Dtype::E4m3, &[0x38], hidden.div_ceil(SCALED_COLUMNS))
        }
    };
    v1::DispatchFrame {
        sequence,
        generation: Some(generation.into()),
        layer: u32::from(layer.0),
        num_tokens: 1,
        dtype: dtype.into(),
        activations: Bytes::from(one.repeat(hidden)),
        scales: Bytes::from(1.0_f32.to_le_bytes().repeat(scales)),
        pair_tokens: vec![0],
        pair_slots: vec![slot],
    }
}

/// What is wrong with an answer of one row.
fn wrong(class: NumericsClass, answer: &v1::CombineFrame, hidden: usize) -> Option<String> {
    let (dtype, element) = match class {
        NumericsClass::F32 => (v1::Dtype::F32, 4),
        NumericsClass::Bf16 | NumericsClass::Fp8 | NumericsClass::CudaFp8 => (v1::Dtype::Bf16, 2),
    };
    if answer.dtype() != dtype || answer.rows.len() != hidden * element {
        let (bytes, found) = (answer.rows.len(), answer.dtype());
        return Some(format!("{bytes} bytes of {found:?}, expected {} of {dtype:?}", hidden * element));
    }
    // In both formats the highest two bytes hold sign, exponent (eight bits) and the first bits of the fraction.
    let finite = |value: &[u8]| {
        let high = u16::from_le_bytes([value[element - 2], value[element - 1]]);
        high & 0x7F80 != 0x7F80
    };
    let bad = answer.rows.chunks_exact(element).position(|value| !finite(value))?;
    Some(format!("element {bad} is not finite"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(dtype: v1::Dtype, rows: Vec<u8>) -> v1::CombineFrame {
        v1::CombineFrame { dtype: dtype.into(), rows: rows.into(), ..v1::CombineFrame::default() }
    }

    #[test]
    fn rows_must_be_whole_and_finite_in_the_format_of_the_class() {
        let f32s = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        let judge = |class, answer: &v1::CombineFrame| wrong(class, answer, 2);
        let good = answer(v1::Dtype::F32, f32s(&[f32::MAX, -0.0]));
        assert_eq!(judge(NumericsClass::F32, &good), None);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let bad = answer(v1::Dtype::F32, f32s(&[1.0, bad]));
            assert_eq!(judge(NumericsClass::F32, &bad).as_deref(), Some("element 1 is not finite"));
        }
        let short = answer(v1::Dtype::F32, f32s(&[1.0]));
        assert_eq!(judge(NumericsClass::F32, &short).as_deref(), Some("4 bytes of F32, expected 8 of F32"));
        for class in [NumericsClass::Bf16, NumericsClass::Fp8, NumericsClass::CudaFp8] {
            assert_eq!(judge(class, &answer(v1::Dtype::Bf16, vec![0x80, 0x3F, 0x7F, 0x7F])), None);
            let nan = answer(v1::Dtype::Bf16, vec![0xC0, 0x7F, 0x80, 0x3F]);
            assert_eq!(judge(class, &nan).as_deref(), Some("element 0 is not finite"));
            assert!(judge(class, &good).is_some_and(|problem| problem.contains("expected 4 of Bf16")));
        }
    }
}
