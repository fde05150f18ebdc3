//! AVX2 with FMA: lanes 0..8 and 8..16 in two registers.

use std::arch::x86_64::*;

use super::{E4M3_MAX, Lanes, Work};

/// Sixteen F32 in two registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(__m256, __m256);

/// The tree sums of four vectors whose lanes `i` and `i + 8` are already added.
///
/// # Safety
/// AVX2 must be available.
#[inline(always)]
pub(super) unsafe fn tree4_of_8(v: [__m256; 4]) -> [f32; 4] {
    // SAFETY: AVX2 is available.
    unsafe {
        // + 4: [a0+a4 .. a3+a7 | b0+b4 ..] and the same of c, d.
        let ab = _mm256_add_ps(
            _mm256_permute2f128_ps::<0x20>(v[0], v[1]),
            _mm256_permute2f128_ps::<0x31>(v[0], v[1]),
        );
        let cd = _mm256_add_ps(
            _mm256_permute2f128_ps::<0x20>(v[2], v[3]),
            _mm256_permute2f128_ps::<0x31>(v[2], v[3]),
        );
        // + 2: [a0+a2, a1+a3, c0+c2, c1+c3 | b.., d..].
        let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
        let sums = _mm256_add_ps(
            _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
            _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)),
        );
        // + 1: a in element 0, c in 2, b in 4, d in 6.
        let sums = _mm256_add_ps(sums, _mm256_movehdup_ps(sums));
        let low = _mm256_castps256_ps128(sums);
        let high = _mm256_extractf128_ps::<1>(sums);
        // [a, c, b, d] -> [a, b, c, d].
        let acbd = _mm_shuffle_ps::<0b10_00_10_00>(low, high);
        let abcd = _mm_shuffle_ps::<0b11_01_10_00>(acbd, acbd);
        std::mem::transmute::<__m128, [f32; 4]>(abcd)
    }
}

/// The upper 16 bits of each lane after rounding to bf16, in the upper half of each lane.
///
/// # Safety
/// AVX2 must be available.
#[inline(always)]
unsafe fn round_bf16_bits(v: __m256) -> __m256i {
    // SAFETY: AVX2 is available.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        let chosen = _mm256_blendv_epi8(rounded, quiet, nan);
        _mm256_and_si256(chosen, _mm256_set1_epi32(0xFFFF_0000_u32 as i32))
    }
}

/// # Safety
/// AVX2 must be available.
#[inline(always)]
unsafe fn round_e4m3(v: __m256) -> __m256 {
    // SAFETY: AVX2 is available.
    unsafe {
        let sign_mask = _mm256_set1_ps(-0.0);
        let sign = _mm256_and_ps(v, sign_mask);
        let magnitude = _mm256_andnot_ps(sign_mask, v);
        let magic = _mm256_set1_ps(16384.0);
        let small = _mm256_sub_ps(_mm256_add_ps(magnitude, magic), magic);
        let bits = _mm256_castps_si256(magnitude);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<20>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7_FFFF)));
        let cut = _mm256_and_si256(rounded, _mm256_set1_epi32(0xFFF0_0000_u32 as i32));
        let large = _mm256_min_ps(_mm256_castsi256_ps(cut), _mm256_set1_ps(E4M3_MAX));
        let is_small = _mm256_cmp_ps::<_CMP_LT_OQ>(magnitude, _mm256_set1_ps(1.0 / 64.0));
        let value = _mm256_or_ps(_mm256_blendv_ps(large, small, is_small), sign);
        let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(v, v);
        _mm256_blendv_ps(value, v, nan)
    }
}

/// Byte `B` of eight words as e4m3, times 2^-120.
///
/// # Safety
/// AVX2 must be available.
#[inline(always)]
unsafe fn e4m3_small<const B: usize>(words: __m256i) -> __m256 {
    // SAFETY: AVX2 is available.
    unsafe {
        // Sign on top, the seven bits below four copies of it; the mask drops the copies. For the upper half of
        // a word that is an arithmetic shift by 4; for the lower half a signed multiplication by 2^12, which
        // takes another execution port. Bytes 0 and 2 first move up by one.
        let upper = if B % 2 == 1 { words } else { _mm256_slli_epi16::<8>(words) };
        let word = if B >= 2 {
            _mm256_srai_epi32::<4>(upper)
        } else {
            _mm256_madd_epi16(upper, _mm256_set1_epi32(1 << 12))
        };
        let mask = _mm256_set1_epi32(0x87F0_0000_u32 as i32);
        _mm256_castsi256_ps(_mm256_and_si256(word, mask))
    }
}

/// Half `H` of eight words as bf16.
///
/// # Safety
/// AVX2 must be available.
#[inline(always)]
unsafe fn bf16_half<const H: usize>(words: __m256i) -> __m256 {
    // SAFETY: AVX2 is available.
    unsafe {
        let upper = _mm256_set1_epi32(0xFFFF_0000_u32 as i32);
        _mm256_castsi256_ps(match H {
            0 => _mm256_slli_epi32::<16>(words),
            _ => _mm256_and_si256(words, upper),
        })
    }
}

/// Eight lanes of `if a < b { yes } else { no }`.
///
/// # Safety
/// AVX2 must be available.
#[inline(always)]
unsafe fn if_less(a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 {
    // SAFETY: AVX2 is available.
    unsafe { _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) }
}

// SAFETY notes of this file: the trait's contract is that AVX2 and FMA are available and pointers
// are valid for the elements that a method names; loads and stores are unaligned forms.
impl Lanes for Avx2 {
    type Words = (__m256i, __m256i);

    // Of 16 registers, 8 hold sums; more of them and the words of weights spill (measured).
    const TILE: usize = 4;
    const FUSED_PANELS: usize = 2;
    const FUSED_ROWS: usize = 5;
    const TILE_ROWS: usize = 6;
    const TILE_PANELS: usize = 1;
    const QUERIES: usize = 6;
    const SCORE_KEYS: usize = 2;

    #[target_feature(enable = "avx2,fma")]
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
        unsafe { Self(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
    }

    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm256_div_ps(self.0, b.0), _mm256_div_ps(self.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: the trait's contract. The instruction returns its second operand where one is NaN.
        unsafe { Self(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn abs(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            Self(_mm256_andnot_ps(sign, self.0), _mm256_andnot_ps(sign, self.1))
        }
    }

    #[inline(always)]
    unsafe fn if_less(self, b: Self, yes: Self, no: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(if_less(self.0, b.0, yes.0, no.0), if_less(self.1, b.1, yes.1, no.1)) }
    }

    #[inline(always)]
    unsafe fn if_nan_else(self, other: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let nan = |v| _mm256_cmp_ps::<_CMP_UNORD_Q>(v, v);
            Self(
                _mm256_blendv_ps(other.0, self.0, nan(self.0)),
                _mm256_blendv_ps(other.1, self.1, nan(self.1)),
            )
        }
    }

    #[inline(always)]
    unsafe fn scale_exponent(self, n: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let shift = |n| _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
            let add = |p, n| _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), shift(n)));
            Self(add(self.0, n.0), add(self.1, n.1))
        }
    }

    #[inline(always)]
    unsafe fn round_bf16(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            Self(_mm256_castsi256_ps(round_bf16_bits(self.0)), _mm256_castsi256_ps(round_bf16_bits(self.1)))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let widen = |v| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(v)));
            Self(widen(_mm_loadu_si128(from.cast())), widen(_mm_loadu_si128(from.add(16).cast())))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u8) {
        // SAFETY: the trait's contract.
        unsafe {
            let low = _mm256_srli_epi32::<16>(round_bf16_bits(self.0));
            let high = _mm256_srli_epi32::<16>(round_bf16_bits(self.1));
            // Packing works within 128-bit halves; the permutation restores the order.
            let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
            _mm256_storeu_si256(to.cast(), packed);
        }
    }

    #[inline(always)]
    unsafe fn load_words(from: *const u8) -> Self::Words {
        // SAFETY: the trait's contract.
        unsafe { (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())) }
    }

    #[inline(always)]
    unsafe fn e4m3_small<const B: usize>(words: Self::Words) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(e4m3_small::<B>(words.0), e4m3_small::<B>(words.1)) }
    }

    #[inline(always)]
    unsafe fn bf16_half<const H: usize>(words: Self::Words) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(bf16_half::<H>(words.0), bf16_half::<H>(words.1)) }
    }

    #[inline(always)]
    unsafe fn round_e4m3(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(round_e4m3(self.0), round_e4m3(self.1)) }
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        // SAFETY: the trait's contract.
        unsafe {
            let v = _mm256_max_ps(self.0, self.1);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            let v = _mm_max_ss(v, _mm_movehdup_ps(v));
            _mm_cvtss_f32(v)
        }
    }

    #[inline(always)]
    unsafe fn tree4(vectors: [Self; 4]) -> [f32; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            let [a, b, c, d] = vectors;
            tree4_of_8([
                _mm256_add_ps(a.0, a.1),
                _mm256_add_ps(b.0, b.1),
                _mm256_add_ps(c.0, c.1),
                _mm256_add_ps(d.0, d.1),
            ])
        }
    }
}
