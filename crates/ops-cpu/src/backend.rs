//! [`CpuBackend`]: validates, splits operations into tasks and runs kernels on them.
//!
//! Tasks are sets of whole outputs; costs are estimated in nanoseconds only to decide how many tasks there
//! are and whether to leave the calling thread at all.

mod attention;
mod dense;
mod ffn;
mod transfer;

use cadre_numerics::quant;
use cadre_ops::{
    AttentionShape, Backend, DecodeRow, Ffn, GateShape, HostMatrix, HostRows, HostVector, KvLayout, OpsError,
    PrefillSegment, RowFormat, RowGroup,
    check::{self, Dims},
    gate::Chooser,
};
use cadre_types::{NumericsClass, PageId, Position, TokenId};

use crate::{
    kernels::product::{Finish, Rows},
    memory::{Aligned, Scratch},
    options::{CpuOptions, Isa, UnsupportedIsa},
    packed::Weight,
    pool::Pool,
    table::Kernels,
};
pub use attention::{Attention, KvCache, KvUp};

/// The CPU backend. Cheap to share behind an `Arc`; two threads may run operations at once, each on its own
/// queue (the second computes its tasks alone while the pool is busy).
pub struct CpuBackend {
    class: NumericsClass,
    isa: Isa,
    kernels: &'static Kernels,
    pool: Pool,
}

/// Activations `[capacity rows, cols]` in F32, and the codes of rows that arrived quantised.
#[derive(Debug)]
pub struct Buffer {
    dims: Dims,
    data: Aligned<f32>,
    /// `[coded_rows, cols]` and `[coded_rows, blocks]`.
    codes: Vec<u8>,
    scales: Vec<f32>,
    coded_rows: usize,
}

/// A vector.
#[derive(Debug)]
pub struct Vector(Aligned<f32>);

/// Scratch memory of a stream of operations.
#[derive(Debug)]
pub struct CpuQueue {
    /// Quantised inputs and their scales.
    codes: Scratch,
    code_scales: Scratch,
    /// Inner activations of feed-forward blocks and their scales.
    inner: Scratch,
    inner_scales: Scratch,
    /// Per thread, and per step, of attention.
    attention: Scratch,
    absorbed: Scratch,
    /// Gate logits.
    logits: Scratch,
    chooser: Chooser,
    /// Row numbers of operations that scatter.
    rows: Vec<usize>,
}

impl CpuBackend {
    /// A backend with its own threads.
    pub fn new(options: CpuOptions) -> Result<Self, OpsError> {
        let isa = options.isa.unwrap_or_else(Isa::best);
        let kernels = Kernels::of(isa).map_err(|error: UnsupportedIsa| OpsError::Device {
            op: "start CPU backend",
            message: error.to_string(),
        })?;
        let available = || std::thread::available_parallelism().map_or(1, |n| n.get());
        let pool = Pool::new(options.threads.unwrap_or_else(available), options.spin)?;
        tracing::debug!(%isa, threads = pool.threads(), numerics = %options.class, "CPU backend");
        Ok(Self { class: options.class, isa, kernels, pool })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in use, the caller's included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Whether rounding points round to bf16.
    fn rounds(&self) -> bool {
        self.class != NumericsClass::F32
    }

    fn finish(&self) -> Finish {
        if self.rounds() { Finish::Bf16 } else { Finish::Exact }
    }

    fn silu_finish(&self) -> Finish {
        if self.rounds() { Finish::SiluBf16 } else { Finish::SiluExact }
    }

    /// Whether the input of this matrix is quantised.
    fn quantises(&self, weight: &Weight) -> bool {
        self.class == NumericsClass::Fp8 && weight.is_e4m3()
    }
}

impl Buffer {
    fn new(op: &'static str, dims: Dims) -> Result<Self, OpsError> {
        let data = Aligned::zeroed(op, check::product(op, dims.rows, dims.cols)?)?;
        Ok(Self { dims, data, codes: Vec::new(), scales: Vec::new(), coded_rows: 0 })
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.dims.cols..(row + 1) * self.dims.cols]
    }

    fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.dims.cols..(row + 1) * self.dims.cols]
    }

    /// Rows to be read by kernels.
    fn input(&self) -> Rows {
        Rows { base: self.data.as_ptr().cast_mut(), stride: self.dims.cols, index: std::ptr::null() }
    }

    /// Rows to be written by kernels; codes that arrived are no longer those of the contents.
    fn output(&mut self) -> Rows {
        self.coded_rows = 0;
        Rows { base: self.data.as_mut_ptr(), stride: self.dims.cols, index: std::ptr::null() }
    }

    /// Codes and scales of a row that arrived with them.
    fn coded(&self, row: usize) -> Option<(&[u8], &[f32])> {
        let (cols, blocks) = (self.dims.cols, quant::blocks(self.dims.cols));
        (row < self.coded_rows).then(|| {
            let codes = &self.codes[row * cols..(row + 1) * cols];
            (codes, &self.scales[row * blocks..(row + 1) * blocks])
        })
    }
}

impl CpuQueue {
    fn new() -> Self {
        Self {
            codes: Scratch::new(),
            code_scales: Scratch::new(),
            inner: Scratch::new(),
            inner_scales: Scratch::new(),
            attention: Scratch::new(),
            absorbed: Scratch::new(),
            logits: Scratch::new(),
            chooser: Chooser::default(),
            rows: Vec::new(),
        }
    }
}

impl Backend for CpuBackend {
    type Buffer = Buffer;
    type Weight = Weight;
    type Vector = Vector;
    type KvCache = KvCache;
    type KvUp = KvUp;
    type Attention = Attention;
    type Queue = CpuQueue;

    fn class(&self) -> NumericsClass {
        self.class
    }

    fn describe(&self) -> String {
        format!("cpu {}, {} threads, numerics {}", self.isa, self.threads(), self.class)
    }

    fn queue(&self) -> Result<CpuQueue, OpsError> {
        Ok(CpuQueue::new())
    }

    fn synchronize(&self, _: &mut CpuQueue) -> Result<(), OpsError> {
        Ok(())
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<Buffer, OpsError> {
        Buffer::new("alloc", Dims { rows, cols })
    }

    fn load_matrix(&self, matrix: HostMatrix<'_>) -> Result<Weight, OpsError> {
        check::matrix("load_matrix", &matrix)?;
        Weight::pack("load_matrix", &self.pool, &matrix)
    }

    fn load_ffn(
        &self,
        gate: HostMatrix<'_>,
        up: HostMatrix<'_>,
        down: HostMatrix<'_>,
    ) -> Result<Ffn<Weight>, OpsError> {
        let (_, inner) = check::ffn("load_ffn", &gate, &up, &down)?;
        Ok(Ffn {
            gate_up: Weight::pack_gate_up("load_ffn", &self.pool, &gate, &up)?,
            down: Weight::pack("load_ffn", &self.pool, &down)?,
            inner,
        })
    }

    fn load_vector(&self, vector: HostVector<'_>) -> Result<Vector, OpsError> {
        check::finite("load_vector", "element", vector.iter().copied())?;
        let mut data = Aligned::zeroed("load_vector", vector.len())?;
        data.copy_from_slice(vector);
        Ok(Vector(data))
    }

    fn load_kv_up(&self, shape: &AttentionShape, kv_b: HostMatrix<'_>) -> Result<KvUp, OpsError> {
        attention::load_kv_up(self, shape, &kv_b)
    }

    fn load_attention(&self, shape: &AttentionShape) -> Result<Attention, OpsError> {
        attention::load_attention(shape)
    }

    fn weight_bytes(&self, weight: &Weight) -> usize {
        weight.bytes()
    }

    fn kv_cache(&self, layout: KvLayout) -> Result<KvCache, OpsError> {
        attention::kv_cache(self, layout)
    }

    fn download_rows(
        &self,
        queue: &mut CpuQueue,
        x: &Buffer,
        rows: usize,
        format: RowFormat,
        data: &mut Vec<u8>,
        scales: &mut Vec<u8>,
    ) -> Result<(), OpsError> {
        transfer::download_rows(self, queue, x, rows, format, data, scales)
    }

    fn upload_rows(&self, _: &mut CpuQueue, rows: HostRows<'_>, y: &mut Buffer) -> Result<(), OpsError> {
        transfer::upload_rows(self, &rows, y)
    }

    fn download_f32(
        &self,
        _: &mut CpuQueue,
        x: &Buffer,
        rows: &[usize],
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        transfer::download_f32(x, rows, out)
    }

    fn kv_read(
        &self,
        _: &mut CpuQueue,
        cache: &KvCache,
        layer: usize,
        block_table: &[PageId],
        first: Position,
        count: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), OpsError> {
        attention::kv_read(cache, layer, block_table, first, count, out)
    }

    fn kv_write(
        &self,
        _: &mut CpuQueue,
        cache: &mut KvCache,
        layer: usize,
        block_table: &[PageId],
        first: Position,
        count: usize,
        rows: &[u8],
    ) -> Result<(), OpsError> {
        attention::kv_write(cache, layer, block_table, first, count, rows)
    }

    fn embed(
        &self,
        _: &mut CpuQueue,
        table: &Weight,
        ids: &[TokenId],
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::embed(self, table, ids, y)
    }

    fn rms_norm(
        &self,
        _: &mut CpuQueue,
        x: &Buffer,
        weight: &Vector,
        eps: f32,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::rms_norm(self, x, weight, eps, rows, y)
    }

    fn linear(
        &self,
        queue: &mut CpuQueue,
        x: &Buffer,
        weight: &Weight,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::linear(self, queue, x, weight, rows, y)
    }

    fn logits(
        &self,
        queue: &mut CpuQueue,
        x: &Buffer,
        rows: &[usize],
        head: &Weight,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        dense::logits(self, queue, x, rows, head, out)
    }

    fn ffn(
        &self,
        queue: &mut CpuQueue,
        x: &Buffer,
        ffn: &Ffn<Weight>,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        let group = RowGroup { expert: 0, first_row: 0, rows };
        ffn::grouped(self, "ffn", queue, x, &[ffn], &[group], y)
    }

    fn grouped_ffn(
        &self,
        queue: &mut CpuQueue,
        x: &Buffer,
        experts: &[&Ffn<Weight>],
        groups: &[RowGroup],
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        ffn::grouped(self, "grouped_ffn", queue, x, experts, groups, y)
    }

    fn gather_rows(
        &self,
        _: &mut CpuQueue,
        x: &Buffer,
        rows: &[usize],
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        transfer::gather_rows(x, rows, y)
    }

    fn concat(
        &self,
        _: &mut CpuQueue,
        a: &Buffer,
        b: &Buffer,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        transfer::concat(a, b, rows, y)
    }

    fn add(&self, _: &mut CpuQueue, x: &mut Buffer, delta: &Buffer, rows: usize) -> Result<(), OpsError> {
        dense::add(self, x, delta, rows)
    }

    fn kv_append(
        &self,
        _: &mut CpuQueue,
        attention: &Attention,
        kv_a: &Buffer,
        norm: &Vector,
        eps: f32,
        positions: &[Position],
        tables: &[&[PageId]],
        layer: usize,
        cache: &mut KvCache,
    ) -> Result<(), OpsError> {
        let row = attention::AppendRow { norm: &norm.0, eps };
        attention::kv_append(self, attention, kv_a, row, positions, tables, layer, cache)
    }

    fn rope_query(
        &self,
        _: &mut CpuQueue,
        attention: &Attention,
        positions: &[Position],
        q: &mut Buffer,
    ) -> Result<(), OpsError> {
        attention::rope_query(self, attention, positions, q)
    }

    fn attention_prefill(
        &self,
        queue: &mut CpuQueue,
        attention: &Attention,
        kv_up: &KvUp,
        q: &Buffer,
        segments: &[PrefillSegment<'_>],
        layer: usize,
        cache: &KvCache,
        out: &mut Buffer,
    ) -> Result<(), OpsError> {
        attention::prefill(self, queue, attention, kv_up, q, segments, layer, cache, out)
    }

    fn attention_decode(
        &self,
        queue: &mut CpuQueue,
        attention: &Attention,
        kv_up: &KvUp,
        q: &Buffer,
        rows: &[DecodeRow<'_>],
        layer: usize,
        cache: &KvCache,
        out: &mut Buffer,
    ) -> Result<(), OpsError> {
        attention::decode(self, queue, attention, kv_up, q, rows, layer, cache, out)
    }

    fn gate(
        &self,
        queue: &mut CpuQueue,
        x: &Buffer,
        weight: &Weight,
        bias: &Vector,
        shape: &GateShape,
        rows: usize,
        topk_idx: &mut Vec<u16>,
        topk_weights: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        dense::gate(self, queue, x, weight, bias, shape, rows, topk_idx, topk_weights)
    }

    fn combine(
        &self,
        queue: &mut CpuQueue,
        expert_rows: HostRows<'_>,
        topk_weights: &[f32],
        top_k: usize,
        shared: Option<&Buffer>,
        rows: usize,
        x: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::combine(self, queue, &expert_rows, topk_weights, top_k, shared, rows, x)
    }
}
