//! Draws by position ([`cadre_numerics::draw`]): element `i` of a tensor is a function of (seed, tensor name, `i`),
//! so bands can be drawn in any order by any thread.

pub(super) use cadre_numerics::draw::Stream;

/// The draws of one checkpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draw {
    seed: u64,
    bias: (f32, f32),
}

impl Draw {
    pub(super) fn new(seed: u64, bias: (f32, f32)) -> Self {
        Self { seed, bias }
    }

    pub(super) fn stream(&self, name: &str) -> Stream {
        Stream::new(self.seed, name)
    }

    /// A correction bias: uniform over the range.
    pub(super) fn bias(&self, stream: &Stream, at: u64) -> f32 {
        let (low, high) = self.bias;
        low + (high - low) * stream.unit(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases_stay_in_range_and_take_both_signs() {
        let draw = Draw::new(3, (-1.0, 3.0));
        let stream = draw.stream("bias");
        let values: Vec<f32> = (0..1000).map(|at| draw.bias(&stream, at)).collect();
        assert!(values.iter().all(|value| (-1.0..=3.0).contains(value)));
        assert!(values.iter().any(|value| *value < -0.9) && values.iter().any(|value| *value > 2.9));
    }
}
