//! The published activation quantiser: per row and 128 columns, `s = max(amax, 1e-4) / 448` and
//! `code = e4m3(x / s)`, both divisions rounded to F32. Checkpoints whose scales are powers of two
//! (`ue8m0`) round `s` up to the next one before it is used.

use crate::{BLOCK, e4m3};

/// Smallest magnitude that a block's scale is made from.
pub const MIN_AMAX: f32 = 1e-4;

/// Scales of a row of `cols` columns.
pub fn blocks(cols: usize) -> usize {
    cols.div_ceil(BLOCK)
}

/// Scale of one block. A NaN does not count towards the largest magnitude; it becomes a NaN code.
#[inline]
pub fn scale(block: &[f32]) -> f32 {
    block.iter().fold(MIN_AMAX, |amax, x| amax.max(x.abs())) / e4m3::MAX
}

/// The smallest power of two that is not below a positive, normal scale.
#[inline]
pub fn up_to_power_of_two(scale: f32) -> f32 {
    f32::from_bits((scale.to_bits() + 0x7F_FFFF) & 0x7F80_0000)
}

/// Quantises a row: `codes` as long as the row, `scales` one per started block, rounded up to powers of two
/// if asked.
pub fn row(x: &[f32], powers_of_two: bool, codes: &mut [u8], scales: &mut [f32]) {
    for ((block, codes), s) in x.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(scales) {
        *s = scale(block);
        if powers_of_two {
            *s = up_to_power_of_two(*s);
        }
        for (code, value) in codes.iter_mut().zip(block) {
            *code = e4m3::encode(value / *s);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_case() {
        let mut codes = [0; 4];
        let mut scales = [0.0];
        row(&[0.1, -0.02, 0.5, 3.0], false, &mut codes, &mut scales);
        assert!((scales[0] - 0.006_696_429).abs() < 1e-9);
        assert_eq!(codes.map(e4m3::decode), [15.0, -3.0, 72.0, 448.0]);
    }

    #[test]
    fn powers_of_two_are_rounded_up() {
        for (scale, expected) in [(1.0, 1.0), (1.000_000_1, 2.0), (0.006_696_429, 0.007_812_5), (3.9, 4.0)] {
            assert_eq!(up_to_power_of_two(scale), expected);
        }
        let mut codes = [0; 4];
        let mut scales = [0.0];
        row(&[0.1, -0.02, 0.5, 3.0], true, &mut codes, &mut scales);
        assert_eq!(scales, [0.007_812_5]);
        assert_eq!(codes.map(e4m3::decode), [13.0, -2.5, 64.0, 384.0]);
    }

    #[test]
    fn zeros_get_the_smallest_scale() {
        let mut codes = [9; 3];
        let mut scales = [0.0];
        row(&[0.0; 3], false, &mut codes, &mut scales);
        assert_eq!(codes, [0; 3]);
        assert!((scales[0] - 2.232_143e-7).abs() < 1e-13);
    }

    #[test]
    fn blocks_are_independent_and_the_last_may_be_short() {
        let x: Vec<f32> = (0..300).map(|i| if i < 128 { 1.0 } else { i as f32 }).collect();
        let mut codes = vec![0; 300];
        let mut scales = vec![0.0; blocks(300)];
        row(&x, false, &mut codes, &mut scales);
        assert_eq!(scales, [1.0 / 448.0, 255.0 / 448.0, 299.0 / 448.0]);
        assert_eq!(codes[0], codes[127]);
        assert_eq!(e4m3::decode(codes[299]), 448.0);
        let mut alone = vec![0; 44];
        row(&x[256..], false, &mut alone, &mut [0.0]);
        assert_eq!(alone, codes[256..]);
    }
}
