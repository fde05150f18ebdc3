//! Row-wise operations: norm, quantiser, rotation, combine, and the conversions around them.

use cadre_numerics::{BLOCK, bf16, norm, quant, rope};

use crate::lanes::{LANES, Lanes};

/// `1 / sqrt(mean square + eps)` of `cols` values, as `cadre_numerics::norm::inverse_rms`.
///
/// # Safety
/// The machine has `V`'s instruction set; `x` holds `cols` values.
#[inline(always)]
unsafe fn inverse_rms<V: Lanes>(x: *const f32, cols: usize, eps: f32) -> f32 {
    // SAFETY: the caller's contract; the tail is padded with zeros, which add nothing to squares.
    unsafe {
        let mut sum = V::splat(0.0);
        let whole = cols / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            let v = V::load(x.add(i));
            sum = v.fma(v, sum);
        }
        if whole < cols {
            let mut tail = [0.0_f32; LANES];
            std::ptr::copy_nonoverlapping(x.add(whole), tail.as_mut_ptr(), cols - whole);
            let v = V::load(tail.as_ptr());
            sum = v.fma(v, sum);
        }
        1.0 / (sum.tree() / cols as f32 + eps).sqrt()
    }
}

/// RMSNorm of one row into `y`, rounded to bf16 if `round`.
///
/// # Safety
/// The machine has `V`'s instruction set; `x`, `weight` and `y` hold `cols` values; `y` is not shared.
#[inline(always)]
pub(crate) unsafe fn rms_norm<V: Lanes>(
    x: *const f32,
    weight: *const f32,
    eps: f32,
    cols: usize,
    round: bool,
    y: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let inverse = inverse_rms::<V>(x, cols, eps);
        let whole = cols / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            let v = V::load(x.add(i)).mul(V::splat(inverse)).mul(V::load(weight.add(i)));
            let v = if round { v.round_bf16() } else { v };
            v.store(y.add(i));
        }
        for i in whole..cols {
            let v = norm::scaled(*x.add(i), inverse, *weight.add(i));
            *y.add(i) = if round { bf16::round(v) } else { v };
        }
    }
}

/// Quantises one row: `y` becomes the codes' values, `scales` one per started block of 128.
///
/// # Safety
/// The machine has `V`'s instruction set; `x` and `y` hold `cols` values (they may be the same row),
/// `scales` one per block; `y` and `scales` are not shared.
#[inline(always)]
pub(crate) unsafe fn quantise<V: Lanes>(
    x: *const f32,
    cols: usize,
    powers_of_two: bool,
    y: *mut f32,
    scales: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        for block in 0..cols.div_ceil(BLOCK) {
            let start = block * BLOCK;
            let len = (cols - start).min(BLOCK);
            let mut padded = [0.0_f32; BLOCK];
            std::ptr::copy_nonoverlapping(x.add(start), padded.as_mut_ptr(), len);
            let mut amax = V::splat(quant::MIN_AMAX);
            for i in (0..BLOCK).step_by(LANES) {
                amax = V::load(padded.as_ptr().add(i)).abs().max(amax);
            }
            let mut scale = amax.reduce_max() / cadre_numerics::e4m3::MAX;
            if powers_of_two {
                scale = quant::up_to_power_of_two(scale);
            }
            *scales.add(block) = scale;
            for i in (0..BLOCK).step_by(LANES) {
                let v = V::load(padded.as_ptr().add(i)).div(V::splat(scale)).round_e4m3();
                v.store(padded.as_mut_ptr().add(i));
            }
            std::ptr::copy_nonoverlapping(padded.as_ptr(), y.add(start), len);
        }
    }
}

/// Codes of values that are e4m3 already, as `cadre_numerics::e4m3::encode`. Written in scalar form without
/// branches for the compiler to make vectors of.
///
/// # Safety
/// The machine has `V`'s instruction set; `from` holds `cols` values, `to` as many codes and is not shared.
#[inline(always)]
pub(crate) unsafe fn encode_e4m3<V: Lanes>(from: *const f32, cols: usize, to: *mut u8) {
    // SAFETY: the caller's contract.
    unsafe {
        for i in 0..cols {
            let bits = (*from.add(i)).to_bits();
            let magnitude = bits & 0x7FFF_FFFF;
            let normal = (magnitude >> 20).wrapping_sub(120 << 3);
            // Below 2^-6 in steps of 2^-9: adding 2^14, whose last place that is, leaves the step count in
            // the low bits.
            let subnormal = (f32::from_bits(magnitude) + 16384.0).to_bits() & 7;
            let code = if magnitude < 0x3C80_0000 { subnormal } else { normal };
            let code = if magnitude > 0x7F80_0000 { 0x7F } else { code };
            *to.add(i) = (code | (bits >> 24) & 0x80) as u8;
        }
    }
}

/// Sigmoid of one row in place, as `cadre_numerics::exp::sigmoid`.
///
/// # Safety
/// The machine has `V`'s instruction set; `x` holds `cols` values and is not shared.
#[inline(always)]
pub(crate) unsafe fn sigmoid<V: Lanes>(x: *mut f32, cols: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let one = V::splat(1.0);
        let of = |v: V| one.div(one.add(V::splat(0.0).sub(v).exp()));
        let whole = cols / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            of(V::load(x.add(i))).store(x.add(i));
        }
        if whole < cols {
            let mut tail = [0.0_f32; LANES];
            std::ptr::copy_nonoverlapping(x.add(whole), tail.as_mut_ptr(), cols - whole);
            of(V::load(tail.as_ptr())).store(tail.as_mut_ptr());
            std::ptr::copy_nonoverlapping(tail.as_ptr(), x.add(whole), cols - whole);
        }
    }
}

/// Rotates the pairs of one rotary part in place; `table` holds (cos, sin) per pair. Pairs are neighbours, so
/// this is written in scalar form and left to the compiler.
///
/// # Safety
/// The machine has `V`'s instruction set; `x` holds `2 * pairs` values and is not shared, `table` as many.
#[inline(always)]
pub(crate) unsafe fn rotate<V: Lanes>(x: *mut f32, table: *const f32, pairs: usize, round: bool) {
    // SAFETY: the caller's contract.
    unsafe {
        for i in 0..pairs {
            let (cos, sin) = (*table.add(2 * i), *table.add(2 * i + 1));
            let (a, b) = rope::rotate(*x.add(2 * i), *x.add(2 * i + 1), cos, sin);
            *x.add(2 * i) = if round { bf16::round(a) } else { a };
            *x.add(2 * i + 1) = if round { bf16::round(b) } else { b };
        }
    }
}

/// Widens one row of bf16.
///
/// # Safety
/// The machine has `V`'s instruction set; `from` holds `cols` bf16, `to` `cols` F32; `to` is not shared.
#[inline(always)]
pub(crate) unsafe fn widen_bf16<V: Lanes>(from: *const u8, cols: usize, to: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe {
        let whole = cols / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            V::load_bf16(from.add(2 * i)).store(to.add(i));
        }
        for i in whole..cols {
            let code = from.add(2 * i).cast::<[u8; 2]>().read_unaligned();
            *to.add(i) = bf16::decode(u16::from_le_bytes(code));
        }
    }
}

/// Rounds one row to bf16.
///
/// # Safety
/// The machine has `V`'s instruction set; `from` holds `cols` F32, `to` `cols` bf16; `to` is not shared.
#[inline(always)]
pub(crate) unsafe fn narrow_bf16<V: Lanes>(from: *const f32, cols: usize, to: *mut u8) {
    // SAFETY: the caller's contract.
    unsafe {
        let whole = cols / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            V::load(from.add(i)).store_bf16(to.add(2 * i));
        }
        for i in whole..cols {
            let code = bf16::encode(*from.add(i)).to_le_bytes();
            to.add(2 * i).cast::<[u8; 2]>().write_unaligned(code);
        }
    }
}

/// Expert rows of one token: how they are encoded and where they are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpertRows {
    /// Where the rows of the token begin.
    pub(crate) rows: *const *const u8,
    /// bf16 or F32 (any alignment).
    pub(crate) bf16: bool,
}

impl ExpertRows {
    #[inline(always)]
    unsafe fn vector<V: Lanes>(&self, j: usize, i: usize) -> V {
        // SAFETY: 16 elements of an existing row; loads are unaligned.
        unsafe {
            let row = *self.rows.add(j);
            if self.bf16 { V::load_bf16(row.add(2 * i)) } else { V::load(row.add(4 * i).cast()) }
        }
    }

    #[inline(always)]
    unsafe fn element(&self, j: usize, i: usize) -> f32 {
        // SAFETY: an element of an existing row.
        unsafe {
            let row = *self.rows.add(j);
            if self.bf16 {
                let code = row.add(2 * i).cast::<[u8; 2]>().read_unaligned();
                bf16::decode(u16::from_le_bytes(code))
            } else {
                f32::from_le_bytes(row.add(4 * i).cast::<[u8; 4]>().read_unaligned())
            }
        }
    }
}

/// `x += (sum over j of weights[j] * row j) + shared` for one token; `shared` may be null.
///
/// # Safety
/// The machine has `V`'s instruction set; there are `top_k` rows and weights; `shared` and `x` hold `cols`
/// values; `x` is not shared.
#[inline(always)]
pub(crate) unsafe fn combine<V: Lanes>(
    rows: &ExpertRows,
    weights: *const f32,
    top_k: usize,
    shared: *const f32,
    cols: usize,
    x: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let whole = cols / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            let mut sum = V::splat(0.0);
            for j in 0..top_k {
                sum = V::splat(*weights.add(j)).fma(rows.vector::<V>(j, i), sum);
            }
            if !shared.is_null() {
                sum = sum.add(V::load(shared.add(i)));
            }
            V::load(x.add(i)).add(sum).store(x.add(i));
        }
        for i in whole..cols {
            let mut sum = 0.0_f32;
            for j in 0..top_k {
                sum = (*weights.add(j)).mul_add(rows.element(j, i), sum);
            }
            if !shared.is_null() {
                sum += *shared.add(i);
            }
            *x.add(i) += sum;
        }
    }
}

/// `x += delta`.
///
/// # Safety
/// The machine has `V`'s instruction set; both hold `len` values; `x` is not shared.
#[inline(always)]
pub(crate) unsafe fn add<V: Lanes>(x: *mut f32, delta: *const f32, len: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let whole = len / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            V::load(x.add(i)).add(V::load(delta.add(i))).store(x.add(i));
        }
        for i in whole..len {
            *x.add(i) += *delta.add(i);
        }
    }
}
