//! Products of few rows: weights are widened in registers and used for all rows of the tile at once.
//!
//! This is the kernel of decoding and as fast as the weights arrive, so two things matter beside arithmetic:
//! inputs are grown by a power of two so that e4m3 codes need no multiplication, and weights are fetched ahead.

use std::marker::PhantomData;

use cadre_numerics::BLOCK;

use super::{
    Done, FUSED_ROWS, Group,
    widen::{E4m3, E4m3Small, Widen},
};
use crate::{
    lanes::{E4M3_GROW, LANES, Lanes, Work},
    packed::GROUP,
};

/// The factor on inputs of [`E4m3Small`], and the magnitude below which it cannot overflow. Powers of two are
/// exact, so `(x 2^112) (w 2^-120)` is the product that the specification names, `x (w 2^-8)`, with the same
/// rounding in every FMA.
const INPUT_GROW: f32 = E4M3_GROW;
const INPUT_LIMIT: f32 = 32768.0;

/// Up to [`Lanes::FUSED_ROWS`] rows, weights widened in registers.
#[inline(always)]
pub(super) unsafe fn fused<V: Lanes, W: Widen>(at: Group<'_>) {
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
