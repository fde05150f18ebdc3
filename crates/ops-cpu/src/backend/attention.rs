//! Latent cache, rotation, kv_b, and what both forms of attention share.

mod decode;
mod prefill;

use cadre_numerics::{rope, softmax};
use cadre_ops::{
    AttentionShape, HostMatrix, KvLayout, OpsError,
    check::{self, Dims},
};
use cadre_types::{PageId, Position};

pub(super) use self::{decode::decode, prefill::prefill};
use super::{Buffer, CpuBackend, transfer::Out};
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

/// Rows of scratch memory.
fn rows_at(base: *mut f32, stride: usize) -> Rows {
    Rows { base, stride, index: std::ptr::null() }
}
