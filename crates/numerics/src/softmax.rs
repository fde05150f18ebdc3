//! Online softmax over blocks of 64 keys for one (query row, head).
//!
//! Keys are taken in blocks of [`KEYS`] positions from position 0, whatever chunk or page they came in;
//! keys after the query's position take part in nothing. Per block: `m' = max(m, largest score)`;
//! `alpha = exp(m - m')`; `p_j = exp(s_j - m')`; `l' = fma(l, alpha, sum of p in the 16-lane order)`; each
//! output element `o' = fma(o, alpha, b)` with `b` the FMA chain from +0 of `p_j * v_j` in ascending `j`.
//! At the start `m` is -infinity, `l` and `o` are +0. At the end the output is `o * (1 / l)`.

use crate::{exp::exp, reduce};

/// Keys per block; also the tokens of a cache page.
pub const KEYS: usize = 64;

/// Running maximum and denominator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    /// Largest score so far.
    pub max: f32,
    /// Sum of `exp(score - max)` so far.
    pub sum: f32,
}

impl State {
    /// Before the first block.
    pub const START: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// Takes in one block: `scores` (at most [`KEYS`], already multiplied with the softmax scale) become
    /// probabilities relative to the new maximum; returns `alpha`, the factor on what was summed before.
    pub fn block(&mut self, scores: &mut [f32]) -> f32 {
        let max = scores.iter().fold(self.max, |max, s| if *s > max { *s } else { max });
        let alpha = exp(self.max - max);
        for score in scores.iter_mut() {
            *score = exp(*score - max);
        }
        self.sum = self.sum.mul_add(alpha, reduce::sum(scores));
        self.max = max;
        alpha
    }

    /// The factor on the output after the last block.
    pub fn inverse(self) -> f32 {
        1.0 / self.sum
    }
}

/// `o = fma(o, alpha, sum over j of p[j] * v(j))`, the sum a chain of FMA from +0.
#[inline]
pub fn accumulate(o: f32, alpha: f32, p: &[f32], v: impl Fn(usize) -> f32) -> f32 {
    let sum = p.iter().enumerate().fold(0.0_f32, |sum, (j, p)| p.mul_add(v(j), sum));
    o.mul_add(alpha, sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_equal_a_plain_softmax_within_rounding() {
        let scores: Vec<f32> = (0..200).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.2).collect();
        let values: Vec<f32> = (0..200).map(|i| (i as f32 * 0.11).sin()).collect();
        let mut state = State::START;
        let mut o = 0.0;
        for (block, v) in scores.chunks(KEYS).zip(values.chunks(KEYS)) {
            let mut p = block.to_vec();
            let alpha = state.block(&mut p);
            o = accumulate(o, alpha, &p, |j| v[j]);
        }
        let got = o * state.inverse();
        let max = scores.iter().copied().fold(f32::MIN, f32::max);
        let weights: Vec<f64> = scores.iter().map(|s| f64::from(s - max).exp()).collect();
        let exact = weights.iter().zip(&values).map(|(w, v)| w * f64::from(*v)).sum::<f64>()
            / weights.iter().sum::<f64>();
        assert!((f64::from(got) - exact).abs() < 1e-6, "{got} {exact}");
    }

    #[test]
    fn first_block_starts_from_nothing() {
        let mut state = State::START;
        let alpha = state.block(&mut [3.0, 3.0]);
        assert_eq!((alpha, state), (0.0, State { max: 3.0, sum: 2.0 }));
    }
}
