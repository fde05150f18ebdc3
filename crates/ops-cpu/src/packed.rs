//! Packed matrices: panels of 16 outputs, `k` outermost, four `k` interleaved.
//!
//! A panel holds the weights of 16 outputs (missing ones are zero). Four panels make a group, and a group is
//! stored block after block of the reduction: the first 128 `k` of its four panels, the next 128 of the four,
//! and so on, because that is the order in which a task reads them. Inside a block come quads of
//! consecutive `k`:
//!
//! | format | a quad | bytes |
//! |---|---|---|
//! | e4m3 | `w[0][k..k+4] w[1][k..k+4] ...` | 64 |
//! | BF16 | `w[0][k..k+2] w[1][k..k+2] ...`, then the same of `k+2` | 128 |
//! | F32 | 16 of `k`, 16 of `k+1`, 16 of `k+2`, 16 of `k+3` | 256 |
//!
//! so that a 32-bit lane holds the codes of one output and two or three cheap operations on a whole register
//! give 16 outputs of one `k`. A block whose length is no multiple of 4 ends in a quad whose rest is not used.
//! Scales (e4m3 only, times 2^8) are one per panel and block, or 16 where a panel straddles two rows of
//! 128x128 blocks.
//!
//! gate_proj and up_proj are one matrix whose panels alternate (gate, up), so that one task has both halves
//! of the same 16 inner channels.

use cadre_numerics::{BLOCK, bf16, e4m3, linear::Blocks, quant};
use cadre_ops::{ElementType, HostMatrix, MatrixData, OpsError, check::Dims};
use cadre_types::config::ScaleFormat;

use crate::{lanes::LANES, memory::Aligned, pool::Pool};

/// Element type of packed weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    E4m3,
    Bf16,
    F32,
}

impl Format {
    /// Bytes of four `k` in a panel.
    pub(crate) const fn quad_bytes(self) -> usize {
        match self {
            Self::E4m3 => 4 * LANES,
            Self::Bf16 => 8 * LANES,
            Self::F32 => 16 * LANES,
        }
    }

    /// Byte offset in a quad of the weight of `lane` at step `i` of the quad.
    const fn offset(self, lane: usize, i: usize) -> usize {
        match self {
            Self::E4m3 => 4 * lane + i,
            Self::Bf16 => (i / 2 * LANES + lane) * 4 + i % 2 * 2,
            Self::F32 => (i * LANES + lane) * 4,
        }
    }

    fn of(data: &MatrixData<'_>) -> Self {
        data.element_type().into()
    }
}

impl From<ElementType> for Format {
    fn from(elements: ElementType) -> Self {
        match elements {
            ElementType::F32 => Self::F32,
            ElementType::Bf16 => Self::Bf16,
            ElementType::E4m3 => Self::E4m3,
        }
    }
}

/// Bytes of `panels` panels over `cols` of the reduction, scales of whole panels included.
pub(crate) fn packed_bytes(elements: ElementType, panels: usize, cols: usize) -> u64 {
    let (format, blocks) = (Format::from(elements), Blocks::aligned(cols));
    let scales = if format == Format::E4m3 { 4 * blocks.count() } else { 0 };
    panels as u64 * (quads(blocks, blocks.count()) * format.quad_bytes() + scales) as u64
}

/// Panels of a group.
pub(crate) const GROUP: usize = 4;

/// How panels map to outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrangement {
    /// Panel `p` holds outputs `16 p ..`.
    Plain,
    /// Panels alternate between gate_proj and up_proj.
    GateUp,
}

/// A matrix in panels.
#[derive(Debug)]
pub struct Weight {
    /// Outputs (of one half for gate and up) and length of the reduction.
    pub(crate) dims: Dims,
    pub(crate) format: Format,
    pub(crate) arrangement: Arrangement,
    pub(crate) blocks: Blocks,
    pub(crate) panels: usize,
    /// Bytes of one panel.
    pub(crate) panel_bytes: usize,
    pub(crate) data: Aligned<u8>,
    /// e4m3 only: `[panels, blocks]`, or `[panels, blocks, 16]` with `lane_scales`.
    pub(crate) scales: Aligned<f32>,
    pub(crate) lane_scales: bool,
    /// Whether scales of a quantised input are powers of two.
    pub(crate) powers_of_two: bool,
}

/// One output of a packed matrix: where its weights come from.
struct Output<'a, 'm> {
    matrix: &'m HostMatrix<'a>,
    /// Which line of the matrix it is.
    line: usize,
    /// Whether a line is a row (the reduction runs over columns) or a column (over rows `first_row..`).
    transposed: Option<usize>,
}

impl Output<'_, '_> {
    /// Index of element `k` of the reduction in the matrix's data.
    fn element(&self, k: usize) -> usize {
        match self.transposed {
            None => self.line * self.matrix.cols + k,
            Some(first_row) => (first_row + k) * self.matrix.cols + self.line,
        }
    }

    /// Folded scale of element `k`.
    fn scale(&self, k: usize) -> f32 {
        let MatrixData::E4m3 { scales, .. } = self.matrix.data else { return 1.0 };
        let (row, col) = match self.transposed {
            None => (self.line, k),
            Some(first_row) => (first_row + k, self.line),
        };
        scales[row / BLOCK * quant::blocks(self.matrix.cols) + col / BLOCK] * e4m3::FOLD
    }
}

impl Weight {
    /// Packs whole rows. The matrix was checked by [`cadre_ops::check::matrix`].
    pub(crate) fn pack(op: &'static str, pool: &Pool, matrix: &HostMatrix<'_>) -> Result<Self, OpsError> {
        Self::pack_rows(op, pool, matrix, 0, matrix.rows)
    }

    /// Packs rows `first..first + rows` of a matrix.
    pub(crate) fn pack_rows(
        op: &'static str,
        pool: &Pool,
        matrix: &HostMatrix<'_>,
        first: usize,
        rows: usize,
    ) -> Result<Self, OpsError> {
        let output = |panel: usize, lane: usize| {
            let n = panel * LANES + lane;
            (n < rows).then_some(Output { matrix, line: first + n, transposed: None })
        };
        let dims = Dims { rows, cols: matrix.cols };
        let blocks = Blocks::aligned(matrix.cols);
        let panels = rows.div_ceil(LANES);
        Self::fill(op, pool, dims, blocks, panels, Arrangement::Plain, &output)
    }

    /// Packs the transpose of rows `first..first + rows`: outputs are columns, the reduction runs over the
    /// rows and its blocks end where the matrix's row blocks end.
    pub(crate) fn pack_transposed(
        op: &'static str,
        pool: &Pool,
        matrix: &HostMatrix<'_>,
        first: usize,
        rows: usize,
    ) -> Result<Self, OpsError> {
        let output = |panel: usize, lane: usize| {
            let n = panel * LANES + lane;
            (n < matrix.cols).then_some(Output { matrix, line: n, transposed: Some(first) })
        };
        let dims = Dims { rows: matrix.cols, cols: rows };
        let blocks = Blocks { len: rows, phase: first % BLOCK };
        let panels = matrix.cols.div_ceil(LANES);
        Self::fill(op, pool, dims, blocks, panels, Arrangement::Plain, &output)
    }

    /// Packs gate_proj and up_proj (equal shapes and element types) with alternating panels.
    pub(crate) fn pack_gate_up(
        op: &'static str,
        pool: &Pool,
        gate: &HostMatrix<'_>,
        up: &HostMatrix<'_>,
    ) -> Result<Self, OpsError> {
        let output = |panel: usize, lane: usize| {
            let line = panel / 2 * LANES + lane;
            let matrix = if panel.is_multiple_of(2) { gate } else { up };
            (line < gate.rows).then_some(Output { matrix, line, transposed: None })
        };
        let dims = Dims { rows: gate.rows, cols: gate.cols };
        let blocks = Blocks::aligned(gate.cols);
        let panels = 2 * gate.rows.div_ceil(LANES);
        Self::fill(op, pool, dims, blocks, panels, Arrangement::GateUp, &output)
    }

    fn fill<'a: 'm, 'm>(
        op: &'static str,
        pool: &Pool,
        dims: Dims,
        blocks: Blocks,
        panels: usize,
        arrangement: Arrangement,
        output: &(dyn Fn(usize, usize) -> Option<Output<'a, 'm>> + Sync),
    ) -> Result<Self, OpsError> {
        let Some(first) = output(0, 0) else {
            return Self::empty(op, dims, blocks, arrangement);
        };
        let format = Format::of(&first.matrix.data);
        let panel_bytes = quads(blocks, blocks.count()) * format.quad_bytes();
        let mut data = Aligned::zeroed(op, panels * panel_bytes)?;
        let lane_scales = format == Format::E4m3 && (0..panels).any(|p| straddles(output, p));
        let per_panel = match (format, lane_scales) {
            (Format::E4m3, true) => blocks.count() * LANES,
            (Format::E4m3, false) => blocks.count(),
            (Format::Bf16 | Format::F32, _) => 0,
        };
        let mut scales = Aligned::zeroed(op, panels * per_panel)?;
        if panel_bytes > 0 {
            let groups: Vec<_> = data.chunks_mut(GROUP * panel_bytes).map(std::sync::Mutex::new).collect();
            // About a nanosecond per element.
            let cost_ns = (panels * LANES * dims.cols) as u64;
            pool.run(groups.len(), cost_ns, &|group, _| {
                // Each group is one task's, so the lock is never contended; it only proves that.
                if let Ok(mut bytes) = groups[group].lock() {
                    let here = GROUP.min(panels - group * GROUP);
                    for lane in 0..here * LANES {
                        let (n, lane) = (lane / LANES, lane % LANES);
                        if let Some(output) = output(group * GROUP + n, lane) {
                            write_lane(&mut bytes, (n, here), lane, &output, blocks);
                        }
                    }
                }
            });
        }
        if per_panel > 0 {
            for (panel, scales) in scales.chunks_mut(per_panel).enumerate() {
                let lanes = if lane_scales { LANES } else { 1 };
                for (i, scale) in scales.iter_mut().enumerate() {
                    let k = blocks.range(i / lanes).start;
                    *scale = output(panel, i % lanes).map_or(0.0, |output| output.scale(k));
                }
            }
        }
        let powers_of_two =
            matches!(first.matrix.data, MatrixData::E4m3 { input_scales: ScaleFormat::Ue8m0, .. });
        Ok(Self {
            dims,
            format,
            arrangement,
            blocks,
            panels,
            panel_bytes,
            data,
            scales,
            lane_scales,
            powers_of_two,
        })
    }

    fn empty(
        op: &'static str,
        dims: Dims,
        blocks: Blocks,
        arrangement: Arrangement,
    ) -> Result<Self, OpsError> {
        Ok(Self {
            dims,
            format: Format::F32,
            arrangement,
            blocks,
            panels: 0,
            panel_bytes: 0,
            data: Aligned::zeroed(op, 0)?,
            scales: Aligned::zeroed(op, 0)?,
            lane_scales: false,
            powers_of_two: false,
        })
    }

    /// Byte offset of one panel's part of one block.
    pub(crate) fn offset(&self, panel: usize, block: usize) -> usize {
        let group = panel / GROUP * GROUP;
        let here = GROUP.min(self.panels - group);
        let quad = self.format.quad_bytes();
        let before = quads(self.blocks, block) * quad;
        let own = self.blocks.range(block).len().div_ceil(4) * quad;
        group * self.panel_bytes + before * here + (panel - group) * own
    }

    /// Whether inputs are quantised in class fp8.
    pub(crate) fn is_e4m3(&self) -> bool {
        self.format == Format::E4m3
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.data.len() + self.scales.len() * size_of::<f32>()
    }

    /// Row `n` of a plain matrix, exact (e4m3: code x scale, rounded once).
    pub(crate) fn read_row(&self, n: usize, out: &mut [f32]) {
        let (panel, lane) = (n / LANES, n % LANES);
        for block in 0..self.blocks.count() {
            let bytes = &self.data[self.offset(panel, block)..];
            let scale = self.scale(panel, block, lane);
            for (i, value) in out[self.blocks.range(block)].iter_mut().enumerate() {
                let quad = &bytes[i / 4 * self.format.quad_bytes()..];
                *value = read_element(self.format, quad, lane, i % 4) * scale;
            }
        }
    }

    fn scale(&self, panel: usize, block: usize, lane: usize) -> f32 {
        let index = panel * self.blocks.count() + block;
        match (self.format, self.lane_scales) {
            (Format::E4m3, true) => self.scales[index * LANES + lane],
            (Format::E4m3, false) => self.scales[index],
            (Format::Bf16 | Format::F32, _) => 1.0,
        }
    }
}

/// Whether the outputs of a panel do not share their scales.
fn straddles<'a: 'm, 'm>(
    output: &(dyn Fn(usize, usize) -> Option<Output<'a, 'm>> + Sync),
    panel: usize,
) -> bool {
    let block = |lane| output(panel, lane).map(|output| output.line / BLOCK);
    let first = block(0);
    (1..LANES).filter_map(block).any(|other| Some(other) != first)
}

/// Quads of one panel in the blocks before the given one.
fn quads(blocks: Blocks, before: usize) -> usize {
    (0..before).map(|block| blocks.range(block).len().div_ceil(4)).sum()
}

/// Writes one output's weights into its group: panel `n` of the `here` that the group has.
fn write_lane(
    group: &mut [u8],
    (n, here): (usize, usize),
    lane: usize,
    output: &Output<'_, '_>,
    blocks: Blocks,
) {
    let format = Format::of(&output.matrix.data);
    let mut at = 0;
    for block in 0..blocks.count() {
        let range = blocks.range(block);
        let bytes = range.len().div_ceil(4) * format.quad_bytes();
        let panel = &mut group[at + n * bytes..at + (n + 1) * bytes];
        for (i, k) in range.enumerate() {
            let element = output.element(k);
            let to = i / 4 * format.quad_bytes() + format.offset(lane, i % 4);
            match output.matrix.data {
                MatrixData::E4m3 { codes, .. } => panel[to] = codes[element],
                MatrixData::Bf16(from) => {
                    panel[to..to + 2].copy_from_slice(&from[element * 2..element * 2 + 2]);
                }
                MatrixData::F32(from) => {
                    panel[to..to + 4].copy_from_slice(&from[element * 4..element * 4 + 4]);
                }
            }
        }
        at += here * bytes;
    }
}

fn read_element(format: Format, quad: &[u8], lane: usize, i: usize) -> f32 {
    let at = format.offset(lane, i);
    match format {
        Format::E4m3 => e4m3::decode(quad[at]) / e4m3::FOLD,
        Format::Bf16 => bf16::decode(u16::from_le_bytes([quad[at], quad[at + 1]])),
        Format::F32 => f32::from_le_bytes([quad[at], quad[at + 1], quad[at + 2], quad[at + 3]]),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn e4m3<'a>(codes: &'a [u8], scales: &'a [f32]) -> MatrixData<'a> {
        MatrixData::E4m3 { codes, scales, block: MatrixData::BLOCK, input_scales: ScaleFormat::F32 }
    }

    fn pool() -> Pool {
        Pool::new(1, std::time::Duration::ZERO).unwrap()
    }

    #[test]
    fn rows_come_back_as_they_went_in() {
        for (rows, cols) in [(1, 1), (16, 128), (17, 129), (130, 257), (3, 0)] {
            let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32).sin()).collect();
            let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let bf16s: Vec<u8> = values.iter().flat_map(|v| bf16::encode(*v).to_le_bytes()).collect();
            let codes: Vec<u8> = values.iter().map(|v| e4m3::encode(*v)).collect();
            let blocks = quant::blocks(rows) * quant::blocks(cols);
            let scales: Vec<f32> = (0..blocks).map(|i| 0.5 + i as f32).collect();
            let e4m3s = e4m3(&codes, &scales);
            for data in [MatrixData::F32(&f32s), MatrixData::Bf16(&bf16s), e4m3s] {
                let matrix = HostMatrix { rows, cols, data };
                let packed = Weight::pack("test", &pool(), &matrix).unwrap();
                let mut row = vec![0.0; cols];
                for n in 0..rows {
                    packed.read_row(n, &mut row);
                    for (k, got) in row.iter().enumerate() {
                        let i = n * cols + k;
                        let expected = match data {
                            MatrixData::F32(_) => values[i],
                            MatrixData::Bf16(_) => bf16::round(values[i]),
                            MatrixData::E4m3 { .. } => {
                                let scale = scales[n / 128 * quant::blocks(cols) + k / 128];
                                e4m3::round(values[i]) * scale
                            }
                        };
                        assert_eq!(*got, expected, "{n} {k}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_slice_that_straddles_scale_rows_has_a_scale_per_lane() {
        let (rows, cols) = (260, 100);
        let codes = vec![e4m3::encode(1.0); rows * cols];
        let data = e4m3(&codes, &[1.0, 2.0, 3.0]);
        let matrix = HostMatrix { rows, cols, data };
        let packed = Weight::pack_rows("test", &pool(), &matrix, 120, 20).unwrap();
        assert!(packed.lane_scales);
        let mut row = vec![0.0; cols];
        packed.read_row(7, &mut row);
        assert_eq!(row[0], 1.0);
        packed.read_row(8, &mut row);
        assert_eq!(row[0], 2.0);
        let packed = Weight::pack_rows("test", &pool(), &matrix, 128, 128).unwrap();
        assert!(!packed.lane_scales);
        assert_eq!(packed.bytes(), 128 * 100 + 8 * 4);
    }

    #[test]
    fn a_transpose_ends_its_blocks_with_the_row_blocks() {
        let (rows, cols) = (200, 20);
        let codes: Vec<u8> = (0..rows * cols).map(|i| (i % 100) as u8).collect();
        let data = e4m3(&codes, &[1.0, 2.0]);
        let matrix = HostMatrix { rows, cols, data };
        let packed = Weight::pack_transposed("test", &pool(), &matrix, 100, 64).unwrap();
        assert_eq!(packed.dims, Dims { rows: cols, cols: 64 });
        assert_eq!(packed.blocks.count(), 2);
        let mut line = vec![0.0; 64];
        packed.read_row(19, &mut line);
        for (k, got) in line.iter().enumerate() {
            let row = 100 + k;
            let scale = if row < 128 { 1.0 } else { 2.0 };
            assert_eq!(*got, e4m3::decode(codes[row * cols + 19]) * scale);
        }
    }
}
