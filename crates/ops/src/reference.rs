//! The scalar reference backend: docs/numerics.md as code.
//!
//! Plain loops over `Vec<f32>`, one output element after the other, every sum through a function of
//! `cadre-numerics`. It is the only implementation of the specification; fast backends are compared with
//! it bit for bit. Weights are kept as F32 (four to eight times their packed size) and nothing is
//! parallel: for tests and small models.
//!
//! Operations run at once; a queue holds nothing.

mod attention;
mod dense;
mod memory;

use cadre_numerics::{bf16, linear::Blocks, quant};
use cadre_types::{NumericsClass, PageId, Position, TokenId};

use crate::{
    backend::{Backend, Ffn, OpsError},
    check::{self, Dims},
    host::{HostMatrix, HostRows, HostVector, RowFormat},
    shape::{AttentionShape, DecodeRow, GateShape, KvLayout, PrefillSegment, RowGroup},
};
pub use memory::{Buffer, KvCache, KvUp, Weight};

/// The scalar reference of one numerics class.
#[derive(Clone, Copy, Debug)]
pub struct ReferenceBackend {
    class: NumericsClass,
}

/// A queue of the reference: every operation is done when its call returns.
#[derive(Debug, Default)]
pub struct Queue(());

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
            NumericsClass::Bf16 | NumericsClass::Fp8 => bf16::round(value),
        }
    }

    /// Whether the input of this matrix is quantised.
    fn quantises(&self, weight: &Weight) -> bool {
        self.class == NumericsClass::Fp8 && weight.is_e4m3()
    }

    /// One row of `x W^T`, not rounded. `codes` are the row's codes if it arrived quantised.
    fn product(&self, x: &[f32], codes: Option<(&[u8], &[f32])>, weight: &Weight) -> Vec<f32> {
        let blocks = Blocks::aligned(weight.dims.cols);
        if !self.quantises(weight) {
            return (0..weight.dims.rows).map(|n| weight.output(n, x, blocks, |_| 1.0)).collect();
        }
        let mut own = (vec![0; x.len()], vec![0.0; quant::blocks(x.len())]);
        let (codes, scales) = codes.unwrap_or_else(|| {
            quant::row(x, &mut own.0, &mut own.1);
            (&own.0, &own.1)
        });
        let values: Vec<f32> = codes.iter().map(|c| cadre_numerics::e4m3::decode(*c)).collect();
        (0..weight.dims.rows).map(|n| weight.output(n, &values, blocks, |block| scales[block])).collect()
    }
}

impl Backend for ReferenceBackend {
    type Buffer = Buffer;
    type Weight = Weight;
    type Vector = Vec<f32>;
    type KvCache = KvCache;
    type KvUp = KvUp;
    type Attention = Attention;
    type Queue = Queue;

    fn class(&self) -> NumericsClass {
        self.class
    }

    fn describe(&self) -> String {
        format!("scalar reference, numerics {}", self.class)
    }

    fn queue(&self) -> Result<Queue, OpsError> {
        Ok(Queue(()))
    }

    fn synchronize(&self, _: &mut Queue) -> Result<(), OpsError> {
        Ok(())
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<Buffer, OpsError> {
        check::product("alloc", rows, cols)?;
        Ok(Buffer::new(Dims { rows, cols }))
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

    fn weight_bytes(&self, weight: &Weight) -> usize {
        weight.bytes()
    }

    fn kv_cache(&self, layout: KvLayout) -> Result<KvCache, OpsError> {
        let elements = check::kv_layout("kv_cache", &layout)?;
        Ok(KvCache { layout, data: vec![0.0; elements] })
    }

    fn download_rows(
        &self,
        _: &mut Queue,
        x: &Buffer,
        rows: usize,
        format: RowFormat,
        data: &mut Vec<u8>,
        scales: &mut Vec<u8>,
    ) -> Result<(), OpsError> {
        memory::download_rows(x, rows, format, data, scales)
    }

    fn upload_rows(&self, _: &mut Queue, rows: HostRows<'_>, y: &mut Buffer) -> Result<(), OpsError> {
        memory::upload_rows(&rows, y)
    }

    fn download_f32(
        &self,
        _: &mut Queue,
        x: &Buffer,
        rows: &[usize],
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        out.clear();
        for row in rows {
            check::index("download_f32", "row", *row, x.dims.rows)?;
            out.extend_from_slice(x.row(*row));
        }
        Ok(())
    }

    fn kv_read(
        &self,
        _: &mut Queue,
        cache: &KvCache,
        layer: usize,
        block_table: &[PageId],
        first: Position,
        count: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), OpsError> {
        memory::kv_read(cache, self.class, layer, block_table, first, count, out)
    }

    fn kv_write(
        &self,
        _: &mut Queue,
        cache: &mut KvCache,
        layer: usize,
        block_table: &[PageId],
        first: Position,
        count: usize,
        rows: &[u8],
    ) -> Result<(), OpsError> {
        memory::kv_write(cache, self.class, layer, block_table, first, count, rows)
    }

    fn embed(&self, _: &mut Queue, table: &Weight, ids: &[TokenId], y: &mut Buffer) -> Result<(), OpsError> {
        dense::embed(table, ids, y)
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
        rows: &[usize],
        head: &Weight,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        dense::logits(self, x, rows, head, out)
    }

    fn ffn(
        &self,
        _: &mut Queue,
        x: &Buffer,
        ffn: &Ffn<Weight>,
        rows: usize,
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        let group = RowGroup { expert: 0, first_row: 0, rows };
        dense::grouped_ffn(self, "ffn", x, &[ffn], &[group], y)
    }

    fn grouped_ffn(
        &self,
        _: &mut Queue,
        x: &Buffer,
        experts: &[&Ffn<Weight>],
        groups: &[RowGroup],
        y: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::grouped_ffn(self, "grouped_ffn", x, experts, groups, y)
    }

    fn gather_rows(&self, _: &mut Queue, x: &Buffer, rows: &[usize], y: &mut Buffer) -> Result<(), OpsError> {
        dense::gather_rows(x, rows, y)
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

    fn add(&self, _: &mut Queue, x: &mut Buffer, delta: &Buffer, rows: usize) -> Result<(), OpsError> {
        dense::add(x, delta, rows)
    }

    fn kv_append(
        &self,
        _: &mut Queue,
        attention: &Attention,
        kv_a: &Buffer,
        norm: &Vec<f32>,
        eps: f32,
        positions: &[Position],
        tables: &[&[PageId]],
        layer: usize,
        cache: &mut KvCache,
    ) -> Result<(), OpsError> {
        let shape = &attention.0;
        attention::kv_append(self, shape, kv_a, norm, eps, positions, tables, layer, cache)
    }

    fn rope_query(
        &self,
        _: &mut Queue,
        attention: &Attention,
        positions: &[Position],
        q: &mut Buffer,
    ) -> Result<(), OpsError> {
        attention::rope_query(self, &attention.0, positions, q)
    }

    fn attention_prefill(
        &self,
        _: &mut Queue,
        attention: &Attention,
        kv_up: &KvUp,
        q: &Buffer,
        segments: &[PrefillSegment<'_>],
        layer: usize,
        cache: &KvCache,
        out: &mut Buffer,
    ) -> Result<(), OpsError> {
        attention::prefill(self, &attention.0, kv_up, q, segments, layer, cache, out)
    }

    fn attention_decode(
        &self,
        _: &mut Queue,
        attention: &Attention,
        kv_up: &KvUp,
        q: &Buffer,
        rows: &[DecodeRow<'_>],
        layer: usize,
        cache: &KvCache,
        out: &mut Buffer,
    ) -> Result<(), OpsError> {
        attention::decode(self, &attention.0, kv_up, q, rows, layer, cache, out)
    }

    fn gate(
        &self,
        _: &mut Queue,
        x: &Buffer,
        weight: &Weight,
        bias: &Vec<f32>,
        shape: &GateShape,
        rows: usize,
        topk_idx: &mut Vec<u16>,
        topk_weights: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        dense::gate(x, weight, bias, shape, rows, topk_idx, topk_weights)
    }

    fn combine(
        &self,
        _: &mut Queue,
        expert_rows: HostRows<'_>,
        topk_weights: &[f32],
        top_k: usize,
        shared: Option<&Buffer>,
        rows: usize,
        x: &mut Buffer,
    ) -> Result<(), OpsError> {
        dense::combine(&expert_rows, topk_weights, top_k, shared, rows, x)
    }
}

#[cfg(test)]
mod tests;
