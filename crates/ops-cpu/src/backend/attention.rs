//! Latent cache, rotation, kv_b, and what both forms of attention share.

mod absorbed;
mod naive;

use cadre_numerics::{rope, softmax};
use cadre_ops::{
    AttentionForm, AttentionShape, HostMatrix, KvLayout, OpsError,
    check::{self, Dims},
    resident::HostStep,
};
use cadre_types::{PageId, Position};

use self::{absorbed::absorbed, naive::naive};
use super::{Buffer, CpuBackend, CpuQueue, transfer::Out};
use crate::{
    kernels::{attention::Page, product::Rows},
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
    memory: &mut [u8],
    at: usize,
) -> Result<(), OpsError> {
    let (op, bytes) = ("kv_read", cache.row_bytes());
    check::index(op, "layer", layer, cache.layout.layers)?;
    check::pages(op, &cache.layout, table, first, count)?;
    check::memory(op, memory.len(), at, check::product(op, count, bytes)?)?;
    for (i, to) in memory[at..at + count * bytes].chunks_exact_mut(bytes.max(1)).enumerate() {
        let offset = cache.offset(layer, table, first as usize + i);
        to.copy_from_slice(&cache.data[offset..offset + bytes]);
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
    step: &HostStep,
    attention: &Attention,
    kv_a: &Buffer,
    append: AppendRow<'_>,
    layer: usize,
    cache: &mut KvCache,
) -> Result<(), OpsError> {
    let shape = &attention.shape;
    let norm = append.norm.len();
    check::kv_append("kv_append", step.info(), shape, &cache.layout, layer, kv_a.dims, norm)?;
    // Serial: a row is a microsecond's work.
    let (round, width, row_bytes) = (backend.rounds(), cache.width(), cache.row_bytes());
    let mut cached = vec![0.0_f32; width];
    for segment in step.segments() {
        for i in 0..segment.rows {
            let position = segment.first_position as usize + i;
            let kv_a = kv_a.row(segment.first_row + i);
            cached[shape.kv_lora..].copy_from_slice(&kv_a[shape.kv_lora..]);
            let offset = cache.offset(layer, segment.block_table, position);
            let to = cache.data[offset..offset + row_bytes].as_mut_ptr();
            let at = cached.as_mut_ptr();
            // SAFETY: `kv_a` and `cached` hold `width` values, the norm `kv_lora`, the rotary table a row for
            // every position below `max_positions` (checked), the cache row `width` elements.
            unsafe {
                let (norm, eps) = (append.norm.as_ptr(), append.eps);
                (backend.kernels.rms_norm)(kv_a.as_ptr(), norm, eps, shape.kv_lora, round, at);
                let angles = attention.table.as_ptr().add(position * shape.rope);
                (backend.kernels.rotate)(at.add(shape.kv_lora), angles, shape.rope / 2, round);
                if cache.bf16 {
                    (backend.kernels.narrow_bf16)(at, width, to);
                } else {
                    std::ptr::copy_nonoverlapping(at.cast::<u8>(), to, width * 4);
                }
            }
        }
    }
    Ok(())
}

pub(super) fn rope_query(
    backend: &CpuBackend,
    step: &HostStep,
    attention: &Attention,
    q: &mut Buffer,
) -> Result<(), OpsError> {
    let shape = &attention.shape;
    let head = shape.nope + shape.rope;
    check::rope_query("rope_query", step.info(), shape, q.dims)?;
    let (out, round, positions) = (q.output(), backend.rounds(), step.positions());
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

/// One row in absorbed form.
#[derive(Clone, Copy)]
struct AbsorbedRow<'a> {
    row: usize,
    position: usize,
    block_table: &'a [PageId],
}

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(super) fn attend(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    step: &HostStep,
    attention: &Attention,
    kv_up: &KvUp,
    q: &Buffer,
    layer: usize,
    cache: &KvCache,
    out: &mut Buffer,
) -> Result<(), OpsError> {
    let (op, shape) = ("attend", &attention.shape);
    check::step_cache(op, step.info(), shape, &cache.layout, layer)?;
    check::attention_io(op, shape, step.info(), q.dims, out.dims)?;
    check::equal(op, "rows of kv_b", kv_up.dims.rows, shape.heads * (shape.nope + shape.v))?;
    check::equal(op, "columns of kv_b", kv_up.dims.cols, shape.kv_lora)?;
    check::equal(op, "heads of kv_b", kv_up.heads.len(), shape.heads)?;
    let (mut segments, mut rows) = (Vec::new(), Vec::new());
    for segment in step.segments() {
        match segment.form {
            AttentionForm::Naive => segments.push(segment),
            AttentionForm::Absorbed => rows.extend((0..segment.rows).map(|i| AbsorbedRow {
                row: segment.first_row + i,
                position: segment.first_position as usize + i,
                block_table: segment.block_table,
            })),
        }
    }
    if !segments.is_empty() {
        naive(backend, queue, attention, kv_up, q, &segments, layer, cache, out)?;
    }
    if !rows.is_empty() {
        absorbed(backend, queue, attention, kv_up, q, &rows, layer, cache, out)?;
    }
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

/// Scratch memory of attention over steps of `rows` rows.
pub(super) fn scratch_bytes(shape: &AttentionShape, rows: u64, threads: u64) -> u64 {
    let padded = Padded::of(shape);
    let (keys, heads) = (softmax::KEYS as u64, shape.heads as u64);
    let wide = |width: usize| width as u64;
    let naive =
        keys * wide(shape.kv_lora + padded.key + padded.value) + rows * wide(padded.key + padded.value + 2);
    let absorbed = keys * wide(padded.latent_key);
    4 * (threads * naive.max(absorbed) + rows * heads * wide(padded.latent_key + padded.latent + 2))
}

/// Rows of scratch memory.
fn rows_at(base: *mut f32, stride: usize) -> Rows {
    Rows { base, stride, index: std::ptr::null() }
}
