//! The step that proves a shard: a row through every slot of every layer, submitted as a worker's frame is.

use std::{sync::Arc, time::Instant};

use cadre_dispatch::{Answer, AnswerSink, DispatchFrame, Reply, ShardContract, ShardService};
use cadre_ops::RowFormat;
use cadre_types::{LayerId, PlacementEpoch};

/// Why a shard is not proven.
#[derive(Debug, thiserror::Error)]
pub enum SelfTestError {
    /// That placement is not loaded.
    #[error("self-test: the placement of {epoch} is not loaded")]
    NothingLoaded {
        /// The placement.
        epoch: PlacementEpoch,
    },
    /// A frame failed.
    #[error("self-test of {layer}: {message}")]
    Failed {
        /// The layer.
        layer: LayerId,
        /// Why.
        message: String,
    },
}

/// Tests every layer that has slots.
pub(crate) fn run(
    shard: &impl ShardService,
    contract: &ShardContract,
    deadline: Instant,
) -> Result<(), SelfTestError> {
    for &(layer, slots) in contract.slots.iter().filter(|(_, slots)| *slots > 0) {
        test_layer(shard, contract, layer, slots, deadline)
            .map_err(|message| SelfTestError::Failed { layer, message })?;
    }
    Ok(())
}

fn test_layer(
    shard: &impl ShardService,
    contract: &ShardContract,
    layer: LayerId,
    slots: usize,
    deadline: Instant,
) -> Result<(), String> {
    let (sink, answers) = crossbeam_channel::bounded(1);
    let frame = test_frame(contract, layer, slots);
    shard.submit(frame, Reply::new(Arc::new(OneAnswer(sink)), 0));
    let answer = answers.recv_deadline(deadline).map_err(|_| "no answer in time".to_owned())?;
    let combined = answer.map_err(|error| error.to_string())?;
    let expected = slots * combined.format.row_bytes(contract.hidden);
    if combined.rows.len() != expected {
        return Err(format!("{} bytes came back, expected {expected}", combined.rows.len()));
    }
    match first_not_finite(combined.format, &combined.rows) {
        Some(at) => Err(format!("element {at} of the rows is not finite")),
        None => Ok(()),
    }
}

/// Where a self-test's answer goes.
pub(crate) struct OneAnswer(pub(crate) crossbeam_channel::Sender<Answer>);

impl AnswerSink for OneAnswer {
    fn deliver(&self, _sequence: u64, answer: Answer) {
        // The tester may have given up.
        let _ = self.0.try_send(answer);
    }

    fn is_cancelled(&self) -> bool {
        false
    }
}

/// One row of ones through every slot of a layer.
fn test_frame(contract: &ShardContract, layer: LayerId, slots: usize) -> DispatchFrame {
    let format = RowFormat::dispatch(contract.generation.numerics);
    let one: &[u8] = match format {
        RowFormat::F32 => &[0x00, 0x00, 0x80, 0x3F],
        RowFormat::Bf16 => &[0x80, 0x3F],
        RowFormat::E4m3 => &[0x38],
    };
    DispatchFrame {
        sequence: 0,
        generation: contract.generation,
        layer,
        tokens: 1,
        format,
        data: one.repeat(contract.hidden).into(),
        scales: 1.0_f32.to_le_bytes().repeat(format.row_scales(contract.hidden)).into(),
        pair_tokens: vec![0; slots],
        pair_slots: (0..slots as u32).collect(),
    }
}

/// Index of the first element whose exponent is all ones.
fn first_not_finite(format: RowFormat, rows: &[u8]) -> Option<usize> {
    match format {
        RowFormat::F32 => {
            rows.chunks_exact(4).position(|bytes| u16::from_le_bytes([bytes[2], bytes[3]]) & 0x7F80 == 0x7F80)
        }
        RowFormat::Bf16 => {
            rows.chunks_exact(2).position(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]) & 0x7F80 == 0x7F80)
        }
        RowFormat::E4m3 => rows.iter().position(|byte| byte & 0x7F == 0x7F),
    }
}
