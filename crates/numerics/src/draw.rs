//! Values by position: element `i` of a tensor is a function of (seed, name, `i`), the same on every device.
//!
//! Integer arithmetic up to one multiplication in F32, so that a kernel gives the bits of this reference;
//! no state, so that bands, shards and devices draw what they need in any order.

use crate::{bf16, e4m3};

/// Weyl increment and finalizer of SplitMix64, whose output function serves here as the mixing of a counter.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// Largest magnitude of [`Stream::sum`]: four 16-bit uniforms, less their mean.
pub const SUM_MAX: f32 = 131_070.0;

#[inline]
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Standard deviation of [`Stream::sum`]: each uniform has variance (2^32 - 1) / 12.
pub fn sum_deviation() -> f64 {
    (4_294_967_295.0_f64 / 3.0).sqrt()
}

/// The draws of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Of (seed, name).
    pub key: u64,
}

impl Stream {
    /// The draws of the tensor of this name under a seed.
    pub fn new(seed: u64, name: &str) -> Self {
        let absorb = |key: u64, byte: u8| mix(key.wrapping_add(GAMMA) ^ u64::from(byte));
        Self { key: name.bytes().fold(mix(seed), absorb) }
    }

    /// 64 uniform bits for element `at`.
    #[inline]
    pub fn word(&self, at: u64) -> u64 {
        mix(self.key.wrapping_add(at.wrapping_add(1).wrapping_mul(GAMMA)))
    }

    /// The sum of four 16-bit uniforms less its mean, exact in F32: normal enough for weights, and bounded by
    /// 3.47 deviations.
    #[inline]
    pub fn sum(&self, at: u64) -> f32 {
        let word = self.word(at);
        let sum = (word & 0xFFFF) + (word >> 16 & 0xFFFF) + (word >> 32 & 0xFFFF) + (word >> 48);
        (sum as i32 - 2 * 0xFFFF) as f32
    }

    /// Uniform over `[0, 1)` in steps of 2^-24.
    #[inline]
    pub fn unit(&self, at: u64) -> f32 {
        // 24 bits: exact in F32.
        (self.word(at) >> 40) as f32 / (1u32 << 24) as f32
    }
}

/// The elements of a drawn tensor: element `at` is `stream.sum(at) * factor`, rounded to the element type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Keyed by seed and name.
    pub stream: Stream,
    /// Multiplies every sum.
    pub factor: f32,
}

impl Draw {
    /// Elements of this standard deviation.
    pub fn normal(stream: Stream, deviation: f64) -> Self {
        Self { stream, factor: (deviation / sum_deviation()) as f32 }
    }

    /// Element `at` before it is rounded.
    #[inline]
    pub fn value(&self, at: u64) -> f32 {
        self.stream.sum(at) * self.factor
    }

    /// Elements `first..first + values.len()`, not rounded.
    pub fn values(&self, first: u64, values: &mut [f32]) {
        (first..).zip(values).for_each(|(at, value)| *value = self.value(at));
    }

    /// Elements from `first` on as little-endian F32 that fill `bytes`.
    pub fn f32_bytes(&self, first: u64, bytes: &mut [u8]) {
        let (quads, _) = bytes.as_chunks_mut::<4>();
        (first..).zip(quads).for_each(|(at, out)| *out = self.value(at).to_le_bytes());
    }

    /// The same as BF16.
    pub fn bf16_bytes(&self, first: u64, bytes: &mut [u8]) {
        let (pairs, _) = bytes.as_chunks_mut::<2>();
        (first..).zip(pairs).for_each(|(at, out)| *out = bf16::encode(self.value(at)).to_le_bytes());
    }

    /// The same as e4m3 codes.
    pub fn e4m3_bytes(&self, first: u64, bytes: &mut [u8]) {
        (first..).zip(bytes).for_each(|(at, out)| *out = e4m3::encode(self.value(at)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normals_have_the_stated_moments_and_do_not_depend_on_the_start() {
        let draw = Draw::normal(Stream::new(7, "model.layers.0.mlp.gate.weight"), 0.25);
        let mut values = vec![0.0; 1 << 18];
        draw.values(0, &mut values);
        let count = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
        let deviation = (values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / count).sqrt();
        // Five standard errors at this count.
        assert!(mean.abs() < 5.0 * 0.25 / count.sqrt(), "mean {mean}");
        assert!((deviation - 0.25).abs() < 5.0 * 0.25 / (2.0 * count).sqrt(), "{deviation}");
        let mut tail = vec![0.0; 100];
        draw.values(1000, &mut tail);
        assert_eq!(tail, values[1000..1100]);
        let most = SUM_MAX * draw.factor;
        assert!(values.iter().all(|value| value.abs() <= most));
    }

    #[test]
    fn names_and_seeds_give_other_draws() {
        let first = |seed, name: &str| [0, 1, 2, 3].map(|at| Stream::new(seed, name).word(at));
        assert_ne!(first(1, "a"), first(2, "a"));
        assert_ne!(first(1, "a"), first(1, "b"));
        assert_eq!(first(1, "a"), first(1, "a"));
    }

    /// Everything that was ever drawn would change with these: caches of texts, golden files of users.
    #[test]
    fn words_are_what_they_were() {
        let stream = Stream::new(1, "lm_head.weight");
        assert_eq!([0, 1, u64::MAX].map(|at| stream.word(at)), WORDS);
    }

    const WORDS: [u64; 3] = [0x0678_BC4B_E978_F592, 0xC1D6_972D_77FD_CADD, 0x619E_999B_E6F2_8B9F];

    #[test]
    fn codes_are_those_of_the_values() {
        let draw = Draw { stream: Stream::new(3, "x"), factor: e4m3::MAX / SUM_MAX };
        let (mut floats, mut halves, mut codes) = ([0; 40], [0; 20], [0; 10]);
        draw.f32_bytes(5, &mut floats);
        draw.bf16_bytes(5, &mut halves);
        draw.e4m3_bytes(5, &mut codes);
        for (i, at) in (5..15).enumerate() {
            let value = draw.value(at);
            assert_eq!(floats[4 * i..4 * i + 4], value.to_le_bytes());
            assert_eq!(halves[2 * i..2 * i + 2], bf16::encode(value).to_le_bytes());
            assert_eq!(codes[i], e4m3::encode(value));
            assert!(!e4m3::is_nan(codes[i]));
        }
    }

    #[test]
    fn units_fill_their_range() {
        let stream = Stream::new(3, "bias");
        let values: Vec<f32> = (0..1000).map(|at| stream.unit(at)).collect();
        assert!(values.iter().all(|value| (0.0..1.0).contains(value)));
        assert!(values.iter().any(|value| *value < 0.03) && values.iter().any(|value| *value > 0.97));
    }
}
