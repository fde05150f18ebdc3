//! Every operation of every instruction set against the scalar function of `cadre-numerics`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_numerics::{bf16, e4m3, exp, reduce};

use super::*;
use crate::options::Isa;

/// Inputs that meet every branch: zeros, subnormals, ties of both roundings, limits, infinities.
fn inputs() -> Vec<f32> {
    let mut values = vec![
        0.0,
        1.0,
        0.5,
        2.0_f32.powi(-9),
        2.0_f32.powi(-10),
        2.0_f32.powi(-10) * 1.5,
        2.0_f32.powi(-6),
        0.015_624,
        447.9,
        448.0,
        464.0,
        1e9,
        f32::MAX,
        f32::MIN_POSITIVE,
        1e-42,
        f32::INFINITY,
        87.0,
        87.000_01,
        88.0,
        88.000_01,
        1.0 + 2.0_f32.powi(-8),
        1.0 + 3.0 * 2.0_f32.powi(-8),
        1.0625,
        1.1875,
    ];
    let mut state = 12345_u32;
    for _ in 0..4000 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        values.push(f32::from_bits(state >> 1).clamp(0.0, f32::MAX));
        values.push((state >> 8) as f32 / (1 << 24) as f32 * 100.0);
    }
    values.retain(|v| !v.is_nan());
    let negative: Vec<f32> = values.iter().map(|v| -v).collect();
    values.extend(negative);
    values.resize(values.len().next_multiple_of(LANES), 1.0);
    values
}

/// A vector operation's result and its scalar form.
type Unary<V> = (&'static str, V, fn(f32) -> f32);
type Binary<V> = (&'static str, V, fn(f32, f32) -> f32);

fn same(name: &str, got: f32, expected: f32) {
    let equal = got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
    assert!(equal, "{name}: {got:?} is not {expected:?}");
}

/// # Safety
/// The machine has `V`'s instruction set.
#[inline(always)]
unsafe fn all<V: Lanes>() {
    // SAFETY: the caller's contract; every slice has 16 elements.
    unsafe {
        let values = inputs();
        let get = |v: V| {
            let mut out = [0.0_f32; LANES];
            v.store(out.as_mut_ptr());
            out
        };
        for (at, x) in values.chunks_exact(LANES).enumerate() {
            let y = &values[(at * 7 + 3) * LANES % values.len()..][..LANES];
            let z = &values[(at * 5 + 1) * LANES % values.len()..][..LANES];
            let (a, b, c) = (V::load(x.as_ptr()), V::load(y.as_ptr()), V::load(z.as_ptr()));
            let unary: [Unary<V>; 6] = [
                ("exp", a.exp(), exp::exp),
                ("silu", a.silu(), exp::silu),
                ("bf16", a.round_bf16(), bf16::round),
                ("e4m3", a.round_e4m3(), e4m3::round),
                ("abs", a.abs(), f32::abs),
                ("nan else", a.if_nan_else(a), |v| v),
            ];
            for (name, got, expected) in unary {
                for (got, x) in get(got).iter().zip(x) {
                    same(&format!("{name}({x})"), *got, expected(*x));
                }
            }
            let binary: [Binary<V>; 5] = [
                ("add", a.add(b), |a, b| a + b),
                ("sub", a.sub(b), |a, b| a - b),
                ("mul", a.mul(b), |a, b| a * b),
                ("div", a.div(b), |a, b| a / b),
                ("less", a.if_less(b, a, b), |a, b| if a < b { a } else { b }),
            ];
            for (name, got, expected) in binary {
                for ((got, x), y) in get(got).iter().zip(x).zip(y) {
                    same(&format!("{name}({x}, {y})"), *got, expected(*x, *y));
                }
            }
            for (i, got) in get(a.fma(b, c)).iter().enumerate() {
                same("fma", *got, x[i].mul_add(y[i], z[i]));
            }
            let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            same("max", a.reduce_max(), largest);
            same("tree", a.tree(), reduce::tree(x.try_into().unwrap()));
            let trees = V::tree4([a, b, c, a]);
            for (got, v) in trees.iter().zip([x, y, z, x]) {
                same("tree4", *got, reduce::tree(v.try_into().unwrap()));
            }
            let mut codes = [0_u8; 2 * LANES];
            a.store_bf16(codes.as_mut_ptr());
            for (code, x) in codes.as_chunks::<2>().0.iter().zip(x) {
                assert_eq!(u16::from_le_bytes(*code), bf16::encode(*x), "{x}");
            }
            for (got, x) in get(V::load_bf16(codes.as_ptr())).iter().zip(x) {
                same("load bf16", *got, bf16::round(*x));
            }
        }
        nan::<V>();
        words::<V>();
    }
}

/// # Safety
/// The machine has `V`'s instruction set.
#[inline(always)]
unsafe fn nan<V: Lanes>() {
    // SAFETY: the caller's contract.
    unsafe {
        let nan = V::splat(f32::NAN);
        let mut out = [0.0_f32; LANES];
        for v in [nan.exp(), nan.round_bf16(), nan.round_e4m3(), nan.silu(), nan.if_nan_else(nan)] {
            v.store(out.as_mut_ptr());
            assert!(out.iter().all(|v| v.is_nan()));
        }
        nan.max(V::splat(3.0)).store(out.as_mut_ptr());
        assert_eq!(out, [3.0; LANES], "the second operand where the first is NaN");
    }
}

/// All codes in all places of a word.
///
/// # Safety
/// The machine has `V`'s instruction set.
#[inline(always)]
unsafe fn words<V: Lanes>() {
    // SAFETY: the caller's contract; 64 bytes are read.
    unsafe {
        let mut out = [0.0_f32; LANES];
        for first in 0..=255_u8 {
            let bytes: [u8; 64] = std::array::from_fn(|i| first.wrapping_add((i as u8).wrapping_mul(37)));
            let words = V::load_words(bytes.as_ptr());
            let small = [
                V::e4m3_small::<0>(words),
                V::e4m3_small::<1>(words),
                V::e4m3_small::<2>(words),
                V::e4m3_small::<3>(words),
            ];
            for (byte, v) in small.iter().enumerate() {
                v.mul(V::splat(E4M3_GROW)).store(out.as_mut_ptr());
                for (lane, got) in out.iter().enumerate() {
                    let code = bytes[4 * lane + byte];
                    if !e4m3::is_nan(code) {
                        same("e4m3 word", *got * e4m3::FOLD, e4m3::decode(code));
                    }
                }
            }
            for (half, v) in [V::bf16_half::<0>(words), V::bf16_half::<1>(words)].iter().enumerate() {
                v.store(out.as_mut_ptr());
                for (lane, got) in out.iter().enumerate() {
                    let at = 4 * lane + 2 * half;
                    let code = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
                    same("bf16 word", *got, bf16::decode(code));
                }
            }
        }
    }
}

#[test]
fn scalar() {
    // SAFETY: no instruction set is needed.
    unsafe { all::<super::scalar::Scalar>() }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;

    #[target_feature(enable = "avx2,fma")]
    fn all_avx2() {
        // SAFETY: this function has the instruction set.
        unsafe { all::<crate::lanes::avx2::Avx2>() }
    }

    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    fn all_avx512() {
        // SAFETY: this function has the instruction set.
        unsafe { all::<crate::lanes::avx512::Avx512>() }
    }

    /// Says past the harness's capture that a test did not run.
    fn missing(isa: Isa) {
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "\n*** NOT RUN on {isa}: this machine lacks it ***\n");
    }

    #[test]
    fn avx2() {
        match Isa::Avx2.available() {
            // SAFETY: just checked.
            true => unsafe { all_avx2() },
            false => missing(Isa::Avx2),
        }
    }

    #[test]
    fn avx512() {
        match Isa::Avx512.available() {
            // SAFETY: just checked.
            true => unsafe { all_avx512() },
            false => missing(Isa::Avx512),
        }
    }
}
