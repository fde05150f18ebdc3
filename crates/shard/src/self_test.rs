//! The step that proves a shard: a row through every slot of every layer, submitted as a worker's frame is.

use std::{sync::Arc, time::Instant};

use cadre_dispatch::{
    Answer, AnswerSink, Reply, ShardContract, ShardService,
    frame::{first_not_finite, frame_of_ones},
};
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
    let all = (0..slots as u32).collect();
    let frame = frame_of_ones(contract.generation, layer, contract.hidden, all);
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
