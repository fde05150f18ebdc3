//! The backend: validation, memory and the order of launches. What a kernel computes is in `kernels/`.
//!
//! The classes `f32`, `bf16` and `fp8` are computed on CUDA cores in the order of docs/numerics.md, so a device gives
//! the bits of the reference and of every CPU, and may serve beside them. Activations are BF16 in the classes that
//! round, F32 in `f32`; every sum is F32.

mod attend;
mod planes;
mod product;
mod queue;
mod sample;
mod staging;
mod step;
mod tensor;
mod weights;

use std::{ops::Range, path::Path, sync::Arc};

use bytes::Bytes;
use cadre_ops::{
    Allocation, AttentionShape, Backend, DeviceMemory, ElementType, EncodedRows, ExpertRows, Ffn, GateShape,
    GroupScore, HostMatrix, HostVector, KvLayout, OpsError, PassLimits, PassRows, RowFormat, RowLayout,
    SampleRow, Scoring, StepInfo, StepRows, check, check::Dims,
};
use cadre_sampler::{Sample, SampleError};
use cadre_types::{NumericsClass, PageId, Position, config::ScaleFormat};

pub use self::{
    attend::KvCache,
    planes::{Plane, Rows},
    product::ExpertTable,
    queue::CudaQueue,
    queue::QueueEvent,
    sample::Samples,
    staging::Staging,
    step::{Pass, Routing, Step},
    weights::{Attention, KvUp, Vector, Weight},
};
use self::{
    planes::{plane_bytes, rows_bytes},
    product::{Input, Output, quantise},
    queue::Scratch,
    staging::StagingPool,
    weights::{Loader, panel_bytes, scale_bytes, up_row},
};
use crate::{
    device::{Device, Memory, Stream},
    error::CudaError,
    kernels::{Kernel, SHARED_BYTES},
    launch::{Arg, Grid},
};

/// Threads of a block for operations over the elements of a row.
const THREADS: u32 = 256;

/// Received rows and pairs of one pass: gate and up of V3's experts in F32 are 16 KiB a pair, so that a pass has
/// 128 MiB of them.
const PASS: PassLimits = PassLimits { rows: 4096, pairs: 8192 };

/// A CUDA device in one numerics class.
#[derive(Debug)]
pub struct CudaBackend {
    device: Arc<Device>,
    class: NumericsClass,
    pool: Arc<StagingPool>,
    loader: Loader,
    /// For what has no queue: zeroing.
    stream: Stream,
}

impl CudaBackend {
    /// Opens `cuda:ordinal` for a class, with the kernels of a folder or of the one that
    /// [`kernels::folder`](crate::kernels::folder) finds.
    pub fn open(ordinal: usize, class: NumericsClass, folder: Option<&Path>) -> Result<Self, CudaError> {
        let device = Device::open(ordinal, folder)?;
        let loader = Loader::new(&device, class == NumericsClass::CudaFp8)?;
        Ok(Self {
            pool: Arc::new(StagingPool::new(device.clone())),
            loader,
            stream: Stream::new(&device)?,
            device,
            class,
        })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Whether the class uses tensor cores.
    fn tensor(&self) -> bool {
        self.class == NumericsClass::CudaFp8
    }

    /// Whether the class rounds activations to BF16.
    fn rounds(&self) -> bool {
        self.class != NumericsClass::F32
    }

    fn plane(&self, op: &'static str, rows: usize, cols: usize, bf16: bool) -> Result<Plane, OpsError> {
        let plane = Plane::new(&self.stream, op, Dims { rows, cols }, bf16)?;
        // A queue does not wait for our stream.
        self.stream.synchronize(op)?;
        Ok(plane)
    }

    fn read(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        x: &Plane,
        rows: &Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        check::rows(op, x.dims, rows)?;
        let mut host = self.pool.take(rows.len() * x.row_bytes())?;
        x.read(op, queue, &mut host, rows, out)
    }

    fn norm(
        &self,
        queue: &CudaQueue,
        x: &Plane,
        weight: &Vector,
        eps: f32,
        rows: usize,
        y: &Plane,
    ) -> Result<(), OpsError> {
        let op = "rms_norm";
        check::same_width(op, x.dims, y.dims, rows)?;
        check::equal(op, "entries of the weight", weight.len, x.dims.cols)?;
        let args = [
            x.into(),
            x.bf16.into(),
            (&weight.memory).into(),
            eps.into(),
            Arg::U32(x.dims.cols as u32),
            y.into(),
            y.bf16.into(),
        ];
        queue.launch(Kernel::RmsNorm, Grid::of(rows, THREADS), &args)
    }
}

/// Blocks of threads for operations over elements: enough to fill the device, each thread takes several.
fn over(elements: usize) -> Grid {
    Grid::of(elements.div_ceil(THREADS as usize).min(4096), THREADS)
}

/// page x 64 + slot of positions `first..first + count` of a sequence, checked.
fn places(table: &[PageId], first: Position, count: usize) -> Vec<u32> {
    let place = |position: usize| {
        table[position / KvLayout::PAGE_TOKENS].index() * KvLayout::PAGE_TOKENS
            + position % KvLayout::PAGE_TOKENS
    };
    (first as usize..first as usize + count).map(|position| place(position) as u32).collect()
}

impl Backend for CudaBackend {
    type Residual = Plane;
    type Activations = Plane;
    type Rows = Rows;
    type Logits = Plane;
    type Routing = Routing;
    type Samples = Samples;
    type Weight = Weight;
    type Vector = Vector;
    type ExpertTable = ExpertTable;
    type KvCache = KvCache;
    type KvUp = KvUp;
    type Attention = Attention;
    type Step = Step;
    type Pass = Pass;
    type Staging = Staging;
    type Event = QueueEvent;
    type Queue = CudaQueue;

    fn class(&self) -> NumericsClass {
        self.class
    }

    fn name(&self) -> String {
        self.device.info().name.clone()
    }

    fn describe(&self) -> String {
        let info = self.device.info();
        format!(
            "cuda:{} {}, {} multiprocessors, {}, numerics {}",
            info.ordinal,
            info.name,
            info.multiprocessors,
            crate::error::gib(info.memory),
            self.class
        )
    }

    fn memory(&self) -> DeviceMemory {
        let (free, total) = self.device.memory().unwrap_or((0, 0));
        DeviceMemory { used: (total - free) as u64, total: total as u64 }
    }

    fn bytes_of(&self, allocation: &Allocation<'_>) -> Result<u64, OpsError> {
        let op = "bytes_of";
        let matrix = |rows, cols, elements| -> Result<usize, OpsError> {
            let dims = Dims { rows, cols };
            let tiles = self.tensor() && tensor::covers_matrix(dims, elements);
            let packed = if tiles {
                tensor::matrix_bytes(op, dims, elements)
            } else {
                panel_bytes(op, dims, elements)
            };
            Ok(packed? + scale_bytes(dims, elements))
        };
        let plane = |rows, cols, bf16| plane_bytes(op, Dims { rows, cols }, bf16);
        let bytes = match *allocation {
            Allocation::Residual { rows, cols } | Allocation::Logits { rows, vocab: cols } => {
                plane(rows, cols, false)?
            }
            Allocation::Activations { rows, cols } => plane(rows, cols, self.rounds())?,
            Allocation::Rows { rows, cols } => {
                rows_bytes(op, Dims { rows, cols }, RowFormat::dispatch(self.class))?.1
            }
            Allocation::Matrix { rows, cols, elements } => matrix(rows, cols, elements)?,
            Allocation::Ffn { hidden, inner, elements } => {
                let dims = Dims { rows: up_row(inner) + inner, cols: hidden };
                let tiles =
                    self.tensor() && tensor::covers_matrix(Dims { rows: inner, cols: hidden }, elements);
                let gate_up = if tiles {
                    tensor::gate_up_bytes(op, inner, hidden, elements)?
                } else {
                    panel_bytes(op, dims, elements)?
                };
                gate_up + scale_bytes(dims, elements) + matrix(hidden, inner, elements)?
            }
            Allocation::Vector { len } => len * 4,
            Allocation::KvUp { shape, elements } => {
                let rows = shape.heads * (shape.nope + shape.v);
                if self.tensor() && tensor::covers_attention(shape) && elements != ElementType::F32 {
                    let sizes = tensor::KvUpTiles::of(shape);
                    return Ok((shape.heads * (sizes.head + sizes.absorb)) as u64);
                }
                let stored = check::product(op, rows, shape.kv_lora)? * weights::element_bytes(elements);
                matrix(rows, shape.kv_lora, elements)? + stored
            }
            Allocation::Attention { shape } => {
                check::product(op, shape.max_positions, shape.inv_freq.len() * 8)?
            }
            Allocation::KvCache { layout } => {
                check::kv_layout(op, &layout)?;
                let tiled = self.tensor() && tensor::covers_cache(&layout);
                layout.layers * layout.pages * attend::page_bytes(&layout, self.rounds(), tiled)
            }
            Allocation::StepScratch { shape, rows, hidden, inner, positions } => {
                let latent = attend::LATENT_ROWS.min(rows) * shape.heads * shape.kv_lora * 4;
                let head_width = shape.nope + shape.v;
                let heads = attend::heads_at_once(shape.heads, positions, head_width);
                let expanded = positions * (heads * head_width + shape.kv_lora + shape.rope) * 4;
                let wide = latent.max(rows * 2 * up_row(inner) * 4);
                let narrow = latent.max(rows * inner * 4);
                // Codes, scales, and expert rows that come back (16 a row at most in any model so far).
                let codes = rows * hidden.max(inner) * 2;
                let step = step::step_bytes(rows, positions) as usize;
                wide + narrow + expanded + codes + rows * 16 * hidden * 4 + step
            }
            Allocation::PassScratch { limits, hidden, inner } => {
                limits.pairs * (2 * up_row(inner) * 4 + inner * 6 + 20) + limits.rows * hidden * 4
            }
        };
        Ok(bytes as u64)
    }

    fn pass_limits(&self, _: usize) -> PassLimits {
        PASS
    }

    fn runs_at_once(&self) -> bool {
        false
    }

    fn queue(&self) -> Result<CudaQueue, OpsError> {
        CudaQueue::new(&self.device)
    }

    fn record(&self, queue: &mut CudaQueue) -> Result<QueueEvent, OpsError> {
        queue.record("record")
    }

    fn is_done(&self, event: &QueueEvent) -> Result<bool, OpsError> {
        event.is_done("is_done")
    }

    fn wait(&self, event: &QueueEvent) -> Result<(), OpsError> {
        event.wait("wait")
    }

    fn run_after(&self, queue: &mut CudaQueue, event: &QueueEvent) -> Result<(), OpsError> {
        Ok(queue.stream.run_after(event.point(), "run_after")?)
    }

    fn synchronize(&self, queue: &mut CudaQueue) -> Result<(), OpsError> {
        queue.finish("synchronize")
    }

    fn alloc_residual(&self, rows: usize, cols: usize) -> Result<Plane, OpsError> {
        self.plane("alloc_residual", rows, cols, false)
    }

    fn alloc_activations(&self, rows: usize, cols: usize) -> Result<Plane, OpsError> {
        self.plane("alloc_activations", rows, cols, self.rounds())
    }

    fn alloc_rows(&self, rows: usize, cols: usize) -> Result<Rows, OpsError> {
        let rows =
            Rows::new(&self.stream, "alloc_rows", Dims { rows, cols }, RowFormat::dispatch(self.class))?;
        self.stream.synchronize("alloc_rows")?;
        Ok(rows)
    }

    fn alloc_logits(&self, rows: usize, vocab: usize) -> Result<Plane, OpsError> {
        self.plane("alloc_logits", rows, vocab, false)
    }

    fn alloc_routing(&self, rows: usize, top_k: usize) -> Result<Routing, OpsError> {
        Routing::new(&self.device, "alloc_routing", rows, top_k)
    }

    fn alloc_step(&self, rows: usize) -> Result<Step, OpsError> {
        Step::new(&self.device, "alloc_step", rows)
    }

    fn alloc_pass(&self, limits: PassLimits) -> Result<Pass, OpsError> {
        Pass::new(&self.device, "alloc_pass", limits)
    }

    fn staging(&self, bytes: usize) -> Result<Staging, OpsError> {
        self.pool.take(bytes)
    }

    fn load_matrix(&self, matrix: HostMatrix<'_>) -> Result<Weight, OpsError> {
        check::matrix("load_matrix", &matrix)?;
        self.loader.matrix("load_matrix", &matrix)
    }

    fn load_ffn(
        &self,
        gate: HostMatrix<'_>,
        up: HostMatrix<'_>,
        down: HostMatrix<'_>,
    ) -> Result<Ffn<Weight>, OpsError> {
        check::ffn("load_ffn", &gate, &up, &down)?;
        self.loader.ffn("load_ffn", &gate, &up, &down)
    }

    fn load_vector(&self, vector: HostVector<'_>) -> Result<Vector, OpsError> {
        check::finite("load_vector", "element", vector.iter().copied())?;
        self.loader.vector("load_vector", vector)
    }

    fn load_kv_up(&self, shape: &AttentionShape, kv_b: HostMatrix<'_>) -> Result<KvUp, OpsError> {
        check::kv_up("load_kv_up", shape, &kv_b)?;
        self.loader.kv_up("load_kv_up", shape, &kv_b)
    }

    fn load_attention(&self, shape: &AttentionShape) -> Result<Attention, OpsError> {
        let op = "load_attention";
        check::attention_shape(op, shape)?;
        // Query, output and probabilities of a row and head lie in shared memory.
        let words = 2 * shape.kv_lora + shape.rope + shape.nope + shape.v + 2 * KvLayout::PAGE_TOKENS;
        check::at_least(op, "elements of shared memory for a head", SHARED_BYTES as usize / 4, words)?;
        self.loader.attention(op, shape)
    }

    fn expert_table(&self, experts: Vec<Arc<Ffn<Weight>>>) -> Result<ExpertTable, OpsError> {
        self.table("expert_table", experts)
    }

    fn weight_bytes(&self, weight: &Weight) -> usize {
        weight.words.bytes() + weight.scales.as_ref().map_or(0, Memory::bytes)
    }

    fn kv_cache(&self, layout: KvLayout) -> Result<KvCache, OpsError> {
        let op = "kv_cache";
        let bf16 = self.rounds();
        let tiled = self.tensor() && tensor::covers_cache(&layout);
        check::kv_layout(op, &layout)?;
        let bytes =
            check::product(op, layout.layers * layout.pages, attend::page_bytes(&layout, bf16, tiled))?;
        // A place in a layer is 32 bits wide on the device.
        check::at_least(
            op,
            "places of a layer",
            u32::MAX as usize,
            layout.pages.saturating_mul(KvLayout::PAGE_TOKENS),
        )?;
        let memory = Memory::zeroed(&self.stream, op, bytes)?;
        self.stream.synchronize(op)?;
        Ok(KvCache { layout, bf16, tiled, memory })
    }

    fn begin_step(
        &self,
        queue: &mut CudaQueue,
        rows: &StepRows<'_>,
        step: &mut Step,
    ) -> Result<(), OpsError> {
        queue.check("begin_step")?;
        step.fill("begin_step", queue, rows)
    }

    fn step_info<'s>(&self, step: &'s Step) -> &'s StepInfo {
        step.info()
    }

    fn begin_pass(
        &self,
        queue: &mut CudaQueue,
        rows: &PassRows<'_>,
        pass: &mut Pass,
    ) -> Result<(), OpsError> {
        queue.check("begin_pass")?;
        pass.fill("begin_pass", queue, rows)
    }

    fn download_rows(
        &self,
        queue: &mut CudaQueue,
        x: &Rows,
        rows: usize,
        memory: &mut Staging,
        at: usize,
    ) -> Result<(), OpsError> {
        let op = "download_rows";
        check::at_least(op, "row capacity of x", x.dims.rows, rows)?;
        let layout = RowLayout::of(x.format, rows, x.dims.cols);
        check::memory(op, memory.len(), at, layout.bytes)?;
        let to = memory.address() + at as u64;
        queue.stream.download(op, x.data(0), to, layout.data)?;
        let scales = layout.bytes - layout.scales_at;
        queue.stream.download(op, x.scales(0), to + layout.scales_at as u64, scales)?;
        memory.used_until(queue.stream.record(op)?);
        Ok(())
    }

    fn upload_rows(
        &self,
        queue: &mut CudaQueue,
        rows: &EncodedRows,
        first_row: usize,
        y: &mut Rows,
    ) -> Result<(), OpsError> {
        let op = "upload_rows";
        check::upload_rows(op, &rows.as_host_rows(), self.class, first_row, y.dims)?;
        queue.upload(op, &rows.data, y.data(first_row))?;
        queue.upload(op, &rows.scales, y.scales(first_row))
    }

    fn download_activations(
        &self,
        queue: &mut CudaQueue,
        x: &Plane,
        rows: Range<usize>,
        memory: &mut Staging,
        at: usize,
    ) -> Result<(), OpsError> {
        let op = "download_activations";
        check::rows(op, x.dims, &rows)?;
        // Activations are stored as they travel.
        let bytes = rows.len() * x.row_bytes();
        check::memory(op, memory.len(), at, bytes)?;
        let from = x.memory.at(rows.start * x.row_bytes());
        queue.stream.download(op, from, memory.address() + at as u64, bytes)?;
        memory.used_until(queue.stream.record(op)?);
        Ok(())
    }

    fn kv_read(
        &self,
        queue: &mut CudaQueue,
        cache: &KvCache,
        layer: usize,
        block_table: &[PageId],
        first: Position,
        count: usize,
        memory: &mut Staging,
        at: usize,
    ) -> Result<(), OpsError> {
        let op = "kv_read";
        check::index(op, "layer", layer, cache.layout.layers)?;
        check::pages(op, &cache.layout, block_table, first, count)?;
        let bytes = check::product(op, count, cache.row_bytes())?;
        check::memory(op, memory.len(), at, bytes)?;
        if count == 0 {
            return Ok(());
        }
        let rows = queue.scratch(op, Scratch::Arrived, bytes)?;
        let places = queue.arguments(op, &places(block_table, first, count))?;
        let mut args = cache.args(layer).to_vec();
        args.extend([Arg::Pointer(places), Arg::Pointer(rows)]);
        queue.launch(Kernel::KvRead, Grid::of(count, 128), &args)?;
        queue.stream.download(op, rows, memory.address() + at as u64, bytes)?;
        memory.used_until(queue.stream.record(op)?);
        Ok(())
    }

    fn kv_write(
        &self,
        queue: &mut CudaQueue,
        cache: &mut KvCache,
        layer: usize,
        block_table: &[PageId],
        first: Position,
        count: usize,
        rows: &Bytes,
    ) -> Result<(), OpsError> {
        let op = "kv_write";
        check::index(op, "layer", layer, cache.layout.layers)?;
        check::pages(op, &cache.layout, block_table, first, count)?;
        check::equal(op, "bytes of rows", rows.len(), check::product(op, count, cache.row_bytes())?)?;
        if count == 0 {
            return Ok(());
        }
        let arrived = queue.scratch(op, Scratch::Arrived, rows.len())?;
        queue.upload(op, rows, arrived)?;
        let places = queue.arguments(op, &places(block_table, first, count))?;
        let mut args = cache.args(layer).to_vec();
        args.extend([Arg::Pointer(places), Arg::Pointer(arrived)]);
        queue.launch(Kernel::KvWrite, Grid::of(count, 128), &args)
    }

    fn read_activations(
        &self,
        queue: &mut CudaQueue,
        x: &Plane,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        self.read("read_activations", queue, x, &rows, out)
    }

    fn read_residual(
        &self,
        queue: &mut CudaQueue,
        x: &Plane,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        self.read("read_residual", queue, x, &rows, out)
    }

    fn read_logits(
        &self,
        queue: &mut CudaQueue,
        x: &Plane,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        self.read("read_logits", queue, x, &rows, out)
    }

    fn write_activations(
        &self,
        queue: &mut CudaQueue,
        values: &[f32],
        y: &mut Plane,
    ) -> Result<(), OpsError> {
        y.write("write_activations", queue, values)
    }

    fn write_residual(&self, queue: &mut CudaQueue, values: &[f32], y: &mut Plane) -> Result<(), OpsError> {
        y.write("write_residual", queue, values)
    }

    fn write_logits(&self, queue: &mut CudaQueue, values: &[f32], y: &mut Plane) -> Result<(), OpsError> {
        y.write("write_logits", queue, values)
    }

    fn embed(
        &self,
        queue: &mut CudaQueue,
        step: &Step,
        table: &Weight,
        y: &mut Plane,
    ) -> Result<(), OpsError> {
        check::embed("embed", step.info(), table.dims, y.dims)?;
        let args = [
            (&table.words).into(),
            Arg::Pointer(table.scales.as_ref().map_or(0, Memory::address)),
            Arg::U32(weights::element_bytes(table.elements) as u32),
            table.tiles.into(),
            Arg::U32(table.dims.cols as u32),
            Arg::Pointer(step.ids()),
            (&*y).into(),
        ];
        queue.launch(Kernel::Embed, Grid::of(step.info().rows, THREADS), &args)
    }

    fn rms_norm(
        &self,
        queue: &mut CudaQueue,
        x: &Plane,
        weight: &Vector,
        eps: f32,
        rows: usize,
        y: &mut Plane,
    ) -> Result<(), OpsError> {
        self.norm(queue, x, weight, eps, rows, y)
    }

    fn rms_norm_residual(
        &self,
        queue: &mut CudaQueue,
        x: &Plane,
        weight: &Vector,
        eps: f32,
        rows: usize,
        y: &mut Plane,
    ) -> Result<(), OpsError> {
        self.norm(queue, x, weight, eps, rows, y)
    }

    fn add(&self, queue: &mut CudaQueue, x: &mut Plane, delta: &Plane, rows: usize) -> Result<(), OpsError> {
        check::same_width("add", delta.dims, x.dims, rows)?;
        let elements = rows * x.dims.cols;
        let args = [(&*x).into(), delta.into(), delta.bf16.into(), Arg::U64(elements as u64)];
        queue.launch(Kernel::Add, over(elements), &args)
    }

    fn assign(&self, queue: &mut CudaQueue, x: &mut Plane, y: &Plane, rows: usize) -> Result<(), OpsError> {
        check::same_width("assign", y.dims, x.dims, rows)?;
        let elements = rows * x.dims.cols;
        let args = [y.into(), y.bf16.into(), Arg::U64(elements as u64), (&*x).into(), x.bf16.into()];
        queue.launch(Kernel::Convert, over(elements), &args)
    }

    fn gather_wanted(
        &self,
        queue: &mut CudaQueue,
        step: &Step,
        x: &Plane,
        y: &mut Plane,
    ) -> Result<(), OpsError> {
        check::gather_wanted("gather_wanted", step.info(), x.dims, y.dims)?;
        let args = [x.into(), Arg::U32(x.dims.cols as u32), Arg::Pointer(step.wanted()), (&*y).into()];
        queue.launch(Kernel::GatherRows, Grid::of(step.info().wanted, THREADS), &args)
    }

    fn concat(
        &self,
        queue: &mut CudaQueue,
        a: &Plane,
        b: &Plane,
        rows: usize,
        y: &mut Plane,
    ) -> Result<(), OpsError> {
        check::concat("concat", a.dims, b.dims, rows, y.dims)?;
        let args = [
            a.into(),
            Arg::U32(a.dims.cols as u32),
            b.into(),
            Arg::U32(b.dims.cols as u32),
            y.bf16.into(),
            (&*y).into(),
        ];
        queue.launch(Kernel::Concat, Grid::of(rows, THREADS), &args)
    }

    fn linear(
        &self,
        queue: &mut CudaQueue,
        x: &Plane,
        weight: &Weight,
        rows: usize,
        y: &mut Plane,
    ) -> Result<(), OpsError> {
        self.matrix_product("linear", queue, x, weight, rows, y)
    }

    fn logits(
        &self,
        queue: &mut CudaQueue,
        x: &Plane,
        head: &Weight,
        rows: usize,
        y: &mut Plane,
    ) -> Result<(), OpsError> {
        self.matrix_product("logits", queue, x, head, rows, y)
    }

    fn ffn(
        &self,
        queue: &mut CudaQueue,
        x: &Plane,
        ffn: &Ffn<Weight>,
        rows: usize,
        y: &mut Plane,
    ) -> Result<(), OpsError> {
        self.dense_ffn(queue, x, ffn, rows, y)
    }

    fn kv_append(
        &self,
        queue: &mut CudaQueue,
        step: &Step,
        attention: &Attention,
        kv_a: &Plane,
        norm: &Vector,
        eps: f32,
        layer: usize,
        cache: &mut KvCache,
    ) -> Result<(), OpsError> {
        let shape = &attention.shape;
        check::kv_append("kv_append", step.info(), shape, &cache.layout, layer, kv_a.dims, norm.len)?;
        let args = [
            kv_a.into(),
            kv_a.bf16.into(),
            (&norm.memory).into(),
            eps.into(),
            Arg::U32(shape.kv_lora as u32),
            Arg::U32(shape.rope as u32),
            Arg::Pointer(step.positions()),
            Arg::Pointer(step.places()),
            (&attention.angles).into(),
            Arg::Pointer(cache.layer(layer)),
            cache.tiled.into(),
        ];
        queue.launch(Kernel::KvAppend, Grid::of(step.info().rows, THREADS), &args)
    }

    fn rope_query(
        &self,
        queue: &mut CudaQueue,
        step: &Step,
        attention: &Attention,
        q: &mut Plane,
    ) -> Result<(), OpsError> {
        let shape = &attention.shape;
        check::rope_query("rope_query", step.info(), shape, q.dims)?;
        let args = [
            (&*q).into(),
            q.bf16.into(),
            Arg::U32(shape.heads as u32),
            Arg::U32(shape.nope as u32),
            Arg::U32(shape.rope as u32),
            Arg::Pointer(step.positions()),
            (&attention.angles).into(),
        ];
        queue.launch(Kernel::RopeQuery, Grid::of(step.info().rows, THREADS), &args)
    }

    fn attend(
        &self,
        queue: &mut CudaQueue,
        step: &Step,
        attention: &Attention,
        kv_up: &KvUp,
        q: &Plane,
        layer: usize,
        cache: &KvCache,
        out: &mut Plane,
    ) -> Result<(), OpsError> {
        self.attention(queue, step, attention, kv_up, q, layer, cache, out)
    }

    fn gate(
        &self,
        queue: &mut CudaQueue,
        step: &Step,
        x: &Plane,
        weight: &Weight,
        bias: &Vector,
        shape: &GateShape,
        routing: &mut Routing,
    ) -> Result<(), OpsError> {
        let (op, rows) = ("gate", step.info().rows);
        check::gate(op, x.dims, weight.dims, bias.len, shape, rows)?;
        routing.check(op, rows, shape.top_k)?;
        // Scores, selections, groups and choices of a row lie in shared memory.
        let words = 2 * shape.experts + shape.n_group + shape.top_k;
        let most = self.device.shared_bytes(Kernel::Choose) / 4;
        check::at_least(op, "elements of shared memory for a row", most, words)?;
        let logits = queue.scratch(op, Scratch::Wide, check::product(op, rows, shape.experts * 4)?.max(4))?;
        let to = Output { values: logits, bf16: false, stride: shape.experts, rows: 0 };
        self.gate_logits(op, queue, Input::of(x), weight, rows, to)?;
        let (marks, ids) = routing.places(rows);
        let args = [
            Arg::Pointer(logits),
            (&bias.memory).into(),
            Arg::U32(shape.experts as u32),
            Arg::U32(shape.n_group as u32),
            Arg::U32(shape.topk_group as u32),
            Arg::U32(shape.top_k as u32),
            shape.norm_topk_prob.into(),
            shape.routed_scaling_factor.into(),
            (shape.scoring == Scoring::Softmax).into(),
            (shape.group_score == GroupScore::Largest).into(),
            Arg::Pointer(ids),
            (&routing.weights).into(),
            Arg::Pointer(marks),
        ];
        queue.launch(Kernel::Choose, Grid::of(rows, 128).shared(4 * words), &args)?;
        routing.chosen(op, queue, rows)
    }

    fn routed<'r>(&self, routing: &'r Routing) -> Result<&'r [u16], OpsError> {
        routing.ids("routed")
    }

    fn read_weights(
        &self,
        queue: &mut CudaQueue,
        routing: &Routing,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        let op = "read_weights";
        let bytes = routing.rows * routing.top_k() * 4;
        let host = self.pool.take(bytes)?;
        queue.stream.download(op, routing.weights.address(), host.address(), bytes)?;
        queue.stream.synchronize(op)?;
        out.extend(host.as_ref().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
        Ok(())
    }

    fn write_routing(
        &self,
        queue: &mut CudaQueue,
        topk_idx: &[u16],
        topk_weights: &[f32],
        routing: &mut Routing,
    ) -> Result<(), OpsError> {
        routing.write("write_routing", queue, topk_idx, topk_weights)
    }

    fn encode(
        &self,
        queue: &mut CudaQueue,
        x: &Plane,
        rows: usize,
        scales: ScaleFormat,
        y: &mut Rows,
    ) -> Result<(), OpsError> {
        let op = "encode";
        check::same_width(op, x.dims, y.dims, rows)?;
        if y.format == RowFormat::E4m3 {
            let dims = Dims { rows, cols: x.dims.cols };
            return quantise(queue, (x.memory.address(), x.bf16), dims, scales, (y.data(0), y.scales(0)));
        }
        Ok(queue.stream.copy(op, x.memory.address(), y.data(0), rows * x.row_bytes())?)
    }

    fn grouped_ffn(
        &self,
        queue: &mut CudaQueue,
        pass: &Pass,
        experts: &ExpertTable,
        x: &Rows,
        y: &mut Plane,
    ) -> Result<(), OpsError> {
        self.experts(queue, pass, experts, x, y)
    }

    fn combine(
        &self,
        queue: &mut CudaQueue,
        experts: &ExpertRows,
        routing: &Routing,
        shared: Option<&Plane>,
        x: &mut Plane,
    ) -> Result<(), OpsError> {
        let (op, rows, top_k) = ("combine", routing.rows, routing.top_k());
        check::combine(op, experts, top_k, shared.map(|shared| shared.dims), rows, x.dims)?;
        let bytes = check::product(op, experts.pairs, experts.row_bytes())?;
        let arrived = queue.scratch(op, Scratch::Arrived, bytes.max(4))?;
        let mut index = vec![0_u32; experts.pairs];
        let mut at = 0;
        for chunk in &experts.chunks {
            queue.upload(op, &chunk.rows, arrived + (at * experts.row_bytes()) as u64)?;
            for (row, target) in (at as u32..).zip(&chunk.targets) {
                index[*target as usize] = row;
            }
            at += chunk.targets.len();
        }
        let index = queue.arguments(op, &index)?;
        let args = [
            Arg::Pointer(arrived),
            (experts.format == RowFormat::Bf16).into(),
            Arg::Pointer(index),
            (&routing.weights).into(),
            Arg::U32(top_k as u32),
            Arg::Pointer(shared.map_or(0, |shared| shared.memory.address())),
            shared.is_some_and(|shared| shared.bf16).into(),
            Arg::U32(x.dims.cols as u32),
            (&*x).into(),
        ];
        queue.launch(Kernel::Combine, Grid::of(rows, THREADS), &args)
    }

    fn sample(
        &self,
        queue: &mut CudaQueue,
        logits: &mut Plane,
        rows: &[SampleRow<'_>],
    ) -> Result<Self::Samples, OpsError> {
        self.ask(queue, logits, rows)
    }

    fn samples(
        &self,
        _: &mut CudaQueue,
        logits: &mut Plane,
        samples: Self::Samples,
    ) -> Result<Vec<Result<Sample, SampleError>>, OpsError> {
        samples.tokens(logits.dims.cols)
    }
}

const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<CudaBackend>();
};
