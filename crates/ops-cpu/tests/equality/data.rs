//! Deterministic inputs, and what a test does with a backend in a few words.

use cadre_numerics::{bf16, e4m3, quant};
use cadre_ops::{Backend, HostMatrix, HostRows, MatrixData, RowFormat};

/// A counter-based stream of values.
#[derive(Clone)]
pub(crate) struct Stream(u64);

impl Stream {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit.max(1) as u64) as usize
    }

    /// Mostly moderate values, some zero, some tiny, some large.
    pub(crate) fn value(&mut self) -> f32 {
        let unit = (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        match self.bits() % 64 {
            0 => 0.0,
            1 => -0.0,
            2 => unit * 1e-7,
            3 => unit * 50.0,
            _ => unit,
        }
    }

    pub(crate) fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }
}

/// Element type of a generated matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dtype {
    F32,
    Bf16,
    E4m3,
}

pub(crate) const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::E4m3];

/// A matrix in host memory.
#[derive(Clone)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    dtype: Dtype,
    bytes: Vec<u8>,
    scales: Vec<f32>,
}

impl Matrix {
    pub(crate) fn new(stream: &mut Stream, dtype: Dtype, rows: usize, cols: usize) -> Self {
        let values = stream.values(rows * cols);
        let bytes = match dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::Bf16 => values.iter().flat_map(|v| bf16::encode(*v).to_le_bytes()).collect(),
            Dtype::E4m3 => values.iter().map(|v| e4m3::encode(v * 8.0)).collect(),
        };
        let blocks = quant::blocks(rows) * quant::blocks(cols);
        let scales = (0..blocks).map(|_| 0.01 + stream.value().abs() * 0.1).collect();
        Self { rows, cols, dtype, bytes, scales }
    }

    pub(crate) fn host(&self) -> HostMatrix<'_> {
        let data = match self.dtype {
            Dtype::F32 => MatrixData::F32(&self.bytes),
            Dtype::Bf16 => MatrixData::Bf16(&self.bytes),
            Dtype::E4m3 => MatrixData::E4m3 { codes: &self.bytes, scales: &self.scales },
        };
        HostMatrix { rows: self.rows, cols: self.cols, data }
    }

    /// Dequantised values, row-major.
    pub(crate) fn values(&self) -> Vec<f32> {
        let value = |i: usize| match self.dtype {
            Dtype::F32 => f32::from_le_bytes(self.bytes[4 * i..4 * i + 4].try_into().unwrap()),
            Dtype::Bf16 => bf16::decode(u16::from_le_bytes(self.bytes[2 * i..2 * i + 2].try_into().unwrap())),
            Dtype::E4m3 => {
                let block = i / self.cols / 128 * quant::blocks(self.cols) + i % self.cols / 128;
                e4m3::decode(self.bytes[i]) * self.scales[block]
            }
        };
        (0..self.rows * self.cols).map(value).collect()
    }
}

/// A buffer with the given rows, and `spare` more rows of garbage.
pub(crate) fn buffer<B: Backend>(backend: &B, x: &[f32], cols: usize, spare: usize) -> B::Buffer {
    let mut values = x.to_vec();
    values.resize(x.len() + spare * cols, 7.0);
    let rows = values.len() / cols;
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let host = HostRows { format: RowFormat::F32, rows, cols, data: &data, scales: &[] };
    let mut buffer = backend.alloc(rows, cols).unwrap();
    backend.upload_rows(&mut backend.queue().unwrap(), host, &mut buffer).unwrap();
    buffer
}

/// Bits of the leading rows.
pub(crate) fn bits<B: Backend>(backend: &B, buffer: &B::Buffer, rows: usize) -> Vec<u32> {
    let rows: Vec<usize> = (0..rows).collect();
    let mut out = Vec::new();
    backend.download_f32(&mut backend.queue().unwrap(), buffer, &rows, &mut out).unwrap();
    out.into_iter().map(f32::to_bits).collect()
}

/// Asserts equal bits and names the first difference.
pub(crate) fn assert_bits(what: &str, got: &[u32], expected: &[u32], cols: usize) {
    assert_eq!(got.len(), expected.len(), "{what}");
    if let Some(i) = (0..got.len()).find(|i| got[*i] != expected[*i]) {
        let (got, expected) = (f32::from_bits(got[i]), f32::from_bits(expected[i]));
        panic!("{what}: row {} column {}: {got:?} is not {expected:?}", i / cols, i % cols);
    }
}
