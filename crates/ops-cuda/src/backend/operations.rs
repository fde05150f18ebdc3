//! The operations of the trait, each by name: what it checks and launches is in the module that it names.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use cadre_ops::{
    Allocation, AttentionShape, Backend, DeviceIdentity, DeviceMemory, DrawnMatrix, EncodedRows, ExpertRows,
    Ffn, GateShape, HostMatrix, HostVector, KvLayout, OpsError, PassLimits, PassRows, RowFormat, SampleRow,
    Sizes, StepInfo, StepRows, check, check::Dims,
};
use cadre_sampler::{Sample, SampleError};
use cadre_types::{NumericsClass, PageId, Position, config::ScaleFormat};

use super::{
    Attention, CudaBackend, CudaQueue, ExpertTable, KvCache, KvUp, Pass, Plane, QueueEvent, Routing, Rows,
    Samples, Staging, Step, Vector, Weight, attend, routed, rows, transfer,
};
use crate::device::Memory;

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

    fn identity(&self) -> DeviceIdentity {
        let info = self.device.info();
        DeviceIdentity {
            device: format!("cuda:{}", info.ordinal),
            name: info.name.clone(),
            architecture: format!("sm_{}{}", info.capability.0, info.capability.1),
        }
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
        match self.device.memory() {
            Ok((free, total)) => {
                let [free, total] = [free, total].map(|bytes| bytes as u64);
                DeviceMemory { used: total - free, total, free: Some(free) }
            }
            Err(_) => DeviceMemory::default(),
        }
    }

    fn bytes_of(&self, allocation: &Allocation<'_>) -> Result<u64, OpsError> {
        self.sizes().planned(allocation)
    }

    fn pass_limits(&self, hidden: usize) -> PassLimits {
        self.sizes().planned_pass(hidden)
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
        self.loader.matrix("load_matrix", (&matrix).into())
    }

    fn load_ffn(
        &self,
        gate: HostMatrix<'_>,
        up: HostMatrix<'_>,
        down: HostMatrix<'_>,
    ) -> Result<Ffn<Weight>, OpsError> {
        check::ffn("load_ffn", &gate, &up, &down)?;
        self.loader.ffn("load_ffn", (&gate).into(), (&up).into(), (&down).into())
    }

    fn load_vector(&self, vector: HostVector<'_>) -> Result<Vector, OpsError> {
        check::finite("load_vector", "element", vector.iter().copied())?;
        self.loader.vector("load_vector", vector)
    }

    fn load_kv_up(&self, shape: &AttentionShape, kv_b: HostMatrix<'_>) -> Result<KvUp, OpsError> {
        check::kv_up("load_kv_up", shape, &kv_b)?;
        self.loader.kv_up("load_kv_up", shape, (&kv_b).into())
    }

    fn draw_matrix(&self, matrix: &DrawnMatrix<'_>) -> Result<Weight, OpsError> {
        check::drawn_matrix("draw_matrix", matrix)?;
        self.loader.matrix("draw_matrix", matrix.into())
    }

    fn draw_ffn(
        &self,
        gate: &DrawnMatrix<'_>,
        up: &DrawnMatrix<'_>,
        down: &DrawnMatrix<'_>,
    ) -> Result<Ffn<Weight>, OpsError> {
        check::drawn_ffn("draw_ffn", gate, up, down)?;
        self.loader.ffn("draw_ffn", gate.into(), up.into(), down.into())
    }

    fn draw_kv_up(&self, shape: &AttentionShape, kv_b: &DrawnMatrix<'_>) -> Result<KvUp, OpsError> {
        check::drawn_kv_up("draw_kv_up", shape, kv_b)?;
        self.loader.kv_up("draw_kv_up", shape, kv_b.into())
    }

    fn load_attention(&self, shape: &AttentionShape) -> Result<Attention, OpsError> {
        self.attention_of(shape)
    }

    fn expert_table(&self, experts: Vec<Arc<Ffn<Weight>>>) -> Result<ExpertTable, OpsError> {
        self.table("expert_table", experts)
    }

    fn weight_bytes(&self, weight: &Weight) -> usize {
        weight.words.bytes() + weight.scales.as_ref().map_or(0, Memory::bytes)
    }

    fn kv_cache(&self, layout: KvLayout) -> Result<KvCache, OpsError> {
        self.cache(layout)
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
        transfer::download_rows(queue, x, rows, memory, at)
    }

    fn upload_rows(
        &self,
        queue: &mut CudaQueue,
        rows: &EncodedRows,
        first_row: usize,
        y: &mut Rows,
    ) -> Result<(), OpsError> {
        transfer::upload_rows(self.class, queue, rows, first_row, y)
    }

    fn download_activations(
        &self,
        queue: &mut CudaQueue,
        x: &Plane,
        rows: Range<usize>,
        memory: &mut Staging,
        at: usize,
    ) -> Result<(), OpsError> {
        transfer::download_activations(queue, x, rows, memory, at)
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
        transfer::kv_read(queue, cache, layer, block_table, first, count, memory, at)
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
        transfer::kv_write(queue, cache, layer, block_table, first, count, rows)
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
        rows::embed(queue, step, table, y)
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
        rows::rms_norm(queue, x, weight, eps, rows, y)
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
        rows::rms_norm(queue, x, weight, eps, rows, y)
    }

    fn add(&self, queue: &mut CudaQueue, x: &mut Plane, delta: &Plane, rows: usize) -> Result<(), OpsError> {
        rows::add(queue, x, delta, rows)
    }

    fn assign(&self, queue: &mut CudaQueue, x: &mut Plane, y: &Plane, rows: usize) -> Result<(), OpsError> {
        rows::assign(queue, x, y, rows)
    }

    fn gather_wanted(
        &self,
        queue: &mut CudaQueue,
        step: &Step,
        x: &Plane,
        y: &mut Plane,
    ) -> Result<(), OpsError> {
        rows::gather_wanted(queue, step, x, y)
    }

    fn concat(
        &self,
        queue: &mut CudaQueue,
        a: &Plane,
        b: &Plane,
        rows: usize,
        y: &mut Plane,
    ) -> Result<(), OpsError> {
        rows::concat(queue, a, b, rows, y)
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
        attend::append(queue, step, attention, kv_a, norm, eps, layer, cache)
    }

    fn rope_query(
        &self,
        queue: &mut CudaQueue,
        step: &Step,
        attention: &Attention,
        q: &mut Plane,
    ) -> Result<(), OpsError> {
        attend::rotate(queue, step, attention, q)
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
        self.choose(queue, step, x, weight, bias, shape, routing)
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
        self.chosen_weights(queue, routing, out)
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
        rows::encode(queue, x, rows, scales, y)
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
        routed::combine(queue, experts, routing, shared, x)
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
        queue: &mut CudaQueue,
        logits: &mut Plane,
        samples: Self::Samples,
    ) -> Result<Vec<Result<Sample, SampleError>>, OpsError> {
        self.tokens(queue, logits, samples)
    }
}
