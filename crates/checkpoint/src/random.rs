//! Random weights: what each tensor of the table would be if it were drawn.
//!
//! Matrices have variance 1/inputs and norms are near 1, so every sublayer adds a bounded share to the residual
//! stream and activations stay sane at any depth. Where the published files are FP8, codes and scales are drawn as
//! such: codes fill their range, and a block's scale makes up for it.

use std::collections::HashMap;

use cadre_numerics::{
    bf16,
    draw::{self, Draw, Stream},
    e4m3,
};
use cadre_types::{ModelConfig, ModelHash, config::ScaleFormat};
use sha2::{Digest as _, Sha256};

use crate::{
    config,
    digest::Digest,
    header::Dtype,
    table::{BLOCK, Content, SCALE_SUFFIX, duplicate_of, table},
};

/// Range of `e_score_correction_bias`: scores are sigmoids around 1/2 with a deviation of 0.2, so it moves choices
/// without deciding them.
const BIAS: (f32, f32) = (-0.05, 0.05);

/// A matrix whose elements are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct DrawnView {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Element `row * cols + col`.
    pub draw: Draw,
    /// What it is rounded to.
    pub data: DrawnData,
}

/// Element type of a [`DrawnView`].
#[derive(Clone, Debug, PartialEq)]
pub enum DrawnData {
    /// F32.
    F32,
    /// BF16.
    Bf16,
    /// e4m3 codes, and multipliers as [`crate::MatrixBytes`] has them.
    E4m3 {
        /// Multipliers.
        scales: Vec<f32>,
    },
}

/// The tensors of a configuration, drawn under one seed.
#[derive(Debug)]
pub(crate) struct Random {
    seed: u64,
    scales: ScaleFormat,
    tensors: HashMap<String, Tensor>,
}

#[derive(Clone, Debug)]
struct Tensor {
    shape: Vec<usize>,
    dtype: Dtype,
    content: Content,
    /// Name whose draws it has: its own but for a copy.
    drawn_as: Option<&'static str>,
}

impl Tensor {
    /// Bytes in a file, scales included.
    fn bytes(&self) -> u64 {
        let elements: u64 = self.shape.iter().map(|&dim| dim as u64).product();
        let scales = match (self.dtype, self.shape.as_slice()) {
            (Dtype::E4m3, &[rows, cols]) => (rows.div_ceil(BLOCK) * cols.div_ceil(BLOCK) * 4) as u64,
            _ => 0,
        };
        elements * self.dtype.bytes() as u64 + scales
    }
}

impl Random {
    pub(crate) fn new(config: &ModelConfig, seed: u64) -> Self {
        let tensors = table(config)
            .filter(|spec| !spec.is_scale())
            .map(|spec| {
                let drawn_as = duplicate_of(&spec);
                let tensor =
                    Tensor { shape: spec.shape, dtype: spec.dtypes[0], content: spec.content, drawn_as };
                (spec.name, tensor)
            })
            .collect();
        let scales = config.quantization.as_ref().map_or(ScaleFormat::F32, |fp8| fp8.scale_fmt);
        Self { seed, scales, tensors }
    }

    /// Identity of the weights: the configuration in force and the seed.
    pub(crate) fn model_hash(&self, config: &ModelConfig) -> ModelHash {
        let mut hash = Sha256::new();
        hash.update(b"cadre random weights 1\0");
        hash.update(self.seed.to_le_bytes());
        hash.update(config::to_json(config).to_string());
        let digest = hash.finalize();
        let mut cut = [0; 16];
        cut.copy_from_slice(&digest[..16]);
        ModelHash(cut)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(crate) fn bytes(&self, name: &str) -> Option<u64> {
        self.tensors.get(name).map(Tensor::bytes)
    }

    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|tensor| tensor.shape.as_slice())
    }

    /// What a tensor is drawn from says what it is.
    pub(crate) fn digest(&self, name: &str, into: &mut Digest) {
        if let Some(tensor) = self.tensors.get(name) {
            into.part(&self.stream(name, tensor).key.to_le_bytes());
            tensor.shape.iter().for_each(|dim| into.part(&(*dim as u64).to_le_bytes()));
            into.part(tensor.dtype.name().as_bytes());
        }
    }

    fn stream(&self, name: &str, tensor: &Tensor) -> Stream {
        Stream::new(self.seed, tensor.drawn_as.unwrap_or(name))
    }

    /// A matrix, if the tensor is one.
    pub(crate) fn matrix(&self, name: &str) -> Option<DrawnView> {
        let tensor = self.tensors.get(name)?;
        let &[rows, cols] = tensor.shape.as_slice() else { return None };
        let stream = self.stream(name, tensor);
        let deviation = (cols as f64).recip().sqrt();
        let plain = Draw::normal(stream, deviation);
        let (draw, data) = match tensor.dtype {
            Dtype::E4m3 => self.quantised(name, stream, deviation, rows, cols),
            Dtype::Bf16 => (plain, DrawnData::Bf16),
            // The table has no other.
            _ => (plain, DrawnData::F32),
        };
        Some(DrawnView { rows, cols, draw, data })
    }

    /// Codes up to the largest and scales around what gives the deviation, no two blocks alike.
    fn quantised(
        &self,
        name: &str,
        stream: Stream,
        deviation: f64,
        rows: usize,
        cols: usize,
    ) -> (Draw, DrawnData) {
        let factor = f64::from(e4m3::MAX / draw::SUM_MAX);
        let base = deviation / (factor * draw::sum_deviation());
        let jitter = self.scale_stream(name);
        let blocks = 0..(rows.div_ceil(BLOCK) * cols.div_ceil(BLOCK)) as u64;
        match self.scales {
            ScaleFormat::F32 => {
                let base = base as f32;
                let scales = blocks.map(|at| base * (0.75 + 0.5 * jitter.unit(at))).collect();
                (Draw { stream, factor: factor as f32 }, DrawnData::E4m3 { scales })
            }
            ScaleFormat::Ue8m0 => {
                // Half of the blocks have half the scale: the mean square is 5/8.
                let wanted = base * (8.0_f64 / 5.0).sqrt();
                let power = power_above(wanted);
                let scales =
                    blocks.map(|at| if jitter.unit(at) < 0.5 { power / 2.0 } else { power }).collect();
                let factor = (factor * wanted / f64::from(power)) as f32;
                (Draw { stream, factor }, DrawnData::E4m3 { scales })
            }
        }
    }

    fn scale_stream(&self, name: &str) -> Stream {
        Stream::new(self.seed, &format!("{name}{SCALE_SUFFIX}"))
    }

    /// A vector in F32, rounded as a file would hold it, if the tensor is one.
    pub(crate) fn vector(&self, name: &str) -> Option<Vec<f32>> {
        let tensor = self.tensors.get(name)?;
        let &[len] = tensor.shape.as_slice() else { return None };
        let stream = self.stream(name, tensor);
        let normal = Draw::normal(stream, 0.05);
        let value = |at: u64| match tensor.content {
            Content::Bias => BIAS.0 + (BIAS.1 - BIAS.0) * stream.unit(at),
            _ => 1.0 + normal.value(at),
        };
        let stored = |value: f32| if tensor.dtype == Dtype::Bf16 { bf16::round(value) } else { value };
        Some((0..len as u64).map(value).map(stored).collect())
    }
}

/// The smallest power of two that is not below a positive number; numbers beyond F32's powers take the outermost.
fn power_above(wanted: f64) -> f32 {
    let mut power = 1.0_f32;
    while f64::from(power) < wanted && power < f32::MAX / 4.0 {
        power *= 2.0;
    }
    while f64::from(power) / 2.0 >= wanted && power > f32::MIN_POSITIVE * 4.0 {
        power /= 2.0;
    }
    power
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn powers_are_the_next_ones() {
        for (wanted, power) in [(1.0, 1.0), (1.1, 2.0), (0.26, 0.5), (0.25, 0.25), (1e-4, 1.0 / 8192.0)] {
            assert_eq!(power_above(wanted), power, "{wanted}");
        }
        assert!(power_above(0.0) > 0.0 && power_above(f64::MAX).is_finite());
    }
}
