//! What a MoE layer asks of whoever computes its routed experts: encoded rows out, encoded rows back.
//!
//! The trait is owned by its consumer (the model); `cadre-dispatch` implements it over shards in this
//! process or behind gRPC. The two calls are apart so that the shared expert, or another micro-batch,
//! is computed while the experts work.

use bytes::Bytes;
use cadre_types::{Generation, LayerId, LogicalExpert, PlacementEpoch, ShardIndex};

use crate::host::{EncodedRows, RowFormat};

/// Rows of one MoE layer step and where they go.
#[derive(Clone, Copy, Debug)]
pub struct DispatchBatch<'a> {
    /// The layer.
    pub layer: LayerId,
    /// `[tokens, hidden]`, encoded in [`RowFormat::dispatch`] of the class. An exchange may keep slices.
    pub activations: &'a EncodedRows,
    /// Experts per token.
    pub top_k: usize,
    /// `[tokens, top_k]` logical experts, ascending within a token.
    pub topk_idx: &'a [u16],
}

/// Names a dispatch until its combine. Tickets of one exchange are combined in the order dispatched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExchangeTicket(pub u64);

/// Expert outputs as they arrived: pair `t * top_k + j` is token `t` through its `j`-th expert.
#[derive(Clone, Debug)]
pub struct ExpertRows {
    /// [`RowFormat::combine`] of the class.
    pub format: RowFormat,
    /// Pairs: `tokens * top_k`.
    pub pairs: usize,
    /// Elements per row.
    pub hidden: usize,
    /// Rows of answers. Together they hold every pair exactly once.
    pub chunks: Vec<ExpertChunk>,
}

/// Rows of one answer.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertChunk {
    /// `targets.len() * format.row_bytes(hidden)` bytes.
    pub rows: Bytes,
    /// The pair that each row is of.
    pub targets: Vec<u32>,
}

impl Default for ExpertRows {
    fn default() -> Self {
        Self { format: RowFormat::F32, pairs: 0, hidden: 0, chunks: Vec::new() }
    }
}

impl ExpertRows {
    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.format.row_bytes(self.hidden)
    }

    /// All rows in the order of pairs, copied together: for tests and tools.
    pub fn in_order(&self) -> Vec<u8> {
        let width = self.row_bytes();
        let mut out = vec![0; self.pairs * width];
        for chunk in &self.chunks {
            for (row, target) in chunk.rows.chunks_exact(width.max(1)).zip(&chunk.targets) {
                let at = *target as usize * width;
                out[at..at + width].copy_from_slice(row);
            }
        }
        out
    }
}

/// Computes routed experts.
pub trait ExpertExchange: Send {
    /// Sends the rows to their experts. Does not wait for results; keeps what it needs of the batch.
    fn dispatch(&mut self, batch: DispatchBatch<'_>) -> Result<ExchangeTicket, ExchangeError>;

    /// Waits, within the exchange's bounds, for the rows of a dispatch; retries on other copies.
    fn combine(&mut self, ticket: ExchangeTicket, out: &mut ExpertRows) -> Result<(), ExchangeError>;
}

/// Why expert rows could not be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// No live copy within the bound.
    #[error("{expert} of {layer}: no live copy after {waited_ms} ms, {epoch}: {causes}")]
    Uncovered {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: LogicalExpert,
        /// The placement in force.
        epoch: PlacementEpoch,
        /// How long was waited for one to come back.
        waited_ms: u64,
        /// What failed first and last, and the state of each copy.
        causes: String,
    },
    /// A shard serves other weights or numerics.
    #[error("{layer}: {shard} refused our generation {ours:?}: {message}")]
    Generation {
        /// The layer.
        layer: LayerId,
        /// The shard.
        shard: ShardIndex,
        /// Our stamp.
        ours: Generation,
        /// What the shard said.
        message: String,
    },
    /// The batch or an answer has sizes that do not fit.
    #[error("{layer}: {message}")]
    Malformed {
        /// The layer.
        layer: LayerId,
        /// What does not fit.
        message: String,
    },
    /// An expert's row is not finite and no shard is to blame: its input was not, or every copy says the same.
    #[error("{expert} of {layer}: {message}")]
    NotFinite {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: LogicalExpert,
        /// What is not finite, and who computed it.
        message: String,
    },
    /// No placement is known yet.
    #[error("{layer}: no placement received from the coordinator yet")]
    NoPlacement {
        /// The layer.
        layer: LayerId,
    },
    /// The exchange was told to stop.
    #[error("{layer}: the exchange is closed")]
    Closed {
        /// The layer.
        layer: LayerId,
    },
}
