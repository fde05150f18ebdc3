//! The naive form: one task is one head of one segment. It walks the blocks of cached keys once, expands the
//! head's keys and values of a block through kv_b, and lets every row of the segment that sees the block
//! attend to it.

use cadre_numerics::softmax;
use cadre_ops::{AttentionShape, OpsError, resident::HostSegment};

use super::{Attention, HeadUp, KvCache, KvUp, Padded, rows_at};
use crate::{
    backend::{Buffer, CpuBackend, CpuQueue, transfer::Out},
    kernels::{
        attention::{self as kernel, Block, Seen, State},
        product::{Finish, Product, Rows},
    },
    lanes::LANES,
    packed::Weight,
};

/// A bump allocator over one thread's part of the scratch memory.
struct Carve(*mut f32);

impl Carve {
    /// # Safety
    /// `len` more floats are left.
    unsafe fn take(&mut self, len: usize) -> *mut f32 {
        let part = self.0;
        // SAFETY: the caller's contract.
        self.0 = unsafe { part.add(len) };
        part
    }
}
#[allow(clippy::too_many_arguments, reason = "segments of the trait's operation")]
pub(super) fn naive(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    attention: &Attention,
    kv_up: &KvUp,
    q: &Buffer,
    segments: &[HostSegment<'_>],
    layer: usize,
    cache: &KvCache,
    out: &mut Buffer,
) -> Result<(), OpsError> {
    let (op, shape) = ("attend", &attention.shape);
    let padded = Padded::of(shape);
    let most = segments.iter().map(|segment| segment.rows).max().unwrap_or(0);
    // c, keys and values of a block; queries, outputs, maxima and denominators of the segment's rows.
    let per_thread =
        softmax::KEYS * (shape.kv_lora + padded.key + padded.value) + most * (padded.key + padded.value + 2);
    let per_thread = per_thread.next_multiple_of(LANES);
    let scratch = queue.attention.floats(op, per_thread * backend.threads())?;
    let scratch = Out(scratch.as_mut_ptr());
    let rows_out = out.output();
    let naive = Naive { backend, shape, padded, q, layer, cache, out: rows_out, round: backend.rounds() };
    let cost = segments.iter().map(|segment| naive.cost_ns(segment)).sum();
    backend.pool.run(segments.len() * shape.heads, cost, &|task, thread| {
        let (segment, head) = (&segments[task / shape.heads], task % shape.heads);
        if segment.rows > 0 {
            // SAFETY: this thread's part of the scratch holds `per_thread` floats; segments do not overlap, so
            // this head's columns of the segment's rows of `out` are this task's.
            unsafe {
                let carve = Carve(scratch.get().add(thread * per_thread));
                naive.head(segment, head, &kv_up.heads[head], carve);
            }
        }
    });
    Ok(())
}

struct Naive<'a> {
    backend: &'a CpuBackend,
    shape: &'a AttentionShape,
    padded: Padded,
    q: &'a Buffer,
    layer: usize,
    cache: &'a KvCache,
    out: Rows,
    round: bool,
}

// SAFETY: `out` is written by tasks that have different heads or rows; everything else is shared read-only.
unsafe impl Sync for Naive<'_> {}

impl Naive<'_> {
    fn cost_ns(&self, segment: &HostSegment<'_>) -> u64 {
        let keys = segment.first_position as usize + segment.rows;
        let expand = (self.shape.nope + self.shape.v) * self.shape.kv_lora;
        let attend = segment.rows * (self.padded.key + self.padded.value);
        (keys * (expand + attend) * self.shape.heads) as u64 / 40
    }

    /// One head of one segment.
    ///
    /// # Safety
    /// The scratch holds what [`naive`] computed; the head's outputs are this call's; shapes were checked.
    unsafe fn head(&self, segment: &HostSegment<'_>, head: usize, up: &HeadUp, mut scratch: Carve) {
        let (shape, padded, kernels) = (self.shape, self.padded, self.backend.kernels);
        let rows = segment.rows;
        // SAFETY: sizes as in `naive`; queries and outputs of the segment exist (checked).
        unsafe {
            let latents = scratch.take(softmax::KEYS * shape.kv_lora);
            let keys = scratch.take(softmax::KEYS * padded.key);
            let values = scratch.take(softmax::KEYS * padded.value);
            let queries = scratch.take(rows * padded.key);
            let o = scratch.take(rows * padded.value);
            let state = State { max: scratch.take(rows), sum: scratch.take(rows), o, stride: padded.value };
            kernel::start(&state, rows);
            let width = shape.nope + shape.rope;
            for i in 0..rows {
                let q = self.q.row(segment.first_row + i)[head * width..].as_ptr();
                kernel::pad(q, width, queries.add(i * padded.key), padded.key);
            }
            // Scratch may hold anything; what no key row covers must count as zero, and value rows beyond the
            // last key are read (times nothing) by no one.
            std::slice::from_raw_parts_mut(keys, softmax::KEYS * padded.key).fill(0.0);
            std::slice::from_raw_parts_mut(values, softmax::KEYS * padded.value).fill(0.0);

            let first_position = segment.first_position as usize;
            let end = first_position + rows;
            for block in 0..end.div_ceil(softmax::KEYS) {
                let start = block * softmax::KEYS;
                let count = softmax::KEYS.min(end - start);
                let page = self.cache.page(self.layer, segment.block_table, block);
                (kernels.widen_page)(&page, count, 0, shape.kv_lora, latents, shape.kv_lora);
                let k_pe = keys.add(shape.nope);
                (kernels.widen_page)(&page, count, shape.kv_lora, shape.rope, k_pe, padded.key);
                let c = rows_at(latents, shape.kv_lora);
                let expand = |weight: &Weight, to: *mut f32, stride: usize| {
                    let product = Product::new(weight, c, rows_at(to, stride), Finish::Exact);
                    (kernels.product)(&product, 0..weight.panels, 0..count);
                };
                expand(&up.key, keys, padded.key);
                expand(&up.value, values, padded.value);
                let block = Block {
                    keys,
                    key_stride: padded.key,
                    values,
                    value_stride: padded.value,
                    value_vectors: padded.value / LANES,
                    scale: shape.softmax_scale,
                };
                // Rows before the block's first position see none of it.
                let skip = start.saturating_sub(first_position);
                let seen = Seen { first: first_position + skip + 1 - start, step: 1 };
                let state = State {
                    max: state.max.add(skip),
                    sum: state.sum.add(skip),
                    o: state.o.add(skip * state.stride),
                    stride: state.stride,
                };
                let q = queries.add(skip * padded.key);
                (kernels.attend)(&block, q, rows - skip, seen, &state);
            }
            (kernels.normalise)(&state, rows, padded.value / LANES);
            for i in 0..rows {
                let to = self.out.row(segment.first_row + i).add(head * shape.v);
                store_row(o.add(i * padded.value), shape.v, self.round, to);
            }
        }
    }
}

/// Copies a row, rounded to bf16 if the class rounds.
///
/// # Safety
/// Both hold `width` values; `to` is not shared.
unsafe fn store_row(from: *const f32, width: usize, round: bool, to: *mut f32) {
    for d in 0..width {
        // SAFETY: the caller's contract.
        unsafe {
            let value = *from.add(d);
            *to.add(d) = if round { cadre_numerics::bf16::round(value) } else { value };
        }
    }
}
