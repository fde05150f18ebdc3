//! One output of a matrix product.
//!
//! The reduction is cut into blocks of [`BLOCK`] elements (the last may be short). Inside a
//! block: one chain of FMA over ascending `k`, starting at +0. Between blocks: `acc = fma(block sum, t,
//! acc)` in ascending order, starting at +0, where `t` is the block's scale:
//!
//! | weights | multiplied with | `t` |
//! |---|---|---|
//! | F32, BF16 | the value | 1 |
//! | e4m3 | value x 2^-8 | scale x 2^8 |
//! | e4m3, quantised input | code of x (as its value) times value x 2^-8 | (scale x 2^8) x s_x, rounded to F32 |
//!
//! Nothing else enters: not the number of rows, not the number of threads, not the width of a register.

use crate::BLOCK;

/// Where blocks of a reduction end. `phase` is how far into a block the reduction starts: 0 except for
/// the absorbed keys of attention, whose reduction runs along rows of kv_b and is cut where kv_b's own
/// row blocks end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Length of the reduction.
    pub len: usize,
    /// Elements of the first block that lie before the reduction's start, below [`BLOCK`].
    pub phase: usize,
}

impl Blocks {
    /// Blocks of a reduction that starts on a block boundary.
    pub fn aligned(len: usize) -> Self {
        Self { len, phase: 0 }
    }

    /// Number of blocks.
    #[inline]
    pub fn count(self) -> usize {
        if self.len == 0 { 0 } else { (self.phase + self.len).div_ceil(BLOCK) }
    }

    /// Start and end of a block in elements of the reduction.
    #[inline]
    pub fn range(self, block: usize) -> std::ops::Range<usize> {
        let start = (block * BLOCK).saturating_sub(self.phase);
        let end = ((block + 1) * BLOCK - self.phase).min(self.len);
        start..end
    }
}

/// The specification: `weight(k)` is what `x[k]` is multiplied with, `scale(block)` is `t`.
pub fn output(x: &[f32], blocks: Blocks, weight: impl Fn(usize) -> f32, scale: impl Fn(usize) -> f32) -> f32 {
    let mut acc = 0.0_f32;
    for block in 0..blocks.count() {
        let mut sum = 0.0_f32;
        for k in blocks.range(block) {
            sum = x[k].mul_add(weight(k), sum);
        }
        acc = sum.mul_add(scale(block), acc);
    }
    acc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_the_reduction_once() {
        for phase in [0, 1, 64, 127] {
            for len in [0, 1, 63, 64, 65, 127, 128, 129, 300, 512] {
                let blocks = Blocks { len, phase };
                let mut next = 0;
                for block in 0..blocks.count() {
                    let range = blocks.range(block);
                    assert_eq!(range.start, next);
                    assert!(!range.is_empty());
                    assert_eq!((range.start + phase) / BLOCK, block);
                    assert_eq!((range.end - 1 + phase) / BLOCK, block);
                    next = range.end;
                }
                assert_eq!(next, len);
            }
        }
    }

    #[test]
    fn scales_apply_to_block_sums() {
        let x: Vec<f32> = (0..200).map(|i| i as f32).collect();
        let got = output(&x, Blocks::aligned(200), |_| 1.0, |block| [10.0, 0.5][block]);
        let first: f32 = (0..128).map(|i| i as f32).sum();
        let second: f32 = (128..200).map(|i| i as f32).sum();
        assert_eq!(got, first * 10.0 + second * 0.5);
        assert_eq!(output(&[], Blocks::aligned(0), |_| 1.0, |_| 1.0), 0.0);
    }
}
