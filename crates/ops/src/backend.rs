//! The backend trait.
//!
//! Conventions: activations are row-major `[rows, cols]` in a [`Backend::Buffer`] of logical element
//! type F32 (a backend may store a class's rounded values more tightly); `rows` arguments say how many
//! leading rows take part, so one buffer serves batches of every size up to its capacity. Outputs are
//! separate buffers; none aliases an input. Every method validates its shapes against the buffers and
//! returns [`OpsError::Shape`] instead of panicking. Rounding points per class are in docs/numerics.md.

use cadre_types::{NumericsClass, PageId, Position, TokenId};

use crate::{
    host::{HostMatrix, HostRows, HostVector, RowFormat},
    shape::{AttentionShape, DecodeRow, GateShape, KvLayout, PrefillSegment, RowGroup},
};

/// Three matrices of a feed-forward block, resident on the device: `down(silu(gate(x)) * up(x))`.
#[derive(Debug)]
pub struct Ffn<W> {
    /// gate_proj and up_proj, stacked by the backend as it likes.
    pub gate_up: W,
    /// down_proj.
    pub down: W,
    /// Inner width.
    pub inner: usize,
}

/// A device that can run the network.
pub trait Backend: Send + Sync + 'static {
    /// Device memory for activations, `[capacity rows, cols]`.
    type Buffer: Send;
    /// A matrix resident on the device, in the backend's own packing.
    type Weight: Send + Sync;
    /// A vector resident on the device.
    type Vector: Send + Sync;
    /// The latent cache: every layer's pages.
    type KvCache: Send;
    /// kv_b in the forms that attention needs (expanding for prefill, absorbed for decode).
    type KvUp: Send + Sync;
    /// Rotary tables and attention scratch for one [`AttentionShape`].
    type Attention: Send + Sync;
    /// An ordered stream of operations.
    type Queue: Send;

    /// The numerics class that this backend was made for.
    fn class(&self) -> NumericsClass;

    /// One line for logs: device, instruction set, threads.
    fn describe(&self) -> String;

    /// Opens a queue. Operations on one queue run in the order given.
    fn queue(&self) -> Result<Self::Queue, OpsError>;

    /// Waits until everything on the queue is done, and reports what failed asynchronously.
    fn synchronize(&self, queue: &mut Self::Queue) -> Result<(), OpsError>;

    // --- memory ---------------------------------------------------------------------------------

    /// Device memory for `rows x cols` activations.
    fn alloc(&self, rows: usize, cols: usize) -> Result<Self::Buffer, OpsError>;

    /// Packs a matrix for [`Self::linear`]. Refuses NaN codes, BF16 and F32 elements that are not finite, and
    /// scales that are not finite and positive (or overflow when multiplied with 2^8).
    fn load_matrix(&self, matrix: HostMatrix<'_>) -> Result<Self::Weight, OpsError>;

    /// Packs gate_proj `[inner, hidden]`, up_proj `[inner, hidden]` and down_proj `[hidden, inner]`; gate_proj and
    /// up_proj have the same element type.
    fn load_ffn(
        &self,
        gate: HostMatrix<'_>,
        up: HostMatrix<'_>,
        down: HostMatrix<'_>,
    ) -> Result<Ffn<Self::Weight>, OpsError>;

    /// A vector of finite values.
    fn load_vector(&self, vector: HostVector<'_>) -> Result<Self::Vector, OpsError>;

    /// kv_b_proj `[heads * (nope + v), kv_lora]`: per head `nope` key rows, then `v` value rows.
    fn load_kv_up(&self, shape: &AttentionShape, kv_b: HostMatrix<'_>) -> Result<Self::KvUp, OpsError>;

    /// Rotary tables for a shape.
    fn load_attention(&self, shape: &AttentionShape) -> Result<Self::Attention, OpsError>;

    /// Bytes that a packed matrix occupies on the device.
    fn weight_bytes(&self, weight: &Self::Weight) -> usize;

    /// A zeroed latent cache. Elements are [`RowFormat::combine`] of the class.
    fn kv_cache(&self, layout: KvLayout) -> Result<Self::KvCache, OpsError>;

    // --- host transfers (each synchronises the queue) -----------------------------------------------

    /// Encodes rows `0..rows` of `x` into `data` and `scales` (cleared first). With [`RowFormat::E4m3`] the
    /// published quantiser is applied (spec §7): per row and 128 columns `s = max(amax, 1e-4) / 448`; a row that
    /// arrived with codes is sent on with those.
    fn download_rows(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Buffer,
        rows: usize,
        format: RowFormat,
        data: &mut Vec<u8>,
        scales: &mut Vec<u8>,
    ) -> Result<(), OpsError>;

    /// Decodes rows into `y`. For [`RowFormat::E4m3`] the buffer remembers codes and scales, so that a
    /// following quantised matrix product uses exactly the sender's codes.
    fn upload_rows(
        &self,
        queue: &mut Self::Queue,
        rows: HostRows<'_>,
        y: &mut Self::Buffer,
    ) -> Result<(), OpsError>;

    /// Copies F32 values of the given rows to the host: `out` becomes `[rows.len(), cols]`.
    fn download_f32(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Buffer,
        rows: &[usize],
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError>;

    /// Reads cached rows (`c` then `k_pe`, [`RowFormat::combine`] of the class) of positions
    /// `first..first + count` of a sequence in one layer, for hand-off; appended to `out`.
    #[allow(clippy::too_many_arguments, reason = "a range of a sequence in a layer of a cache")]
    fn kv_read(
        &self,
        queue: &mut Self::Queue,
        cache: &Self::KvCache,
        layer: usize,
        block_table: &[PageId],
        first: Position,
        count: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), OpsError>;

    /// Writes rows that [`Self::kv_read`] of a peer produced.
    #[allow(clippy::too_many_arguments, reason = "a range of a sequence in a layer of a cache")]
    fn kv_write(
        &self,
        queue: &mut Self::Queue,
        cache: &mut Self::KvCache,
        layer: usize,
        block_table: &[PageId],
        first: Position,
        count: usize,
        rows: &[u8],
    ) -> Result<(), OpsError>;

    // --- network operations ---------------------------------------------------------------------------

    /// `y[t, :] = table[ids[t], :]` (exact).
    fn embed(
        &self,
        queue: &mut Self::Queue,
        table: &Self::Weight,
        ids: &[TokenId],
        y: &mut Self::Buffer,
    ) -> Result<(), OpsError>;

    /// `y = x / sqrt(mean(x^2) + eps) * weight`, rounded once to the class's activation type.
    fn rms_norm(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        rows: usize,
        y: &mut Self::Buffer,
    ) -> Result<(), OpsError>;

    /// `y = x W^T`, `x [rows, W.cols]`, `y [rows, W.rows]`, rounded once to the class's activation type. In
    /// class fp8 the input of an e4m3 matrix is quantised per 128 first.
    fn linear(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Buffer,
        weight: &Self::Weight,
        rows: usize,
        y: &mut Self::Buffer,
    ) -> Result<(), OpsError>;

    /// As [`Self::linear`] for chosen rows of `x` and without rounding: logits in F32, downloaded to `out`
    /// as `[rows.len(), W.rows]`. Synchronises.
    fn logits(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Buffer,
        rows: &[usize],
        head: &Self::Weight,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError>;

    /// A whole feed-forward block; the inner activation is rounded to the class's activation type (and
    /// quantised again in class fp8).
    fn ffn(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Buffer,
        ffn: &Ffn<Self::Weight>,
        rows: usize,
        y: &mut Self::Buffer,
    ) -> Result<(), OpsError>;

    /// Grouped feed-forward: rows of each group through that group's expert. Rows of `x` are contiguous by
    /// group, groups do not overlap (their order is free, rows in none are left alone), experts have one shape;
    /// each row's result depends on nothing but that row and its expert.
    fn grouped_ffn(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Buffer,
        experts: &[&Ffn<Self::Weight>],
        groups: &[RowGroup],
        y: &mut Self::Buffer,
    ) -> Result<(), OpsError>;

    /// `y[i, :] = x[rows[i], :]`, codes and scales included where the buffer carries them.
    fn gather_rows(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Buffer,
        rows: &[usize],
        y: &mut Self::Buffer,
    ) -> Result<(), OpsError>;

    /// Concatenates per row: `y[t, :] = [a[t, :], b[t, :]]` (input of eh_proj).
    fn concat(
        &self,
        queue: &mut Self::Queue,
        a: &Self::Buffer,
        b: &Self::Buffer,
        rows: usize,
        y: &mut Self::Buffer,
    ) -> Result<(), OpsError>;

    /// Residual stream: `x += delta`, F32, not rounded.
    fn add(
        &self,
        queue: &mut Self::Queue,
        x: &mut Self::Buffer,
        delta: &Self::Buffer,
        rows: usize,
    ) -> Result<(), OpsError>;

    /// Rotates the `k_pe` part and normalises the `c` part of `kv_a [rows, kv_lora + rope]` and stores both
    /// at each row's position. `positions[t]` and `tables[t]` belong to row `t`. Of two rows for one place the
    /// later one stays.
    #[allow(clippy::too_many_arguments, reason = "fuses norm, rotation and store")]
    fn kv_append(
        &self,
        queue: &mut Self::Queue,
        attention: &Self::Attention,
        kv_a: &Self::Buffer,
        norm: &Self::Vector,
        eps: f32,
        positions: &[Position],
        tables: &[&[PageId]],
        layer: usize,
        cache: &mut Self::KvCache,
    ) -> Result<(), OpsError>;

    /// Rotates `q_pe` of every row in place; `q [rows, heads * (nope + rope)]`.
    fn rope_query(
        &self,
        queue: &mut Self::Queue,
        attention: &Self::Attention,
        positions: &[Position],
        q: &mut Self::Buffer,
    ) -> Result<(), OpsError>;

    /// Naive-form causal attention of prompt chunks over the cache (which already holds the chunk itself):
    /// keys and values expanded through `kv_up` from the cached latents. Writes rows of the segments in
    /// `out [rows, heads * v]`; segments do not overlap. The context is expanded anew on every call, so
    /// longer chunks cost less per row.
    #[allow(clippy::too_many_arguments, reason = "a batch of segments against one layer of a cache")]
    fn attention_prefill(
        &self,
        queue: &mut Self::Queue,
        attention: &Self::Attention,
        kv_up: &Self::KvUp,
        q: &Self::Buffer,
        segments: &[PrefillSegment<'_>],
        layer: usize,
        cache: &Self::KvCache,
        out: &mut Self::Buffer,
    ) -> Result<(), OpsError>;

    /// Absorbed-form attention of generated rows. Writes those rows of `out [rows, heads * v]`; no row is named
    /// twice.
    #[allow(clippy::too_many_arguments, reason = "a batch of rows against one layer of a cache")]
    fn attention_decode(
        &self,
        queue: &mut Self::Queue,
        attention: &Self::Attention,
        kv_up: &Self::KvUp,
        q: &Self::Buffer,
        rows: &[DecodeRow<'_>],
        layer: usize,
        cache: &Self::KvCache,
        out: &mut Self::Buffer,
    ) -> Result<(), OpsError>;

    /// The gate (spec §6): `topk_idx [rows, k]` ascending by expert id within a row, `topk_weights` in the
    /// same order. Ties choose the lowest id; a NaN logit is [`OpsError::NanGate`]. Synchronises.
    #[allow(clippy::too_many_arguments, reason = "gate inputs and its two outputs")]
    fn gate(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Buffer,
        weight: &Self::Weight,
        bias: &Self::Vector,
        shape: &GateShape,
        rows: usize,
        topk_idx: &mut Vec<u16>,
        topk_weights: &mut Vec<f32>,
    ) -> Result<(), OpsError>;

    /// `x[t] += (sum over j ascending of weights[t, j] * expert_rows[t * k + j]) + shared[t]`: the chain
    /// starts at 0, each term is one FMA in F32, the shared output is added last, then the residual.
    #[allow(clippy::too_many_arguments, reason = "fuses weighting, sum, shared expert and residual")]
    fn combine(
        &self,
        queue: &mut Self::Queue,
        expert_rows: HostRows<'_>,
        topk_weights: &[f32],
        top_k: usize,
        shared: Option<&Self::Buffer>,
        rows: usize,
        x: &mut Self::Buffer,
    ) -> Result<(), OpsError>;
}

/// What an operation refuses.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OpsError {
    /// Shapes do not fit together.
    #[error("{op}: {what} is {found}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Which dimension of which argument.
        what: &'static str,
        /// What was given.
        found: usize,
        /// What is needed.
        expected: usize,
    },
    /// An index is out of range.
    #[error("{op}: {what} {index} is out of range (limit {limit})")]
    Range {
        /// The operation.
        op: &'static str,
        /// What the index counts.
        what: &'static str,
        /// The index.
        index: usize,
        /// First index that does not exist.
        limit: usize,
    },
    /// A weight value that no kernel may see.
    #[error("{op}: {what} at element {index} is {value}")]
    BadValue {
        /// The operation.
        op: &'static str,
        /// Which value.
        what: &'static str,
        /// Its flat index.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// The gate met a NaN.
    #[error("gate: logit of expert {expert} in row {row} is NaN")]
    NanGate {
        /// Row of the batch.
        row: usize,
        /// Logical expert.
        expert: usize,
    },
    /// The device has no room.
    #[error("{op}: cannot allocate {bytes} bytes on the device")]
    OutOfMemory {
        /// The operation.
        op: &'static str,
        /// Requested size.
        bytes: usize,
    },
    /// The device failed.
    #[error("{op}: {message}")]
    Device {
        /// The operation.
        op: &'static str,
        /// What the device said.
        message: String,
    },
}
