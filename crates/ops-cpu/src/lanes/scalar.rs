//! The portable form: an array, each lane through `cadre-numerics`.

use cadre_numerics::{bf16, e4m3, reduce};

use super::{LANES, Lanes, Work};

/// Sixteen F32 in an array.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar([f32; LANES]);

impl Scalar {
    #[inline(always)]
    fn map(self, f: impl Fn(f32) -> f32) -> Self {
        Self(self.0.map(f))
    }

    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

// SAFETY notes of this file: every pointer is valid for the elements that a method names, by the trait's
// contract; no instruction set is needed.
impl Lanes for Scalar {
    type Words = [[u8; 4]; LANES];

    const TILE: usize = 1;
    const FUSED_PANELS: usize = 1;
    const FUSED_ROWS: usize = 1;
    const TILE_ROWS: usize = 1;
    const TILE_PANELS: usize = 1;
    const QUERIES: usize = 1;
    const SCORE_KEYS: usize = 2;

    #[inline(never)]
    unsafe fn enter<W: Work>(work: W) -> W::Out {
        // SAFETY: the trait's contract, and the caller's for this work.
        unsafe { work.run::<Self>() }
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: 16 readable F32.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 16 writable F32.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }

    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.zip(b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn abs(self) -> Self {
        self.map(f32::abs)
    }

    #[inline(always)]
    unsafe fn if_less(self, b: Self, yes: Self, no: Self) -> Self {
        Self(std::array::from_fn(|i| if self.0[i] < b.0[i] { yes.0[i] } else { no.0[i] }))
    }

    #[inline(always)]
    unsafe fn if_nan_else(self, other: Self) -> Self {
        self.zip(other, |a, b| if a.is_nan() { a } else { b })
    }

    #[inline(always)]
    unsafe fn scale_exponent(self, n: Self) -> Self {
        // Out of range (NaN, beyond exp's range) the result is not used; the cast saturates.
        self.zip(n, |p, n| f32::from_bits(p.to_bits().wrapping_add(((n as i32) << 23) as u32)))
    }

    #[inline(always)]
    unsafe fn round_bf16(self) -> Self {
        self.map(bf16::round)
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self {
        // SAFETY: 32 readable bytes.
        let bytes = unsafe { from.cast::<[[u8; 2]; LANES]>().read_unaligned() };
        Self(bytes.map(|b| bf16::decode(u16::from_le_bytes(b))))
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u8) {
        let bytes = self.0.map(|v| bf16::encode(v).to_le_bytes());
        // SAFETY: 32 writable bytes.
        unsafe { to.cast::<[[u8; 2]; LANES]>().write_unaligned(bytes) }
    }

    #[inline(always)]
    unsafe fn load_words(from: *const u8) -> Self::Words {
        // SAFETY: 64 readable bytes.
        unsafe { from.cast::<[[u8; 4]; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn e4m3_small<const B: usize>(words: Self::Words) -> Self {
        Self(words.map(|bytes| {
            let code = u32::from(bytes[B]);
            f32::from_bits((code & 0x80) << 24 | (code & 0x7F) << 20)
        }))
    }

    #[inline(always)]
    unsafe fn bf16_half<const H: usize>(words: Self::Words) -> Self {
        Self(words.map(|b| bf16::decode(u16::from_le_bytes([b[2 * H], b[2 * H + 1]]))))
    }

    #[inline(always)]
    unsafe fn round_e4m3(self) -> Self {
        self.map(e4m3::round)
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, |max, v| if v > max { v } else { max })
    }

    #[inline(always)]
    unsafe fn tree4(vectors: [Self; 4]) -> [f32; 4] {
        vectors.map(|v| reduce::tree(v.0))
    }
}
