//! The nouns of the dispatch path: a request frame, its answer, and why either fails.
//!
//! Payloads are [`Bytes`]: a frame that arrived from the network is slices of the message, a frame that
//! was gathered here is slices of the dispatcher's buffer, and cloning one to keep it for a retry copies
//! no payload. [`ShardContract::check`] is the one place where a shard decides whether it may compute a
//! frame; every transport's frames pass it.

use bytes::Bytes;
use cadre_ops::RowFormat;
use cadre_types::{Generation, LayerId, ShardIndex, generation::GenerationMismatch};

/// Most tokens in one frame. A prefill chunk is at most this long, so a chunk is one frame per shard.
pub const MAX_FRAME_TOKENS: usize = 4096;

/// Most payload bytes of a frame or of its answer: half of what a gRPC message may have, and what the
/// HTTP/2 window takes without an update. At hidden 7168 that is 4096 tokens of e4m3 (30 MB) or bf16
/// (59 MB); longer frames and answers are split.
pub const MAX_FRAME_BYTES: usize = 64 << 20;

/// Tokens and the slots they want: one per (layer step, shard).
#[derive(Clone, Debug, PartialEq)]
pub struct DispatchFrame {
    /// Names the frame on its stream.
    pub sequence: u64,
    /// The sender's stamp.
    pub generation: Generation,
    /// The layer.
    pub layer: LayerId,
    /// Rows of `data`; 0 is a probe.
    pub tokens: usize,
    /// Encoding of `data`.
    pub format: RowFormat,
    /// `[tokens, hidden]`.
    pub data: Bytes,
    /// `[tokens, ceil(hidden / 128)]` F32 little-endian, only with e4m3.
    pub scales: Bytes,
    /// Row of each wanted pair.
    pub pair_tokens: Vec<u32>,
    /// Slot of each wanted pair. Pairs ascend by (slot, token).
    pub pair_slots: Vec<u32>,
}

impl DispatchFrame {
    /// (token, slot) pairs wanted.
    pub fn pairs(&self) -> usize {
        self.pair_tokens.len()
    }

    /// Bytes that the frame takes in memory and, nearly, on the wire.
    pub fn payload_bytes(&self) -> usize {
        self.data.len() + self.scales.len() + 8 * self.pairs()
    }
}

/// The row of ones that proves slots: every shard computes finite rows of it, or its weights are broken.
pub fn frame_of_ones(
    generation: Generation,
    layer: LayerId,
    hidden: usize,
    slots: Vec<u32>,
) -> DispatchFrame {
    let format = RowFormat::dispatch(generation.numerics);
    let one: &[u8] = match format {
        RowFormat::F32 => &[0x00, 0x00, 0x80, 0x3F],
        RowFormat::Bf16 => &[0x80, 0x3F],
        RowFormat::E4m3 => &[0x38],
    };
    DispatchFrame {
        sequence: 0,
        generation,
        layer,
        tokens: 1,
        format,
        data: one.repeat(hidden).into(),
        scales: 1.0_f32.to_le_bytes().repeat(format.row_scales(hidden)).into(),
        pair_tokens: vec![0; slots.len()],
        pair_slots: slots,
    }
}

/// Index of the first element that is not finite: its exponent is all ones (e4m3fn: all bits but the sign). Reads
/// whole blocks without a branch, so that it costs less than the copy that follows.
pub fn first_not_finite(format: RowFormat, rows: &[u8]) -> Option<usize> {
    /// Elements of a block: few kilobytes, so that a hit is looked for in the nearest cache.
    const BLOCK: usize = 1024;
    fn find<const N: usize>(rows: &[u8], is_bad: impl Fn(&[u8; N]) -> bool) -> Option<usize> {
        let (elements, _) = rows.as_chunks::<N>();
        let any_bad = |block: &[[u8; N]]| block.iter().fold(false, |bad, element| bad | is_bad(element));
        let block = elements.chunks(BLOCK).position(any_bad)?;
        let within = elements[block * BLOCK..].iter().position(is_bad)?;
        Some(block * BLOCK + within)
    }
    match format {
        RowFormat::F32 => {
            find::<4>(rows, |element| u32::from_le_bytes(*element) & 0x7F80_0000 == 0x7F80_0000)
        }
        RowFormat::Bf16 => find::<2>(rows, |element| u16::from_le_bytes(*element) & 0x7F80 == 0x7F80),
        RowFormat::E4m3 => find::<1>(rows, |element| element[0] & 0x7F == 0x7F),
    }
}

/// Expert outputs for one frame.
#[derive(Clone, Debug, PartialEq)]
pub struct CombineFrame {
    /// Encoding of `rows`.
    pub format: RowFormat,
    /// `[pairs, hidden]` in the request's pair order.
    pub rows: Bytes,
    /// What the shard measured.
    pub signals: ShardSignals,
}

/// Measurements that ride on an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ShardSignals {
    /// Microseconds that the frame waited before its GEMM began.
    pub queue_micros: u32,
    /// Microseconds of the GEMM that it took part in.
    pub compute_micros: u32,
    /// Tokens of all workers waiting on the shard when it answered.
    pub queued_tokens: u32,
}

/// What a frame ends in.
pub type Answer = Result<CombineFrame, LinkError>;

/// Why a shard did not compute a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalCode {
    /// Other weights or numerics. Not retryable anywhere.
    Generation,
    /// Other placement epoch. Retryable after the next view.
    Epoch,
    /// Sizes, dtypes or indices that do not fit. A bug of the sender.
    Malformed,
    /// More tokens or bytes than a frame may have. A bug of the sender.
    Oversize,
    /// The shard's queue is full. Retryable on another copy.
    Overloaded,
    /// Slots are not loaded yet, or the shard drains. Retryable on another copy.
    Unavailable,
    /// The backend failed. Retryable on another copy.
    Internal,
}

/// A typed refusal with its words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What kind.
    pub code: RefusalCode,
    /// Names the operation, the layer, the epoch and the values.
    pub message: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Why a frame has no rows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The shard refused it.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// The stream to the shard is down or broke while the frame was out.
    #[error("link down: {0}")]
    Disconnected(String),
    /// Too many frames are out on this link already.
    #[error("{outstanding} frames are out on this link already")]
    Backlogged {
        /// Frames without an answer.
        outstanding: usize,
    },
    /// Whoever had the frame dropped it without an answer.
    #[error("the shard dropped the frame")]
    Dropped,
}

/// What a shard serves right now; frames are checked against it before they queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardContract {
    /// Which shard.
    pub shard: ShardIndex,
    /// Weights, numerics and the epoch applied.
    pub generation: Generation,
    /// Row width.
    pub hidden: usize,
    /// `(layer, slots)` ascending by layer.
    pub slots: Vec<(LayerId, usize)>,
}

impl ShardContract {
    /// Whether a frame may be computed.
    pub fn check(&self, frame: &DispatchFrame) -> Result<(), Refusal> {
        self.check_generation(frame)?;
        self.check_size(frame)?;
        self.check_pairs(frame)
    }

    fn refuse<T>(
        &self,
        frame: &DispatchFrame,
        code: RefusalCode,
        what: impl std::fmt::Display,
    ) -> Result<T, Refusal> {
        let (shard, epoch) = (self.shard, self.generation.epoch);
        Err(Refusal::new(code, format!("{shard}, {}, {epoch}: {what}", frame.layer)))
    }

    fn check_generation(&self, frame: &DispatchFrame) -> Result<(), Refusal> {
        match self.generation.check(&frame.generation) {
            Ok(()) => Ok(()),
            Err(mismatch @ GenerationMismatch::Epoch { .. }) => {
                self.refuse(frame, RefusalCode::Epoch, mismatch)
            }
            Err(mismatch) => self.refuse(frame, RefusalCode::Generation, mismatch.to_peer()),
        }
    }

    fn check_size(&self, frame: &DispatchFrame) -> Result<(), Refusal> {
        let class = self.generation.numerics;
        let expected = RowFormat::dispatch(class);
        if frame.format != expected {
            let what = format!("rows are {:?}, class {class} takes {expected:?}", frame.format);
            return self.refuse(frame, RefusalCode::Malformed, what);
        }
        if frame.tokens > MAX_FRAME_TOKENS {
            let what = format!("{} tokens, a frame has at most {MAX_FRAME_TOKENS}", frame.tokens);
            return self.refuse(frame, RefusalCode::Oversize, what);
        }
        let answer = frame.pairs() * RowFormat::combine(class).row_bytes(self.hidden);
        for (what, bytes) in [("frame", frame.payload_bytes()), ("answer", answer)] {
            if bytes > MAX_FRAME_BYTES {
                let what = format!("{what} of {bytes} bytes, at most {MAX_FRAME_BYTES}");
                return self.refuse(frame, RefusalCode::Oversize, what);
            }
        }
        let sizes = [
            ("activation", frame.data.len(), frame.tokens * expected.row_bytes(self.hidden)),
            ("scale", frame.scales.len(), frame.tokens * expected.row_scales(self.hidden) * 4),
        ];
        for (what, found, wanted) in sizes {
            if found != wanted {
                let what = format!(
                    "{found} {what} bytes for {} tokens of hidden {}, expected {wanted}",
                    frame.tokens, self.hidden
                );
                return self.refuse(frame, RefusalCode::Malformed, what);
            }
        }
        Ok(())
    }

    fn check_pairs(&self, frame: &DispatchFrame) -> Result<(), Refusal> {
        let malformed = |what: String| self.refuse(frame, RefusalCode::Malformed, what);
        let Ok(at) = self.slots.binary_search_by_key(&frame.layer, |(layer, _)| *layer) else {
            return malformed("no experts of this layer are placed".to_owned());
        };
        let slots = self.slots[at].1;
        if frame.pair_slots.len() != frame.pair_tokens.len() {
            let (tokens, slots) = (frame.pair_tokens.len(), frame.pair_slots.len());
            return malformed(format!("{tokens} pair tokens but {slots} pair slots"));
        }
        let mut previous = None;
        for pair in frame.pair_slots.iter().copied().zip(frame.pair_tokens.iter().copied()) {
            let (slot, token) = pair;
            if slot as usize >= slots {
                return malformed(format!("slot {slot} of {slots}"));
            }
            if token as usize >= frame.tokens {
                return malformed(format!("token {token} of {}", frame.tokens));
            }
            if previous.is_some_and(|previous| previous >= pair) {
                return malformed(format!("pair (slot {slot}, token {token}) is out of order"));
            }
            previous = Some(pair);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
