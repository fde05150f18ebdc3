//! The backend trait.
//!
//! **Order.** Operations on one queue run in the order given. A call may return before its work is done: what
//! it reads and writes is then the device's until an [`Backend::Event`] recorded later on that queue is done.
//! Whatever memory a call names (buffers, weights, [`Bytes`], staging) may be dropped or overwritten by
//! *later operations of the same queue* at once; the backend keeps what its device still needs. Only methods
//! that say *waits* wait for the device.
//!
//! **Kinds of buffers.** [`Backend::Residual`] is F32 and never rounded; [`Backend::Activations`] hold values
//! rounded to the class's activation type (and, if the backend likes, their e4m3 codes beside them);
//! [`Backend::Rows`] hold rows in [`RowFormat::dispatch`](crate::RowFormat::dispatch) of the class, as they travel to experts;
//! [`Backend::Logits`] are F32. All are row-major `[capacity rows, cols]`; `rows` arguments say how many
//! leading rows take part, so one buffer serves batches of every size up to its capacity. Outputs are separate
//! buffers; none aliases an input.
//!
//! **Refusals.** Every method validates its shapes against the buffers and returns [`OpsError::Shape`] or
//! [`OpsError::Range`] instead of panicking (`check` has the shared words). Rounding points per class are in
//! docs/numerics.md.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use cadre_sampler::{Sample, SampleError};
use cadre_types::{NumericsClass, PageId, Position, config::ScaleFormat};

use crate::{
    check,
    drawn::DrawnMatrix,
    exchange::ExpertRows,
    host::{EncodedRows, HostMatrix, HostMemory, HostVector},
    plan::{Allocation, DeviceIdentity, DeviceMemory, PassLimits},
    shape::{AttentionShape, GateShape, KvLayout},
    step::{PassRows, SampleRow, StepInfo, StepRows},
};

pub use crate::error::OpsError;

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
    /// The residual stream: F32, never rounded.
    type Residual: Send;
    /// Values rounded to the class's activation type.
    type Activations: Send;
    /// Rows in the dispatch format of the class (F32; bf16; e4m3 codes and F32 scales per 128 columns).
    type Rows: Send;
    /// Output logits, F32.
    type Logits: Send;
    /// Chosen experts and weights of a step's rows, on the device and (after [`Backend::routed`]) on the host.
    type Routing: Send;
    /// Tokens drawn by [`Backend::sample`], perhaps not yet.
    type Samples: Send;
    /// A matrix resident on the device, in the backend's own packing.
    type Weight: Send + Sync;
    /// A vector resident on the device.
    type Vector: Send + Sync;
    /// The experts of a layer that a shard holds, by slot, ready to be chosen from on the device.
    type ExpertTable: Send + Sync;
    /// The latent cache: every layer's pages.
    type KvCache: Send;
    /// kv_b in the forms that attention needs (expanding for prefill, absorbed for decode).
    type KvUp: Send + Sync;
    /// Rotary tables for one [`AttentionShape`].
    type Attention: Send + Sync;
    /// Ids, positions, segments, block tables and wanted rows of one step, on the device.
    type Step: Send;
    /// Which received rows go through which experts in one pass of a shard, on the device.
    type Pass: Send;
    /// Host memory that the device reads and writes (pinned, on a GPU) and sockets too. Made into [`Bytes`]
    /// without a copy by `Bytes::from_owner`; goes back to the backend when the last of those is dropped.
    /// Looking at it waits until transfers into it are done; ask an event first to avoid that.
    type Staging: HostMemory;
    /// A point in a queue.
    type Event: Send + Sync;
    /// An ordered stream of operations, and scratch memory of their own.
    type Queue: Send;

    // --- the device -------------------------------------------------------------------------------

    /// The numerics class that this backend was made for.
    fn class(&self) -> NumericsClass;

    /// Which device it is, for status and metrics.
    fn identity(&self) -> DeviceIdentity;

    /// One line for logs: device, instruction set, threads.
    fn describe(&self) -> String;

    /// Memory of the device now.
    fn memory(&self) -> DeviceMemory;

    /// Bytes of device memory that an allocation will take, padding and packing included: what a plan made
    /// before loading adds up.
    fn bytes_of(&self, allocation: &Allocation<'_>) -> Result<u64, OpsError>;

    /// How large a pass of a shard over rows of this width may be. More is cut into passes.
    fn pass_limits(&self, hidden: usize) -> PassLimits;

    /// Whether operations are done when their calls return. Who drives such a backend sends rows away before
    /// it asks for more computing; who drives a device queues the computing first and then waits.
    fn runs_at_once(&self) -> bool;

    // --- queues and events ------------------------------------------------------------------------

    /// Opens a queue.
    fn queue(&self) -> Result<Self::Queue, OpsError>;

    /// An event that is done when everything on the queue so far is.
    fn record(&self, queue: &mut Self::Queue) -> Result<Self::Event, OpsError>;

    /// Whether an event is done; an error if what it stands for failed.
    fn is_done(&self, event: &Self::Event) -> Result<bool, OpsError>;

    /// Waits for an event; an error if what it stands for failed.
    fn wait(&self, event: &Self::Event) -> Result<(), OpsError>;

    /// What is given to `queue` from here on runs after the event (of any queue of this backend).
    fn run_after(&self, queue: &mut Self::Queue, event: &Self::Event) -> Result<(), OpsError>;

    /// Waits until everything on the queue is done, and reports what failed.
    fn synchronize(&self, queue: &mut Self::Queue) -> Result<(), OpsError> {
        let event = self.record(queue)?;
        self.wait(&event)
    }

    // --- memory -----------------------------------------------------------------------------------

    /// A zeroed residual stream.
    fn alloc_residual(&self, rows: usize, cols: usize) -> Result<Self::Residual, OpsError>;

    /// Zeroed activations.
    fn alloc_activations(&self, rows: usize, cols: usize) -> Result<Self::Activations, OpsError>;

    /// Room for rows in the dispatch format.
    fn alloc_rows(&self, rows: usize, cols: usize) -> Result<Self::Rows, OpsError>;

    /// Room for logits.
    fn alloc_logits(&self, rows: usize, vocab: usize) -> Result<Self::Logits, OpsError>;

    /// Room for the routing of this many rows.
    fn alloc_routing(&self, rows: usize, top_k: usize) -> Result<Self::Routing, OpsError>;

    /// Room for a step of at most this many rows. Block tables may grow it at [`Self::begin_step`].
    fn alloc_step(&self, rows: usize) -> Result<Self::Step, OpsError>;

    /// Room for a pass within limits.
    fn alloc_pass(&self, limits: PassLimits) -> Result<Self::Pass, OpsError>;

    /// Host memory of exactly `bytes` bytes with any contents, from a pool: what earlier users gave back is used
    /// again.
    fn staging(&self, bytes: usize) -> Result<Self::Staging, OpsError>;

    /// Packs a matrix for [`Self::linear`]. Refuses NaN codes, BF16 and F32 elements that are not finite, and
    /// scales that are not finite and positive (or overflow when multiplied with 2^8). Waits.
    fn load_matrix(&self, matrix: HostMatrix<'_>) -> Result<Self::Weight, OpsError>;

    /// Packs gate_proj `[inner, hidden]`, up_proj `[inner, hidden]` and down_proj `[hidden, inner]`; gate_proj and
    /// up_proj have the same element type. Waits.
    fn load_ffn(
        &self,
        gate: HostMatrix<'_>,
        up: HostMatrix<'_>,
        down: HostMatrix<'_>,
    ) -> Result<Ffn<Self::Weight>, OpsError>;

    /// A vector of finite values. Waits.
    fn load_vector(&self, vector: HostVector<'_>) -> Result<Self::Vector, OpsError>;

    /// kv_b_proj `[heads * (nope + v), kv_lora]`: per head `nope` key rows, then `v` value rows. Waits.
    fn load_kv_up(&self, shape: &AttentionShape, kv_b: HostMatrix<'_>) -> Result<Self::KvUp, OpsError>;

    /// [`Self::load_matrix`] of a matrix whose elements the device draws: the same bits as of
    /// [`DrawnMatrix::bytes`], which this default hands over.
    fn draw_matrix(&self, matrix: &DrawnMatrix<'_>) -> Result<Self::Weight, OpsError> {
        check::drawn_matrix("draw_matrix", matrix)?;
        self.load_matrix(matrix.host(&matrix.bytes("draw_matrix")?))
    }

    /// [`Self::load_ffn`] of drawn matrices.
    fn draw_ffn(
        &self,
        gate: &DrawnMatrix<'_>,
        up: &DrawnMatrix<'_>,
        down: &DrawnMatrix<'_>,
    ) -> Result<Ffn<Self::Weight>, OpsError> {
        let op = "draw_ffn";
        check::drawn_ffn(op, gate, up, down)?;
        let [gates, ups, downs] = [gate.bytes(op)?, up.bytes(op)?, down.bytes(op)?];
        self.load_ffn(gate.host(&gates), up.host(&ups), down.host(&downs))
    }

    /// [`Self::load_kv_up`] of a drawn matrix.
    fn draw_kv_up(&self, shape: &AttentionShape, kv_b: &DrawnMatrix<'_>) -> Result<Self::KvUp, OpsError> {
        check::drawn_kv_up("draw_kv_up", shape, kv_b)?;
        self.load_kv_up(shape, kv_b.host(&kv_b.bytes("draw_kv_up")?))
    }

    /// Rotary tables for a shape. Waits.
    fn load_attention(&self, shape: &AttentionShape) -> Result<Self::Attention, OpsError>;

    /// A table of experts of one shape (it may be empty). Waits.
    fn expert_table(&self, experts: Vec<Arc<Ffn<Self::Weight>>>) -> Result<Self::ExpertTable, OpsError>;

    /// Bytes that a packed matrix occupies on the device.
    fn weight_bytes(&self, weight: &Self::Weight) -> usize;

    /// A zeroed latent cache. Elements are [`RowFormat::combine`] of the class.
    ///
    /// [`RowFormat::combine`]: crate::RowFormat::combine
    fn kv_cache(&self, layout: KvLayout) -> Result<Self::KvCache, OpsError>;

    // --- a step, a pass ---------------------------------------------------------------------------

    /// Puts a step on the device: once, whatever the number of layers. Refuses rows that do not add up, block
    /// tables that do not reach their positions, and two rows with one place in the cache.
    fn begin_step(
        &self,
        queue: &mut Self::Queue,
        rows: &StepRows<'_>,
        step: &mut Self::Step,
    ) -> Result<(), OpsError>;

    /// What the host knows of a step.
    fn step_info<'s>(&self, step: &'s Self::Step) -> &'s StepInfo;

    /// Puts a pass on the device.
    fn begin_pass(
        &self,
        queue: &mut Self::Queue,
        rows: &PassRows<'_>,
        pass: &mut Self::Pass,
    ) -> Result<(), OpsError>;

    // --- transfers ----------------------------------------------------------------------------------

    /// Copies the leading rows to `memory`, laid out as [`RowLayout::of`] the class's dispatch format from
    /// byte `at` on.
    ///
    /// [`RowLayout::of`]: crate::host::RowLayout::of
    fn download_rows(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Rows,
        rows: usize,
        memory: &mut Self::Staging,
        at: usize,
    ) -> Result<(), OpsError>;

    /// Puts rows that arrived at rows `first_row..` of `y`. The codes and scales are used as they came.
    fn upload_rows(
        &self,
        queue: &mut Self::Queue,
        rows: &EncodedRows,
        first_row: usize,
        y: &mut Self::Rows,
    ) -> Result<(), OpsError>;

    /// Copies rows, encoded in [`RowFormat::combine`] of the class, to `memory` from byte `at` on.
    ///
    /// [`RowFormat::combine`]: crate::RowFormat::combine
    fn download_activations(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Activations,
        rows: Range<usize>,
        memory: &mut Self::Staging,
        at: usize,
    ) -> Result<(), OpsError>;

    /// Reads cached rows (`c` then `k_pe`, [`RowFormat::combine`] of the class) of positions
    /// `first..first + count` of a sequence in one layer into `memory` from byte `at` on, for hand-off.
    ///
    /// [`RowFormat::combine`]: crate::RowFormat::combine
    #[allow(clippy::too_many_arguments, reason = "a range of a sequence in a layer of a cache, and a place")]
    fn kv_read(
        &self,
        queue: &mut Self::Queue,
        cache: &Self::KvCache,
        layer: usize,
        block_table: &[PageId],
        first: Position,
        count: usize,
        memory: &mut Self::Staging,
        at: usize,
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
        rows: &Bytes,
    ) -> Result<(), OpsError>;

    /// Values of rows, appended to `out`. Waits: for observers, tests, and the few values that leave a step.
    fn read_activations(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Activations,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError>;

    /// As [`Self::read_activations`].
    fn read_residual(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Residual,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError>;

    /// As [`Self::read_activations`].
    fn read_logits(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Logits,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError>;

    /// Writes the leading `values.len() / cols` rows, each value rounded as an activation of the class. Waits.
    fn write_activations(
        &self,
        queue: &mut Self::Queue,
        values: &[f32],
        y: &mut Self::Activations,
    ) -> Result<(), OpsError>;

    /// Writes the leading `values.len() / cols` rows exactly. Waits.
    fn write_residual(
        &self,
        queue: &mut Self::Queue,
        values: &[f32],
        y: &mut Self::Residual,
    ) -> Result<(), OpsError>;

    /// As [`Self::write_residual`], for logits.
    fn write_logits(
        &self,
        queue: &mut Self::Queue,
        values: &[f32],
        y: &mut Self::Logits,
    ) -> Result<(), OpsError>;

    // --- dense operations -------------------------------------------------------------------------------

    /// `y[t, :] = table[id of row t, :]` for every row of the step (exact).
    fn embed(
        &self,
        queue: &mut Self::Queue,
        step: &Self::Step,
        table: &Self::Weight,
        y: &mut Self::Residual,
    ) -> Result<(), OpsError>;

    /// `y = x / sqrt(mean(x^2) + eps) * weight`, rounded once to the class's activation type.
    fn rms_norm(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Activations,
        weight: &Self::Vector,
        eps: f32,
        rows: usize,
        y: &mut Self::Activations,
    ) -> Result<(), OpsError>;

    /// As [`Self::rms_norm`], of the residual stream.
    fn rms_norm_residual(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Residual,
        weight: &Self::Vector,
        eps: f32,
        rows: usize,
        y: &mut Self::Activations,
    ) -> Result<(), OpsError>;

    /// Residual stream: `x += delta`, F32, not rounded.
    fn add(
        &self,
        queue: &mut Self::Queue,
        x: &mut Self::Residual,
        delta: &Self::Activations,
        rows: usize,
    ) -> Result<(), OpsError>;

    /// [`Self::add`], then [`Self::rms_norm_residual`] of the sum: for backends that do both at once.
    #[allow(clippy::too_many_arguments, reason = "two operations in one")]
    fn add_rms_norm(
        &self,
        queue: &mut Self::Queue,
        x: &mut Self::Residual,
        delta: &Self::Activations,
        weight: &Self::Vector,
        eps: f32,
        rows: usize,
        y: &mut Self::Activations,
    ) -> Result<(), OpsError> {
        self.add(queue, x, delta, rows)?;
        self.rms_norm_residual(queue, x, weight, eps, rows, y)
    }

    /// Residual stream: `x = y` (exact).
    fn assign(
        &self,
        queue: &mut Self::Queue,
        x: &mut Self::Residual,
        y: &Self::Activations,
        rows: usize,
    ) -> Result<(), OpsError>;

    /// `y[i, :] = x[wanted row i, :]` for the wanted rows of the step.
    fn gather_wanted(
        &self,
        queue: &mut Self::Queue,
        step: &Self::Step,
        x: &Self::Residual,
        y: &mut Self::Residual,
    ) -> Result<(), OpsError>;

    /// Concatenates per row: `y[t, :] = [a[t, :], b[t, :]]` (input of eh_proj).
    fn concat(
        &self,
        queue: &mut Self::Queue,
        a: &Self::Activations,
        b: &Self::Activations,
        rows: usize,
        y: &mut Self::Activations,
    ) -> Result<(), OpsError>;

    /// `y = x W^T`, `x [rows, W.cols]`, `y [rows, W.rows]`, rounded once to the class's activation type. In
    /// class fp8 the input of an e4m3 matrix is quantised per 128 first, with scales of the matrix's
    /// [`ScaleFormat`].
    fn linear(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Activations,
        weight: &Self::Weight,
        rows: usize,
        y: &mut Self::Activations,
    ) -> Result<(), OpsError>;

    /// As [`Self::linear`] without rounding: logits of the leading rows.
    fn logits(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Activations,
        head: &Self::Weight,
        rows: usize,
        y: &mut Self::Logits,
    ) -> Result<(), OpsError>;

    /// A whole feed-forward block; the inner activation is rounded to the class's activation type (and
    /// quantised again in class fp8).
    fn ffn(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Activations,
        ffn: &Ffn<Self::Weight>,
        rows: usize,
        y: &mut Self::Activations,
    ) -> Result<(), OpsError>;

    // --- attention --------------------------------------------------------------------------------------

    /// Rotates the `k_pe` part and normalises the `c` part of `kv_a [rows, kv_lora + rope]` and stores both
    /// at each row's position.
    #[allow(clippy::too_many_arguments, reason = "fuses norm, rotation and store")]
    fn kv_append(
        &self,
        queue: &mut Self::Queue,
        step: &Self::Step,
        attention: &Self::Attention,
        kv_a: &Self::Activations,
        norm: &Self::Vector,
        eps: f32,
        layer: usize,
        cache: &mut Self::KvCache,
    ) -> Result<(), OpsError>;

    /// Rotates `q_pe` of every row in place; `q [rows, heads * (nope + rope)]`.
    fn rope_query(
        &self,
        queue: &mut Self::Queue,
        step: &Self::Step,
        attention: &Self::Attention,
        q: &mut Self::Activations,
    ) -> Result<(), OpsError>;

    /// Causal attention of every row of the step over the cache (which already holds the step's own rows), in
    /// the form of its segment: naive (keys and values expanded through `kv_up` from the cached latents) or
    /// absorbed. Writes `out [rows, heads * v]`.
    #[allow(clippy::too_many_arguments, reason = "a batch of segments against one layer of a cache")]
    fn attend(
        &self,
        queue: &mut Self::Queue,
        step: &Self::Step,
        attention: &Self::Attention,
        kv_up: &Self::KvUp,
        q: &Self::Activations,
        layer: usize,
        cache: &Self::KvCache,
        out: &mut Self::Activations,
    ) -> Result<(), OpsError>;

    // --- experts ------------------------------------------------------------------------------------------

    /// The gate (spec §6) for every row of the step; token ids are the step's. Ids ascend within a row, ties
    /// choose the lowest. Starts the copy of the ids to the host.
    #[allow(clippy::too_many_arguments, reason = "gate inputs and its output")]
    fn gate(
        &self,
        queue: &mut Self::Queue,
        step: &Self::Step,
        x: &Self::Activations,
        weight: &Self::Weight,
        bias: &Self::Vector,
        shape: &GateShape,
        routing: &mut Self::Routing,
    ) -> Result<(), OpsError>;

    /// The chosen experts `[rows, top_k]` of the last [`Self::gate`]; a NaN logit is [`OpsError::NanGate`].
    /// Waits for that gate (not for what was queued after it).
    fn routed<'r>(&self, routing: &'r Self::Routing) -> Result<&'r [u16], OpsError>;

    /// The weights `[rows, top_k]` beside [`Self::routed`]. Waits: for observers and tests.
    fn read_weights(
        &self,
        queue: &mut Self::Queue,
        routing: &Self::Routing,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError>;

    /// Fills a routing with given choices, as a gate would. Waits: for tests and self-tests.
    fn write_routing(
        &self,
        queue: &mut Self::Queue,
        topk_idx: &[u16],
        topk_weights: &[f32],
        routing: &mut Self::Routing,
    ) -> Result<(), OpsError>;

    /// Encodes rows in the dispatch format. Class fp8: the published quantiser (spec §7), per row and 128
    /// columns `s = max(amax, 1e-4) / 448`, rounded up to a power of two where `scales` says so.
    fn encode(
        &self,
        queue: &mut Self::Queue,
        x: &Self::Activations,
        rows: usize,
        scales: ScaleFormat,
        y: &mut Self::Rows,
    ) -> Result<(), OpsError>;

    /// Received rows through experts: pair `i` of the pass takes row `pass.input[i]` of `x` through the expert
    /// of its group and becomes row `pass.output[i]` of `y`. Each result depends on nothing but its row and
    /// its expert.
    fn grouped_ffn(
        &self,
        queue: &mut Self::Queue,
        pass: &Self::Pass,
        experts: &Self::ExpertTable,
        x: &Self::Rows,
        y: &mut Self::Activations,
    ) -> Result<(), OpsError>;

    /// `x[t] += (sum over j ascending of weights[t, j] * expert row (t, j)) + shared[t]`: the chain starts at 0,
    /// each term is one FMA in F32, the shared output is added last, then the residual. Takes the experts'
    /// rows as they arrived, each chunk copied to the device once.
    fn combine(
        &self,
        queue: &mut Self::Queue,
        experts: &ExpertRows,
        routing: &Self::Routing,
        shared: Option<&Self::Activations>,
        x: &mut Self::Residual,
    ) -> Result<(), OpsError>;

    // --- sampling -------------------------------------------------------------------------------------------

    /// Draws one token per entry from its row of `logits`, with the bits of [`cadre_sampler::Sampler`]:
    /// penalties, largest, total weight and candidates on the device. The logits are scratch space until
    /// [`Self::samples`] has returned. No row is named twice.
    fn sample(
        &self,
        queue: &mut Self::Queue,
        logits: &mut Self::Logits,
        rows: &[SampleRow<'_>],
    ) -> Result<Self::Samples, OpsError>;

    /// The tokens, in the order asked; a row's own trouble (a NaN logit, a wrong parameter) is its entry's.
    /// Waits for them.
    fn samples(
        &self,
        queue: &mut Self::Queue,
        logits: &mut Self::Logits,
        samples: Self::Samples,
    ) -> Result<Vec<Result<Sample, SampleError>>, OpsError>;
}
