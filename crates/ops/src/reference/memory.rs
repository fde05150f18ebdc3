//! What the reference keeps, and transfers to and from the host.

use std::ops::Range;

use cadre_numerics::{
    bf16, e4m3,
    linear::{self, Blocks},
    quant,
};
use cadre_types::{NumericsClass, PageId, Position, config::ScaleFormat};

use crate::{
    check::{self, Dims},
    error::OpsError,
    host::{HostMatrix, HostRows, MatrixData, RowFormat, RowLayout},
    shape::KvLayout,
};

/// Values `[rows, cols]`, row-major: residual stream, activations and logits.
#[derive(Clone, Debug)]
pub struct Buffer {
    pub(super) dims: Dims,
    data: Vec<f32>,
}

impl Buffer {
    pub(super) fn new(dims: Dims) -> Self {
        Self { dims, data: vec![0.0; dims.rows * dims.cols] }
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.dims.cols..(row + 1) * self.dims.cols]
    }

    pub(super) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.dims.cols..(row + 1) * self.dims.cols]
    }

    pub(super) fn rows(&self, rows: Range<usize>) -> &[f32] {
        &self.data[rows.start * self.dims.cols..rows.end * self.dims.cols]
    }
}

/// Rows in the dispatch format: values, and in class fp8 the codes and scales that they are made of.
#[derive(Clone, Debug)]
pub struct Rows {
    pub(super) values: Buffer,
    /// `[rows, cols]` and `[rows, blocks]`.
    codes: Option<(Vec<u8>, Vec<f32>)>,
}

impl Rows {
    pub(super) fn new(dims: Dims, format: RowFormat) -> Self {
        let coded = || (vec![0; dims.rows * dims.cols], vec![0.0; dims.rows * quant::blocks(dims.cols)]);
        Self { values: Buffer::new(dims), codes: (format == RowFormat::E4m3).then(coded) }
    }

    pub(super) fn dims(&self) -> Dims {
        self.values.dims
    }

    /// Codes and scales of a row.
    pub(super) fn coded(&self, row: usize) -> Option<(&[u8], &[f32])> {
        let (cols, blocks) = (self.dims().cols, quant::blocks(self.dims().cols));
        self.codes.as_ref().map(|(codes, scales)| {
            (&codes[row * cols..(row + 1) * cols], &scales[row * blocks..(row + 1) * blocks])
        })
    }

    fn coded_mut(&mut self, row: usize) -> Option<(&mut [u8], &mut [f32])> {
        let (cols, blocks) = (self.dims().cols, quant::blocks(self.dims().cols));
        self.codes.as_mut().map(|(codes, scales)| {
            (&mut codes[row * cols..(row + 1) * cols], &mut scales[row * blocks..(row + 1) * blocks])
        })
    }
}

/// A matrix: what inputs are multiplied with, and block scales.
#[derive(Clone, Debug)]
pub struct Weight {
    pub(super) dims: Dims,
    /// Row-major; e4m3 as value x 2^-8.
    values: Vec<f32>,
    /// e4m3 only: scale x 2^8, as in [`MatrixData::E4m3`].
    scales: Option<Vec<f32>>,
    /// Scales of a quantised input.
    pub(super) input_scales: ScaleFormat,
}

impl Weight {
    pub(super) fn new(matrix: &HostMatrix<'_>) -> Self {
        let dims = Dims { rows: matrix.rows, cols: matrix.cols };
        let (values, scales, input_scales) = match matrix.data {
            MatrixData::F32(bytes) => {
                let values = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
                (values.collect(), None, ScaleFormat::F32)
            }
            MatrixData::Bf16(bytes) => {
                let codes = bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
                (codes.map(bf16::decode).collect(), None, ScaleFormat::F32)
            }
            MatrixData::E4m3 { codes, scales, input_scales, .. } => (
                codes.iter().map(|code| e4m3::decode(*code) / e4m3::FOLD).collect(),
                Some(scales.iter().map(|scale| scale * e4m3::FOLD).collect()),
                input_scales,
            ),
        };
        Self { dims, values, scales, input_scales }
    }

    /// gate above up. Each keeps its own scale rows, so the upper part is padded to whole blocks.
    pub(super) fn stacked(mut gate: Self, up: Self) -> Self {
        let padding = gate.dims.rows.next_multiple_of(cadre_numerics::BLOCK) - gate.dims.rows;
        gate.values.resize(gate.values.len() + padding * gate.dims.cols, 0.0);
        gate.dims.rows += padding + up.dims.rows;
        gate.values.extend(up.values);
        if let (Some(scales), Some(more)) = (&mut gate.scales, up.scales) {
            scales.extend(more);
        }
        gate
    }

    /// First row of up_proj in a stacked matrix.
    pub(super) fn up_row(inner: usize) -> usize {
        inner.next_multiple_of(cadre_numerics::BLOCK)
    }

    pub(super) fn is_e4m3(&self) -> bool {
        self.scales.is_some()
    }

    pub(super) fn value(&self, n: usize, k: usize) -> f32 {
        self.values[n * self.dims.cols + k]
    }

    /// The block scale `t` of an element, before an input's scale.
    pub(super) fn scale(&self, n: usize, k: usize) -> f32 {
        let block = cadre_numerics::BLOCK;
        let per_row = quant::blocks(self.dims.cols);
        self.scales.as_ref().map_or(1.0, |scales| scales[n / block * per_row + k / block])
    }

    /// Output `n` for a row, not rounded; `input_scale` is 1 for an input that is not quantised.
    pub(super) fn output(
        &self,
        n: usize,
        x: &[f32],
        blocks: Blocks,
        input_scale: impl Fn(usize) -> f32,
    ) -> f32 {
        let scale = |block: usize| self.scale(n, blocks.range(block).start) * input_scale(block);
        linear::output(x, blocks, |k| self.value(n, k), scale)
    }

    pub(super) fn bytes(&self) -> usize {
        (self.values.len() + self.scales.as_ref().map_or(0, Vec::len)) * 4
    }
}

/// kv_b as stored.
#[derive(Clone, Debug)]
pub struct KvUp {
    pub(super) weight: Weight,
}

/// The latent cache as F32 (values of the class's cached type).
#[derive(Clone, Debug)]
pub struct KvCache {
    pub(super) layout: KvLayout,
    pub(super) data: Vec<f32>,
}

impl KvCache {
    fn offset(&self, layer: usize, table: &[PageId], position: usize) -> (usize, usize) {
        let layout = &self.layout;
        let width = layout.kv_lora_rank + layout.qk_rope_head_dim;
        let page = table[position / layout.page_tokens].index();
        let slot = position % layout.page_tokens;
        (((layer * layout.pages + page) * layout.page_tokens + slot) * width, width)
    }

    /// `[c | k_pe]` of a position.
    pub(super) fn row(&self, layer: usize, table: &[PageId], position: usize) -> &[f32] {
        let (offset, width) = self.offset(layer, table, position);
        &self.data[offset..offset + width]
    }

    pub(super) fn row_mut(&mut self, layer: usize, table: &[PageId], position: usize) -> &mut [f32] {
        let (offset, width) = self.offset(layer, table, position);
        &mut self.data[offset..offset + width]
    }
}

fn write(values: &[f32], format: RowFormat, out: &mut [u8]) {
    match format {
        RowFormat::F32 => {
            for (out, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *out = value.to_le_bytes();
            }
        }
        RowFormat::Bf16 => {
            for (out, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *out = bf16::encode(*value).to_le_bytes();
            }
        }
        RowFormat::E4m3 => {}
    }
}

pub(super) fn encode(x: &Buffer, rows: usize, scales: ScaleFormat, y: &mut Rows) -> Result<(), OpsError> {
    check::same_width("encode", x.dims, y.dims(), rows)?;
    for row in 0..rows {
        y.values.row_mut(row).copy_from_slice(x.row(row));
        let mut values = vec![0.0; x.dims.cols];
        let Some((codes, own)) = y.coded_mut(row) else { continue };
        quant::row(x.row(row), scales == ScaleFormat::Ue8m0, codes, own);
        let bytes: Vec<u8> = own.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        check::decode_row(RowFormat::E4m3, codes, &bytes, &mut values);
        y.values.row_mut(row).copy_from_slice(&values);
    }
    Ok(())
}

pub(super) fn download_rows(
    x: &Rows,
    class: NumericsClass,
    rows: usize,
    memory: &mut [u8],
    at: usize,
) -> Result<(), OpsError> {
    let (op, cols, format) = ("download_rows", x.dims().cols, RowFormat::dispatch(class));
    check::at_least(op, "row capacity of x", x.dims().rows, rows)?;
    let layout = RowLayout::of(format, rows, cols);
    check::memory(op, memory.len(), at, layout.bytes)?;
    let (width, blocks) = (format.row_bytes(cols), format.row_scales(cols));
    let memory = &mut memory[at..at + layout.bytes];
    for row in 0..rows {
        let to = row * width..(row + 1) * width;
        match x.coded(row) {
            None => write(x.values.row(row), format, &mut memory[to]),
            Some((codes, scales)) => {
                memory[to].copy_from_slice(codes);
                let first = layout.scales_at + row * blocks * 4;
                write(scales, RowFormat::F32, &mut memory[first..first + blocks * 4]);
            }
        }
    }
    Ok(())
}

pub(super) fn download_activations(
    x: &Buffer,
    class: NumericsClass,
    rows: Range<usize>,
    memory: &mut [u8],
    at: usize,
) -> Result<(), OpsError> {
    let (op, format) = ("download_activations", RowFormat::combine(class));
    check::rows(op, x.dims, &rows)?;
    let bytes = rows.len() * format.row_bytes(x.dims.cols);
    check::memory(op, memory.len(), at, bytes)?;
    write(x.rows(rows), format, &mut memory[at..at + bytes]);
    Ok(())
}

pub(super) fn upload_rows(
    rows: &HostRows<'_>,
    class: NumericsClass,
    first_row: usize,
    y: &mut Rows,
) -> Result<(), OpsError> {
    check::upload_rows("upload_rows", rows, class, first_row, y.dims())?;
    for row in 0..rows.rows {
        let (data, scales) = check::host_row(rows, row);
        check::decode_row(rows.format, data, scales, y.values.row_mut(first_row + row));
        if let Some((codes, own)) = y.coded_mut(first_row + row) {
            codes.copy_from_slice(data);
            for (own, bytes) in own.iter_mut().zip(scales.as_chunks::<4>().0) {
                *own = f32::from_le_bytes(*bytes);
            }
        }
    }
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(super) fn kv_read(
    cache: &KvCache,
    class: NumericsClass,
    layer: usize,
    table: &[PageId],
    first: Position,
    count: usize,
    memory: &mut [u8],
    at: usize,
) -> Result<(), OpsError> {
    let (op, format) = ("kv_read", RowFormat::combine(class));
    let width = format.row_bytes(cache.layout.kv_lora_rank + cache.layout.qk_rope_head_dim);
    check::index(op, "layer", layer, cache.layout.layers)?;
    check::pages(op, &cache.layout, table, first, count)?;
    check::memory(op, memory.len(), at, check::product(op, count, width)?)?;
    for i in 0..count {
        let to = &mut memory[at + i * width..at + (i + 1) * width];
        write(cache.row(layer, table, first as usize + i), format, to);
    }
    Ok(())
}

pub(super) fn kv_write(
    cache: &mut KvCache,
    class: NumericsClass,
    layer: usize,
    table: &[PageId],
    first: Position,
    count: usize,
    rows: &[u8],
) -> Result<(), OpsError> {
    let (op, format) = ("kv_write", RowFormat::combine(class));
    let width = cache.layout.kv_lora_rank + cache.layout.qk_rope_head_dim;
    check::index(op, "layer", layer, cache.layout.layers)?;
    check::pages(op, &cache.layout, table, first, count)?;
    check::equal(op, "bytes of rows", rows.len(), check::product(op, count, format.row_bytes(width))?)?;
    for i in 0..count {
        let bytes = &rows[i * format.row_bytes(width)..(i + 1) * format.row_bytes(width)];
        check::decode_row(format, bytes, &[], cache.row_mut(layer, table, first as usize + i));
    }
    Ok(())
}
