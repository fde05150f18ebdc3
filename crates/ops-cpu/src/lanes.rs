//! Sixteen F32 lanes: the one vector type that kernels are written over.
//!
//! Each implementation rounds every operation like the scalar operation of its name, so a kernel gives the
//! same bits in all of them. Methods are `unsafe` because the implementations use instructions that the
//! machine must have; kernels are entered only through [`crate::table`], which checks.
//!
//! All methods are `#[inline(always)]`: they must be inlined into a function that enables the instruction
//! set, or the intrinsics would become calls.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod scalar;
#[cfg(test)]
mod tests;

use cadre_numerics::{e4m3, exp};

/// Lanes of a vector, outputs of a panel.
pub(crate) const LANES: usize = 16;

/// A piece of a kernel that becomes a function of its own for each instruction set.
pub(crate) trait Work {
    /// Its result.
    type Out;

    /// # Safety
    /// The machine has `V`'s instruction set, and what the implementing type says of its pointers holds.
    unsafe fn run<V: Lanes>(self) -> Self::Out;
}

/// Sixteen F32 values.
///
/// # Safety
/// Every method requires that the machine has the implementation's instruction set; those that take a
/// pointer require that many readable or writable elements behind it, at any alignment.
pub(crate) trait Lanes: Copy {
    /// Sixteen 32-bit words.
    type Words: Copy;

    /// Rows times panels of a register tile whose weights are widened in registers.
    const TILE: usize;
    /// Most panels of such a tile.
    const FUSED_PANELS: usize;
    /// Rows up to which weights are widened in registers.
    const FUSED_ROWS: usize;
    /// Rows of a register tile in a product of many rows.
    const TILE_ROWS: usize;
    /// Panels of a register tile in a product of many rows.
    const TILE_PANELS: usize;
    /// Query rows of an attention tile.
    const QUERIES: usize;
    /// Keys of a register tile of scores.
    const SCORE_KEYS: usize;

    /// Runs `work` inside a function of its own that enables the instruction set. Everything that is not
    /// entered here is inlined into its caller: one function per tile shape keeps the compiler's work linear.
    unsafe fn enter<W: Work>(work: W) -> W::Out;

    /// Asks for the cache line of an address, which need not exist.
    unsafe fn prefetch(at: *const u8);
    /// All lanes `value`.
    unsafe fn splat(value: f32) -> Self;
    /// 16 consecutive F32.
    unsafe fn load(from: *const f32) -> Self;
    /// 16 consecutive F32.
    unsafe fn store(self, to: *mut f32);
    /// `self * b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// `self + b`.
    unsafe fn add(self, b: Self) -> Self;
    /// `self - b`.
    unsafe fn sub(self, b: Self) -> Self;
    /// `self * b`.
    unsafe fn mul(self, b: Self) -> Self;
    /// `self / b`.
    unsafe fn div(self, b: Self) -> Self;
    /// The larger; `b` where `self` is NaN.
    unsafe fn max(self, b: Self) -> Self;
    /// Magnitude.
    unsafe fn abs(self) -> Self;
    /// `if self < b { yes } else { no }`, lane by lane; false where one is NaN.
    unsafe fn if_less(self, b: Self, yes: Self, no: Self) -> Self;
    /// `if self is NaN { self } else { other }`.
    unsafe fn if_nan_else(self, other: Self) -> Self;
    /// `self * 2^n` by adding to the exponent bits; `n` holds integers that keep the result normal.
    unsafe fn scale_exponent(self, n: Self) -> Self;
    /// Rounded to bf16, as F32.
    unsafe fn round_bf16(self) -> Self;
    /// 16 consecutive bf16.
    unsafe fn load_bf16(from: *const u8) -> Self;
    /// Rounded to bf16 and stored as 16 consecutive bf16.
    unsafe fn store_bf16(self, to: *mut u8);
    /// 64 bytes: 16 words of 32 bits.
    unsafe fn load_words(from: *const u8) -> Self::Words;
    /// Byte `B` of every word as an e4m3 code, as value x 2^-120: the code's bits where an F32 has them. The
    /// seven subnormal codes become subnormal F32.
    unsafe fn e4m3_small<const B: usize>(words: Self::Words) -> Self;
    /// Half `H` (0 the lower) of every word as a bf16.
    unsafe fn bf16_half<const H: usize>(words: Self::Words) -> Self;
    /// Rounded to the nearest e4m3 value, saturating, as F32.
    unsafe fn round_e4m3(self) -> Self;
    /// The largest lane; NaN lanes may be ignored.
    unsafe fn reduce_max(self) -> f32;
    /// Sums of four vectors' lanes, each as `cadre_numerics::reduce::tree`.
    unsafe fn tree4(vectors: [Self; 4]) -> [f32; 4];

    /// Sum of the lanes as `cadre_numerics::reduce::tree`.
    #[inline(always)]
    unsafe fn tree(self) -> f32 {
        // SAFETY: the caller's contract.
        unsafe {
            let zero = Self::splat(0.0);
            Self::tree4([self, zero, zero, zero])[0]
        }
    }

    /// `cadre_numerics::exp::exp`.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: the caller's contract.
        unsafe {
            let magic = Self::splat(exp::ROUND_MAGIC);
            let n = self.mul(Self::splat(exp::LOG2_E)).add(magic).sub(magic);
            let r = n.fma(Self::splat(-exp::LN_2_HIGH), self);
            let r = n.fma(Self::splat(-exp::LN_2_LOW), r);
            let mut p = Self::splat(exp::EXP_POLYNOMIAL[0]);
            for c in &exp::EXP_POLYNOMIAL[1..] {
                p = p.fma(r, Self::splat(*c));
            }
            let y = p.scale_exponent(n);
            let low = Self::splat(exp::EXP_ZERO_BELOW);
            let high = Self::splat(exp::EXP_INFINITE_ABOVE);
            let y = self.if_less(low, Self::splat(0.0), y);
            let y = high.if_less(self, Self::splat(f32::INFINITY), y);
            self.if_nan_else(y)
        }
    }

    /// `cadre_numerics::exp::silu`.
    #[inline(always)]
    unsafe fn silu(self) -> Self {
        // SAFETY: the caller's contract.
        unsafe {
            // Negation flips the sign bit, as in the scalar form (0 - x would not for zeros; exp does not
            // care).
            let negative = Self::splat(0.0).sub(self);
            self.div(Self::splat(1.0).add(negative.exp()))
        }
    }
}

/// What makes value x 2^-8 of [`Lanes::e4m3_small`].
pub(crate) const E4M3_GROW: f32 = f32::from_bits((127 + 112) << 23);

/// Largest finite e4m3 value.
pub(crate) const E4M3_MAX: f32 = e4m3::MAX;
