//! Multi-head latent attention: rotation, the cached row, the naive and the absorbed form.

use cadre_numerics::{
    linear::{self, Blocks},
    norm, reduce, rope,
    softmax::{self, State},
};
use cadre_types::{PageId, Position};

use super::{Buffer, KvCache, KvUp, ReferenceBackend};
use crate::{
    backend::OpsError,
    check,
    shape::{AttentionShape, DecodeRow, PrefillSegment},
};

/// Rotates the pairs of `x` (one rotary part) for a position.
fn rotate(backend: &ReferenceBackend, shape: &AttentionShape, position: Position, x: &mut [f32]) {
    for (pair, inv_freq) in x.as_chunks_mut::<2>().0.iter_mut().zip(&shape.inv_freq) {
        let (cos, sin) = rope::table_entry(position, *inv_freq, shape.rope_magnitude);
        let (a, b) = rope::rotate(pair[0], pair[1], cos, sin);
        *pair = [backend.round(a), backend.round(b)];
    }
}

pub(super) fn rope_query(
    backend: &ReferenceBackend,
    shape: &AttentionShape,
    positions: &[Position],
    q: &mut Buffer,
) -> Result<(), OpsError> {
    let (op, head) = ("rope_query", shape.nope + shape.rope);
    check::equal(op, "columns of q", q.dims.cols, shape.heads * head)?;
    check::at_least(op, "row capacity of q", q.dims.rows, positions.len())?;
    for position in positions {
        check::index(op, "position", *position as usize, shape.max_positions)?;
    }
    for (row, position) in positions.iter().enumerate() {
        for head in q.row_mut(row).chunks_exact_mut(head) {
            rotate(backend, shape, *position, &mut head[shape.nope..]);
        }
    }
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(super) fn kv_append(
    backend: &ReferenceBackend,
    shape: &AttentionShape,
    kv_a: &Buffer,
    norm: &[f32],
    eps: f32,
    positions: &[Position],
    tables: &[&[PageId]],
    layer: usize,
    cache: &mut KvCache,
) -> Result<(), OpsError> {
    let op = "kv_append";
    check::cache(op, shape, &cache.layout, layer)?;
    check::equal(op, "columns of kv_a", kv_a.dims.cols, shape.kv_lora + shape.rope)?;
    check::equal(op, "entries of the norm", norm.len(), shape.kv_lora)?;
    check::equal(op, "block tables", tables.len(), positions.len())?;
    check::at_least(op, "row capacity of kv_a", kv_a.dims.rows, positions.len())?;
    for (position, table) in positions.iter().zip(tables) {
        check::index(op, "position", *position as usize, shape.max_positions)?;
        check::pages(op, &cache.layout, table, *position, 1)?;
    }
    for (row, (position, table)) in positions.iter().zip(tables).enumerate() {
        let (c_raw, k_pe) = kv_a.row(row).split_at(shape.kv_lora);
        let cached = cache.row_mut(layer, table, *position as usize);
        let (c, k) = cached.split_at_mut(shape.kv_lora);
        let inverse = norm::inverse_rms(c_raw, eps);
        for ((c, x), w) in c.iter_mut().zip(c_raw).zip(norm) {
            *c = backend.round(norm::scaled(*x, inverse, *w));
        }
        k.copy_from_slice(k_pe);
        rotate(backend, shape, *position, k);
    }
    Ok(())
}

/// One (row, head): keys and values of positions `0..keys` through the online softmax, in F32.
fn attend<'a>(
    scale: f32,
    q: &[f32],
    keys: usize,
    key: impl Fn(usize) -> &'a [f32],
    value: impl Fn(usize) -> &'a [f32],
    width: usize,
) -> Vec<f32> {
    let mut state = State::START;
    let mut o = vec![0.0_f32; width];
    for first in (0..keys).step_by(softmax::KEYS) {
        let count = softmax::KEYS.min(keys - first);
        let mut p: Vec<f32> = (first..first + count).map(|j| reduce::dot(q, key(j)) * scale).collect();
        let alpha = state.block(&mut p);
        for (d, o) in o.iter_mut().enumerate() {
            *o = softmax::accumulate(*o, alpha, &p, |j| value(first + j)[d]);
        }
    }
    let inverse = state.inverse();
    o.iter().map(|o| o * inverse).collect()
}

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(super) fn prefill(
    backend: &ReferenceBackend,
    shape: &AttentionShape,
    kv_up: &KvUp,
    q: &Buffer,
    segments: &[PrefillSegment<'_>],
    layer: usize,
    cache: &KvCache,
    out: &mut Buffer,
) -> Result<(), OpsError> {
    let op = "attention_prefill";
    check::cache(op, shape, &cache.layout, layer)?;
    check::attention_io(op, shape, q.dims, out.dims)?;
    check_kv_up(op, shape, kv_up)?;
    check::segments(op, shape, &cache.layout, segments, q.dims.rows.min(out.dims.rows))?;
    let (width, blocks) = (shape.nope + shape.rope, Blocks::aligned(shape.kv_lora));
    for segment in segments.iter().filter(|segment| segment.rows > 0) {
        let end = segment.first_position as usize + segment.rows;
        for head in 0..shape.heads {
            let first = head * (shape.nope + shape.v);
            let expand = |c: &[f32], rows: std::ops::Range<usize>| -> Vec<f32> {
                rows.map(|n| kv_up.weight.output(first + n, c, blocks, |_| 1.0)).collect()
            };
            let (mut keys, mut values) = (Vec::with_capacity(end), Vec::with_capacity(end));
            for position in 0..end {
                let (c, k_pe) = cache.row(layer, segment.block_table, position).split_at(shape.kv_lora);
                let mut key = expand(c, 0..shape.nope);
                key.extend_from_slice(k_pe);
                keys.push(key);
                values.push(expand(c, shape.nope..shape.nope + shape.v));
            }
            for i in 0..segment.rows {
                let row = segment.first_row + i;
                let seen = segment.first_position as usize + i + 1;
                let q = &q.row(row)[head * width..(head + 1) * width];
                let scale = shape.softmax_scale;
                let o = attend(scale, q, seen, |j| &keys[j], |j| &values[j], shape.v);
                let out = &mut out.row_mut(row)[head * shape.v..(head + 1) * shape.v];
                out.iter_mut().zip(o).for_each(|(out, o)| *out = backend.round(o));
            }
        }
    }
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(super) fn decode(
    backend: &ReferenceBackend,
    shape: &AttentionShape,
    kv_up: &KvUp,
    q: &Buffer,
    rows: &[DecodeRow<'_>],
    layer: usize,
    cache: &KvCache,
    out: &mut Buffer,
) -> Result<(), OpsError> {
    let op = "attention_decode";
    check::cache(op, shape, &cache.layout, layer)?;
    check::attention_io(op, shape, q.dims, out.dims)?;
    check_kv_up(op, shape, kv_up)?;
    check::decode_rows(op, shape, &cache.layout, rows, q.dims.rows.min(out.dims.rows))?;
    let width = shape.nope + shape.rope;
    for row in rows {
        let seen = row.position as usize + 1;
        for head in 0..shape.heads {
            let first = head * (shape.nope + shape.v);
            let (q_nope, q_pe) = q.row(row.row)[head * width..(head + 1) * width].split_at(shape.nope);
            let mut query = absorb(kv_up, first, q_nope, shape.kv_lora);
            query.extend_from_slice(q_pe);
            let key = |j| cache.row(layer, row.block_table, j);
            let o = attend(shape.softmax_scale, &query, seen, key, key, shape.kv_lora);
            let blocks = Blocks::aligned(shape.kv_lora);
            for d in 0..shape.v {
                let value = kv_up.weight.output(first + shape.nope + d, &o, blocks, |_| 1.0);
                out.row_mut(row.row)[head * shape.v + d] = backend.round(value);
            }
        }
    }
    Ok(())
}

/// `q_lat[c] = sum over d of q_nope[d] * W_UK[d][c]`: the reduction runs along rows `first..` of kv_b, so
/// its blocks end where kv_b's row blocks end.
fn absorb(kv_up: &KvUp, first: usize, q_nope: &[f32], kv_lora: usize) -> Vec<f32> {
    let weight = &kv_up.weight;
    let blocks = Blocks { len: q_nope.len(), phase: first % cadre_numerics::BLOCK };
    (0..kv_lora)
        .map(|c| {
            let scale = |block: usize| weight.scale(first + blocks.range(block).start, c);
            linear::output(q_nope, blocks, |d| weight.value(first + d, c), scale)
        })
        .collect()
}

fn check_kv_up(op: &'static str, shape: &AttentionShape, kv_up: &KvUp) -> Result<(), OpsError> {
    let dims = kv_up.weight.dims;
    check::equal(op, "rows of kv_b", dims.rows, shape.heads * (shape.nope + shape.v))?;
    check::equal(op, "columns of kv_b", dims.cols, shape.kv_lora)
}
