//! Rotary embedding: cos and sin of an angle, and the rotation of one pair.
//!
//! The angle is an F32 product made by the caller; its cos and sin are computed here in F64 with our own
//! reduction and series (the platform's differ between systems) and rounded once to F32.

/// pi/2 in three parts of 33, 33 and 53 bits: `n` times one of the first two is exact for n < 2^20.
const HALF_PI: [f64; 3] = [1.570_796_326_734_125_6, 6.077_100_506_303_966e-11, 2.022_266_248_795_950_6e-21];

/// Largest angle that [`cos_sin`] reduces with full accuracy (2^20 quarter turns).
pub const MAX_ANGLE: f32 = 1_600_000.0;

/// cos and sin of an F32 angle of magnitude up to [`MAX_ANGLE`], each the F64 result rounded to F32.
pub fn cos_sin(angle: f32) -> (f32, f32) {
    let x = f64::from(angle);
    let n = (x * std::f64::consts::FRAC_2_PI).round_ties_even();
    let r = ((x - n * HALF_PI[0]) - n * HALF_PI[1]) - n * HALF_PI[2];
    let r2 = r * r;
    // Taylor: |r| <= pi/4, so the first term left out is below 1e-17.
    let sin = series(
        r2,
        &[
            1.0,
            -6.0,
            120.0,
            -5040.0,
            362_880.0,
            -39_916_800.0,
            6_227_020_800.0,
            -1_307_674_368_000.0,
            355_687_428_096_000.0,
        ],
    ) * r;
    let cos = series(
        r2,
        &[
            1.0,
            -2.0,
            24.0,
            -720.0,
            40_320.0,
            -3_628_800.0,
            479_001_600.0,
            -87_178_291_200.0,
            20_922_789_888_000.0,
        ],
    );
    let (cos, sin) = match (n as i64).rem_euclid(4) {
        0 => (cos, sin),
        1 => (-sin, cos),
        2 => (-cos, -sin),
        _ => (sin, -cos),
    };
    (cos as f32, sin as f32)
}

/// Sum of `x^i / divisors[i]`, Horner, plain F64 operations.
fn series(x: f64, divisors: &[f64]) -> f64 {
    divisors.iter().rev().fold(0.0, |sum, divisor| sum * x + 1.0 / divisor)
}

/// cos and sin of position `p` for a rotary frequency, times `magnitude`: what a table holds.
pub fn table_entry(position: u32, inv_freq: f32, magnitude: f32) -> (f32, f32) {
    let (cos, sin) = cos_sin(position as f32 * inv_freq);
    (cos * magnitude, sin * magnitude)
}

/// Rotates the pair (elements 2i and 2i+1): `(fma(a, cos, -(b sin)), fma(a, sin, b cos))`; the caller
/// rounds to the class.
#[inline]
pub fn rotate(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a.mul_add(cos, -(b * sin)), a.mul_add(sin, b * cos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cos_sin_equal_the_platform_after_rounding() {
        let mut differ = 0;
        for step in 0..200_000_u32 {
            let angle = step as f32 * 0.819_23;
            let (cos, sin) = cos_sin(angle);
            let exact = (f64::from(angle).cos(), f64::from(angle).sin());
            assert!((f64::from(cos) - exact.0).abs() <= 3.1e-8, "{angle}");
            assert!((f64::from(sin) - exact.1).abs() <= 3.1e-8, "{angle}");
            differ += usize::from(cos != exact.0 as f32) + usize::from(sin != exact.1 as f32);
        }
        // Two F64 values one unit apart round to different F32 once in 2^28 or so.
        assert!(differ <= 1, "{differ} values differ");
    }

    #[test]
    fn quadrants_and_signs() {
        assert_eq!(cos_sin(0.0), (1.0, 0.0));
        let (cos, sin) = cos_sin(-1.0);
        assert_eq!((cos, sin), ((-1.0_f64).cos() as f32, (-1.0_f64).sin() as f32));
        let (cos, sin) = cos_sin(std::f32::consts::PI);
        assert!(cos == -1.0 && sin.abs() < 1e-7);
    }

    #[test]
    fn rotation_keeps_length_and_adds_angles() {
        let (c, s) = cos_sin(0.7);
        let (a, b) = rotate(3.0, 4.0, c, s);
        assert!((a.hypot(b) - 5.0).abs() < 1e-6);
        let (c2, s2) = cos_sin(-0.7);
        let (a, b) = rotate(a, b, c2, s2);
        assert!((a - 3.0).abs() < 1e-6 && (b - 4.0).abs() < 1e-6);
    }
}
