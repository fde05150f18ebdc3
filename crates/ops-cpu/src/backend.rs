//! [`CpuBackend`]: validates, splits operations into tasks and runs kernels on them.
//!
//! Tasks are sets of whole outputs; costs are estimated in nanoseconds only to decide how many tasks there
//! are and whether to leave the calling thread at all.

mod attention;
mod dense;
mod ffn;
mod sizes;
mod transfer;

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use cadre_ops::{
    Allocation, AttentionShape, Backend, DeviceIdentity, DeviceMemory, EncodedRows, ExpertRows, Ffn,
    GateShape, HostMatrix, HostVector, KvLayout, OpsError, PassLimits, PassRows, SampleRow, Sizes, StepInfo,
    StepRows,
    check::{self, Dims},
    gate::Chooser,
    resident::{HostPass, HostRouting, HostStep},
};
use cadre_sampler::{Sample, SampleError, Sampler};
use cadre_types::{NumericsClass, PageId, Position, config::ScaleFormat};

use crate::{
    kernels::product::{Finish, Rows},
    memory::{Aligned, Scratch},
    options::{CpuOptions, Isa, UnsupportedIsa},
    packed::Weight,
    pool::Pool,
    staging::{Staging, StagingPool},
    system,
    table::Kernels,
};
pub use attention::{Attention, KvCache, KvUp};
pub use sizes::CpuSizes;
pub use transfer::DispatchRows;

/// The CPU backend. Cheap to share behind an `Arc`; two threads may run operations at once, each on its own
/// queue (the second computes its tasks alone while the pool is busy).
pub struct CpuBackend {
    class: NumericsClass,
    isa: Isa,
    kernels: &'static Kernels,
    pool: Pool,
    staging: Arc<StagingPool>,
}

/// An event: operations are done when their calls return, so it always is.
#[derive(Clone, Copy, Debug)]
pub struct Done;

/// Residual stream, activations or logits `[capacity rows, cols]`, in F32.
#[derive(Debug)]
pub struct Buffer {
    dims: Dims,
    data: Aligned<f32>,
}

/// A vector.
#[derive(Debug)]
pub struct Vector(Aligned<f32>);

/// Scratch memory of a stream of operations.
#[derive(Debug)]
pub struct CpuQueue {
    /// Quantised inputs (as codes' values) and their scales; received rows as plain values.
    codes: Scratch,
    code_scales: Scratch,
    values: Scratch,
    /// Inner activations of feed-forward blocks and their scales.
    inner: Scratch,
    inner_scales: Scratch,
    /// Per thread, and per step, of attention.
    attention: Scratch,
    absorbed: Scratch,
    /// Gate logits.
    logits: Scratch,
    chooser: Chooser,
    /// One per thread.
    samplers: Vec<Sampler>,
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
        Ok(Self { class: options.class, isa, kernels, pool, staging: Arc::default() })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in use, the caller's included.
    pub(crate) fn sizes(&self) -> CpuSizes {
        CpuSizes { class: self.class, threads: self.threads() }
    }

    /// Threads, the caller's included.
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
        Ok(Self { dims, data })
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

    /// Rows to be written by kernels.
    fn output(&mut self) -> Rows {
        Rows { base: self.data.as_mut_ptr(), stride: self.dims.cols, index: std::ptr::null() }
    }
}

impl CpuQueue {
    fn new() -> Self {
        Self {
            codes: Scratch::new(),
            code_scales: Scratch::new(),
            values: Scratch::new(),
            inner: Scratch::new(),
            inner_scales: Scratch::new(),
            attention: Scratch::new(),
            absorbed: Scratch::new(),
            logits: Scratch::new(),
            chooser: Chooser::default(),
            samplers: Vec::new(),
            rows: Vec::new(),
        }
    }
}

impl Backend for CpuBackend {
    type Residual = Buffer;
    type Activations = Buffer;
    type Rows = DispatchRows;
    type Logits = Buffer;
    type Routing = HostRouting;
    type Samples = Vec<Result<Sample, SampleError>>;
    type Weight = Weight;
    type Vector = Vector;
    type ExpertTable = Vec<Arc<Ffn<Weight>>>;
    type KvCache = KvCache;
    type KvUp = KvUp;
    type Attention = Attention;
    type Step = HostStep;
    type Pass = HostPass;
    type Staging = Staging;
    type Event = Done;
    type Queue = CpuQueue;

    fn class(&self) -> NumericsClass {
        self.class
    }

    fn identity(&self) -> DeviceIdentity {
        let [device, name] = ["cpu", "cpu"].map(str::to_owned);
        DeviceIdentity { device, name, architecture: self.isa.to_string() }
    }

    fn describe(&self) -> String {
        format!("cpu {}, {} threads, numerics {}", self.isa, self.threads(), self.class)
    }

    fn memory(&self) -> DeviceMemory {
        system::memory()
    }

    fn bytes_of(&self, allocation: &Allocation<'_>) -> Result<u64, OpsError> {
        self.sizes().planned(allocation)
    }

    fn pass_limits(&self, hidden: usize) -> PassLimits {
        self.sizes().planned_pass(hidden)
    }

    fn runs_at_once(&self) -> bool {
        true
    }

    fn queue(&self) -> Result<CpuQueue, OpsError> {
        Ok(CpuQueue::new())
    }

    fn record(&self, _: &mut CpuQueue) -> Result<Done, OpsError> {
        Ok(Done)
    }

    fn is_done(&self, _: &Done) -> Result<bool, OpsError> {
        Ok(true)
    }

    fn wait(&self, _: &Done) -> Result<(), OpsError> {
        Ok(())
    }

    fn run_after(&self, _: &mut CpuQueue, _: &Done) -> Result<(), OpsError> {
        Ok(())
    }

    fn alloc_residual(&self, rows: usize, cols: usize) -> Result<Buffer, OpsError> {
        Buffer::new("alloc_residual", Dims { rows, cols })
    }

    fn alloc_activations(&self, rows: usize, cols: usize) -> Result<Buffer, OpsError> {
        Buffer::new("alloc_activations", Dims { rows, cols })
    }

    fn alloc_rows(&self, rows: usize, cols: usize) -> Result<DispatchRows, OpsError> {
        DispatchRows::new("alloc_rows", self.class, Dims { rows, cols })
    }

    fn alloc_logits(&self, rows: usize, vocab: usize) -> Result<Buffer, OpsError> {
        Buffer::new("alloc_logits", Dims { rows, cols: vocab })
    }

    fn alloc_routing(&self, rows: usize, top_k: usize) -> Result<HostRouting, OpsError> {
        Ok(HostRouting::new(rows, top_k))
    }

    fn alloc_step(&self, rows: usize) -> Result<HostStep, OpsError> {
        Ok(HostStep::new(rows))
    }

    fn alloc_pass(&self, limits: PassLimits) -> Result<HostPass, OpsError> {
        Ok(HostPass::new(limits.pairs))
    }

    fn staging(&self, bytes: usize) -> Result<Staging, OpsError> {
        self.staging.take(bytes)
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

    fn expert_table(&self, experts: Vec<Arc<Ffn<Weight>>>) -> Result<Self::ExpertTable, OpsError> {
        let shape = |ffn: &Arc<Ffn<Weight>>| (ffn.gate_up.dims.cols, ffn.inner, ffn.down.dims.rows);
        check::expert_table("expert_table", experts.iter().map(shape))?;
        Ok(experts)
    }

    fn weight_bytes(&self, weight: &Weight) -> usize {
        weight.bytes()
    }

    fn kv_cache(&self, layout: KvLayout) -> Result<KvCache, OpsError> {
        attention::kv_cache(self, layout)
    }

    fn begin_step(&self, _: &mut CpuQueue, rows: &StepRows<'_>, step: &mut HostStep) -> Result<(), OpsError> {
        step.fill("begin_step", rows)
    }

    fn step_info<'s>(&self, step: &'s HostStep) -> &'s StepInfo {
        step.info()
    }

    fn begin_pass(&self, _: &mut CpuQueue, rows: &PassRows<'_>, pass: &mut HostPass) -> Result<(), OpsError> {
        pass.fill("begin_pass", rows)
    }

    fn download_rows(
        &self,
        _: &mut CpuQueue,
        x: &DispatchRows,
        rows: usize,
        memory: &mut Staging,
        at: usize,
    ) -> Result<(), OpsError> {
        transfer::download_rows(self, x, rows, memory.as_mut(), at)
    }

    fn upload_rows(
        &self,
        _: &mut CpuQueue,
        rows: &EncodedRows,
        first_row: usize,
        y: &mut DispatchRows,
    ) -> Result<(), OpsError> {
        transfer::upload_rows(self, &rows.as_host_rows(), first_row, y)
    }

    fn download_activations(
        &self,
        _: &mut CpuQueue,
        x: &Buffer,
        rows: Range<usize>,
        memory: &mut Staging,
        at: usize,
    ) -> Result<(), OpsError> {
        transfer::download_activations(self, x, rows, memory.as_mut(), at)
    }

    fn kv_read(
        &self,
        _: &mut CpuQueue,
        cache: &KvCache,
        layer: usize,
        block_table: &[PageId],
        first: Position,
        count: usize,
        memory: &mut Staging,
        at: usize,
    ) -> Result<(), OpsError> {
        attention::kv_read(cache, layer, block_table, first, count, memory.as_mut(), at)
    }

    fn kv_write(
        &self,
        _: &mut CpuQueue,
        cache: &mut KvCache,
        layer: usize,
        block_table: &[PageId],
        first: Position,
        count: usize,
        rows: &Bytes,
    ) -> Result<(), OpsError> {
        attention::kv_write(cache, layer, block_table, first, count, rows)
    }

    fn read_activations(
        &self,
        _: &mut CpuQueue,
        x: &Buffer,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        transfer::read("read_activations", x, rows, out)
    }

    fn read_residual(
        &self,
        _: &mut CpuQueue,
        x: &Buffer,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        transfer::read("read_residual", x, rows, out)
    }

    fn read_logits(
        &self,
        _: &mut CpuQueue,
        x: &Buffer,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        transfer::read("read_logits", x, rows, out)
    }

    fn write_activations(&self, _: &mut CpuQueue, values: &[f32], y: &mut Buffer) -> Result<(), OpsError> {
        transfer::write_activations(self, values, y)
    }

    fn write_residual(&self, _: &mut CpuQueue, values: &[f32], y: &mut Buffer) -> Result<(), OpsError> {
        transfer::write("write_residual", values, y).map(drop)
    }

    fn write_logits(&self, _: &mut CpuQueue, values: &[f32], y: &mut Buffer) -> Result<(), OpsError> {
        transfer::write("write_logits", values, y).map(drop)
    }

    fn embed(
        &self,
        _: &mut CpuQueue,
        step: &HostStep,
        table: &Weight,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::embed(self, step, table, y)
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

    fn rms_norm_residual(
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

    fn add(&self, _: &mut CpuQueue, x: &mut Buffer, delta: &Buffer, rows: usize) -> Result<(), OpsError> {
        dense::add(self, x, delta, rows)
    }

    fn assign(&self, _: &mut CpuQueue, x: &mut Buffer, y: &Buffer, rows: usize) -> Result<(), OpsError> {
        transfer::assign(x, y, rows)
    }

    fn gather_wanted(
        &self,
        _: &mut CpuQueue,
        step: &HostStep,
        x: &Buffer,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        transfer::gather_wanted(step, x, y)
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

    fn linear(
        &self,
        queue: &mut CpuQueue,
        x: &Buffer,
        weight: &Weight,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::linear(self, "linear", queue, x, weight, rows, self.finish(), y)
    }

    fn logits(
        &self,
        queue: &mut CpuQueue,
        x: &Buffer,
        head: &Weight,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::linear(self, "logits", queue, x, head, rows, Finish::Exact, y)
    }

    fn ffn(
        &self,
        queue: &mut CpuQueue,
        x: &Buffer,
        ffn: &Ffn<Weight>,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        ffn::dense(self, queue, x, ffn, rows, y)
    }

    fn kv_append(
        &self,
        _: &mut CpuQueue,
        step: &HostStep,
        attention: &Attention,
        kv_a: &Buffer,
        norm: &Vector,
        eps: f32,
        layer: usize,
        cache: &mut KvCache,
    ) -> Result<(), OpsError> {
        let append = attention::AppendRow { norm: &norm.0, eps };
        attention::kv_append(self, step, attention, kv_a, append, layer, cache)
    }

    fn rope_query(
        &self,
        _: &mut CpuQueue,
        step: &HostStep,
        attention: &Attention,
        q: &mut Buffer,
    ) -> Result<(), OpsError> {
        attention::rope_query(self, step, attention, q)
    }

    fn attend(
        &self,
        queue: &mut CpuQueue,
        step: &HostStep,
        attention: &Attention,
        kv_up: &KvUp,
        q: &Buffer,
        layer: usize,
        cache: &KvCache,
        out: &mut Buffer,
    ) -> Result<(), OpsError> {
        attention::attend(self, queue, step, attention, kv_up, q, layer, cache, out)
    }

    fn gate(
        &self,
        queue: &mut CpuQueue,
        step: &HostStep,
        x: &Buffer,
        weight: &Weight,
        bias: &Vector,
        shape: &GateShape,
        routing: &mut HostRouting,
    ) -> Result<(), OpsError> {
        dense::gate(self, queue, step, x, weight, bias, shape, routing)
    }

    fn routed<'r>(&self, routing: &'r HostRouting) -> Result<&'r [u16], OpsError> {
        routing.ids()
    }

    fn read_weights(
        &self,
        _: &mut CpuQueue,
        routing: &HostRouting,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        out.extend_from_slice(routing.weights());
        Ok(())
    }

    fn write_routing(
        &self,
        _: &mut CpuQueue,
        topk_idx: &[u16],
        topk_weights: &[f32],
        routing: &mut HostRouting,
    ) -> Result<(), OpsError> {
        routing.write("write_routing", topk_idx, topk_weights)
    }

    fn encode(
        &self,
        queue: &mut CpuQueue,
        x: &Buffer,
        rows: usize,
        scales: ScaleFormat,
        y: &mut DispatchRows,
    ) -> Result<(), OpsError> {
        transfer::encode(self, queue, x, rows, scales == ScaleFormat::Ue8m0, y)
    }

    fn grouped_ffn(
        &self,
        queue: &mut CpuQueue,
        pass: &HostPass,
        experts: &Self::ExpertTable,
        x: &DispatchRows,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        ffn::grouped(self, queue, pass, experts, x, y)
    }

    fn combine(
        &self,
        _: &mut CpuQueue,
        experts: &ExpertRows,
        routing: &HostRouting,
        shared: Option<&Buffer>,
        x: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::combine(self, experts, routing, shared, x)
    }

    fn sample(
        &self,
        queue: &mut CpuQueue,
        logits: &mut Buffer,
        rows: &[SampleRow<'_>],
    ) -> Result<Self::Samples, OpsError> {
        dense::sample(self, queue, logits, rows)
    }

    fn samples(
        &self,
        _: &mut CpuQueue,
        _: &mut Buffer,
        samples: Self::Samples,
    ) -> Result<Vec<Result<Sample, SampleError>>, OpsError> {
        Ok(samples)
    }
}
