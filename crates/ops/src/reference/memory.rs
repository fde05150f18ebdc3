//! What the reference keeps, and transfers to and from the host.

use cadre_numerics::{
    bf16, e4m3,
    linear::{self, Blocks},
    quant,
};
use cadre_types::{NumericsClass, PageId, Position};

use crate::{
    backend::OpsError,
    check::{self, Dims},
    host::{HostMatrix, HostRows, MatrixData, RowFormat},
    shape::KvLayout,
};

/// Activations `[rows, cols]`, row-major.
#[derive(Clone, Debug)]
pub struct Buffer {
    pub(super) dims: Dims,
    data: Vec<f32>,
    /// Codes and scales of the leading `coded_rows` rows, as they arrived.
    codes: Vec<u8>,
    scales: Vec<f32>,
    coded_rows: usize,
}

impl Buffer {
    pub(super) fn new(dims: Dims) -> Self {
        let data = vec![0.0; dims.rows * dims.cols];
        Self { dims, data, codes: Vec::new(), scales: Vec::new(), coded_rows: 0 }
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.dims.cols..(row + 1) * self.dims.cols]
    }

    /// A row to be written; the buffer forgets codes.
    pub(super) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        self.coded_rows = 0;
        &mut self.data[row * self.dims.cols..(row + 1) * self.dims.cols]
    }

    /// Codes and scales of a row, if it arrived with them.
    pub(super) fn coded(&self, row: usize) -> Option<(&[u8], &[f32])> {
        let (cols, blocks) = (self.dims.cols, quant::blocks(self.dims.cols));
        (row < self.coded_rows).then(|| {
            (&self.codes[row * cols..(row + 1) * cols], &self.scales[row * blocks..(row + 1) * blocks])
        })
    }

    /// Attaches codes and scales of the leading rows.
    pub(super) fn set_coded(&mut self, rows: usize, codes: Vec<u8>, scales: Vec<f32>) {
        (self.coded_rows, self.codes, self.scales) = (rows, codes, scales);
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
}

impl Weight {
    pub(super) fn new(matrix: &HostMatrix<'_>) -> Self {
        let dims = Dims { rows: matrix.rows, cols: matrix.cols };
        let (values, scales) = match matrix.data {
            MatrixData::F32(bytes) => {
                (bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(), None)
            }
            MatrixData::Bf16(bytes) => {
                let codes = bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
                (codes.map(bf16::decode).collect(), None)
            }
            MatrixData::E4m3 { codes, scales } => (
                codes.iter().map(|code| e4m3::decode(*code) / e4m3::FOLD).collect(),
                Some(scales.iter().map(|scale| scale * e4m3::FOLD).collect()),
            ),
        };
        Self { dims, values, scales }
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

fn encode(values: &[f32], format: RowFormat, data: &mut Vec<u8>) {
    match format {
        RowFormat::F32 => data.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        RowFormat::Bf16 => data.extend(values.iter().flat_map(|v| bf16::encode(*v).to_le_bytes())),
        RowFormat::E4m3 => {}
    }
}

pub(super) fn download_rows(
    x: &Buffer,
    rows: usize,
    format: RowFormat,
    data: &mut Vec<u8>,
    scales: &mut Vec<u8>,
) -> Result<(), OpsError> {
    check::at_least("download_rows", "row capacity of x", x.dims.rows, rows)?;
    data.clear();
    scales.clear();
    for row in 0..rows {
        if format != RowFormat::E4m3 {
            encode(x.row(row), format, data);
            continue;
        }
        let mut own = (vec![0; x.dims.cols], vec![0.0; quant::blocks(x.dims.cols)]);
        let (codes, s) = x.coded(row).unwrap_or_else(|| {
            quant::row(x.row(row), &mut own.0, &mut own.1);
            (&own.0, &own.1)
        });
        data.extend_from_slice(codes);
        encode(s, RowFormat::F32, scales);
    }
    Ok(())
}

pub(super) fn upload_rows(rows: &HostRows<'_>, y: &mut Buffer) -> Result<(), OpsError> {
    let op = "upload_rows";
    check::host_rows(op, rows)?;
    check::equal(op, "columns of y", y.dims.cols, rows.cols)?;
    check::at_least(op, "row capacity of y", y.dims.rows, rows.rows)?;
    for row in 0..rows.rows {
        let (data, scales) = check::host_row(rows, row);
        check::decode_row(rows.format, data, scales, y.row_mut(row));
    }
    y.coded_rows = 0;
    if rows.format == RowFormat::E4m3 {
        let scales = rows.scales.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        y.set_coded(rows.rows, rows.data.to_vec(), scales.collect());
    }
    Ok(())
}

pub(super) fn kv_read(
    cache: &KvCache,
    class: NumericsClass,
    layer: usize,
    table: &[PageId],
    first: Position,
    count: usize,
    out: &mut Vec<u8>,
) -> Result<(), OpsError> {
    check::index("kv_read", "layer", layer, cache.layout.layers)?;
    check::pages("kv_read", &cache.layout, table, first, count)?;
    for position in first as usize..first as usize + count {
        encode(cache.row(layer, table, position), RowFormat::combine(class), out);
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
