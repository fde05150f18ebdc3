//! Deterministic inputs, and what a test does with a backend in a few words.

use cadre_numerics::{bf16, e4m3, quant};
use cadre_types::{TokenId, config::ScaleFormat};

use crate::{
    backend::Backend,
    host::{HostMatrix, MatrixData},
    step::{StepRows, StepSegment},
};

/// A counter-based stream of values.
#[derive(Clone, Debug)]
pub struct Stream(u64);

impl Stream {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below a limit (0 if that is 0).
    pub fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit.max(1) as u64) as usize
    }

    /// One of two.
    pub fn coin(&mut self) -> bool {
        self.below(2) == 1
    }

    /// Mostly moderate values, some zero, some tiny, some large.
    pub fn value(&mut self) -> f32 {
        let unit = (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        match self.bits() % 64 {
            0 => 0.0,
            1 => -0.0,
            2 => unit * 1e-7,
            3 => unit * 50.0,
            _ => unit,
        }
    }

    /// That many of them.
    pub fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }
}

/// Element type of a generated matrix.
#[derive(Clone, Copy, Debug)]
pub enum Dtype {
    /// F32.
    F32,
    /// BF16.
    Bf16,
    /// e4m3; inputs get scales of any value.
    E4m3,
    /// e4m3; inputs get scales that are powers of two.
    E4m3Powers,
}

impl Dtype {
    pub(super) const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::E4m3, Self::E4m3Powers];

    pub(super) fn any(stream: &mut Stream) -> Self {
        Self::ALL[stream.below(Self::ALL.len())]
    }
}

/// A matrix in host memory.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    dtype: Dtype,
    bytes: Vec<u8>,
    scales: Vec<f32>,
}

impl Matrix {
    /// A matrix of random values.
    pub fn new(stream: &mut Stream, dtype: Dtype, rows: usize, cols: usize) -> Self {
        let values = stream.values(rows * cols);
        let bytes = match dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::Bf16 => values.iter().flat_map(|v| bf16::encode(*v).to_le_bytes()).collect(),
            Dtype::E4m3 | Dtype::E4m3Powers => values.iter().map(|v| e4m3::encode(v * 8.0)).collect(),
        };
        let blocks = quant::blocks(rows) * quant::blocks(cols);
        let scales = (0..blocks).map(|_| 0.01 + stream.value().abs() * 0.1).collect();
        Self { rows, cols, dtype, bytes, scales }
    }

    /// As [`Self::new`], of any element type.
    pub fn any(stream: &mut Stream, rows: usize, cols: usize) -> Self {
        let dtype = Dtype::any(stream);
        Self::new(stream, dtype, rows, cols)
    }

    /// The matrix as a backend takes it.
    pub fn host(&self) -> HostMatrix<'_> {
        let e4m3 = |input_scales| MatrixData::E4m3 {
            codes: &self.bytes,
            scales: &self.scales,
            block: MatrixData::BLOCK,
            input_scales,
        };
        let data = match self.dtype {
            Dtype::F32 => MatrixData::F32(&self.bytes),
            Dtype::Bf16 => MatrixData::Bf16(&self.bytes),
            Dtype::E4m3 => e4m3(ScaleFormat::F32),
            Dtype::E4m3Powers => e4m3(ScaleFormat::Ue8m0),
        };
        HostMatrix { rows: self.rows, cols: self.cols, data }
    }

    /// Dequantised values, row-major.
    pub fn values(&self) -> Vec<f32> {
        let value = |i: usize| match self.dtype {
            Dtype::F32 => f32::from_le_bytes(self.bytes[4 * i..4 * i + 4].try_into().unwrap()),
            Dtype::Bf16 => bf16::decode(u16::from_le_bytes(self.bytes[2 * i..2 * i + 2].try_into().unwrap())),
            Dtype::E4m3 | Dtype::E4m3Powers => {
                let block = i / self.cols / 128 * quant::blocks(self.cols) + i % self.cols / 128;
                e4m3::decode(self.bytes[i]) * self.scales[block]
            }
        };
        (0..self.rows * self.cols).map(value).collect()
    }
}

/// Values and `spare` more rows of garbage.
fn padded(x: &[f32], cols: usize, spare: usize) -> (Vec<f32>, usize) {
    let mut values = x.to_vec();
    values.resize(x.len() + spare * cols, 7.0);
    let rows = values.len() / cols.max(1);
    (values, rows)
}

/// Activations with the given rows, and `spare` more of garbage.
pub(super) fn activations<B: Backend>(backend: &B, x: &[f32], cols: usize, spare: usize) -> B::Activations {
    let (values, rows) = padded(x, cols, spare);
    let mut buffer = backend.alloc_activations(rows, cols).unwrap();
    backend.write_activations(&mut backend.queue().unwrap(), &values, &mut buffer).unwrap();
    buffer
}

/// A residual stream with the given rows, and `spare` more of garbage.
pub(super) fn residual<B: Backend>(backend: &B, x: &[f32], cols: usize, spare: usize) -> B::Residual {
    let (values, rows) = padded(x, cols, spare);
    let mut buffer = backend.alloc_residual(rows, cols).unwrap();
    backend.write_residual(&mut backend.queue().unwrap(), &values, &mut buffer).unwrap();
    buffer
}

/// Values of the leading rows.
pub(super) fn read<B: Backend>(
    backend: &B,
    queue: &mut B::Queue,
    x: &B::Activations,
    rows: usize,
) -> Vec<f32> {
    let mut out = Vec::new();
    backend.read_activations(queue, x, 0..rows, &mut out).unwrap();
    out
}

/// As [`read`], of the residual stream.
pub(super) fn read_residual<B: Backend>(
    backend: &B,
    queue: &mut B::Queue,
    x: &B::Residual,
    rows: usize,
) -> Vec<f32> {
    let mut out = Vec::new();
    backend.read_residual(queue, x, 0..rows, &mut out).unwrap();
    out
}

/// A step without attention.
pub(super) fn step_of<B: Backend>(
    backend: &B,
    queue: &mut B::Queue,
    ids: &[TokenId],
    wanted: &[u32],
) -> B::Step {
    let mut step = backend.alloc_step(ids.len()).unwrap();
    backend.begin_step(queue, &StepRows { ids, segments: &[], wanted }, &mut step).unwrap();
    step
}

/// A step of segments.
pub(super) fn attending<B: Backend>(
    backend: &B,
    queue: &mut B::Queue,
    segments: &[StepSegment<'_>],
) -> B::Step {
    let rows = segments.iter().map(|segment| segment.rows).sum();
    let mut step = backend.alloc_step(rows).unwrap();
    let ids = vec![0; rows];
    backend.begin_step(queue, &StepRows { ids: &ids, segments, wanted: &[] }, &mut step).unwrap();
    step
}
