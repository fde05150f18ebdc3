//! `ReceiveKv`: one hand-off from a prefill worker into the pages of a waiting sequence.
//!
//! The order of frames and their sizes are judged here, their meaning (layer, order, range, completeness)
//! by the engine. Every wait is bounded; when this call ends without a receipt, for whatever reason, the
//! writer is dropped and the engine fails the sequence.

use std::{future::Future, time::Duration};

use cadre_engine::MAX_KV_FRAME_BYTES;
use cadre_proto::{convert::required, v1};
use tonic::{Status, Streaming};
use v1::kv_frame::Frame;

use crate::{status, wire};

use super::WorkerService;

impl WorkerService {
    pub(super) async fn receive(&self, mut frames: Streaming<v1::KvFrame>) -> Result<v1::KvReceipt, Status> {
        let engine = self.engine()?;
        let bound = self.shared.options.handoff_timeout;
        let begin = match next(&mut frames, bound).await? {
            Some(Frame::Begin(begin)) => begin,
            Some(Frame::Rows(_) | Frame::Finish(_)) => {
                return Err(Status::invalid_argument("hand-off: the first frame is not begin"));
            }
            None => return Err(Status::invalid_argument("hand-off: no frames")),
        };
        self.check_generation(begin.generation.as_ref(), "kv_begin.generation")?;
        let offer = wire::offer(&begin)?;
        let mut writer = bounded(bound, "the engine to begin", engine.begin_handoff(offer))
            .await?
            .map_err(|error| status::of_handoff(&error))?;
        loop {
            match next(&mut frames, bound).await? {
                Some(Frame::Rows(rows)) => {
                    if rows.rows.len() > MAX_KV_FRAME_BYTES {
                        let bytes = rows.rows.len();
                        return Err(Status::invalid_argument(format!(
                            "hand-off, layer {}: {bytes} bytes of rows, at most {MAX_KV_FRAME_BYTES}",
                            rows.layer
                        )));
                    }
                    let mut rows = wire::rows_from(rows)?;
                    let room = self.shared.incoming_room.hold(rows.rows);
                    rows.rows = bounded(bound, "room for the rows of all hand-offs", room).await?;
                    bounded(bound, "room for rows", writer.rows(rows))
                        .await?
                        .map_err(|error| status::of_handoff(&error))?;
                }
                Some(Frame::Finish(finish)) => {
                    let finish = wire::finish_from(finish)?;
                    let kv_bytes = bounded(bound, "the engine to take the last rows", writer.finish(finish))
                        .await?
                        .map_err(|error| status::of_handoff(&error))?;
                    return Ok(v1::KvReceipt { kv_bytes });
                }
                Some(Frame::Begin(_)) => return Err(Status::invalid_argument("hand-off: a second begin")),
                None => return Err(Status::aborted("hand-off: the frames end without finish")),
            }
        }
    }
}

async fn next(frames: &mut Streaming<v1::KvFrame>, bound: Duration) -> Result<Option<Frame>, Status> {
    match bounded(bound, "the next frame", frames.message()).await?? {
        Some(frame) => Ok(Some(required(frame.frame, "kv_frame.frame")?)),
        None => Ok(None),
    }
}

async fn bounded<T>(bound: Duration, what: &str, wait: impl Future<Output = T>) -> Result<T, Status> {
    tokio::time::timeout(bound, wait)
        .await
        .map_err(|_| Status::aborted(format!("hand-off: waited {bound:?} for {what}")))
}
