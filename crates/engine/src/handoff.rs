//! Hand-off of a prompt's KV between engines: what travels, and the two ends outside the step loop.
//!
//! Outgoing: the loop reads rows out of the cache, layer by layer as they are computed, into a bounded
//! channel whose receiving end is a [`KvStream`]. Incoming: a [`KvWriter`] feeds a bounded channel that the
//! loop empties into the cache between steps. Both ends wake the loop, and neither can hold it up. Rows of
//! one layer travel in order of position; layers interleave as they like. `k_pe` is in the checkpoint's
//! interleaved pair order, the row as the cache holds it.
//!
//! Dropping either end is the abort: the loop sees a closed channel and ends that sequence alone.

mod room;

use bytes::Bytes;
use cadre_ops::RowFormat;
use cadre_types::{LayerId, Position, TokenId};
use tokio::sync::{mpsc, oneshot};

use crate::{error::HandoffError, handle::Waker, request::GeneratedToken};
pub(crate) use room::Held;
pub use room::{KV_ROOM_BYTES, KvRoom};

/// Most bytes of rows in one message (and in one frame on the wire).
pub const MAX_KV_FRAME_BYTES: usize = 1 << 20;

/// Messages that may wait on either side of a hand-off. At 1 MiB each it bounds what one hand-off buffers
/// to 16 MiB, and it lets the loop compute 16 layers of a 512-row step (0.6 MB a layer for V3) ahead of
/// the network.
pub(crate) const KV_QUEUE: usize = 16;

/// What a sender says before the first row; the receiver compares every field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandoffOffer {
    /// The request whose prompt it is.
    pub request_id: String,
    /// Positions of the prompt.
    pub prompt_tokens: u32,
    /// [`prompt_hash`] of the prompt.
    pub prompt_hash: u64,
    /// Layers handed off, from 0.
    pub layers: u32,
    /// Elements of a row: `kv_lora_rank + qk_rope_head_dim`.
    pub row_width: u32,
    /// Encoding of a row.
    pub format: RowFormat,
}

/// Cached rows of consecutive positions of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvRows {
    /// The layer.
    pub layer: LayerId,
    /// First position.
    pub first_position: Position,
    /// Positions; at least 1.
    pub count: u32,
    /// `[count, row_width]`, at most [`MAX_KV_FRAME_BYTES`] (or one row).
    pub rows: Bytes,
}

/// What comes after the last row.
#[derive(Clone, Debug, PartialEq)]
pub struct KvFinish {
    /// The token sampled from the prompt.
    pub first_token: GeneratedToken,
}

/// One message of a hand-off.
#[derive(Clone, Debug, PartialEq)]
pub enum KvMessage {
    /// Rows.
    Rows(KvRows),
    /// The end.
    Finish(KvFinish),
}

/// FNV-1a, 64 bits, over the token ids as little-endian u32.
pub fn prompt_hash(prompt: &[TokenId]) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    prompt
        .iter()
        .flat_map(|token| token.to_le_bytes())
        .fold(OFFSET, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}

/// Rows of one message, at most [`MAX_KV_FRAME_BYTES`] of them and at least one.
pub(crate) fn rows_per_message(row_bytes: usize) -> u32 {
    (MAX_KV_FRAME_BYTES / row_bytes.max(1)).clamp(1, u32::MAX as usize) as u32
}

/// The receiving end of an outgoing hand-off.
#[derive(Debug)]
pub struct KvStream {
    messages: mpsc::Receiver<KvMessage>,
    waker: Waker,
}

impl KvStream {
    pub(crate) fn new(messages: mpsc::Receiver<KvMessage>, waker: Waker) -> Self {
        Self { messages, waker }
    }

    /// The next message; `None` after [`KvMessage::Finish`], or early if the sequence has ended (its
    /// events say how).
    pub async fn recv(&mut self) -> Option<KvMessage> {
        let message = self.messages.recv().await;
        // There is room again for rows that the loop holds back.
        self.waker.wake();
        message
    }
}

impl Drop for KvStream {
    fn drop(&mut self) {
        self.messages.close();
        self.waker.wake();
    }
}

/// The sending end of an incoming hand-off. Dropping it before [`KvWriter::finish`] aborts.
#[derive(Debug)]
pub struct KvWriter {
    request_id: String,
    messages: Option<mpsc::Sender<KvMessage>>,
    outcome: oneshot::Receiver<Result<u64, HandoffError>>,
    waker: Waker,
}

impl KvWriter {
    pub(crate) fn new(
        request_id: String,
        messages: mpsc::Sender<KvMessage>,
        outcome: oneshot::Receiver<Result<u64, HandoffError>>,
        waker: Waker,
    ) -> Self {
        Self { request_id, messages: Some(messages), outcome, waker }
    }

    /// Queues rows; waits while the queue is full. An error ends the hand-off and says what of the rows so
    /// far was refused.
    pub async fn rows(&mut self, rows: KvRows) -> Result<(), HandoffError> {
        self.send(KvMessage::Rows(rows)).await
    }

    /// Ends the hand-off and waits until the loop has taken everything. Returns the bytes received.
    pub async fn finish(mut self, finish: KvFinish) -> Result<u64, HandoffError> {
        self.send(KvMessage::Finish(finish)).await?;
        self.outcome().await
    }

    async fn send(&mut self, message: KvMessage) -> Result<(), HandoffError> {
        let sent = match &self.messages {
            Some(messages) => messages.send(message).await.is_ok(),
            None => false,
        };
        if sent {
            self.waker.wake();
            return Ok(());
        }
        match self.outcome().await {
            Err(refused) => Err(refused),
            // The loop has closed the channel after a finish that this writer cannot have sent.
            Ok(_) => Err(HandoffError::Unknown { request_id: self.request_id.clone() }),
        }
    }

    async fn outcome(&mut self) -> Result<u64, HandoffError> {
        match (&mut self.outcome).await {
            Ok(outcome) => outcome,
            // The sequence was cancelled, or the engine stopped.
            Err(_) => Err(HandoffError::Unknown { request_id: self.request_id.clone() }),
        }
    }
}

impl Drop for KvWriter {
    fn drop(&mut self) {
        self.messages = None;
        self.waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_hash_is_fnv_1a() {
        // The empty hash is the offset basis; one zero byte maps the basis to basis * prime.
        assert_eq!(prompt_hash(&[]), 0xcbf2_9ce4_8422_2325);
        // FNV-1a of the bytes "abcd" (0x64636261 little-endian), from the published algorithm.
        assert_eq!(prompt_hash(&[0x6463_6261]), 0xfc17_9f83_ee07_24dd);
        assert_ne!(prompt_hash(&[1, 2]), prompt_hash(&[2, 1]));
    }

    #[test]
    fn messages_stay_below_the_frame_bound() {
        assert_eq!(rows_per_message(1152), 910);
        assert_eq!(rows_per_message(MAX_KV_FRAME_BYTES), 1);
        assert_eq!(rows_per_message(2 * MAX_KV_FRAME_BYTES), 1, "a row is never cut");
    }
}
