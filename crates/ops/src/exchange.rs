//! What a MoE layer asks of whoever computes its routed experts: encoded rows out, encoded rows back.
//!
//! The trait is owned by its consumer (the model); `cadre-dispatch` implements it over shards in this
//! process or behind gRPC. The two calls are apart so that the shared expert, or another micro-batch,
//! is computed while the experts work.

use cadre_types::{Generation, LayerId, LogicalExpert, PlacementEpoch, ShardIndex};

use crate::host::{HostRows, RowFormat};

/// Rows of one MoE layer step and where they go.
#[derive(Clone, Copy, Debug)]
pub struct DispatchBatch<'a> {
    /// The layer.
    pub layer: LayerId,
    /// `[tokens, hidden]`, encoded in [`RowFormat::dispatch`] of the class.
    pub activations: HostRows<'a>,
    /// Experts per token.
    pub top_k: usize,
    /// `[tokens, top_k]` logical experts, ascending within a token.
    pub topk_idx: &'a [u16],
}

/// Names a dispatch until its combine. Tickets of one exchange are combined in the order dispatched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExchangeTicket(pub u64);

/// Expert outputs in the order of `topk_idx`: row `t * top_k + j` is token `t` through its `j`-th expert.
#[derive(Clone, Debug)]
pub struct ExpertRows {
    /// [`RowFormat::combine`] of the class.
    pub format: RowFormat,
    /// `tokens * top_k`.
    pub rows: usize,
    /// Elements per row.
    pub hidden: usize,
    /// `rows * format.row_bytes(hidden)`; reused from step to step.
    pub data: Vec<u8>,
}

impl Default for ExpertRows {
    fn default() -> Self {
        Self { format: RowFormat::F32, rows: 0, hidden: 0, data: Vec::new() }
    }
}

impl ExpertRows {
    /// The rows as [`HostRows`].
    pub fn as_host_rows(&self) -> HostRows<'_> {
        HostRows { format: self.format, rows: self.rows, cols: self.hidden, data: &self.data, scales: &[] }
    }
}

/// Computes routed experts.
pub trait ExpertExchange: Send {
    /// Sends the rows to their experts. Does not wait for results; copies what it needs of the batch.
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
