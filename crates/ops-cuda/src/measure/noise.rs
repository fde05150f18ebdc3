//! Normally distributed data, drawn once and taken again from other places.

use cadre_numerics::{bf16, e4m3, quant};
use cadre_ops::{ElementType, HostMatrix, MatrixData};
use cadre_types::config::ScaleFormat;

/// Values that are drawn; no power of two, so that rows of a matrix do not repeat each other.
const DRAWN: usize = 4_194_301;

/// Standard deviation of the codes of e4m3, whose largest is 448.
const CODES: f32 = 100.0;

pub(super) struct Noise {
    values: Vec<f32>,
    /// The same as codes of e4m3, and as BF16.
    codes: Vec<u8>,
    halves: Vec<u8>,
    taken: usize,
}

impl Noise {
    pub(super) fn new() -> Self {
        let values: Vec<f32> = (0..DRAWN as u64).map(normal).collect();
        let codes = values.iter().map(|value| e4m3::encode(value * CODES)).collect();
        let halves = values.iter().flat_map(|value| bf16::encode(*value).to_le_bytes()).collect();
        Self { values, codes, halves, taken: 0 }
    }

    /// Where the next data begin.
    fn next(&mut self) -> usize {
        self.taken = (self.taken + 1_000_003) % DRAWN;
        self.taken
    }

    pub(super) fn values(&mut self, len: usize) -> Vec<f32> {
        let from = self.next();
        self.values.iter().cycle().skip(from).take(len).copied().collect()
    }

    /// Elements of a type as bytes (e4m3 with a standard deviation of 100).
    pub(super) fn bytes(&mut self, elements: ElementType, len: usize) -> Vec<u8> {
        let (from, source) = match elements {
            ElementType::E4m3 => (self.next(), &self.codes),
            ElementType::Bf16 | ElementType::F32 => (2 * self.next(), &self.halves),
        };
        let mut bytes = Vec::with_capacity(len);
        let mut at = from;
        while bytes.len() < len {
            let more = (source.len() - at).min(len - bytes.len());
            bytes.extend_from_slice(&source[at..at + more]);
            at = 0;
        }
        bytes
    }

    /// A matrix whose products with normal rows are about normal.
    pub(super) fn with_matrix<T>(
        &mut self,
        elements: ElementType,
        n: usize,
        k: usize,
        load: impl FnOnce(HostMatrix<'_>) -> T,
    ) -> T {
        let (bytes, scales) = self.matrix(elements, n, k);
        load(as_matrix(elements, n, k, &bytes, &scales))
    }

    /// gate, up and down of e4m3.
    pub(super) fn with_ffn<T>(
        &mut self,
        hidden: usize,
        inner: usize,
        load: impl FnOnce([HostMatrix<'_>; 3]) -> T,
    ) -> T {
        let e4m3 = ElementType::E4m3;
        let shapes = [(inner, hidden), (inner, hidden), (hidden, inner)];
        let parts = shapes.map(|(n, k)| self.matrix(e4m3, n, k));
        let mut matrices =
            shapes.iter().zip(&parts).map(|((n, k), (bytes, scales))| as_matrix(e4m3, *n, *k, bytes, scales));
        let mut next =
            || matrices.next().unwrap_or(HostMatrix { rows: 0, cols: 0, data: MatrixData::F32(&[]) });
        load([next(), next(), next()])
    }

    fn matrix(&mut self, elements: ElementType, n: usize, k: usize) -> (Vec<u8>, Vec<f32>) {
        if elements != ElementType::E4m3 {
            return (self.bytes(elements, n * k * 2), Vec::new());
        }
        let scale = 1.0 / CODES / (k as f32).sqrt();
        let spread = |value: f32| scale * (0.5 * value).exp2();
        let scales = self.values(quant::blocks(n) * quant::blocks(k)).into_iter().map(spread).collect();
        (self.bytes(elements, n * k), scales)
    }
}

fn as_matrix<'a>(
    elements: ElementType,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
    scales: &'a [f32],
) -> HostMatrix<'a> {
    let data = match elements {
        ElementType::E4m3 => MatrixData::E4m3 {
            codes: bytes,
            scales,
            block: MatrixData::BLOCK,
            input_scales: ScaleFormat::F32,
        },
        ElementType::Bf16 | ElementType::F32 => MatrixData::Bf16(bytes),
    };
    HostMatrix { rows, cols, data }
}

/// The value of a counter (Box and Muller's transform of two hashed halves).
fn normal(counter: u64) -> f32 {
    let mut z = counter.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    let unit = |bits: u32| (f64::from(bits) + 1.0) / 4_294_967_297.0;
    let (a, b) = (unit(z as u32), unit((z >> 32) as u32));
    ((-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_normal_and_no_piece_is_like_another() {
        let mut noise = Noise::new();
        let values = noise.values(100_000);
        let mean = values.iter().sum::<f32>() / 1e5;
        let variance = values.iter().map(|v| v * v).sum::<f32>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "mean {mean}, variance {variance}");
        assert_ne!(noise.values(100), values[..100]);
        assert_eq!(noise.bytes(ElementType::Bf16, 10_000_000).len(), 10_000_000);
        // No NaN among codes and halves, whatever is taken.
        assert!(noise.bytes(ElementType::E4m3, 5_000_000).iter().all(|code| code & 0x7f != 0x7f));
    }
}
