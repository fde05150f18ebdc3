//! Products of many rows: each panel's block is widened into scratch memory once and used for every row, in
//! register tiles.

use std::marker::PhantomData;

use cadre_numerics::BLOCK;

use super::{Done, Group, ROWS, widen::Widen};
use crate::{
    lanes::{LANES, Lanes, Work},
    packed::GROUP,
};

/// Up to [`ROWS`] rows, each panel's block widened into scratch.
#[inline(always)]
pub(super) unsafe fn tiled<V: Lanes, W: Widen>(at: Group<'_>) {
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
