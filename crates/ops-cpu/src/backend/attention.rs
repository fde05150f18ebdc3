//! Latent cache, rotation, and both forms of attention.

use cadre_numerics::{rope, softmax};
use cadre_ops::{
    AttentionShape, DecodeRow, HostMatrix, KvLayout, OpsError, PrefillSegment,
    check::{self, Dims},
};
use cadre_types::{PageId, Position};

use super::{Buffer, CpuBackend, CpuQueue, dense::product_ns, transfer::Out};
use crate::{
    kernels::{
        attention::{self as kernel, Block, Page, Seen, State},
        product::{Finish, Product, Rows},
    },
    lanes::LANES,
    memory::Aligned,
    packed::Weight,
};

/// Rotary table and widths of one attention shape.
#[derive(Debug)]
pub struct Attention {
    shape: AttentionShape,
    /// `[max_positions][rope / 2]` of (cos, sin).
    table: Aligned<f32>,
}

/// kv_b per head in three forms.
#[derive(Debug)]
pub struct KvUp {
    heads: Vec<HeadUp>,
    dims: Dims,
}

/// One head of kv_b.
#[derive(Debug)]
struct HeadUp {
    /// `nope x kv_lora`: expands keys.
    key: Weight,
    /// `v x kv_lora`: expands values, and latent outputs of the absorbed form.
    value: Weight,
    /// `kv_lora x nope`: absorbs queries.
    absorb: Weight,
}

/// The latent cache: `[layers][pages][64][kv_lora + rope]` of bf16 or F32.
#[derive(Debug)]
pub struct KvCache {
    layout: KvLayout,
    /// bf16, else F32.
    bf16: bool,
    data: Aligned<u8>,
}

impl KvUp {
    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        let bytes = |head: &HeadUp| head.key.bytes() + head.value.bytes() + head.absorb.bytes();
        self.heads.iter().map(bytes).sum()
    }
}

impl KvCache {
    /// Elements of a cached row.
    fn width(&self) -> usize {
        self.layout.kv_lora_rank + self.layout.qk_rope_head_dim
    }

    /// Bytes of a cached row.
    fn row_bytes(&self) -> usize {
        self.width() * if self.bf16 { 2 } else { 4 }
    }

    /// Byte offset of a position's row.
    fn offset(&self, layer: usize, table: &[PageId], position: usize) -> usize {
        let tokens = self.layout.page_tokens;
        let page = table[position / tokens].index();
        ((layer * self.layout.pages + page) * tokens + position % tokens) * self.row_bytes()
    }

    /// The page that holds positions `64 block ..`.
    fn page(&self, layer: usize, table: &[PageId], block: usize) -> Page {
        let offset = self.offset(layer, table, block * softmax::KEYS);
        Page { rows: self.data[offset..].as_ptr(), width: self.width(), bf16: self.bf16 }
    }
}

pub(super) fn load_kv_up(
    backend: &CpuBackend,
    shape: &AttentionShape,
    kv_b: &HostMatrix<'_>,
) -> Result<KvUp, OpsError> {
    let op = "load_kv_up";
    check::kv_up(op, shape, kv_b)?;
    let head = |head: usize| {
        let first = head * (shape.nope + shape.v);
        let pool = &backend.pool;
        Ok(HeadUp {
            key: Weight::pack_rows(op, pool, kv_b, first, shape.nope)?,
            value: Weight::pack_rows(op, pool, kv_b, first + shape.nope, shape.v)?,
            absorb: Weight::pack_transposed(op, pool, kv_b, first, shape.nope)?,
        })
    };
    let heads = (0..shape.heads).map(head).collect::<Result<_, OpsError>>()?;
    Ok(KvUp { heads, dims: Dims { rows: kv_b.rows, cols: kv_b.cols } })
}

pub(super) fn load_attention(shape: &AttentionShape) -> Result<Attention, OpsError> {
    let op = "load_attention";
    check::attention_shape(op, shape)?;
    let len = check::product(op, shape.max_positions, shape.rope)?;
    let mut table = Aligned::zeroed(op, len)?;
    if shape.rope > 0 {
        for (position, row) in table.chunks_exact_mut(shape.rope).enumerate() {
            for (pair, inv_freq) in row.as_chunks_mut::<2>().0.iter_mut().zip(&shape.inv_freq) {
                let (cos, sin) = rope::table_entry(position as u32, *inv_freq, shape.rope_magnitude);
                *pair = [cos, sin];
            }
        }
    }
    Ok(Attention { shape: shape.clone(), table })
}

pub(super) fn kv_cache(backend: &CpuBackend, layout: KvLayout) -> Result<KvCache, OpsError> {
    let elements = check::kv_layout("kv_cache", &layout)?;
    let bf16 = backend.rounds();
    let data = Aligned::zeroed("kv_cache", elements * if bf16 { 2 } else { 4 })?;
    Ok(KvCache { layout, bf16, data })
}

pub(super) fn kv_read(
    cache: &KvCache,
    layer: usize,
    table: &[PageId],
    first: Position,
    count: usize,
    out: &mut Vec<u8>,
) -> Result<(), OpsError> {
    check::index("kv_read", "layer", layer, cache.layout.layers)?;
    check::pages("kv_read", &cache.layout, table, first, count)?;
    for position in first as usize..first as usize + count {
        let offset = cache.offset(layer, table, position);
        out.extend_from_slice(&cache.data[offset..offset + cache.row_bytes()]);
    }
    Ok(())
}

pub(super) fn kv_write(
    cache: &mut KvCache,
    layer: usize,
    table: &[PageId],
    first: Position,
    count: usize,
    rows: &[u8],
) -> Result<(), OpsError> {
    let (op, bytes) = ("kv_write", cache.row_bytes());
    check::index(op, "layer", layer, cache.layout.layers)?;
    check::pages(op, &cache.layout, table, first, count)?;
    check::equal(op, "bytes of rows", rows.len(), check::product(op, count, bytes)?)?;
    for i in 0..count {
        let offset = cache.offset(layer, table, first as usize + i);
        cache.data[offset..offset + bytes].copy_from_slice(&rows[i * bytes..(i + 1) * bytes]);
    }
    Ok(())
}

/// Norm of the latent part of appended rows.
#[derive(Clone, Copy)]
pub(super) struct AppendRow<'a> {
    pub(super) norm: &'a [f32],
    pub(super) eps: f32,
}

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(super) fn kv_append(
    backend: &CpuBackend,
    attention: &Attention,
    kv_a: &Buffer,
    append: AppendRow<'_>,
    positions: &[Position],
    tables: &[&[PageId]],
    layer: usize,
    cache: &mut KvCache,
) -> Result<(), OpsError> {
    let (op, shape) = ("kv_append", &attention.shape);
    check::cache(op, shape, &cache.layout, layer)?;
    check::equal(op, "columns of kv_a", kv_a.dims.cols, shape.kv_lora + shape.rope)?;
    check::equal(op, "entries of the norm", append.norm.len(), shape.kv_lora)?;
    check::equal(op, "block tables", tables.len(), positions.len())?;
    check::at_least(op, "row capacity of kv_a", kv_a.dims.rows, positions.len())?;
    for (position, table) in positions.iter().zip(tables) {
        check::index(op, "position", *position as usize, shape.max_positions)?;
        check::pages(op, &cache.layout, table, *position, 1)?;
    }
    // Serial: rows may repeat a position (the last one wins), and a row is a microsecond's work.
    let (round, width, row_bytes) = (backend.rounds(), cache.width(), cache.row_bytes());
    let mut cached = vec![0.0_f32; width];
    for (row, (position, table)) in positions.iter().zip(tables).enumerate() {
        let kv_a = kv_a.row(row);
        cached[shape.kv_lora..].copy_from_slice(&kv_a[shape.kv_lora..]);
        let offset = cache.offset(layer, table, *position as usize);
        let to = cache.data[offset..offset + row_bytes].as_mut_ptr();
        let at = cached.as_mut_ptr();
        // SAFETY: `kv_a` and `cached` hold `width` values, the norm `kv_lora`, the rotary table a row for every
        // position below `max_positions` (checked), the cache row `width` elements.
        unsafe {
            let (norm, eps) = (append.norm.as_ptr(), append.eps);
            (backend.kernels.rms_norm)(kv_a.as_ptr(), norm, eps, shape.kv_lora, round, at);
            let angles = attention.table.as_ptr().add(*position as usize * shape.rope);
            (backend.kernels.rotate)(at.add(shape.kv_lora), angles, shape.rope / 2, round);
            if cache.bf16 {
                (backend.kernels.narrow_bf16)(at, width, to);
            } else {
                std::ptr::copy_nonoverlapping(at.cast::<u8>(), to, width * 4);
            }
        }
    }
    Ok(())
}

pub(super) fn rope_query(
    backend: &CpuBackend,
    attention: &Attention,
    positions: &[Position],
    q: &mut Buffer,
) -> Result<(), OpsError> {
    let (op, shape) = ("rope_query", &attention.shape);
    let head = shape.nope + shape.rope;
    check::equal(op, "columns of q", q.dims.cols, shape.heads * head)?;
    check::at_least(op, "row capacity of q", q.dims.rows, positions.len())?;
    for position in positions {
        check::index(op, "position", *position as usize, shape.max_positions)?;
    }
    let (out, round) = (q.output(), backend.rounds());
    let base = Out(out.base);
    let cost = (positions.len() * shape.heads * shape.rope) as u64 * 2;
    backend.run_rows(positions.len(), cost, &|row| {
        // SAFETY: row `row` of `q` is this call's; the table has a row for its position (checked).
        unsafe {
            let angles = attention.table.as_ptr().add(positions[row] as usize * shape.rope);
            for i in 0..shape.heads {
                let q_pe = base.get().add(row * out.stride + i * head + shape.nope);
                (backend.kernels.rotate)(q_pe, angles, shape.rope / 2, round);
            }
        }
    });
    Ok(())
}

/// Widths of a shape, padded to whole vectors.
#[derive(Clone, Copy)]
struct Padded {
    /// Naive key, absorbed key, value, latent value.
    key: usize,
    latent_key: usize,
    value: usize,
    latent: usize,
}

impl Padded {
    fn of(shape: &AttentionShape) -> Self {
        let pad = |width: usize| width.next_multiple_of(LANES);
        Self {
            key: pad(shape.nope + shape.rope),
            latent_key: pad(shape.kv_lora + shape.rope),
            value: pad(shape.v),
            latent: pad(shape.kv_lora),
        }
    }
}

fn check_attention(
    op: &'static str,
    shape: &AttentionShape,
    kv_up: &KvUp,
    q: &Buffer,
    layer: usize,
    cache: &KvCache,
    out: &Buffer,
) -> Result<(), OpsError> {
    check::cache(op, shape, &cache.layout, layer)?;
    check::attention_io(op, shape, q.dims, out.dims)?;
    check::equal(op, "rows of kv_b", kv_up.dims.rows, shape.heads * (shape.nope + shape.v))?;
    check::equal(op, "columns of kv_b", kv_up.dims.cols, shape.kv_lora)?;
    check::equal(op, "heads of kv_b", kv_up.heads.len(), shape.heads)
}

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

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(super) fn prefill(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    attention: &Attention,
    kv_up: &KvUp,
    q: &Buffer,
    segments: &[PrefillSegment<'_>],
    layer: usize,
    cache: &KvCache,
    out: &mut Buffer,
) -> Result<(), OpsError> {
    let (op, shape) = ("attention_prefill", &attention.shape);
    check_attention(op, shape, kv_up, q, layer, cache, out)?;
    check::segments(op, shape, &cache.layout, segments, q.dims.rows.min(out.dims.rows))?;
    let padded = Padded::of(shape);
    let most = segments.iter().map(|segment| segment.rows).max().unwrap_or(0);
    // c, keys and values of a block; queries, outputs, maxima and denominators of the segment's rows.
    let per_thread =
        softmax::KEYS * (shape.kv_lora + padded.key + padded.value) + most * (padded.key + padded.value + 2);
    let per_thread = per_thread.next_multiple_of(LANES);
    let scratch = queue.attention.floats(op, per_thread * backend.threads())?;
    let scratch = Out(scratch.as_mut_ptr());
    let rows_out = out.output();
    let prefill = Prefill { backend, shape, padded, q, layer, cache, out: rows_out, round: backend.rounds() };
    let cost = segments.iter().map(|segment| prefill.cost_ns(segment)).sum();
    backend.pool.run(segments.len() * shape.heads, cost, &|task, thread| {
        let (segment, head) = (&segments[task / shape.heads], task % shape.heads);
        if segment.rows > 0 {
            // SAFETY: this thread's part of the scratch holds `per_thread` floats; segments do not overlap, so
            // this head's columns of the segment's rows of `out` are this task's.
            unsafe {
                let carve = Carve(scratch.get().add(thread * per_thread));
                prefill.head(segment, head, &kv_up.heads[head], carve);
            }
        }
    });
    Ok(())
}

struct Prefill<'a> {
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
unsafe impl Sync for Prefill<'_> {}

impl Prefill<'_> {
    fn cost_ns(&self, segment: &PrefillSegment<'_>) -> u64 {
        let keys = segment.first_position as usize + segment.rows;
        let expand = (self.shape.nope + self.shape.v) * self.shape.kv_lora;
        let attend = segment.rows * (self.padded.key + self.padded.value);
        (keys * (expand + attend) * self.shape.heads) as u64 / 40
    }

    /// One head of one segment.
    ///
    /// # Safety
    /// The scratch holds what [`prefill`] computed; the head's outputs are this call's; shapes were checked.
    unsafe fn head(&self, segment: &PrefillSegment<'_>, head: usize, up: &HeadUp, mut scratch: Carve) {
        let (shape, padded, kernels) = (self.shape, self.padded, self.backend.kernels);
        let rows = segment.rows;
        // SAFETY: sizes as in `prefill`; queries and outputs of the segment exist (checked).
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

/// Rows of scratch memory.
fn rows_at(base: *mut f32, stride: usize) -> Rows {
    Rows { base, stride, index: std::ptr::null() }
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

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(super) fn decode(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    attention: &Attention,
    kv_up: &KvUp,
    q: &Buffer,
    rows: &[DecodeRow<'_>],
    layer: usize,
    cache: &KvCache,
    out: &mut Buffer,
) -> Result<(), OpsError> {
    let (op, shape) = ("attention_decode", &attention.shape);
    check_attention(op, shape, kv_up, q, layer, cache, out)?;
    check::decode_rows(op, shape, &cache.layout, rows, q.dims.rows.min(out.dims.rows))?;
    let padded = Padded::of(shape);
    let (heads, count) = (shape.heads, rows.len());
    // Per (row, head): the absorbed query, the latent output, a maximum and a denominator.
    let (query, latent) = (heads * padded.latent_key, heads * padded.latent);
    let absorbed = queue.absorbed.floats(op, count * (query + latent + 2 * heads))?;
    let queries = Out(absorbed.as_mut_ptr());
    let latents = Out(absorbed[count * query..].as_mut_ptr());
    let states = Out(absorbed[count * (query + latent)..].as_mut_ptr());
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
    let keys: usize = rows.iter().map(|row| row.position as usize + 1).sum();
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
            let seen = row.position as usize + 1;
            decode_heads(backend, shape, padded, layer, cache, row, queries, keys, seen, heads_here, &state);
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
#[allow(clippy::too_many_arguments, reason = "the state of one task of decode")]
unsafe fn decode_heads(
    backend: &CpuBackend,
    shape: &AttentionShape,
    padded: Padded,
    layer: usize,
    cache: &KvCache,
    row: &DecodeRow<'_>,
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
