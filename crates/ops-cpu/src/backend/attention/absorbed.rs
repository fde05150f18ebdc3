//! The absorbed form, in three regions: queries into the latent space, head by head for all rows; attention
//! over cached rows, row by row, all heads of a row sharing its keys; latent outputs through kv_b's value
//! rows, head by head.

use cadre_numerics::softmax;
use cadre_ops::{AttentionShape, OpsError};

use super::{AbsorbedRow, Attention, KvCache, KvUp, Padded, rows_at};
use crate::{
    backend::{Buffer, CpuBackend, CpuQueue, dense::product_ns, transfer::Out},
    kernels::{
        attention::{self as kernel, Block, Seen, State},
        product::{Finish, Product, Rows},
    },
    lanes::LANES,
};

#[allow(clippy::too_many_arguments, reason = "rows of the trait's operation")]
pub(super) fn absorbed(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    attention: &Attention,
    kv_up: &KvUp,
    q: &Buffer,
    rows: &[AbsorbedRow<'_>],
    layer: usize,
    cache: &KvCache,
    out: &mut Buffer,
) -> Result<(), OpsError> {
    let (op, shape) = ("attend", &attention.shape);
    let padded = Padded::of(shape);
    let (heads, count) = (shape.heads, rows.len());
    // Per (row, head): the absorbed query, the latent output, a maximum and a denominator.
    let (query, latent) = (heads * padded.latent_key, heads * padded.latent);
    let scratch = queue.absorbed.floats(op, count * (query + latent + 2 * heads))?;
    let queries = Out(scratch.as_mut_ptr());
    let latents = Out(scratch[count * query..].as_mut_ptr());
    let states = Out(scratch[count * (query + latent)..].as_mut_ptr());
    let per_thread = softmax::KEYS * padded.latent_key;
    let blocks = queue.attention.floats(op, per_thread * backend.threads())?;
    let blocks = Out(blocks.as_mut_ptr());
    queue.rows.clear();
    queue.rows.extend(rows.iter().map(|row| row.row));
    let index = Out(queue.rows.as_mut_ptr());

    // 1. q_lat of every row, head by head.
    let width = shape.nope + shape.rope;
    let input = Out(q.input().base);
    let cost = product_ns(padded.latent / LANES * heads, shape.nope, count);
    backend.pool.run(heads, cost, &|head, _| {
        let weight = &kv_up.heads[head].absorb;
        // SAFETY: the indexed rows exist (checked); this head's part of `queries` is this task's.
        unsafe {
            let from = input.get().add(head * width);
            let x = Rows { base: from, stride: q.dims.cols, index: index.get() };
            let to = rows_at(queries.get().add(head * padded.latent_key), query);
            let product = Product::new(weight, x, to, Finish::Exact);
            (backend.kernels.product)(&product, 0..weight.panels, 0..count);
            for i in 0..count {
                let to = to.row(i).add(shape.kv_lora);
                let q_pe = x.row(i).add(shape.nope);
                kernel::pad(q_pe, shape.rope, to, padded.latent_key - shape.kv_lora);
            }
        }
    });

    // 2. Attention over the cached rows: all heads of a row share its keys. With few rows, heads are split so
    // that every thread has work (each then widens the keys for itself).
    let parts = backend.threads().div_ceil(count.max(1)).min(heads.div_ceil(kernel::QUERIES)).max(1);
    let part = heads.div_ceil(parts);
    let keys: usize = rows.iter().map(|row| row.position + 1).sum();
    let cost = (keys * heads * (padded.latent_key + padded.latent)) as u64 / 40;
    backend.pool.run(count * parts, cost, &|task, thread| {
        let (i, first) = (task / parts, task % parts * part);
        let heads_here = part.min(heads.saturating_sub(first));
        if heads_here == 0 {
            return;
        }
        let row = &rows[i];
        // SAFETY: this thread's block and this (row, heads)' queries, state and outputs are this task's.
        unsafe {
            let at = (i * heads + first) * 2;
            let state = State {
                max: states.get().add(at),
                sum: states.get().add(at + heads_here),
                o: latents.get().add(i * latent + first * padded.latent),
                stride: padded.latent,
            };
            let queries = queries.get().add(i * query + first * padded.latent_key);
            let keys = blocks.get().add(thread * per_thread);
            let seen = row.position + 1;
            heads_of(backend, shape, padded, layer, cache, row, queries, keys, seen, heads_here, &state);
        }
    });

    // 3. Values of the latent outputs, head by head.
    let out_rows = out.output();
    let base = Out(out_rows.base);
    let cost = product_ns(padded.value / LANES * heads, shape.kv_lora, count);
    backend.pool.run(heads, cost, &|head, _| {
        let weight = &kv_up.heads[head].value;
        // SAFETY: this head's columns of the indexed rows of `out` are this task's; rows differ (checked).
        unsafe {
            let x = rows_at(latents.get().add(head * padded.latent), latent);
            let y =
                Rows { base: base.get().add(head * shape.v), stride: out_rows.stride, index: index.get() };
            let product = Product::new(weight, x, y, backend.finish());
            (backend.kernels.product)(&product, 0..weight.panels, 0..count);
        }
    });
    Ok(())
}

/// Some heads of one generated row over its cached keys.
///
/// # Safety
/// `queries` has `count` rows, `keys` holds a block, the state `count` queries; all are the caller's alone.
#[allow(clippy::too_many_arguments, reason = "the state of one task")]
unsafe fn heads_of(
    backend: &CpuBackend,
    shape: &AttentionShape,
    padded: Padded,
    layer: usize,
    cache: &KvCache,
    row: &AbsorbedRow<'_>,
    queries: *const f32,
    keys: *mut f32,
    seen: usize,
    count: usize,
    state: &State,
) {
    let kernels = backend.kernels;
    // SAFETY: the caller's contract; pages of the positions exist (checked).
    unsafe {
        kernel::start(state, count);
        // What no cached element covers must count as zero.
        std::slice::from_raw_parts_mut(keys, softmax::KEYS * padded.latent_key).fill(0.0);
        for block in 0..seen.div_ceil(softmax::KEYS) {
            let here = softmax::KEYS.min(seen - block * softmax::KEYS);
            let page = cache.page(layer, row.block_table, block);
            let width = shape.kv_lora + shape.rope;
            (kernels.widen_page)(&page, here, 0, width, keys, padded.latent_key);
            let block = Block {
                keys,
                key_stride: padded.latent_key,
                values: keys,
                value_stride: padded.latent_key,
                value_vectors: padded.latent / LANES,
                scale: shape.softmax_scale,
            };
            (kernels.attend)(&block, queries, count, Seen { first: here, step: 0 }, state);
        }
        (kernels.normalise)(state, count, padded.latent / LANES);
    }
}
