//! Multi-head latent attention: rotation, the cached row, the naive and the absorbed form.

use cadre_numerics::{
    linear::{self, Blocks},
    norm, reduce, rope,
    softmax::{self, State},
};
use cadre_types::Position;

use super::{Buffer, KvCache, KvUp, ReferenceBackend};
use crate::{
    check,
    error::OpsError,
    resident::{HostSegment, HostStep},
    shape::AttentionShape,
    step::AttentionForm,
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
    step: &HostStep,
    shape: &AttentionShape,
    q: &mut Buffer,
) -> Result<(), OpsError> {
    let (op, head) = ("rope_query", shape.nope + shape.rope);
    check::rope_query(op, step.info(), shape, q.dims)?;
    for (row, position) in step.positions().iter().enumerate() {
        for head in q.row_mut(row).chunks_exact_mut(head) {
            rotate(backend, shape, *position, &mut head[shape.nope..]);
        }
    }
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(super) fn kv_append(
    backend: &ReferenceBackend,
    step: &HostStep,
    shape: &AttentionShape,
    kv_a: &Buffer,
    norm: &[f32],
    eps: f32,
    layer: usize,
    cache: &mut KvCache,
) -> Result<(), OpsError> {
    check::kv_append("kv_append", step.info(), shape, &cache.layout, layer, kv_a.dims, norm.len())?;
    for segment in step.segments() {
        for i in 0..segment.rows {
            let position = segment.first_position + i as Position;
            let (c_raw, k_pe) = kv_a.row(segment.first_row + i).split_at(shape.kv_lora);
            let cached = cache.row_mut(layer, segment.block_table, position as usize);
            let (c, k) = cached.split_at_mut(shape.kv_lora);
            let inverse = norm::inverse_rms(c_raw, eps);
            for ((c, x), w) in c.iter_mut().zip(c_raw).zip(norm) {
                *c = backend.round(norm::scaled(*x, inverse, *w));
            }
            k.copy_from_slice(k_pe);
            rotate(backend, shape, position, k);
        }
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
pub(super) fn attend_all(
    backend: &ReferenceBackend,
    step: &HostStep,
    shape: &AttentionShape,
    kv_up: &KvUp,
    q: &Buffer,
    layer: usize,
    cache: &KvCache,
    out: &mut Buffer,
) -> Result<(), OpsError> {
    let op = "attend";
    check::step_cache(op, step.info(), shape, &cache.layout, layer)?;
    check::attention_io(op, shape, step.info(), q.dims, out.dims)?;
    check_kv_up(op, shape, kv_up)?;
    for segment in step.segments() {
        match segment.form {
            AttentionForm::Naive => naive(backend, shape, kv_up, q, &segment, layer, cache, out),
            AttentionForm::Absorbed => absorbed(backend, shape, kv_up, q, &segment, layer, cache, out),
        }
    }
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "one segment of the operation")]
fn naive(
    backend: &ReferenceBackend,
    shape: &AttentionShape,
    kv_up: &KvUp,
    q: &Buffer,
    segment: &HostSegment<'_>,
    layer: usize,
    cache: &KvCache,
    out: &mut Buffer,
) {
    let (width, blocks) = (shape.nope + shape.rope, Blocks::aligned(shape.kv_lora));
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

#[allow(clippy::too_many_arguments, reason = "one segment of the operation")]
fn absorbed(
    backend: &ReferenceBackend,
    shape: &AttentionShape,
    kv_up: &KvUp,
    q: &Buffer,
    segment: &HostSegment<'_>,
    layer: usize,
    cache: &KvCache,
    out: &mut Buffer,
) {
    let width = shape.nope + shape.rope;
    for i in 0..segment.rows {
        let row = segment.first_row + i;
        let seen = segment.first_position as usize + i + 1;
        for head in 0..shape.heads {
            let first = head * (shape.nope + shape.v);
            let (q_nope, q_pe) = q.row(row)[head * width..(head + 1) * width].split_at(shape.nope);
            let mut query = absorb(kv_up, first, q_nope, shape.kv_lora);
            query.extend_from_slice(q_pe);
            let key = |j| cache.row(layer, segment.block_table, j);
            let o = attend(shape.softmax_scale, &query, seen, key, key, shape.kv_lora);
            let blocks = Blocks::aligned(shape.kv_lora);
            for d in 0..shape.v {
                let value = kv_up.weight.output(first + shape.nope + d, &o, blocks, |_| 1.0);
                out.row_mut(row)[head * shape.v + d] = backend.round(value);
            }
        }
    }
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
