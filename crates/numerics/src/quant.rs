//! The published activation quantiser: per row and 128 columns, `s = max(amax, 1e-4) / 448` and
//! `code = e4m3(x / s)`, both divisions rounded to F32.

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

/// Quantises a row: `codes` as long as the row, `scales` one per started block.
pub fn row(x: &[f32], codes: &mut [u8], scales: &mut [f32]) {
    for ((block, codes), s) in x.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(scales) {
        *s = scale(block);
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
        row(&[0.1, -0.02, 0.5, 3.0], &mut codes, &mut scales);
        assert!((scales[0] - 0.006_696_429).abs() < 1e-9);
        assert_eq!(codes.map(e4m3::decode), [15.0, -3.0, 72.0, 448.0]);
    }

    #[test]
    fn zeros_get_the_smallest_scale() {
        let mut codes = [9; 3];
        let mut scales = [0.0];
        row(&[0.0; 3], &mut codes, &mut scales);
        assert_eq!(codes, [0; 3]);
        assert!((scales[0] - 2.232_143e-7).abs() < 1e-13);
    }

    #[test]
    fn blocks_are_independent_and_the_last_may_be_short() {
        let x: Vec<f32> = (0..300).map(|i| if i < 128 { 1.0 } else { i as f32 }).collect();
        let mut codes = vec![0; 300];
        let mut scales = vec![0.0; blocks(300)];
        row(&x, &mut codes, &mut scales);
        assert_eq!(scales, [1.0 / 448.0, 255.0 / 448.0, 299.0 / 448.0]);
        assert_eq!(codes[0], codes[127]);
        assert_eq!(e4m3::decode(codes[299]), 448.0);
        let mut alone = vec![0; 44];
        row(&x[256..], &mut alone, &mut [0.0]);
        assert_eq!(alone, codes[256..]);
    }
}
