//! Matrices that are drawn instead of read: random weights.
//!
//! Every element is a function of the matrix's key and the element's index ([`cadre_numerics::draw`]), so that a
//! device draws what it holds by itself and all processes hold the same. Scales of e4m3 matrices are few and come
//! from the host.

use std::thread;

use cadre_numerics::draw::Draw;
use cadre_types::config::ScaleFormat;

use crate::{
    check,
    error::OpsError,
    host::{ElementType, HostMatrix, MatrixData},
};

/// A matrix whose element `row * cols + col` is drawn.
#[derive(Clone, Copy, Debug)]
pub struct DrawnMatrix<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// What is drawn.
    pub draw: Draw,
    /// What it is rounded to.
    pub elements: DrawnElements<'a>,
}

/// Element type of a [`DrawnMatrix`].
#[derive(Clone, Copy, Debug)]
pub enum DrawnElements<'a> {
    /// F32.
    F32,
    /// BF16.
    Bf16,
    /// e4m3 codes, with the multipliers of [`MatrixData::E4m3`].
    E4m3 {
        /// Multipliers.
        scales: &'a [f32],
        /// As [`MatrixData::E4m3`] has it.
        input_scales: ScaleFormat,
    },
}

/// Elements that one more thread is worth.
const PER_THREAD: usize = 1 << 20;

impl DrawnMatrix<'_> {
    /// Its element type.
    pub fn element_type(&self) -> ElementType {
        match self.elements {
            DrawnElements::F32 => ElementType::F32,
            DrawnElements::Bf16 => ElementType::Bf16,
            DrawnElements::E4m3 { .. } => ElementType::E4m3,
        }
    }

    /// The elements as a checkpoint would store them: what every device draws.
    pub fn bytes(&self, op: &'static str) -> Result<Vec<u8>, OpsError> {
        let elements = check::product(op, self.rows, self.cols)?;
        let width = match self.elements {
            DrawnElements::F32 => 4,
            DrawnElements::Bf16 => 2,
            DrawnElements::E4m3 { .. } => 1,
        };
        let mut bytes = vec![0; check::product(op, elements, width)?];
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let share = elements.div_ceil(threads).max(PER_THREAD);
        thread::scope(|scope| {
            for (i, part) in bytes.chunks_mut(share * width).enumerate() {
                let first = (i * share) as u64;
                scope.spawn(move || match self.elements {
                    DrawnElements::F32 => self.draw.f32_bytes(first, part),
                    DrawnElements::Bf16 => self.draw.bf16_bytes(first, part),
                    DrawnElements::E4m3 { .. } => self.draw.e4m3_bytes(first, part),
                });
            }
        });
        Ok(bytes)
    }

    /// The same matrix with its elements in memory.
    pub fn host<'b>(&'b self, bytes: &'b [u8]) -> HostMatrix<'b> {
        let data = match self.elements {
            DrawnElements::F32 => MatrixData::F32(bytes),
            DrawnElements::Bf16 => MatrixData::Bf16(bytes),
            DrawnElements::E4m3 { scales, input_scales } => {
                MatrixData::E4m3 { codes: bytes, scales, block: MatrixData::BLOCK, input_scales }
            }
        };
        HostMatrix { rows: self.rows, cols: self.cols, data }
    }
}
