//! Draws by position: element `i` of a tensor is a function of (seed, tensor name, `i`), so bands can be
//! drawn in any order by any thread.

/// Weyl increment and finalizer of SplitMix64, whose output function serves here as the mixing of a
/// counter.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

#[inline]
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The draws of one checkpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draw {
    seed: u64,
    bias: (f32, f32),
}

/// The draws of one tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stream {
    key: u64,
}

impl Draw {
    pub(super) fn new(seed: u64, bias: (f32, f32)) -> Self {
        Self { seed, bias }
    }

    pub(super) fn stream(&self, name: &str) -> Stream {
        let absorb = |key: u64, byte: u8| mix(key.wrapping_add(GAMMA) ^ u64::from(byte));
        Stream { key: name.bytes().fold(mix(self.seed), absorb) }
    }

    /// A correction bias: uniform over the range.
    pub(super) fn bias(&self, stream: &Stream, at: u64) -> f32 {
        let (low, high) = self.bias;
        // 24 bits: exact in F32.
        let unit = (stream.word(at) >> 40) as f32 / (1u32 << 24) as f32;
        low + (high - low) * unit
    }
}

impl Stream {
    #[inline]
    fn word(&self, at: u64) -> u64 {
        mix(self.key.wrapping_add(at.wrapping_add(1).wrapping_mul(GAMMA)))
    }

    /// Fills `out` with elements `start..` of mean 0 and standard deviation `deviation`: the sum of four
    /// 16-bit uniforms, which is normal enough for weights, bounded by 3.47 deviations, and exact integer
    /// arithmetic up to one multiplication.
    pub(super) fn normals(&self, start: u64, deviation: f64, out: &mut [f32]) {
        // Each uniform has variance (2^32 - 1) / 12.
        let factor = (deviation / ((4_294_967_295.0f64) / 3.0).sqrt()) as f32;
        for (at, value) in (start..).zip(out) {
            let word = self.word(at);
            let sum = (word & 0xFFFF) + (word >> 16 & 0xFFFF) + (word >> 32 & 0xFFFF) + (word >> 48);
            *value = (sum as i32 - 2 * 0xFFFF) as f32 * factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normals_have_the_stated_moments_and_do_not_depend_on_the_start() {
        let stream = Draw::new(7, (0.0, 1.0)).stream("model.layers.0.mlp.gate.weight");
        let mut values = vec![0.0; 1 << 18];
        stream.normals(0, 0.25, &mut values);
        let count = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
        let deviation = (values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / count).sqrt();
        // Five standard errors at this count.
        assert!(mean.abs() < 5.0 * 0.25 / count.sqrt(), "mean {mean}");
        assert!((deviation - 0.25).abs() < 5.0 * 0.25 / (2.0 * count).sqrt(), "{deviation}");
        let mut tail = vec![0.0; 100];
        stream.normals(1000, 0.25, &mut tail);
        assert_eq!(tail, values[1000..1100]);
    }

    #[test]
    fn names_and_seeds_give_other_draws() {
        let first = |seed, name: &str| {
            let mut out = [0.0; 4];
            Draw::new(seed, (0.0, 1.0)).stream(name).normals(0, 1.0, &mut out);
            out
        };
        assert_ne!(first(1, "a"), first(2, "a"));
        assert_ne!(first(1, "a"), first(1, "b"));
        assert_eq!(first(1, "a"), first(1, "a"));
    }

    #[test]
    fn biases_stay_in_range_and_take_both_signs() {
        let draw = Draw::new(3, (-1.0, 3.0));
        let stream = draw.stream("bias");
        let values: Vec<f32> = (0..1000).map(|at| draw.bias(&stream, at)).collect();
        assert!(values.iter().all(|value| (-1.0..=3.0).contains(value)));
        assert!(values.iter().any(|value| *value < -0.9) && values.iter().any(|value| *value > 2.9));
    }
}
