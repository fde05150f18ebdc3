//! AVX-512 F, BW, DQ, VL: all lanes in one register.

use std::arch::x86_64::*;

use super::{E4M3_MAX, Lanes, Work, avx2::tree4_of_8};

/// Sixteen F32 in one register.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(__m512);

/// Bits rounded to bf16, in the upper half of each lane, the lower half zero.
///
/// # Safety
/// AVX-512 F must be available.
#[inline(always)]
unsafe fn round_bf16_bits(v: __m512) -> __m512i {
    // SAFETY: AVX-512 F is available.
    unsafe {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let chosen = _mm512_mask_blend_epi32(nan, rounded, quiet);
        _mm512_and_si512(chosen, _mm512_set1_epi32(0xFFFF_0000_u32 as i32))
    }
}

// SAFETY notes of this file: the trait's contract is that the instruction set is available and pointers are
// valid for the elements that a method names; loads and stores are unaligned forms.
impl Lanes for Avx512 {
    type Words = __m512i;

    // 32 registers: 24 may hold sums.
    const TILE: usize = 24;
    const FUSED_PANELS: usize = 4;
    const FUSED_ROWS: usize = 6;
    const TILE_ROWS: usize = 8;
    const TILE_PANELS: usize = 2;
    const QUERIES: usize = 6;
    const SCORE_KEYS: usize = 4;

    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline(never)]
    unsafe fn enter<W: Work>(work: W) -> W::Out {
        // SAFETY: the trait's contract, and the caller's for this work.
        unsafe { work.run::<Self>() }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm512_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm512_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }

    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm512_add_ps(self.0, b.0)) }
    }

    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm512_sub_ps(self.0, b.0)) }
    }

    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm512_mul_ps(self.0, b.0)) }
    }

    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm512_div_ps(self.0, b.0)) }
    }

    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: the trait's contract. The instruction returns its second operand where one is NaN.
        unsafe { Self(_mm512_max_ps(self.0, b.0)) }
    }

    #[inline(always)]
    unsafe fn abs(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm512_abs_ps(self.0)) }
    }

    #[inline(always)]
    unsafe fn if_less(self, b: Self, yes: Self, no: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let less = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, b.0);
            Self(_mm512_mask_blend_ps(less, no.0, yes.0))
        }
    }

    #[inline(always)]
    unsafe fn if_nan_else(self, other: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            Self(_mm512_mask_blend_ps(nan, other.0, self.0))
        }
    }

    #[inline(always)]
    unsafe fn scale_exponent(self, n: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let shift = _mm512_slli_epi32::<23>(_mm512_cvtps_epi32(n.0));
            Self(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(self.0), shift)))
        }
    }

    #[inline(always)]
    unsafe fn round_bf16(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm512_castsi512_ps(round_bf16_bits(self.0))) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u8) {
        // SAFETY: the trait's contract.
        unsafe {
            let high = _mm512_srli_epi32::<16>(round_bf16_bits(self.0));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(high));
        }
    }

    #[inline(always)]
    unsafe fn load_words(from: *const u8) -> Self::Words {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn e4m3_small<const B: usize>(words: Self::Words) -> Self {
        // SAFETY: the trait's contract. The bits move as in the AVX2 form.
        unsafe {
            let upper = if B % 2 == 1 { words } else { _mm512_slli_epi16::<8>(words) };
            let halves = _mm512_srai_epi16::<4>(upper);
            let word = if B >= 2 { halves } else { _mm512_slli_epi32::<16>(halves) };
            let mask = _mm512_set1_epi32(0x87F0_0000_u32 as i32);
            Self(_mm512_castsi512_ps(_mm512_and_si512(word, mask)))
        }
    }

    #[inline(always)]
    unsafe fn bf16_half<const H: usize>(words: Self::Words) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let upper = _mm512_set1_epi32(0xFFFF_0000_u32 as i32);
            Self(_mm512_castsi512_ps(match H {
                0 => _mm512_slli_epi32::<16>(words),
                _ => _mm512_and_si512(words, upper),
            }))
        }
    }

    #[inline(always)]
    unsafe fn round_e4m3(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let sign = _mm512_and_si512(bits, _mm512_set1_epi32(i32::MIN));
            let magnitude = _mm512_abs_ps(self.0);
            let magic = _mm512_set1_ps(16384.0);
            let small = _mm512_sub_ps(_mm512_add_ps(magnitude, magic), magic);
            let bits = _mm512_castps_si512(magnitude);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<20>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7_FFFF)));
            let cut = _mm512_and_si512(rounded, _mm512_set1_epi32(0xFFF0_0000_u32 as i32));
            let large = _mm512_min_ps(_mm512_castsi512_ps(cut), _mm512_set1_ps(E4M3_MAX));
            let is_small = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(magnitude, _mm512_set1_ps(1.0 / 64.0));
            let value = _mm512_castps_si512(_mm512_mask_blend_ps(is_small, large, small));
            let value = _mm512_castsi512_ps(_mm512_or_si512(value, sign));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            Self(_mm512_mask_blend_ps(nan, value, self.0))
        }
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_reduce_max_ps(self.0) }
    }

    #[inline(always)]
    unsafe fn tree4(vectors: [Self; 4]) -> [f32; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            let [a, b, c, d] = vectors;
            let low = |v: Self| _mm512_castps512_ps256(v.0);
            let high = |v: Self| _mm512_extractf32x8_ps::<1>(v.0);
            tree4_of_8([
                _mm256_add_ps(low(a), high(a)),
                _mm256_add_ps(low(b), high(b)),
                _mm256_add_ps(low(c), high(c)),
                _mm256_add_ps(low(d), high(d)),
            ])
        }
    }
}
