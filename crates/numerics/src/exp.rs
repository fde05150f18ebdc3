//! exp, sigmoid and silu in a fixed sequence of F32 operations.
//!
//! `exp(x)`: `n = round_ties_even(x * log2(e))`; `r = x - n ln 2` by two FMA with ln 2 split in two;
//! `e^r` by the Taylor polynomial of degree 7 in Horner form by FMA (|r| <= 0.3466: the truncation is
//! 6e-9 relative, a twentieth of a unit in the last place); times `2^n` by adding `n` to the exponent
//! bits. Between -87 and 88 the exponent neither under- nor overflows; below -87 the result is 0, above
//! 88 it is infinite, NaN stays NaN. Error below 1 unit in the last place (measured over every 97th
//! F32 of the range by the test: 0.92).

/// Below this the result is 0 (e^-87 = 1.6e-38, near the smallest normal F32).
pub const EXP_ZERO_BELOW: f32 = -87.0;
/// Above this the result is infinite (e^88 = 1.7e38, half of the largest F32).
pub const EXP_INFINITE_ABOVE: f32 = 88.0;
/// log2(e) rounded to F32.
pub const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 rounded to F32. `n * LN_2_HIGH` is subtracted from `x` without error (both are multiples of
/// 2^-24 and the difference is below 1/2).
pub const LN_2_HIGH: f32 = std::f32::consts::LN_2;
/// ln 2 minus [`LN_2_HIGH`], rounded to F32.
pub const LN_2_LOW: f32 = -1.904_654_2e-9;
/// 1/7!, 1/6!, ..., 1/1!, 1/0! rounded to F32, in Horner order.
pub const EXP_POLYNOMIAL: [f32; 8] =
    [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
/// Adding and subtracting 1.5 * 2^23 rounds a magnitude below 2^22 to an integer, ties to even.
pub const ROUND_MAGIC: f32 = 12_582_912.0;

/// e^x; see the module for the operations, the range and the error.
#[inline]
pub fn exp(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    if x < EXP_ZERO_BELOW {
        return 0.0;
    }
    if x > EXP_INFINITE_ABOVE {
        return f32::INFINITY;
    }
    let n = (x * LOG2_E + ROUND_MAGIC) - ROUND_MAGIC;
    let r = n.mul_add(-LN_2_HIGH, x);
    let r = n.mul_add(-LN_2_LOW, r);
    let mut p = EXP_POLYNOMIAL[0];
    for c in &EXP_POLYNOMIAL[1..] {
        p = p.mul_add(r, *c);
    }
    f32::from_bits(p.to_bits().wrapping_add(((n as i32) << 23) as u32))
}

/// `1 / (1 + exp(-x))`: two roundings after exp's.
#[inline]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x / (1 + exp(-x))`.
#[inline]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units in the last place of the F32 nearest to the F64 value.
    fn ulps(got: f32, exact: f64) -> f64 {
        let near = exact as f32;
        let ulp = f64::from(near.abs().next_up()) - f64::from(near.abs());
        (f64::from(got) - exact).abs() / ulp
    }

    #[test]
    fn exp_is_within_one_unit_over_its_range() {
        let mut worst = (0.0, 0.0);
        for magnitude in (0..EXP_INFINITE_ABOVE.to_bits()).step_by(97) {
            for x in [f32::from_bits(magnitude), -f32::from_bits(magnitude)] {
                if (EXP_ZERO_BELOW..=EXP_INFINITE_ABOVE).contains(&x) {
                    let error = ulps(exp(x), f64::from(x).exp());
                    if error > worst.0 {
                        worst = (error, x);
                    }
                }
            }
        }
        assert!(worst.0 < 1.0, "{} units at {}", worst.0, worst.1);
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(EXP_ZERO_BELOW.next_down()), 0.0);
        assert!(exp(EXP_ZERO_BELOW).is_normal());
        assert!(exp(EXP_INFINITE_ABOVE).is_finite());
        assert_eq!(exp(EXP_INFINITE_ABOVE.next_up()), f32::INFINITY);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sigmoid_and_silu_hold_their_bounds() {
        for step in -4000..4000 {
            let x = step as f32 * 0.025;
            let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
            assert!(
                (f64::from(sigmoid(x)) - exact).abs() <= 3.0 * f64::from(f32::EPSILON) * exact + 1e-38,
                "{x}"
            );
            let exact = exact * f64::from(x);
            assert!(
                (f64::from(silu(x)) - exact).abs() <= 3.0 * f64::from(f32::EPSILON) * exact.abs() + 1e-36,
                "{x}"
            );
        }
        assert_eq!(sigmoid(f32::INFINITY), 1.0);
        assert_eq!(sigmoid(f32::NEG_INFINITY), 0.0);
        assert_eq!(silu(0.0), 0.0);
    }

    /// The bits of a few results, so that a change of the sequence cannot pass unseen.
    #[test]
    fn bits_are_pinned() {
        let bits = [-86.5, -20.0, -1.0, -0.3, 0.1, 0.5, 1.0, 10.0, 87.9].map(|x| exp(x).to_bits());
        let pinned = [
            0x0113_bc74,
            0x310d_a433,
            0x3ebc_5ab2,
            0x3f3d_a643,
            0x3f8d_763e,
            0x3fd3_094c,
            0x402d_f854,
            0x46ac_14ef,
            0x7ee0_dcae,
        ];
        assert_eq!(bits, pinned, "{bits:#x?}");
    }
}
