//! Matrix products over packed panels.
//!
//! One output is, as docs/numerics.md says, an FMA chain over `k` inside each block, and an FMA chain of
//! block sums times scales. 16 outputs share a vector; a group of up to four panels is computed together,
//! block after block. Few rows: weights are widened in registers, once for all rows of the tile ("fused").
//! Many rows: a panel's block is widened into scratch memory once and used for up to [`ROWS`] rows
//! ("tiled"). Both add in the same order.

use std::{marker::PhantomData, ops::Range};

use crate::{
    lanes::{E4M3_GROW, LANES, Lanes, Work},
    packed::{Format, GROUP, Weight},
};
use cadre_numerics::{BLOCK, linear::Blocks};

/// Most rows of one pass: bounds the sums kept on the stack (192 x 64 F32 = 48 KiB).
pub(crate) const ROWS: usize = 192;
/// Most rows of a fused pass, on any instruction set.
const FUSED_ROWS: usize = 6;

/// Rows of a matrix in memory, with an optional indirection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    /// Element 0 of row 0.
    pub(crate) base: *mut f32,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    /// Row number of entry `i`; null means `i` itself.
    pub(crate) index: *const usize,
}

// SAFETY: a `Rows` says where rows are; whoever follows it guarantees that they exist and that concurrent
// writers write different elements.
unsafe impl Sync for Rows {}

impl Rows {
    /// # Safety
    /// Entry `i` must exist in the index (if any) and its row in memory.
    #[inline(always)]
    pub(crate) unsafe fn row(&self, i: usize) -> *mut f32 {
        // SAFETY: the caller's contract.
        unsafe {
            let row = if self.index.is_null() { i } else { *self.index.add(i) };
            self.base.add(row * self.stride)
        }
    }
}

/// What happens to finished outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// Stored as F32.
    Exact,
    /// Rounded to bf16 and stored.
    Bf16,
    /// `silu(gate) * up`, stored as F32.
    SiluExact,
    /// `silu(gate) * up`, rounded to bf16 and stored.
    SiluBf16,
}

/// A product `y = x W^T`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    format: Format,
    data: *const u8,
    panel_bytes: usize,
    /// All panels of the matrix.
    panels: usize,
    /// Null: all scales are 1.
    scales: *const f32,
    lane_scales: bool,
    blocks: Blocks,
    /// Outputs: those beyond are padding and not stored.
    outputs: usize,
    /// Inputs.
    x: Rows,
    /// Input scales `[entry][block]`, or null. Entries are numbered like those of `x` without its index.
    x_scales: *const f32,
    /// Outputs.
    y: Rows,
    finish: Finish,
}

// SAFETY: a `Product` is a description; whoever runs one guarantees that what it points to is readable, and
// that concurrent runs write different rows or panels.
unsafe impl Sync for Product {}

impl Product {
    /// Describes a product; pointers as in the fields' notes.
    pub(crate) fn new(weight: &Weight, x: Rows, y: Rows, finish: Finish) -> Self {
        let scaled = weight.format == Format::E4m3;
        Self {
            format: weight.format,
            data: weight.data.as_ptr(),
            panel_bytes: weight.panel_bytes,
            panels: weight.panels,
            scales: if scaled { weight.scales.as_ptr() } else { std::ptr::null() },
            lane_scales: weight.lane_scales,
            blocks: weight.blocks,
            outputs: weight.dims.rows,
            x,
            x_scales: std::ptr::null(),
            y,
            finish,
        }
    }

    /// With inputs that are codes (as values) with a scale per row and block.
    pub(crate) fn with_input_scales(self, x_scales: *const f32) -> Self {
        Self { x_scales, ..self }
    }

    /// The factor on a block's sums of one panel for one row.
    #[inline(always)]
    unsafe fn scale<V: Lanes>(&self, panel: usize, block: usize, row: usize) -> V {
        // SAFETY: `run`'s contract: panel, block and row exist.
        unsafe {
            let count = self.blocks.count();
            let weight = if self.scales.is_null() {
                V::splat(1.0)
            } else if self.lane_scales {
                V::load(self.scales.add((panel * count + block) * LANES))
            } else {
                V::splat(*self.scales.add(panel * count + block))
            };
            if self.x_scales.is_null() {
                weight
            } else {
                weight.mul(V::splat(*self.x_scales.add(row * count + block)))
            }
        }
    }
}

/// How a format widens: a quad of `k` is loaded once, then each of its steps made a vector.
trait Widen {
    const IS_E4M3: bool = false;
    /// Whether there is a fused form.
    const FUSED: bool = true;
    const QUAD_BYTES: usize;
    type Quad<V: Lanes>: Copy;
    unsafe fn load<V: Lanes>(from: *const u8) -> Self::Quad<V>;
    unsafe fn step<V: Lanes, const I: usize>(quad: Self::Quad<V>) -> V;
}

/// e4m3 as value x 2^-120, for inputs times 2^112.
struct E4m3Small;
impl Widen for E4m3Small {
    const QUAD_BYTES: usize = Format::E4m3.quad_bytes();
    type Quad<V: Lanes> = V::Words;
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const u8) -> V::Words {
        // SAFETY: a quad is readable.
        unsafe { V::load_words(from) }
    }
    #[inline(always)]
    unsafe fn step<V: Lanes, const I: usize>(quad: V::Words) -> V {
        // SAFETY: the caller's instruction set.
        unsafe { V::e4m3_small::<I>(quad) }
    }
}

/// e4m3 as value x 2^-8.
struct E4m3;
impl Widen for E4m3 {
    const IS_E4M3: bool = true;
    const QUAD_BYTES: usize = Format::E4m3.quad_bytes();
    type Quad<V: Lanes> = V::Words;
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const u8) -> V::Words {
        // SAFETY: a quad is readable.
        unsafe { V::load_words(from) }
    }
    #[inline(always)]
    unsafe fn step<V: Lanes, const I: usize>(quad: V::Words) -> V {
        // SAFETY: the caller's instruction set.
        unsafe { V::e4m3_small::<I>(quad).mul(V::splat(E4M3_GROW)) }
    }
}

struct Bf16;
impl Widen for Bf16 {
    const QUAD_BYTES: usize = Format::Bf16.quad_bytes();
    type Quad<V: Lanes> = [V::Words; 2];
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const u8) -> [V::Words; 2] {
        // SAFETY: a quad is readable.
        unsafe { [V::load_words(from), V::load_words(from.add(4 * LANES))] }
    }
    #[inline(always)]
    unsafe fn step<V: Lanes, const I: usize>(quad: [V::Words; 2]) -> V {
        // SAFETY: the caller's instruction set.
        unsafe {
            match I % 2 {
                0 => V::bf16_half::<0>(quad[I / 2]),
                _ => V::bf16_half::<1>(quad[I / 2]),
            }
        }
    }
}

struct F32;
impl Widen for F32 {
    // No checkpoint of this architecture has F32 matrices worth more code.
    const FUSED: bool = false;
    const QUAD_BYTES: usize = Format::F32.quad_bytes();
    type Quad<V: Lanes> = *const f32;
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const u8) -> *const f32 {
        from.cast()
    }
    #[inline(always)]
    unsafe fn step<V: Lanes, const I: usize>(quad: *const f32) -> V {
        // SAFETY: a quad is readable.
        unsafe { V::load(quad.add(I * LANES)) }
    }
}

/// The factor on inputs of [`E4m3Small`], and the magnitude below which it cannot overflow. Powers of two are
/// exact, so `(x 2^112) (w 2^-120)` is the product that the specification names, `x (w 2^-8)`, with the same
/// rounding in every FMA.
const INPUT_GROW: f32 = E4M3_GROW;
const INPUT_LIMIT: f32 = 32768.0;

/// Computes entries `rows` of the panels `panels`.
///
/// # Safety
/// The machine has `V`'s instruction set. Panels exist in the weights; every entry exists in `x`, `y` and the
/// input scales; rows of `x` hold the reduction, rows of `y` the outputs. `panels` starts at a whole group. Nobody else writes or reads those outputs meanwhile.
#[inline(always)]
pub(crate) unsafe fn run<V: Lanes>(p: &Product, panels: Range<usize>, rows: Range<usize>) {
    // SAFETY: the caller's contract.
    unsafe {
        match p.format {
            Format::E4m3 => run_format::<V, E4m3>(p, panels, rows),
            Format::Bf16 => run_format::<V, Bf16>(p, panels, rows),
            Format::F32 => run_format::<V, F32>(p, panels, rows),
        }
    }
}

#[inline(always)]
unsafe fn run_format<V: Lanes, W: Widen>(p: &Product, panels: Range<usize>, rows: Range<usize>) {
    for first in rows.clone().step_by(ROWS) {
        let count = (rows.end - first).min(ROWS);
        for panel in panels.clone().step_by(GROUP) {
            let here = GROUP.min(p.panels - panel);
            // SAFETY: the group's weights, of which this task may want only some panels, start here.
            let w = unsafe { p.data.add(panel * p.panel_bytes) };
            let at = Group { p, panel, here, wanted: here.min(panels.end - panel), first, count, w };
            // SAFETY: the caller's contract on a part of the rows and panels.
            unsafe {
                if const { W::FUSED } && count <= V::FUSED_ROWS {
                    fused::<V, W>(at);
                } else {
                    tiled::<V, W>(at);
                }
            }
        }
    }
}

/// Some rows and one group of panels.
#[derive(Clone, Copy)]
struct Group<'a> {
    p: &'a Product,
    /// First panel of the group.
    panel: usize,
    /// Panels that are stored together.
    here: usize,
    /// Panels that are computed.
    wanted: usize,
    first: usize,
    count: usize,
    /// The group's weights.
    w: *const u8,
}

/// Up to [`Lanes::FUSED_ROWS`] rows, weights widened in registers.
#[inline(always)]
unsafe fn fused<V: Lanes, W: Widen>(at: Group<'_>) {
    let mut sums = std::mem::MaybeUninit::<[f32; FUSED_ROWS * GROUP * LANES]>::uninit();
    let sums = sums.as_mut_ptr().cast::<f32>();
    // SAFETY: `Fused` fills `[count][wanted * 16]` sums of existing rows and panels, `Done` reads them.
    unsafe {
        match at.count {
            1 => fused_rows::<V, W, 1>(at, sums),
            2 => fused_rows::<V, W, 2>(at, sums),
            3 => fused_rows::<V, W, 3>(at, sums),
            4 => fused_rows::<V, W, 4>(at, sums),
            5 => fused_rows::<V, W, 5>(at, sums),
            _ => fused_rows::<V, W, 6>(at, sums),
        }
        V::enter(Done { at, sums });
    }
}

/// Enters the shape if the instruction set has tiles that high: the condition is a constant, so that shapes
/// that are not used are not compiled.
#[inline(always)]
unsafe fn fused_rows<V: Lanes, W: Widen, const R: usize>(at: Group<'_>, sums: *mut f32) {
    if const { R <= V::FUSED_ROWS } {
        // SAFETY: the caller's contract.
        unsafe { V::enter(Fused::<W, R> { at, sums, format: PhantomData }) }
    }
}

/// `R` rows by one group over the whole reduction; sums go to `[row][wanted * 16]`.
struct Fused<'a, W, const R: usize> {
    at: Group<'a>,
    sums: *mut f32,
    format: PhantomData<W>,
}

impl<W: Widen, const R: usize> Work for Fused<'_, W, R> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Group { p, here, wanted, first, mut w, .. } = self.at;
        let mut grown = std::mem::MaybeUninit::<[[f32; BLOCK]; R]>::uninit();
        let grown = grown.as_mut_ptr().cast::<f32>();
        // SAFETY: rows and panels exist; quads are read inside their blocks; `grow` fills `len` values of each
        // row before they are read.
        unsafe {
            let mut x = [std::ptr::null::<f32>(); R];
            let mut small = [std::ptr::null::<f32>(); R];
            for r in 0..R {
                x[r] = p.x.row(first + r);
                small[r] = grown.add(r * BLOCK);
            }
            for i in 0..R * wanted {
                V::splat(0.0).store(self.sums.add(i * LANES));
            }
            for block in 0..p.blocks.count() {
                let len = p.blocks.range(block).len();
                let bytes = len.div_ceil(4) * W::QUAD_BYTES;
                let at = FusedBlock { group: &self.at, block, len, bytes, w, sums: self.sums };
                if const { W::IS_E4M3 } {
                    if grow::<V, R>(x, len, grown) {
                        at.panels::<V, E4m3Small, R>(small);
                    } else {
                        V::enter(LargeBlock { at, x });
                    }
                } else {
                    at.panels::<V, W, R>(x);
                }
                w = w.add(here * bytes);
                for x in &mut x {
                    *x = x.add(len);
                }
            }
        }
    }
}

/// One block of a fused pass.
#[derive(Clone, Copy)]
struct FusedBlock<'a> {
    group: &'a Group<'a>,
    block: usize,
    len: usize,
    /// Bytes of one panel's block.
    bytes: usize,
    w: *const u8,
    sums: *mut f32,
}

impl FusedBlock<'_> {
    /// All panels, in register tiles as wide as the register file allows.
    #[inline(always)]
    unsafe fn panels<V: Lanes, W: Widen, const R: usize>(self, x: [*const f32; R]) {
        let mut n = 0;
        // SAFETY: panels below `wanted` exist.
        unsafe {
            if const { V::FUSED_PANELS >= 4 && R * 4 <= V::TILE } && self.group.wanted == 4 {
                return self.tile::<V, W, R, 4>(x, 0);
            }
            if const { V::FUSED_PANELS >= 2 && R * 2 <= V::TILE } {
                while n + 2 <= self.group.wanted {
                    self.tile::<V, W, R, 2>(x, n);
                    n += 2;
                }
            }
            while n < self.group.wanted {
                self.tile::<V, W, R, 1>(x, n);
                n += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<V: Lanes, W: Widen, const R: usize, const N: usize>(self, x: [*const f32; R], n0: usize) {
        let Group { p, panel, first, wanted, .. } = *self.group;
        // SAFETY: these panels exist; sums hold `[R][wanted]` vectors.
        unsafe {
            let mut w = [std::ptr::null::<u8>(); N];
            for (n, w) in w.iter_mut().enumerate() {
                *w = self.w.add((n0 + n) * self.bytes);
            }
            let sum = chain::<V, W, R, N>(x, w, self.len);
            for n in 0..N {
                for r in 0..R {
                    let t = p.scale::<V>(panel + n0 + n, self.block, first + r);
                    let to = self.sums.add((r * wanted + n0 + n) * LANES);
                    sum[r][n].fma(t, V::load(to)).store(to);
                }
            }
        }
    }
}

/// A block of e4m3 weights whose inputs are too large to be grown; rare, so one row and panel at a time.
struct LargeBlock<'a, const R: usize> {
    at: FusedBlock<'a>,
    x: [*const f32; R],
}

impl<const R: usize> Work for LargeBlock<'_, R> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Self { at, x } = self;
        let Group { p, panel, first, wanted, .. } = *at.group;
        // SAFETY: as in `FusedBlock::tile`.
        unsafe {
            for (r, x) in x.iter().enumerate() {
                for n in 0..wanted {
                    let sum = chain::<V, E4m3, 1, 1>([*x], [at.w.add(n * at.bytes)], at.len);
                    let t = p.scale::<V>(panel + n, at.block, first + r);
                    let to = at.sums.add((r * wanted + n) * LANES);
                    sum[0][0].fma(t, V::load(to)).store(to);
                }
            }
        }
    }
}

/// Writes `x * 2^112` of one block to `to` (`[R][128]`), unless a magnitude might overflow: then false.
#[inline(always)]
unsafe fn grow<V: Lanes, const R: usize>(x: [*const f32; R], len: usize, to: *mut f32) -> bool {
    // SAFETY: rows hold `len <= 128` values.
    unsafe {
        let factor = V::splat(INPUT_GROW);
        let mut largest = V::splat(0.0);
        let whole = len / LANES * LANES;
        let mut tail = 0.0_f32;
        for (r, x) in x.iter().enumerate() {
            let to = to.add(r * BLOCK);
            for i in (0..whole).step_by(LANES) {
                let v = V::load(x.add(i));
                largest = v.abs().max(largest);
                v.mul(factor).store(to.add(i));
            }
            for i in whole..len {
                tail = tail.max((*x.add(i)).abs());
                *to.add(i) = *x.add(i) * INPUT_GROW;
            }
        }
        largest.reduce_max() < INPUT_LIMIT && tail < INPUT_LIMIT
    }
}

/// How far ahead of its use a weight is fetched. A group lies in memory in the order in which it is read, but
/// the hardware's prefetchers start anew at every 4 KiB page and see two short streams in it; 8 KiB take about
/// as long to compute as memory takes to answer.
const AHEAD: usize = 8192;

/// FMA chains over one block, from +0.
#[inline(always)]
unsafe fn chain<V: Lanes, W: Widen, const R: usize, const N: usize>(
    x: [*const f32; R],
    w: [*const u8; N],
    len: usize,
) -> [[V; N]; R] {
    // SAFETY: rows hold `len` values, panels the quads of `len` steps.
    unsafe {
        let mut sum = [[V::splat(0.0); N]; R];
        for quad in 0..len / 4 {
            let k = quad * 4;
            for n in 0..N {
                let from = w[n].add(quad * W::QUAD_BYTES);
                for line in (0..W::QUAD_BYTES).step_by(64) {
                    V::prefetch(from.wrapping_add(AHEAD + line));
                }
                let codes = W::load::<V>(from);
                let step = W::step::<V, 0>(codes);
                for r in 0..R {
                    sum[r][n] = V::splat(*x[r].add(k)).fma(step, sum[r][n]);
                }
                let step = W::step::<V, 1>(codes);
                for r in 0..R {
                    sum[r][n] = V::splat(*x[r].add(k + 1)).fma(step, sum[r][n]);
                }
                let step = W::step::<V, 2>(codes);
                for r in 0..R {
                    sum[r][n] = V::splat(*x[r].add(k + 2)).fma(step, sum[r][n]);
                }
                let step = W::step::<V, 3>(codes);
                for r in 0..R {
                    sum[r][n] = V::splat(*x[r].add(k + 3)).fma(step, sum[r][n]);
                }
            }
        }
        let k = len / 4 * 4;
        for n in 0..N {
            if k == len {
                break;
            }
            let codes = W::load::<V>(w[n].add(len / 4 * W::QUAD_BYTES));
            let steps = [W::step::<V, 0>(codes), W::step::<V, 1>(codes), W::step::<V, 2>(codes)];
            for (i, step) in steps.iter().enumerate().take(len - k) {
                for r in 0..R {
                    sum[r][n] = V::splat(*x[r].add(k + i)).fma(*step, sum[r][n]);
                }
            }
        }
        sum
    }
}

/// Up to [`ROWS`] rows, each panel's block widened into scratch.
#[inline(always)]
unsafe fn tiled<V: Lanes, W: Widen>(at: Group<'_>) {
    let mut sums = std::mem::MaybeUninit::<[f32; ROWS * GROUP * LANES]>::uninit();
    let sums = sums.as_mut_ptr().cast::<f32>();
    let mut wide = std::mem::MaybeUninit::<[f32; 2 * BLOCK * LANES]>::uninit();
    let wide = wide.as_mut_ptr().cast::<f32>();
    // SAFETY: `sums` holds `[count <= ROWS][wanted <= GROUP][16]`, `wide` two blocks of up to 128 x 16.
    unsafe {
        std::slice::from_raw_parts_mut(
            sums.cast::<std::mem::MaybeUninit<f32>>(),
            at.count * at.wanted * LANES,
        )
        .fill(std::mem::MaybeUninit::new(0.0));
        let (mut k, mut w) = (0, at.w);
        for block in 0..at.p.blocks.count() {
            let len = at.p.blocks.range(block).len();
            let bytes = len.div_ceil(4) * W::QUAD_BYTES;
            let mut n = 0;
            while n < at.wanted {
                let panels = V::TILE_PANELS.min(at.wanted - n);
                for i in 0..panels {
                    let (from, to) = (w.add((n + i) * bytes), wide.add(i * BLOCK * LANES));
                    V::enter(WidenBlock { from, len, to, format: PhantomData::<W> });
                }
                tiles::<V>(Tile { at, block, n, panels, row: 0, k, len, wide, sums });
                n += panels;
            }
            k += len;
            w = w.add(at.here * bytes);
        }
        V::enter(Done { at, sums });
    }
}

/// One block of one panel as F32 `[len][16]`.
struct WidenBlock<W> {
    from: *const u8,
    len: usize,
    to: *mut f32,
    format: PhantomData<W>,
}

impl<W: Widen> Work for WidenBlock<W> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        // SAFETY: the block's quads are readable, `to` holds `len` (rounded up to fours, at most 128) vectors.
        unsafe {
            for quad in 0..self.len.div_ceil(4) {
                let codes = W::load::<V>(self.from.add(quad * W::QUAD_BYTES));
                let to = self.to.add(quad * 4 * LANES);
                W::step::<V, 0>(codes).store(to);
                W::step::<V, 1>(codes).store(to.add(LANES));
                W::step::<V, 2>(codes).store(to.add(2 * LANES));
                W::step::<V, 3>(codes).store(to.add(3 * LANES));
            }
        }
    }
}

/// All row tiles of one block of some panels: `sums = fma(block sum, scale, sums)`.
#[inline(always)]
unsafe fn tiles<V: Lanes>(mut tile: Tile<'_>) {
    // Tiles of nearly equal height keep every tile's chains many enough to hide the FMA latency.
    let count = tile.at.count;
    let tiles = count.div_ceil(V::TILE_ROWS);
    let (height, higher) = (count / tiles, count % tiles);
    for index in 0..tiles {
        let rows = height + usize::from(index < higher);
        // SAFETY: rows `row..row + rows` exist; a tile's rows are at most TILE_ROWS <= 8.
        unsafe {
            match rows {
                1 => tile.run::<V, 1>(),
                2 => tile.run::<V, 2>(),
                3 => tile.run::<V, 3>(),
                4 => tile.run::<V, 4>(),
                5 => tile.run::<V, 5>(),
                6 => tile.run::<V, 6>(),
                7 => tile.run::<V, 7>(),
                _ => tile.run::<V, 8>(),
            }
        }
        tile.row += rows;
    }
}

/// Where a tile works: rows from `row` on, panels from `n` on.
#[derive(Clone, Copy)]
struct Tile<'a> {
    at: Group<'a>,
    block: usize,
    n: usize,
    panels: usize,
    row: usize,
    k: usize,
    len: usize,
    wide: *const f32,
    sums: *mut f32,
}

impl Tile<'_> {
    #[inline(always)]
    unsafe fn run<V: Lanes, const R: usize>(self) {
        // SAFETY: as in `tiles`.
        unsafe {
            if const { R <= V::TILE_ROWS } {
                if const { V::TILE_PANELS == 2 } && self.panels == 2 {
                    V::enter(TileOf::<R, 2>(self));
                } else {
                    V::enter(TileOf::<R, 1>(self));
                }
            }
        }
    }
}

/// `R` rows by `N` panels.
struct TileOf<'a, const R: usize, const N: usize>(Tile<'a>);

impl<const R: usize, const N: usize> Work for TileOf<'_, R, N> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Tile { at, block, n: n0, row, k, len, wide, sums, .. } = self.0;
        // SAFETY: rows, panels and the widened blocks exist.
        unsafe {
            let mut x = [std::ptr::null::<f32>(); R];
            for (r, x) in x.iter_mut().enumerate() {
                *x = at.p.x.row(at.first + row + r).add(k);
            }
            let sum = tile::<V, R, N>(x, wide, BLOCK * LANES, LANES, len);
            for (r, sum) in sum.iter().enumerate() {
                for (n, sum) in sum.iter().enumerate() {
                    let to = sums.add(((row + r) * at.wanted + n0 + n) * LANES);
                    let t = at.p.scale::<V>(at.panel + n0 + n, block, at.first + row + r);
                    sum.fma(t, V::load(to)).store(to);
                }
            }
        }
    }
}

/// The register tile: `R` rows of F32 `x` times `N` groups of 16 columns of `w`, an FMA chain from +0 over
/// `len` steps. Step `k` of group `n` is at `w + n * group_stride + k * step`.
///
/// # Safety
/// The machine has `V`'s instruction set; all those elements are readable.
#[inline(always)]
pub(crate) unsafe fn tile<V: Lanes, const R: usize, const N: usize>(
    x: [*const f32; R],
    w: *const f32,
    group_stride: usize,
    step: usize,
    len: usize,
) -> [[V; N]; R] {
    // SAFETY: the caller's contract.
    unsafe {
        let mut sum = [[V::splat(0.0); N]; R];
        let mut at = w;
        for k in 0..len {
            for n in 0..N {
                let w = V::load(at.add(n * group_stride));
                for r in 0..R {
                    sum[r][n] = V::splat(*x[r].add(k)).fma(w, sum[r][n]);
                }
            }
            at = at.add(step);
        }
        sum
    }
}

/// Finishes `[count][wanted][16]` sums.
struct Done<'a> {
    at: Group<'a>,
    sums: *const f32,
}

impl Work for Done<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Group { p, panel, wanted, first, count, .. } = self.at;
        // SAFETY: sums are filled; rows exist in `y`; only outputs that exist are stored.
        unsafe {
            for row in 0..count {
                let y = p.y.row(first + row);
                let sums = self.sums.add(row * wanted * LANES);
                match p.finish {
                    Finish::Exact | Finish::Bf16 => {
                        for n in 0..wanted {
                            let v = V::load(sums.add(n * LANES));
                            let v = if p.finish == Finish::Bf16 { v.round_bf16() } else { v };
                            let at = (panel + n) * LANES;
                            store::<V>(v, y.add(at), p.outputs - at);
                        }
                    }
                    Finish::SiluExact | Finish::SiluBf16 => {
                        for n in 0..wanted / 2 {
                            let gate = V::load(sums.add(2 * n * LANES));
                            let up = V::load(sums.add((2 * n + 1) * LANES));
                            let v = gate.silu().mul(up);
                            let v = if p.finish == Finish::SiluBf16 { v.round_bf16() } else { v };
                            let at = (panel / 2 + n) * LANES;
                            store::<V>(v, y.add(at), p.outputs - at);
                        }
                    }
                }
            }
        }
    }
}

/// Stores the lanes that exist.
#[inline(always)]
pub(crate) unsafe fn store<V: Lanes>(v: V, to: *mut f32, exist: usize) {
    // SAFETY: `to` has room for `min(exist, 16)` elements.
    unsafe {
        if exist >= LANES {
            v.store(to);
        } else {
            let mut lanes = [0.0_f32; LANES];
            v.store(lanes.as_mut_ptr());
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, exist);
        }
    }
}
