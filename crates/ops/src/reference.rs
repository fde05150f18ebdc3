//! The scalar reference backend: docs/numerics.md as code.
//!
//! Plain loops over `Vec<f32>`, one output element after the other, every sum through a function of
//! `cadre-numerics`. It is the only implementation of the specification; fast backends are compared with
//! it bit for bit. Weights are kept as F32 (four to eight times their packed size) and nothing is
//! parallel: for tests and small models.
//!
//! Operations run at once; a queue holds nothing, and an event is done when it is made.

mod attention;
mod dense;
mod memory;

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use cadre_numerics::{bf16, linear::Blocks, quant};
use cadre_sampler::{Sample, SampleError, Sampler};
use cadre_types::{NumericsClass, PageId, Position, config::ScaleFormat};

use crate::{
    backend::{Backend, Ffn},
    check::{self, Dims},
    error::OpsError,
    exchange::ExpertRows,
    host::{EncodedRows, HostMatrix, HostVector, RowFormat},
    plan::{Allocation, DeviceIdentity, DeviceMemory, PassLimits},
    resident::{HostPass, HostRouting, HostStep},
    shape::{AttentionShape, GateShape, KvLayout},
    step::{PassRows, SampleRow, StepInfo, StepRows},
};
pub use memory::{Buffer, KvCache, KvUp, Rows, Weight};

/// The scalar reference of one numerics class; of `cuda-fp8` it has the rounding points, not the bits.
#[derive(Clone, Copy, Debug)]
pub struct ReferenceBackend {
    class: NumericsClass,
}

/// A queue of the reference: every operation is done when its call returns.
#[derive(Debug, Default)]
pub struct Queue(());

/// An event of the reference: always done.
#[derive(Clone, Copy, Debug)]
pub struct Done;

/// Rotary parameters of the reference: angles are computed where they are needed.
#[derive(Clone, Debug)]
pub struct Attention(AttentionShape);

impl ReferenceBackend {
    /// The reference of a class.
    pub fn new(class: NumericsClass) -> Self {
        Self { class }
    }

    /// One rounding point.
    fn round(&self, value: f32) -> f32 {
        match self.class {
            NumericsClass::F32 => value,
            NumericsClass::Bf16 | NumericsClass::Fp8 | NumericsClass::CudaFp8 => bf16::round(value),
        }
    }

    /// Whether the input of this matrix is quantised.
    fn quantises(&self, weight: &Weight) -> bool {
        self.class.quantises() && weight.is_e4m3()
    }

    /// One row of `x W^T`, not rounded. `codes` are the row's codes if it arrived quantised.
    fn product(&self, x: &[f32], codes: Option<(&[u8], &[f32])>, weight: &Weight) -> Vec<f32> {
        let blocks = Blocks::aligned(weight.dims.cols);
        if !self.quantises(weight) {
            return (0..weight.dims.rows).map(|n| weight.output(n, x, blocks, |_| 1.0)).collect();
        }
        let mut own = (vec![0; x.len()], vec![0.0; quant::blocks(x.len())]);
        let (codes, scales) = codes.unwrap_or_else(|| {
            quant::row(x, weight.input_scales == ScaleFormat::Ue8m0, &mut own.0, &mut own.1);
            (&own.0, &own.1)
        });
        let values: Vec<f32> = codes.iter().map(|c| cadre_numerics::e4m3::decode(*c)).collect();
        (0..weight.dims.rows).map(|n| weight.output(n, &values, blocks, |block| scales[block])).collect()
    }
}

fn buffer(op: &'static str, rows: usize, cols: usize) -> Result<Buffer, OpsError> {
    check::product(op, rows, cols)?;
    Ok(Buffer::new(Dims { rows, cols }))
}

fn read(op: &'static str, x: &Buffer, rows: Range<usize>, out: &mut Vec<f32>) -> Result<(), OpsError> {
    check::rows(op, x.dims, &rows)?;
    out.extend_from_slice(x.rows(rows));
    Ok(())
}

fn write(
    op: &'static str,
    values: &[f32],
    y: &mut Buffer,
    round: impl Fn(f32) -> f32,
) -> Result<(), OpsError> {
    let rows = check::values(op, values.len(), y.dims)?;
    let cols = y.dims.cols;
    for row in 0..rows {
        let from = &values[row * cols..(row + 1) * cols];
        y.row_mut(row).iter_mut().zip(from).for_each(|(to, from)| *to = round(*from));
    }
    Ok(())
}

impl Backend for ReferenceBackend {
    type Residual = Buffer;
    type Activations = Buffer;
    type Rows = Rows;
    type Logits = Buffer;
    type Routing = HostRouting;
    type Samples = Vec<Result<Sample, SampleError>>;
    type Weight = Weight;
    type Vector = Vec<f32>;
    type ExpertTable = Vec<Arc<Ffn<Weight>>>;
    type KvCache = KvCache;
    type KvUp = KvUp;
    type Attention = Attention;
    type Step = HostStep;
    type Pass = HostPass;
    type Staging = Vec<u8>;
    type Event = Done;
    type Queue = Queue;

    fn class(&self) -> NumericsClass {
        self.class
    }

    fn identity(&self) -> DeviceIdentity {
        let [device, name, architecture] = ["cpu", "reference", "scalar"].map(str::to_owned);
        DeviceIdentity { device, name, architecture }
    }

    fn describe(&self) -> String {
        format!("scalar reference, numerics {}", self.class)
    }

    fn memory(&self) -> DeviceMemory {
        DeviceMemory::default()
    }

    fn bytes_of(&self, allocation: &Allocation<'_>) -> Result<u64, OpsError> {
        // Everything is F32 here; rows of class fp8 have codes and scales beside.
        Ok(4 * allocation.elements("bytes_of")?)
    }

    fn pass_limits(&self, _: usize) -> PassLimits {
        PassLimits { rows: 256, pairs: 256 }
    }

    fn runs_at_once(&self) -> bool {
        true
    }

    fn queue(&self) -> Result<Queue, OpsError> {
        Ok(Queue(()))
    }

    fn record(&self, _: &mut Queue) -> Result<Done, OpsError> {
        Ok(Done)
    }

    fn is_done(&self, _: &Done) -> Result<bool, OpsError> {
        Ok(true)
    }

    fn wait(&self, _: &Done) -> Result<(), OpsError> {
        Ok(())
    }

    fn run_after(&self, _: &mut Queue, _: &Done) -> Result<(), OpsError> {
        Ok(())
    }

    fn alloc_residual(&self, rows: usize, cols: usize) -> Result<Buffer, OpsError> {
        buffer("alloc_residual", rows, cols)
    }

    fn alloc_activations(&self, rows: usize, cols: usize) -> Result<Buffer, OpsError> {
        buffer("alloc_activations", rows, cols)
    }

    fn alloc_rows(&self, rows: usize, cols: usize) -> Result<Rows, OpsError> {
        check::product("alloc_rows", rows, cols)?;
        Ok(Rows::new(Dims { rows, cols }, RowFormat::dispatch(self.class)))
    }

    fn alloc_logits(&self, rows: usize, vocab: usize) -> Result<Buffer, OpsError> {
        buffer("alloc_logits", rows, vocab)
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

    fn staging(&self, bytes: usize) -> Result<Vec<u8>, OpsError> {
        Ok(vec![0; bytes])
    }

    fn load_matrix(&self, matrix: HostMatrix<'_>) -> Result<Weight, OpsError> {
        check::matrix("load_matrix", &matrix)?;
        Ok(Weight::new(&matrix))
    }

    fn load_ffn(
        &self,
        gate: HostMatrix<'_>,
        up: HostMatrix<'_>,
        down: HostMatrix<'_>,
    ) -> Result<Ffn<Weight>, OpsError> {
        let (_, inner) = check::ffn("load_ffn", &gate, &up, &down)?;
        let gate_up = Weight::stacked(Weight::new(&gate), Weight::new(&up));
        Ok(Ffn { gate_up, down: Weight::new(&down), inner })
    }

    fn load_vector(&self, vector: HostVector<'_>) -> Result<Vec<f32>, OpsError> {
        check::finite("load_vector", "element", vector.iter().copied())?;
        Ok(vector.to_vec())
    }

    fn load_kv_up(&self, shape: &AttentionShape, kv_b: HostMatrix<'_>) -> Result<KvUp, OpsError> {
        check::kv_up("load_kv_up", shape, &kv_b)?;
        Ok(KvUp { weight: Weight::new(&kv_b) })
    }

    fn load_attention(&self, shape: &AttentionShape) -> Result<Attention, OpsError> {
        check::attention_shape("load_attention", shape)?;
        Ok(Attention(shape.clone()))
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
        let elements = check::kv_layout("kv_cache", &layout)?;
        Ok(KvCache { layout, data: vec![0.0; elements] })
    }

    fn begin_step(&self, _: &mut Queue, rows: &StepRows<'_>, step: &mut HostStep) -> Result<(), OpsError> {
        step.fill("begin_step", rows)
    }

    fn step_info<'s>(&self, step: &'s HostStep) -> &'s StepInfo {
        step.info()
    }

    fn begin_pass(&self, _: &mut Queue, rows: &PassRows<'_>, pass: &mut HostPass) -> Result<(), OpsError> {
        pass.fill("begin_pass", rows)
    }

    fn download_rows(
        &self,
        _: &mut Queue,
        x: &Rows,
        rows: usize,
        memory: &mut Vec<u8>,
        at: usize,
    ) -> Result<(), OpsError> {
        memory::download_rows(x, self.class, rows, memory, at)
    }

    fn upload_rows(
        &self,
        _: &mut Queue,
        rows: &EncodedRows,
        first_row: usize,
        y: &mut Rows,
    ) -> Result<(), OpsError> {
        memory::upload_rows(&rows.as_host_rows(), self.class, first_row, y)
    }

    fn download_activations(
        &self,
        _: &mut Queue,
        x: &Buffer,
        rows: Range<usize>,
        memory: &mut Vec<u8>,
        at: usize,
    ) -> Result<(), OpsError> {
        memory::download_activations(x, self.class, rows, memory, at)
    }

    fn kv_read(
        &self,
        _: &mut Queue,
        cache: &KvCache,
        layer: usize,
        block_table: &[PageId],
        first: Position,
        count: usize,
        memory: &mut Vec<u8>,
        at: usize,
    ) -> Result<(), OpsError> {
        memory::kv_read(cache, self.class, layer, block_table, first, count, memory, at)
    }

    fn kv_write(
        &self,
        _: &mut Queue,
        cache: &mut KvCache,
        layer: usize,
        block_table: &[PageId],
        first: Position,
        count: usize,
        rows: &Bytes,
    ) -> Result<(), OpsError> {
        memory::kv_write(cache, self.class, layer, block_table, first, count, rows)
    }

    fn read_activations(
        &self,
        _: &mut Queue,
        x: &Buffer,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        read("read_activations", x, rows, out)
    }

    fn read_residual(
        &self,
        _: &mut Queue,
        x: &Buffer,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        read("read_residual", x, rows, out)
    }

    fn read_logits(
        &self,
        _: &mut Queue,
        x: &Buffer,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        read("read_logits", x, rows, out)
    }

    fn write_activations(&self, _: &mut Queue, values: &[f32], y: &mut Buffer) -> Result<(), OpsError> {
        write("write_activations", values, y, |value| self.round(value))
    }

    fn write_residual(&self, _: &mut Queue, values: &[f32], y: &mut Buffer) -> Result<(), OpsError> {
        write("write_residual", values, y, |value| value)
    }

    fn write_logits(&self, _: &mut Queue, values: &[f32], y: &mut Buffer) -> Result<(), OpsError> {
        write("write_logits", values, y, |value| value)
    }

    fn embed(&self, _: &mut Queue, step: &HostStep, table: &Weight, y: &mut Buffer) -> Result<(), OpsError> {
        dense::embed(step, table, y)
    }

    fn rms_norm(
        &self,
        _: &mut Queue,
        x: &Buffer,
        weight: &Vec<f32>,
        eps: f32,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::rms_norm(self, x, weight, eps, rows, y)
    }

    fn rms_norm_residual(
        &self,
        _: &mut Queue,
        x: &Buffer,
        weight: &Vec<f32>,
        eps: f32,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::rms_norm(self, x, weight, eps, rows, y)
    }

    fn add(&self, _: &mut Queue, x: &mut Buffer, delta: &Buffer, rows: usize) -> Result<(), OpsError> {
        dense::add(x, delta, rows)
    }

    fn assign(&self, _: &mut Queue, x: &mut Buffer, y: &Buffer, rows: usize) -> Result<(), OpsError> {
        dense::assign(x, y, rows)
    }

    fn gather_wanted(
        &self,
        _: &mut Queue,
        step: &HostStep,
        x: &Buffer,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::gather_wanted(step, x, y)
    }

    fn concat(
        &self,
        _: &mut Queue,
        a: &Buffer,
        b: &Buffer,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::concat(a, b, rows, y)
    }

    fn linear(
        &self,
        _: &mut Queue,
        x: &Buffer,
        weight: &Weight,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::linear(self, x, weight, rows, y)
    }

    fn logits(
        &self,
        _: &mut Queue,
        x: &Buffer,
        head: &Weight,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::logits(self, x, head, rows, y)
    }

    fn ffn(
        &self,
        _: &mut Queue,
        x: &Buffer,
        ffn: &Ffn<Weight>,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::ffn(self, x, ffn, rows, y)
    }

    fn kv_append(
        &self,
        _: &mut Queue,
        step: &HostStep,
        attention: &Attention,
        kv_a: &Buffer,
        norm: &Vec<f32>,
        eps: f32,
        layer: usize,
        cache: &mut KvCache,
    ) -> Result<(), OpsError> {
        attention::kv_append(self, step, &attention.0, kv_a, norm, eps, layer, cache)
    }

    fn rope_query(
        &self,
        _: &mut Queue,
        step: &HostStep,
        attention: &Attention,
        q: &mut Buffer,
    ) -> Result<(), OpsError> {
        attention::rope_query(self, step, &attention.0, q)
    }

    fn attend(
        &self,
        _: &mut Queue,
        step: &HostStep,
        attention: &Attention,
        kv_up: &KvUp,
        q: &Buffer,
        layer: usize,
        cache: &KvCache,
        out: &mut Buffer,
    ) -> Result<(), OpsError> {
        attention::attend_all(self, step, &attention.0, kv_up, q, layer, cache, out)
    }

    fn gate(
        &self,
        _: &mut Queue,
        step: &HostStep,
        x: &Buffer,
        weight: &Weight,
        bias: &Vec<f32>,
        shape: &GateShape,
        routing: &mut HostRouting,
    ) -> Result<(), OpsError> {
        dense::gate(step, x, weight, bias, shape, routing)
    }

    fn routed<'r>(&self, routing: &'r HostRouting) -> Result<&'r [u16], OpsError> {
        routing.ids()
    }

    fn read_weights(&self, _: &mut Queue, routing: &HostRouting, out: &mut Vec<f32>) -> Result<(), OpsError> {
        out.extend_from_slice(routing.weights());
        Ok(())
    }

    fn write_routing(
        &self,
        _: &mut Queue,
        topk_idx: &[u16],
        topk_weights: &[f32],
        routing: &mut HostRouting,
    ) -> Result<(), OpsError> {
        routing.write("write_routing", topk_idx, topk_weights)
    }

    fn encode(
        &self,
        _: &mut Queue,
        x: &Buffer,
        rows: usize,
        scales: ScaleFormat,
        y: &mut Rows,
    ) -> Result<(), OpsError> {
        memory::encode(x, rows, scales, y)
    }

    fn grouped_ffn(
        &self,
        _: &mut Queue,
        pass: &HostPass,
        experts: &Self::ExpertTable,
        x: &Rows,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::grouped_ffn(self, pass, experts, x, y)
    }

    fn combine(
        &self,
        _: &mut Queue,
        experts: &ExpertRows,
        routing: &HostRouting,
        shared: Option<&Buffer>,
        x: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::combine(experts, routing, shared, x)
    }

    fn sample(
        &self,
        _: &mut Queue,
        logits: &mut Buffer,
        rows: &[SampleRow<'_>],
    ) -> Result<Self::Samples, OpsError> {
        check::sample_rows("sample", logits.dims.rows, rows.iter().map(|row| row.row))?;
        let mut sampler = Sampler::new();
        let draw = |row: &SampleRow<'_>| {
            sampler.sample(logits.row_mut(row.row), row.params, row.history, row.position)
        };
        Ok(rows.iter().map(draw).collect())
    }

    fn samples(
        &self,
        _: &mut Queue,
        _: &mut Buffer,
        samples: Self::Samples,
    ) -> Result<Vec<Result<Sample, SampleError>>, OpsError> {
        Ok(samples)
    }
}

#[cfg(test)]
mod tests;
