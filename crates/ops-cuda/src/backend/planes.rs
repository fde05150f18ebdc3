//! Values on the device: residual stream, activations, logits, and rows as they travel.

use std::ops::Range;

use cadre_numerics::{bf16, quant};
use cadre_ops::{OpsError, RowFormat, check, check::Dims};

use super::queue::CudaQueue;
use crate::{
    device::{Memory, Stream},
    launch::Arg,
};

/// Values `[rows, cols]`, row-major, F32 or BF16.
#[derive(Debug)]
pub struct Plane {
    pub(crate) dims: Dims,
    pub(crate) bf16: bool,
    pub(crate) memory: Memory,
}

/// Rows in the dispatch format of the class.
#[derive(Debug)]
pub struct Rows {
    pub(crate) dims: Dims,
    pub(crate) format: RowFormat,
    /// Elements of every row, then (from a multiple of 256 on) the scales.
    pub(crate) memory: Memory,
    scales_at: usize,
}

/// Bytes of a plane.
pub(crate) fn plane_bytes(op: &'static str, dims: Dims, bf16: bool) -> Result<usize, OpsError> {
    check::product(op, check::product(op, dims.rows, dims.cols)?, if bf16 { 2 } else { 4 })
}

/// Where the scales of rows begin, and all bytes.
pub(crate) fn rows_bytes(
    op: &'static str,
    dims: Dims,
    format: RowFormat,
) -> Result<(usize, usize), OpsError> {
    let data = check::product(op, dims.rows, format.row_bytes(dims.cols))?.next_multiple_of(256);
    let scales = check::product(op, dims.rows, format.row_scales(dims.cols) * 4)?;
    Ok((data, data + scales))
}

impl Plane {
    pub(crate) fn new(stream: &Stream, op: &'static str, dims: Dims, bf16: bool) -> Result<Self, OpsError> {
        let bytes = plane_bytes(op, dims, bf16)?;
        Ok(Self { dims, bf16, memory: Memory::zeroed(stream, op, bytes)? })
    }

    /// Bytes of a row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.dims.cols * if self.bf16 { 2 } else { 4 }
    }

    /// Values of rows, appended; waits.
    pub(crate) fn read(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        host: &mut super::Staging,
        rows: &Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        let bytes = rows.len() * self.row_bytes();
        let from = self.memory.at(rows.start * self.row_bytes());
        queue.stream.download(op, from, host.address(), bytes)?;
        queue.finish(op)?;
        let host = &host.as_ref()[..bytes];
        if self.bf16 {
            out.extend(host.as_chunks::<2>().0.iter().map(|b| bf16::decode(u16::from_le_bytes(*b))));
        } else {
            out.extend(host.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
        }
        Ok(())
    }

    /// Writes leading rows, each value rounded to the element type; waits.
    pub(crate) fn write(
        &mut self,
        op: &'static str,
        queue: &mut CudaQueue,
        values: &[f32],
    ) -> Result<(), OpsError> {
        check::values(op, values.len(), self.dims)?;
        let bytes: Vec<u8> = if self.bf16 {
            values.iter().flat_map(|value| bf16::encode(*value).to_le_bytes()).collect()
        } else {
            values.iter().flat_map(|value| value.to_le_bytes()).collect()
        };
        queue.stream.upload(op, &bytes, self.memory.address())?;
        Ok(queue.stream.synchronize(op)?)
    }
}

impl Rows {
    pub(crate) fn new(
        stream: &Stream,
        op: &'static str,
        dims: Dims,
        format: RowFormat,
    ) -> Result<Self, OpsError> {
        let (scales_at, bytes) = rows_bytes(op, dims, format)?;
        Ok(Self { dims, format, memory: Memory::zeroed(stream, op, bytes)?, scales_at })
    }

    /// Address of a row's elements.
    pub(crate) fn data(&self, row: usize) -> u64 {
        self.memory.address() + (row * self.format.row_bytes(self.dims.cols)) as u64
    }

    /// Address of a row's scales.
    pub(crate) fn scales(&self, row: usize) -> u64 {
        self.memory.address() + (self.scales_at + row * quant::blocks(self.dims.cols) * 4) as u64
    }
}

impl From<&Plane> for Arg<'_> {
    fn from(plane: &Plane) -> Self {
        Self::Pointer(plane.memory.address())
    }
}
