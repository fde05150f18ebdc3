//! Validation that every backend shares, so that a bad call is refused with the same words on each and
//! kernels may rely on shapes without looking again.

use cadre_numerics::e4m3;
use cadre_types::{NumericsClass, PageId, Position};

use crate::{
    error::OpsError,
    exchange::ExpertRows,
    host::{HostRows, RowFormat},
    shape::{AttentionShape, GateShape, KvLayout},
    step::{PassInfo, StepInfo},
};

mod weights;

pub use weights::{drawn_ffn, drawn_kv_up, drawn_matrix, ffn, finite, kv_up, matrix};

/// Rows and columns of a buffer or a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows (of a buffer: its capacity).
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

/// `found == expected`.
pub fn equal(op: &'static str, what: &'static str, found: usize, expected: usize) -> Result<(), OpsError> {
    if found == expected { Ok(()) } else { Err(OpsError::Shape { op, what, found, expected }) }
}

/// `found >= needed`, for capacities.
pub fn at_least(op: &'static str, what: &'static str, found: usize, needed: usize) -> Result<(), OpsError> {
    if found >= needed { Ok(()) } else { Err(OpsError::Shape { op, what, found, expected: needed }) }
}

/// `index < limit`.
pub fn index(op: &'static str, what: &'static str, index: usize, limit: usize) -> Result<(), OpsError> {
    if index < limit { Ok(()) } else { Err(OpsError::Range { op, what, index, limit }) }
}

/// `a * b`, or the refusal of a size that no machine has.
pub fn product(op: &'static str, a: usize, b: usize) -> Result<usize, OpsError> {
    a.checked_mul(b).filter(|n| *n <= isize::MAX as usize / 16).ok_or(OpsError::OutOfMemory {
        op,
        bytes: usize::MAX,
        free: None,
    })
}

/// `x [rows.., w.cols]`, `y [rows.., w.rows]`.
pub fn linear(op: &'static str, x: Dims, w: Dims, rows: usize, y: Dims) -> Result<(), OpsError> {
    equal(op, "columns of x", x.cols, w.cols)?;
    equal(op, "columns of y", y.cols, w.rows)?;
    at_least(op, "row capacity of x", x.rows, rows)?;
    at_least(op, "row capacity of y", y.rows, rows)
}

/// Two buffers of one width that both hold `rows`.
pub fn same_width(op: &'static str, x: Dims, y: Dims, rows: usize) -> Result<(), OpsError> {
    equal(op, "columns of y", y.cols, x.cols)?;
    at_least(op, "row capacity of x", x.rows, rows)?;
    at_least(op, "row capacity of y", y.rows, rows)
}

/// Sizes of encoded rows.
pub fn host_rows(op: &'static str, rows: &HostRows<'_>) -> Result<(), OpsError> {
    product(op, rows.rows, rows.cols)?;
    let bytes = rows.rows * rows.format.row_bytes(rows.cols);
    let scales = rows.rows * rows.format.row_scales(rows.cols) * 4;
    equal(op, "bytes of encoded rows", rows.data.len(), bytes)?;
    equal(op, "bytes of row scales", rows.scales.len(), scales)
}

/// Rows that arrive for rows `first_row..` of a buffer.
pub fn upload_rows(
    op: &'static str,
    rows: &HostRows<'_>,
    class: NumericsClass,
    first_row: usize,
    y: Dims,
) -> Result<(), OpsError> {
    host_rows(op, rows)?;
    if rows.format != RowFormat::dispatch(class) {
        let message =
            format!("rows are {:?}, class {class} takes {:?}", rows.format, RowFormat::dispatch(class));
        return Err(OpsError::Device { op, message });
    }
    equal(op, "columns of y", y.cols, rows.cols)?;
    at_least(op, "row capacity of y", y.rows, first_row.saturating_add(rows.rows))
}

/// An attention shape that kernels can run.
pub fn attention_shape(op: &'static str, shape: &AttentionShape) -> Result<(), OpsError> {
    equal(op, "rope width modulo 2", shape.rope % 2, 0)?;
    equal(op, "entries of inv_freq", shape.inv_freq.len(), shape.rope / 2)?;
    at_least(op, "heads", shape.heads, 1)?;
    at_least(op, "value width", shape.v, 1)?;
    at_least(op, "latent width", shape.kv_lora, 1)?;
    at_least(op, "query width", shape.nope + shape.rope, 1)?;
    finite(op, "inverse frequency", shape.inv_freq.iter().copied())?;
    finite(op, "softmax scale", [shape.softmax_scale, shape.rope_magnitude])
}

/// A cache geometry; returns its elements.
pub fn kv_layout(op: &'static str, layout: &KvLayout) -> Result<usize, OpsError> {
    equal(op, "tokens per page", layout.page_tokens, KvLayout::PAGE_TOKENS)?;
    let rows = product(op, product(op, layout.layers, layout.pages)?, layout.page_tokens)?;
    product(op, rows, layout.kv_lora_rank + layout.qk_rope_head_dim)
}

/// That a cache fits an attention shape and has the layer.
pub fn cache(
    op: &'static str,
    shape: &AttentionShape,
    layout: &KvLayout,
    layer: usize,
) -> Result<(), OpsError> {
    equal(op, "latent width of the cache", layout.kv_lora_rank, shape.kv_lora)?;
    equal(op, "rope width of the cache", layout.qk_rope_head_dim, shape.rope)?;
    index(op, "layer", layer, layout.layers)
}

/// That a block table has pages, inside the pool, for positions `first..first + count`.
pub fn pages(
    op: &'static str,
    layout: &KvLayout,
    table: &[PageId],
    first: Position,
    count: usize,
) -> Result<(), OpsError> {
    if count == 0 {
        return Ok(());
    }
    let start = first as usize / layout.page_tokens;
    let end = (first as usize + count - 1) / layout.page_tokens;
    index(op, "page of the block table", end, table.len())?;
    table[start..=end].iter().try_for_each(|page| index(op, "page", page.index(), layout.pages))
}

/// A range of bytes in host memory.
pub fn memory(op: &'static str, len: usize, at: usize, bytes: usize) -> Result<(), OpsError> {
    at_least(op, "bytes of host memory", len, at.saturating_add(bytes))
}

/// A range of rows of a buffer.
pub fn rows(op: &'static str, x: Dims, rows: &std::ops::Range<usize>) -> Result<(), OpsError> {
    at_least(op, "end of a range of rows after its start", rows.end, rows.start)?;
    at_least(op, "row capacity of x", x.rows, rows.end)
}

/// Values for whole leading rows of a buffer; returns the rows.
pub fn values(op: &'static str, values: usize, y: Dims) -> Result<usize, OpsError> {
    let rows = values / y.cols.max(1);
    equal(op, "values of whole rows", values, rows * y.cols)?;
    at_least(op, "row capacity of y", y.rows, rows)?;
    Ok(rows)
}

/// Embedding of a step.
pub fn embed(op: &'static str, step: &StepInfo, table: Dims, y: Dims) -> Result<(), OpsError> {
    equal(op, "columns of y", y.cols, table.cols)?;
    at_least(op, "row capacity of y", y.rows, step.rows)?;
    match step.ids_end {
        0 => Ok(()),
        end => index(op, "token id", end - 1, table.rows),
    }
}

/// The wanted rows of a step.
pub fn gather_wanted(op: &'static str, step: &StepInfo, x: Dims, y: Dims) -> Result<(), OpsError> {
    equal(op, "columns of y", y.cols, x.cols)?;
    at_least(op, "row capacity of x", x.rows, step.rows)?;
    at_least(op, "row capacity of y", y.rows, step.wanted)
}

/// Two buffers side by side.
pub fn concat(op: &'static str, a: Dims, b: Dims, rows: usize, y: Dims) -> Result<(), OpsError> {
    equal(op, "columns of y", y.cols, a.cols + b.cols)?;
    at_least(op, "row capacity of a", a.rows, rows)?;
    at_least(op, "row capacity of b", b.rows, rows)?;
    at_least(op, "row capacity of y", y.rows, rows)
}

/// Experts of one table have one shape: `(hidden, inner, output)` of each.
pub fn expert_table(
    op: &'static str,
    shapes: impl IntoIterator<Item = (usize, usize, usize)>,
) -> Result<(), OpsError> {
    let mut shapes = shapes.into_iter();
    let Some(first) = shapes.next() else { return Ok(()) };
    shapes.try_for_each(|(hidden, inner, output)| {
        equal(op, "columns of an expert", hidden, first.0)?;
        equal(op, "inner width of an expert", inner, first.1)?;
        equal(op, "rows of an expert", output, first.2)
    })
}

/// Rows of logits to sample from, none twice.
pub fn sample_rows(
    op: &'static str,
    capacity: usize,
    rows: impl IntoIterator<Item = usize>,
) -> Result<(), OpsError> {
    let mut seen = vec![false; capacity];
    rows.into_iter().try_for_each(|row| {
        index(op, "row of logits", row, capacity)?;
        match std::mem::replace(&mut seen[row], true) {
            false => Ok(()),
            true => {
                Err(OpsError::Range { op, what: "row of logits, named twice:", index: row, limit: capacity })
            }
        }
    })
}

/// A pass over experts (of one shape, which the table saw to).
pub fn pass(op: &'static str, pass: &PassInfo, experts: usize, x: Dims, y: Dims) -> Result<(), OpsError> {
    if pass.experts_end > 0 {
        index(op, "expert", pass.experts_end - 1, experts)?;
    }
    at_least(op, "row capacity of x", x.rows, pass.input_end)?;
    at_least(op, "row capacity of y", y.rows, pass.pairs)
}

/// The query and the output of attention.
pub fn attention_io(
    op: &'static str,
    shape: &AttentionShape,
    step: &StepInfo,
    q: Dims,
    out: Dims,
) -> Result<(), OpsError> {
    equal(op, "columns of q", q.cols, shape.heads * (shape.nope + shape.rope))?;
    equal(op, "columns of out", out.cols, shape.heads * shape.v)?;
    at_least(op, "row capacity of q", q.rows, step.rows)?;
    at_least(op, "row capacity of out", out.rows, step.rows)
}

/// A rotation of queries.
pub fn rope_query(
    op: &'static str,
    step: &StepInfo,
    shape: &AttentionShape,
    q: Dims,
) -> Result<(), OpsError> {
    equal(op, "columns of q", q.cols, shape.heads * (shape.nope + shape.rope))?;
    at_least(op, "row capacity of q", q.rows, step.rows)?;
    step_positions(op, step, shape)
}

/// Rows appended to a cache.
pub fn kv_append(
    op: &'static str,
    step: &StepInfo,
    shape: &AttentionShape,
    layout: &KvLayout,
    layer: usize,
    kv_a: Dims,
    norm: usize,
) -> Result<(), OpsError> {
    step_cache(op, step, shape, layout, layer)?;
    equal(op, "columns of kv_a", kv_a.cols, shape.kv_lora + shape.rope)?;
    equal(op, "entries of the norm", norm, shape.kv_lora)?;
    at_least(op, "row capacity of kv_a", kv_a.rows, step.rows)
}

/// That a step's positions are within a shape.
pub fn step_positions(op: &'static str, step: &StepInfo, shape: &AttentionShape) -> Result<(), OpsError> {
    equal(op, "rows of the segments", step.attending, step.rows)?;
    match step.positions_end {
        0 => Ok(()),
        end => index(op, "position", end - 1, shape.max_positions),
    }
}

/// That a step fits a cache.
pub fn step_cache(
    op: &'static str,
    step: &StepInfo,
    shape: &AttentionShape,
    layout: &KvLayout,
    layer: usize,
) -> Result<(), OpsError> {
    cache(op, shape, layout, layer)?;
    step_positions(op, step, shape)?;
    match step.pages_end {
        0 => Ok(()),
        end => index(op, "page", end - 1, layout.pages),
    }
}

/// A gate whose rule can be carried out.
pub fn gate(
    op: &'static str,
    x: Dims,
    weight: Dims,
    bias: usize,
    shape: &GateShape,
    rows: usize,
) -> Result<(), OpsError> {
    equal(op, "columns of x", x.cols, weight.cols)?;
    at_least(op, "row capacity of x", x.rows, rows)?;
    equal(op, "rows of the gate matrix", weight.rows, shape.experts)?;
    equal(op, "entries of the gate bias", bias, shape.experts)?;
    at_least(op, "experts", shape.experts, 1)?;
    at_least(op, "expert ids that fit u16", usize::from(u16::MAX) + 1, shape.experts)?;
    at_least(op, "groups", shape.n_group, 1)?;
    equal(op, "experts modulo groups", shape.experts % shape.n_group, 0)?;
    at_least(op, "groups", shape.n_group, shape.topk_group)?;
    let candidates = shape.topk_group * (shape.experts / shape.n_group);
    at_least(op, "experts in the kept groups", candidates, shape.top_k)
}

/// Inputs of combine: `rows` tokens with `top_k` pairs each, every pair in the chunks exactly once.
pub fn combine(
    op: &'static str,
    experts: &ExpertRows,
    top_k: usize,
    shared: Option<Dims>,
    rows: usize,
    x: Dims,
) -> Result<(), OpsError> {
    let pairs = product(op, rows, top_k)?;
    equal(op, "pairs of the expert rows", experts.pairs, pairs)?;
    equal(op, "columns of the expert rows", experts.hidden, x.cols)?;
    if experts.format == RowFormat::E4m3 {
        let message = "expert rows are e4m3, which has no scales here".to_owned();
        return Err(OpsError::Device { op, message });
    }
    let mut seen = vec![0_u64; pairs.div_ceil(64)];
    let mut found = 0;
    for chunk in &experts.chunks {
        let bytes = product(op, chunk.targets.len(), experts.row_bytes())?;
        equal(op, "bytes of a chunk of expert rows", chunk.rows.len(), bytes)?;
        for target in &chunk.targets {
            let target = *target as usize;
            index(op, "pair of an expert row", target, pairs)?;
            let bit = 1 << (target % 64);
            if seen[target / 64] & bit != 0 {
                return Err(OpsError::Range { op, what: "pair, given twice:", index: target, limit: pairs });
            }
            seen[target / 64] |= bit;
        }
        found += chunk.targets.len();
    }
    equal(op, "expert rows", found, pairs)?;
    at_least(op, "row capacity of x", x.rows, rows)?;
    shared.map_or(Ok(()), |shared| same_width(op, shared, x, rows))
}

/// A routing's room.
pub fn routing(
    op: &'static str,
    capacity: (usize, usize),
    rows: usize,
    top_k: usize,
) -> Result<(), OpsError> {
    equal(op, "experts per row of the routing", capacity.1, top_k)?;
    at_least(op, "row capacity of the routing", capacity.0, rows)
}

/// Encoded rows as (data, scales) of one row; `rows` was checked by [`host_rows`].
pub fn host_row<'a>(rows: &HostRows<'a>, row: usize) -> (&'a [u8], &'a [u8]) {
    let bytes = rows.format.row_bytes(rows.cols);
    let scales = rows.format.row_scales(rows.cols) * 4;
    (&rows.data[row * bytes..(row + 1) * bytes], &rows.scales[row * scales..(row + 1) * scales])
}

/// Decodes one encoded row: exact, except that an e4m3 code times its scale is rounded to F32.
pub fn decode_row(format: RowFormat, data: &[u8], scales: &[u8], out: &mut [f32]) {
    match format {
        RowFormat::F32 => {
            for (value, bytes) in out.iter_mut().zip(data.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        RowFormat::Bf16 => {
            for (value, bytes) in out.iter_mut().zip(data.as_chunks::<2>().0) {
                *value = cadre_numerics::bf16::decode(u16::from_le_bytes(*bytes));
            }
        }
        RowFormat::E4m3 => {
            let blocks = out
                .chunks_mut(cadre_numerics::BLOCK)
                .zip(data.chunks(cadre_numerics::BLOCK))
                .zip(scales.as_chunks::<4>().0);
            for ((values, codes), scale) in blocks {
                let scale = f32::from_le_bytes(*scale);
                for (value, code) in values.iter_mut().zip(codes) {
                    *value = e4m3::decode(*code) * scale;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use cadre_types::config::ScaleFormat;

    use super::*;
    use crate::exchange::ExpertChunk;
    use crate::host::{HostMatrix, MatrixData};

    #[test]
    fn pages_are_checked_for_the_range_asked() {
        let layout = KvLayout { layers: 1, pages: 4, page_tokens: 64, kv_lora_rank: 8, qk_rope_head_dim: 4 };
        let table = [PageId(9), PageId(3)];
        assert_eq!(pages("t", &layout, &table, 64, 64), Ok(()));
        assert!(pages("t", &layout, &table, 63, 1).is_err(), "page 9 is outside the pool");
        assert!(pages("t", &layout, &table, 64, 65).is_err(), "a third page is needed");
        assert_eq!(pages("t", &layout, &[], 7, 0), Ok(()));
    }

    fn e4m3<'a>(codes: &'a [u8], scales: &'a [f32]) -> MatrixData<'a> {
        MatrixData::E4m3 { codes, scales, block: MatrixData::BLOCK, input_scales: ScaleFormat::F32 }
    }

    #[test]
    fn other_block_shapes_are_refused() {
        let data = MatrixData::E4m3 {
            codes: &[0],
            scales: &[1.0],
            block: [64, 128],
            input_scales: ScaleFormat::F32,
        };
        let error = matrix("load", &HostMatrix { rows: 1, cols: 1, data });
        let (what, found) = ("rows of a scale block", 64);
        assert_eq!(error, Err(OpsError::Shape { op: "load", what, found, expected: 128 }));
    }

    #[test]
    fn every_pair_comes_once() {
        let x = Dims { rows: 2, cols: 1 };
        let check = |targets: &[&[u32]]| {
            let chunk = |targets: &&[u32]| ExpertChunk {
                rows: vec![0; targets.len() * 2].into(),
                targets: targets.to_vec(),
            };
            let chunks = targets.iter().map(chunk).collect();
            let experts = ExpertRows { format: RowFormat::Bf16, pairs: 4, hidden: 1, chunks };
            combine("c", &experts, 2, None, 2, x)
        };
        assert_eq!(check(&[&[3, 0], &[1], &[], &[2]]), Ok(()));
        assert!(check(&[&[3, 0], &[1]]).is_err(), "pair 2 is missing");
        assert!(check(&[&[3, 0], &[1, 0]]).is_err(), "pair 0 comes twice");
        assert!(check(&[&[4, 0, 1, 2]]).is_err(), "there is no pair 4");
    }

    #[test]
    fn bad_weights_are_named() {
        let codes = [0_u8, 0x7F];
        let bad = |scales: &[f32]| {
            let data = e4m3(&codes[..1], scales);
            matrix("load", &HostMatrix { rows: 1, cols: 1, data })
        };
        assert_eq!(bad(&[1.0]), Ok(()));
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY, f32::MAX] {
            assert!(matches!(bad(&[scale]), Err(OpsError::BadValue { what: "scale", .. })));
        }
        let data = e4m3(&codes, &[1.0]);
        let error = matrix("load", &HostMatrix { rows: 1, cols: 2, data });
        assert!(matches!(error, Err(OpsError::BadValue { what: "e4m3 code", index: 1, .. })));
    }
}
