//! Packed formats in registers: a quad of `k` is loaded once, then each of its steps made a vector.

use crate::{
    lanes::{E4M3_GROW, LANES, Lanes},
    packed::Format,
};

/// How a format widens: a quad of `k` is loaded once, then each of its steps made a vector.
pub(super) trait Widen {
    const IS_E4M3: bool = false;
    /// Whether there is a fused form.
    const FUSED: bool = true;
    const QUAD_BYTES: usize;
    type Quad<V: Lanes>: Copy;
    unsafe fn load<V: Lanes>(from: *const u8) -> Self::Quad<V>;
    unsafe fn step<V: Lanes, const I: usize>(quad: Self::Quad<V>) -> V;
}

/// e4m3 as value x 2^-120, for inputs times 2^112.
pub(super) struct E4m3Small;
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
pub(super) struct E4m3;
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

pub(super) struct Bf16;
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

pub(super) struct F32;
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
