//! Class `cuda-fp8`: products and attention on tensor cores (kernels gemm, mla_decode, mla_prefill).
//!
//! Which kernel computes an element is a function of the shapes and element types alone. Matrices that the tiles of
//! wgmma cannot hold (F32, widths that are no multiple of 16 bytes, an odd number of outputs) and attention of other
//! widths than [`covers_attention`] are computed on CUDA cores, in the order of the other classes.

use cadre_numerics::quant;
use cadre_ops::{AttentionShape, ElementType, KvLayout, OpsError, check, check::Dims};

use super::{
    CudaBackend, Step,
    attend::KvCache,
    planes::Plane,
    queue::{CudaQueue, Scratch},
    step::{Naive, Run},
    weights::{KvUp, Weight},
};
use crate::{
    device::Memory,
    kernels::Kernel,
    launch::{Arg, Grid},
};

/// Bytes of a tile: 128 rows of 128 bytes.
const TILE: usize = 16_384;

/// Positions of a piece of absorbed attention: part of the class.
const CUT: usize = 1024;

/// Whether a matrix lies in tiles.
pub(crate) fn covers_matrix(dims: Dims, elements: ElementType) -> bool {
    let granule = match elements {
        ElementType::F32 => return false,
        ElementType::Bf16 => 8,
        ElementType::E4m3 => 16,
    };
    dims.rows > 0 && dims.rows.is_multiple_of(2) && dims.cols > 0 && dims.cols.is_multiple_of(granule)
}

/// Whether the pages of a cache are in tiles.
pub(crate) fn covers_cache(layout: &KvLayout) -> bool {
    matches!(layout.kv_lora_rank, 128 | 512)
        && layout.qk_rope_head_dim <= 64
        && layout.qk_rope_head_dim.is_multiple_of(8)
}

/// Whether attention is on tensor cores; the cache is in tiles then.
pub(crate) fn covers_attention(shape: &AttentionShape) -> bool {
    matches!(shape.kv_lora, 128 | 512)
        && shape.rope <= 64
        && shape.rope.is_multiple_of(8)
        && shape.nope == shape.v
        && matches!(shape.nope, 64 | 128)
}

/// Blocks of the reduction in tiles.
fn blocks(cols: usize, elements: ElementType) -> usize {
    cols.div_ceil(if elements == ElementType::E4m3 { 128 } else { 64 })
}

/// Bytes of a matrix in tiles.
pub(crate) fn matrix_bytes(op: &'static str, dims: Dims, elements: ElementType) -> Result<usize, OpsError> {
    check::product(op, check::product(op, dims.rows.div_ceil(128), blocks(dims.cols, elements))?, TILE)
}

/// Bytes of gate and up together in tiles.
pub(crate) fn gate_up_bytes(
    op: &'static str,
    inner: usize,
    hidden: usize,
    elements: ElementType,
) -> Result<usize, OpsError> {
    check::product(op, check::product(op, inner.div_ceil(64), blocks(hidden, elements))?, TILE)
}

/// Sizes of kv_b in its two forms, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvUpTiles {
    /// Key tiles of a head.
    pub(crate) keys: usize,
    /// Key and value tiles of a head.
    pub(crate) head: usize,
    /// W_UK transposed of a head.
    pub(crate) absorb: usize,
}

impl KvUpTiles {
    pub(crate) fn of(shape: &AttentionShape) -> Self {
        let keys = shape.nope.div_ceil(128) * (shape.kv_lora / 64) * TILE;
        Self { keys, head: 2 * keys, absorb: shape.kv_lora.div_ceil(128) * (shape.nope / 64) * TILE }
    }
}

/// What the kernels of gemm.cu take.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GemmArgs {
    pub(crate) x: u64,
    pub(crate) xs: u64,
    pub(crate) gather: u64,
    pub(crate) scatter: u64,
    pub(crate) w: u64,
    pub(crate) ws: u64,
    pub(crate) table: u64,
    pub(crate) counts: u64,
    pub(crate) offsets: u64,
    pub(crate) pages: u64,
    pub(crate) y: u64,
    pub(crate) error: u64,
    pub(crate) x_row: i64,
    pub(crate) x_group: i64,
    pub(crate) w_group: i64,
    pub(crate) y_row: i64,
    pub(crate) y_group: i64,
    pub(crate) xs_row: i32,
    pub(crate) groups: i32,
    pub(crate) rows: i32,
    pub(crate) n: i32,
    pub(crate) k: i32,
    pub(crate) table_at: i32,
    pub(crate) x_mode: i32,
    pub(crate) y_mode: i32,
    pub(crate) y_sub: i32,
    pub(crate) padding: i32,
}

pub(crate) const Y_BF16: i32 = 0;
pub(crate) const Y_F32: i32 = 1;
const Y_QUERY_TILES: i32 = 2;
const Y_KEY_TILES: i32 = 3;
pub(crate) const Y_SWIGLU: i32 = 4;
const X_PAGES: i32 = 1;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct DecodeArgs {
    q: u64,
    cache: u64,
    tables: u64,
    table_of: u64,
    work: u64,
    work_count: u64,
    pieces: u64,
    out: u64,
    partial: u64,
    sums: u64,
    done: u64,
    error: u64,
    page_bytes: i64,
    max_pages: i32,
    halves: i32,
    heads: i32,
    scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct PrefillArgs {
    q: u64,
    kv: u64,
    cache: u64,
    pages: u64,
    out: u64,
    error: u64,
    q_row: i64,
    out_row: i64,
    page_bytes: i64,
    kv_group: i64,
    rows: i32,
    first_position: i32,
    head0: i32,
    rope: i32,
    rope_tile: i32,
    scale: f32,
}

/// A structure without holes as an argument.
pub(crate) trait Plain: Copy {
    fn bytes(&self) -> &[u8] {
        // SAFETY: the types that implement this are `repr(C)` of integers and floats with no bytes between or behind
        // them, which the sizes in the table of kernels confirm.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }
}

impl Plain for GemmArgs {}
impl Plain for DecodeArgs {}
impl Plain for PrefillArgs {}

/// Entry points of a product by rows of a token tile: whole tiles of the matrix, then half tiles.
const FP8: [(usize, Kernel); 5] = [
    (8, Kernel::GemmFp8N8),
    (16, Kernel::GemmFp8N16),
    (32, Kernel::GemmFp8N32),
    (64, Kernel::GemmFp8N64),
    (128, Kernel::GemmFp8N128),
];
const FP8_HALF: [(usize, Kernel); 4] =
    [(8, Kernel::GemmFp8H8), (16, Kernel::GemmFp8H16), (32, Kernel::GemmFp8H32), (64, Kernel::GemmFp8H64)];
const BF16: [(usize, Kernel); 5] = [
    (8, Kernel::GemmBf16N8),
    (16, Kernel::GemmBf16N16),
    (32, Kernel::GemmBf16N32),
    (64, Kernel::GemmBf16N64),
    (128, Kernel::GemmBf16N128),
];
const BF16_HALF: [(usize, Kernel); 4] = [
    (8, Kernel::GemmBf16H8),
    (16, Kernel::GemmBf16H16),
    (32, Kernel::GemmBf16H32),
    (64, Kernel::GemmBf16H64),
];

/// Dynamic shared memory of a product's entry point (kernels/gemm.cu).
fn gemm_shared(half: bool, tile: usize) -> usize {
    match (half, tile) {
        (false, 8) => 178_820,
        (false, 16) => 189_380,
        (false, 32) => 210_500,
        (false, 64) => 203_012,
        (false, _) => 203_972,
        (true, 8) => 171_140,
        (true, 16) => 190_148,
        (true, 32) => 203_268,
        (true, _) => 204_164,
    }
}

impl CudaBackend {
    /// Queues a product. `typical` rows a group: all entry points give the same bits, one is the fastest.
    pub(crate) fn gemm(
        &self,
        queue: &CudaQueue,
        elements: ElementType,
        typical: usize,
        args: &GemmArgs,
    ) -> Result<(), OpsError> {
        let args = GemmArgs { error: queue.error(), ..*args };
        let multiprocessors = self.device.info().multiprocessors;
        let (n, groups) = (args.n as usize, args.groups as usize);
        let columns = if args.y_mode == Y_SWIGLU { 64 } else { 128 };
        let fits = |(tile, _): &&(usize, Kernel)| *tile >= typical;
        let fp8 = elements == ElementType::E4m3;
        let whole = if fp8 { &FP8 } else { &BF16 };
        let half = if fp8 { &FP8_HALF } else { &BF16_HALF };
        let few = n.div_ceil(columns) * groups < 2 * multiprocessors;
        let (is_half, (tile, kernel)) = match half.iter().find(fits).filter(|_| few) {
            Some(entry) => (true, *entry),
            None => (false, *whole.iter().find(fits).unwrap_or(&whole[whole.len() - 1])),
        };
        let columns = if is_half { columns / 2 } else { columns };
        let tasks = n.div_ceil(columns) * groups * (args.rows as usize).div_ceil(tile).max(1);
        let threads = if is_half { 256 } else { 384 };
        let grid = Grid::of(tasks.min(multiprocessors), threads).shared(gemm_shared(is_half, tile));
        queue.launch(kernel, grid, &[Arg::Struct(args.bytes())])
    }

    /// `y = x W^T` of a matrix in tiles; `x` is codes and scales, or BF16.
    #[allow(clippy::too_many_arguments, reason = "a product")]
    pub(crate) fn tile_product(
        &self,
        queue: &CudaQueue,
        x: (u64, u64),
        weight: &Weight,
        rows: usize,
        y: u64,
        y_mode: i32,
        n: usize,
    ) -> Result<(), OpsError> {
        let cols = weight.dims.cols;
        let args = GemmArgs {
            x: x.0,
            xs: x.1,
            w: weight.words.address(),
            ws: weight.scales.as_ref().map_or(0, Memory::address),
            y,
            x_row: row_bytes(cols, weight.elements),
            y_row: n as i64,
            xs_row: quant::blocks(cols) as i32,
            groups: 1,
            rows: rows as i32,
            n: n as i32,
            k: cols as i32,
            y_mode,
            ..GemmArgs::default()
        };
        self.gemm(queue, weight.elements, rows, &args)
    }

    /// Absorbed attention of consecutive rows.
    #[allow(clippy::too_many_arguments, reason = "a part of the trait's operation")]
    pub(crate) fn tensor_absorbed(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        step: &Step,
        run: &Run,
        shape: &AttentionShape,
        kv_up: &KvUp,
        q: &Plane,
        layer: usize,
        cache: &KvCache,
        out: &Plane,
    ) -> Result<(), OpsError> {
        let Some(tiles) = &kv_up.tiles else { return Ok(()) };
        let (rows, heads) = (run.keys.len(), shape.heads);
        let halves = heads.div_ceil(64);
        let sub = shape.kv_lora / 64 + 1;
        let width = shape.nope + shape.rope;
        let sizes = KvUpTiles::of(shape);
        let pieces = |keys: &usize| keys.div_ceil(CUT);
        let work: usize = run.keys.iter().map(pieces).sum();
        let slots: usize = run.keys.iter().filter(|keys| **keys > CUT).map(pieces).sum();
        let queries = queue.scratch(op, Scratch::Wide, rows * halves * sub * 8192)?;
        let latent = queue.scratch(op, Scratch::Inner, rows * heads * shape.kv_lora * 2)?;
        let partial = queue.scratch(op, Scratch::Expanded, (slots * halves * shape.kv_lora * 128).max(16))?;
        // Work, pieces, sums and the number of work, each from a multiple of 256 on.
        let sizes_of =
            [work * 16, rows * 8, slots * halves * 64 * 4, 4].map(|bytes: usize| bytes.next_multiple_of(256));
        let lists = queue.scratch(op, Scratch::Latents, sizes_of.iter().sum())?;
        let at = |list: usize| lists + sizes_of[..list].iter().sum::<usize>() as u64;
        let done = queue.zeros(op, rows * halves * 4)?;
        queue.launch(
            Kernel::MlaPlan,
            Grid::of(1, 1024),
            &[
                Arg::Pointer(step.position_of(run.first_row)),
                Arg::U32(rows as u32),
                Arg::U32(CUT as u32),
                Arg::Pointer(at(0)),
                Arg::Pointer(at(1)),
                Arg::Pointer(at(3)),
            ],
        )?;
        let first_query = q.memory.at(run.first_row * q.row_bytes());
        queue.launch(
            Kernel::MlaQueryRope,
            Grid::of((rows * halves * sub * 512).div_ceil(256).min(2048), 256),
            &[
                Arg::Pointer(first_query),
                Arg::U64((heads * width) as u64),
                Arg::Pointer(queries),
                Arg::U32(rows as u32),
                Arg::U32(heads as u32),
                Arg::U32(shape.nope as u32),
                Arg::U32(shape.rope as u32),
                Arg::U32(sub as u32),
            ],
        )?;
        let absorb = GemmArgs {
            x: first_query,
            w: tiles.absorb.address(),
            y: queries,
            x_row: (heads * width * 2) as i64,
            x_group: (width * 2) as i64,
            w_group: sizes.absorb as i64,
            y_row: (halves * sub * 4096) as i64,
            groups: heads as i32,
            rows: rows as i32,
            n: shape.kv_lora as i32,
            k: shape.nope as i32,
            y_mode: Y_QUERY_TILES,
            y_sub: sub as i32,
            ..GemmArgs::default()
        };
        self.gemm(queue, ElementType::Bf16, rows, &absorb)?;
        let args = DecodeArgs {
            q: queries,
            cache: cache.layer(layer),
            tables: step.pages(0),
            table_of: step.table_of(run.first_row),
            work: at(0),
            work_count: at(3),
            pieces: at(1),
            out: latent,
            partial,
            sums: at(2),
            done,
            error: queue.error(),
            page_bytes: cache.page_bytes() as i64,
            max_pages: step.table_pages() as i32,
            halves: halves as i32,
            heads: heads as i32,
            scale: shape.softmax_scale * std::f32::consts::LOG2_E,
        };
        let (kernel, shared) = if shape.kv_lora == 512 {
            (Kernel::MlaDecode512, 230_936)
        } else {
            (Kernel::MlaDecode128, 83_352)
        };
        let blocks = halves * (self.device.info().multiprocessors / halves).clamp(1, work);
        queue.launch(kernel, Grid::of(blocks, 384).shared(shared), &[Arg::Struct(args.bytes())])?;
        let values = GemmArgs {
            x: latent,
            w: tiles.keys_values.at(sizes.keys),
            y: out.memory.at(run.first_row * out.row_bytes()),
            x_row: (heads * shape.kv_lora * 2) as i64,
            x_group: (shape.kv_lora * 2) as i64,
            w_group: sizes.head as i64,
            y_row: (heads * shape.v) as i64,
            y_group: shape.v as i64,
            groups: heads as i32,
            rows: rows as i32,
            n: shape.v as i32,
            k: shape.kv_lora as i32,
            ..GemmArgs::default()
        };
        self.gemm(queue, ElementType::Bf16, rows, &values)
    }

    /// Naive attention of one segment.
    #[allow(clippy::too_many_arguments, reason = "a part of the trait's operation")]
    pub(crate) fn tensor_naive(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        step: &Step,
        segment: &Naive,
        shape: &AttentionShape,
        kv_up: &KvUp,
        q: &Plane,
        layer: usize,
        cache: &KvCache,
        out: &Plane,
    ) -> Result<(), OpsError> {
        let Some(tiles) = &kv_up.tiles else { return Ok(()) };
        let sizes = KvUpTiles::of(shape);
        let key_blocks = (segment.first_position + segment.rows).div_ceil(KvLayout::PAGE_TOKENS);
        let group = key_blocks * (shape.nope / 64) * 8192;
        let at_once = (super::attend::EXPANDED_BYTES / (2 * group)).clamp(1, shape.heads);
        let expanded = queue.scratch(op, Scratch::Expanded, check::product(op, at_once, 2 * group)?)?;
        for first in (0..shape.heads).step_by(at_once) {
            let heads = at_once.min(shape.heads - first);
            let args = GemmArgs {
                x: cache.layer(layer),
                pages: step.pages(segment.table),
                w: tiles.keys_values.at(first * sizes.head),
                y: expanded,
                x_row: cache.page_bytes() as i64,
                w_group: sizes.keys as i64,
                y_group: (key_blocks * (shape.nope / 64) * 4096) as i64,
                groups: 2 * heads as i32,
                rows: (key_blocks * KvLayout::PAGE_TOKENS) as i32,
                n: shape.nope as i32,
                k: shape.kv_lora as i32,
                x_mode: X_PAGES,
                y_mode: Y_KEY_TILES,
                y_sub: (shape.nope / 64) as i32,
                ..GemmArgs::default()
            };
            self.gemm(queue, ElementType::Bf16, 128, &args)?;
            let args = PrefillArgs {
                q: q.memory.at(segment.first_row * q.row_bytes()),
                kv: expanded,
                cache: cache.layer(layer),
                pages: step.pages(segment.table),
                out: out.memory.at(segment.first_row * out.row_bytes()),
                error: queue.error(),
                q_row: q.dims.cols as i64,
                out_row: out.dims.cols as i64,
                page_bytes: cache.page_bytes() as i64,
                kv_group: group as i64,
                rows: segment.rows as i32,
                first_position: segment.first_position as i32,
                head0: first as i32,
                rope: shape.rope as i32,
                rope_tile: (shape.kv_lora / 64) as i32,
                scale: shape.softmax_scale * std::f32::consts::LOG2_E,
            };
            let (kernel, shared) = if shape.nope == 128 {
                (Kernel::MlaPrefill128, 196_704)
            } else {
                (Kernel::MlaPrefill64, 122_976)
            };
            let grid = Grid::of(segment.rows.div_ceil(192), 512).by(heads).shared(shared);
            queue.launch(kernel, grid, &[Arg::Struct(args.bytes())])?;
        }
        Ok(())
    }
}

/// Bytes of an input row.
pub(crate) fn row_bytes(cols: usize, elements: ElementType) -> i64 {
    (cols * if elements == ElementType::E4m3 { 1 } else { 2 }) as i64
}
