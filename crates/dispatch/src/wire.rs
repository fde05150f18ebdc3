//! Frames to and from their messages. Payload bytes move; nothing of size is copied.

use cadre_ops::RowFormat;
use cadre_proto::{
    convert::{ConvertError, required},
    v1,
};
use cadre_types::{Generation, LayerId};

use crate::frame::{Answer, CombineFrame, DispatchFrame, LinkError, Refusal, RefusalCode, ShardSignals};

fn dtype(format: RowFormat) -> v1::Dtype {
    match format {
        RowFormat::F32 => v1::Dtype::F32,
        RowFormat::Bf16 => v1::Dtype::Bf16,
        RowFormat::E4m3 => v1::Dtype::E4m3,
    }
}

fn format(value: i32, field: &'static str) -> Result<RowFormat, ConvertError> {
    match v1::Dtype::try_from(value) {
        Ok(v1::Dtype::F32) => Ok(RowFormat::F32),
        Ok(v1::Dtype::Bf16) => Ok(RowFormat::Bf16),
        Ok(v1::Dtype::E4m3) => Ok(RowFormat::E4m3),
        Ok(v1::Dtype::Unspecified) | Err(_) => Err(ConvertError::UnknownEnum { field, value }),
    }
}

impl From<DispatchFrame> for v1::DispatchFrame {
    fn from(frame: DispatchFrame) -> Self {
        Self {
            sequence: frame.sequence,
            generation: Some(frame.generation.into()),
            layer: u32::from(frame.layer.0),
            num_tokens: frame.tokens as u32,
            dtype: dtype(frame.format).into(),
            activations: frame.data,
            scales: frame.scales,
            pair_tokens: frame.pair_tokens,
            pair_slots: frame.pair_slots,
        }
    }
}

impl TryFrom<v1::DispatchFrame> for DispatchFrame {
    type Error = ConvertError;

    fn try_from(wire: v1::DispatchFrame) -> Result<Self, ConvertError> {
        let generation = required(wire.generation.as_ref(), "dispatch.generation")?;
        let layer = u16::try_from(wire.layer).map_err(|_| ConvertError::Invalid {
            field: "dispatch.layer",
            problem: format!("{} is out of range", wire.layer),
        })?;
        Ok(Self {
            sequence: wire.sequence,
            generation: Generation::try_from(generation)?,
            layer: LayerId(layer),
            tokens: wire.num_tokens as usize,
            format: format(wire.dtype, "dispatch.dtype")?,
            data: wire.activations,
            scales: wire.scales,
            pair_tokens: wire.pair_tokens,
            pair_slots: wire.pair_slots,
        })
    }
}

impl From<RefusalCode> for v1::DispatchErrorCode {
    fn from(code: RefusalCode) -> Self {
        match code {
            RefusalCode::Generation => Self::Generation,
            RefusalCode::Epoch => Self::Epoch,
            RefusalCode::Malformed => Self::Malformed,
            RefusalCode::Oversize => Self::Oversize,
            RefusalCode::Overloaded => Self::Overloaded,
            RefusalCode::Unavailable => Self::Unavailable,
            RefusalCode::Internal => Self::Internal,
        }
    }
}

/// A code that this version does not know is `Internal`: the frame failed, and another copy may do better.
fn refusal_code(value: i32) -> RefusalCode {
    match v1::DispatchErrorCode::try_from(value) {
        Ok(v1::DispatchErrorCode::Generation) => RefusalCode::Generation,
        Ok(v1::DispatchErrorCode::Epoch) => RefusalCode::Epoch,
        Ok(v1::DispatchErrorCode::Malformed) => RefusalCode::Malformed,
        Ok(v1::DispatchErrorCode::Oversize) => RefusalCode::Oversize,
        Ok(v1::DispatchErrorCode::Overloaded) => RefusalCode::Overloaded,
        Ok(v1::DispatchErrorCode::Unavailable) => RefusalCode::Unavailable,
        Ok(v1::DispatchErrorCode::Internal | v1::DispatchErrorCode::Unspecified) | Err(_) => {
            RefusalCode::Internal
        }
    }
}

/// The message that answers a frame.
pub fn encode_answer(sequence: u64, answer: Answer) -> v1::CombineFrame {
    let error = match answer {
        Ok(frame) => {
            return v1::CombineFrame {
                sequence,
                dtype: dtype(frame.format).into(),
                rows: frame.rows,
                queue_micros: frame.signals.queue_micros,
                compute_micros: frame.signals.compute_micros,
                queued_tokens: frame.signals.queued_tokens,
                error: None,
            };
        }
        Err(LinkError::Refused(refusal)) => refusal,
        // What a service reports that is no refusal is a frame it lost.
        Err(other) => Refusal::new(RefusalCode::Unavailable, other.to_string()),
    };
    let code = v1::DispatchErrorCode::from(error.code).into();
    v1::CombineFrame {
        sequence,
        error: Some(v1::DispatchError { code, message: error.message }),
        ..v1::CombineFrame::default()
    }
}

/// The answer in a message.
pub fn decode_answer(wire: v1::CombineFrame) -> (u64, Answer) {
    let sequence = wire.sequence;
    if let Some(error) = wire.error {
        return (sequence, Err(Refusal::new(refusal_code(error.code), error.message).into()));
    }
    let answer = match format(wire.dtype, "combine.dtype") {
        Ok(format) => Ok(CombineFrame {
            format,
            rows: wire.rows,
            signals: ShardSignals {
                queue_micros: wire.queue_micros,
                compute_micros: wire.compute_micros,
                queued_tokens: wire.queued_tokens,
            },
        }),
        Err(error) => Err(Refusal::new(RefusalCode::Internal, error.to_string()).into()),
    };
    (sequence, answer)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use bytes::Bytes;
    use cadre_types::{ModelHash, NumericsClass, PlacementEpoch};

    use super::*;

    fn frame() -> DispatchFrame {
        DispatchFrame {
            sequence: 77,
            generation: Generation {
                model: ModelHash([3; 16]),
                numerics: NumericsClass::Fp8,
                epoch: PlacementEpoch(5),
            },
            layer: LayerId(60),
            tokens: 2,
            format: RowFormat::E4m3,
            data: Bytes::from_static(b"abcd"),
            scales: Bytes::from_static(b"12345678"),
            pair_tokens: vec![0, 1],
            pair_slots: vec![4, 4],
        }
    }

    #[test]
    fn frames_round_trip_without_copying_their_payload() {
        let original = frame();
        let wire = v1::DispatchFrame::from(original.clone());
        assert_eq!(wire.activations.as_ptr(), original.data.as_ptr());
        assert_eq!(DispatchFrame::try_from(wire).unwrap(), original);
    }

    #[test]
    fn frames_with_unknown_fields_name_them() {
        type Change = fn(&mut v1::DispatchFrame);
        let cases: [(&str, Change); 4] = [
            ("dispatch.generation: missing", |wire| wire.generation = None),
            ("generation.numerics", |wire| wire.generation.as_mut().unwrap().numerics = 9),
            ("dispatch.dtype: unknown value 44", |wire| wire.dtype = 44),
            ("dispatch.layer: 70000", |wire| wire.layer = 70_000),
        ];
        for (words, change) in cases {
            let mut wire = v1::DispatchFrame::from(frame());
            change(&mut wire);
            let error = DispatchFrame::try_from(wire).unwrap_err().to_string();
            assert!(error.contains(words), "{words:?} not in {error:?}");
        }
    }

    #[test]
    fn answers_round_trip() {
        let rows = CombineFrame {
            format: RowFormat::Bf16,
            rows: Bytes::from_static(b"xyzw"),
            signals: ShardSignals { queue_micros: 1, compute_micros: 2, queued_tokens: 3 },
        };
        assert_eq!(decode_answer(encode_answer(4, Ok(rows.clone()))), (4, Ok(rows)));
        for code in [
            RefusalCode::Generation,
            RefusalCode::Epoch,
            RefusalCode::Malformed,
            RefusalCode::Oversize,
            RefusalCode::Overloaded,
            RefusalCode::Unavailable,
            RefusalCode::Internal,
        ] {
            let answer: Answer = Err(Refusal::new(code, "why").into());
            assert_eq!(decode_answer(encode_answer(5, answer.clone())), (5, answer));
        }
    }
}
