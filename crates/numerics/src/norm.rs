//! RMSNorm of one row.

use crate::reduce::sum_squares;

/// `1 / sqrt(mean of squares + eps)`: the squares in the 16-lane order, then one division by the width,
/// one addition, one square root, one division.
pub fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_squares(x) / x.len() as f32 + eps).sqrt()
}

/// One element: `(x * inverse_rms) * weight`, two roundings; the caller rounds to the class.
#[inline]
pub fn scaled(x: f32, inverse_rms: f32, weight: f32) -> f32 {
    (x * inverse_rms) * weight
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_formula() {
        let x: Vec<f32> = (0..37).map(|i| (i as f32 - 18.0) * 0.3).collect();
        let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 37.0;
        let exact = 1.0 / (mean + 1e-6).sqrt();
        assert!((f64::from(inverse_rms(&x, 1e-6)) - exact).abs() < 1e-6 * exact);
        assert_eq!(scaled(2.0, 0.5, 3.0), 3.0);
    }

    #[test]
    fn a_zero_row_stays_zero() {
        let inverse = inverse_rms(&[0.0; 8], 1e-6);
        assert!(inverse.is_finite());
        assert_eq!(scaled(0.0, inverse, 1.0), 0.0);
    }
}
