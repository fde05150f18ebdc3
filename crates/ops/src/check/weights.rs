//! Validation of weights, stored or drawn.

use cadre_numerics::{bf16, draw, e4m3, quant};

use super::{Dims, attention_shape, equal, product};
use crate::{
    drawn::{DrawnElements, DrawnMatrix},
    error::OpsError,
    host::{HostMatrix, MatrixData},
    shape::AttentionShape,
};

/// Sizes of a matrix's data, and values that no kernel may see: elements that are not finite (for e4m3:
/// NaN codes), scales that are not finite and positive or overflow when folded with 2^8.
pub fn matrix(op: &'static str, matrix: &HostMatrix<'_>) -> Result<(), OpsError> {
    let elements = product(op, matrix.rows, matrix.cols)?;
    match matrix.data {
        MatrixData::F32(bytes) => {
            equal(op, "bytes of F32 elements", bytes.len(), elements * 4)?;
            let values = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
            finite(op, "element", values)
        }
        MatrixData::Bf16(bytes) => {
            equal(op, "bytes of BF16 elements", bytes.len(), elements * 2)?;
            let mut codes = bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
            match codes.position(|code| code & 0x7F80 == 0x7F80) {
                None => Ok(()),
                Some(index) => Err(OpsError::BadValue { op, what: "element", index, value: f32::NAN }),
            }
        }
        MatrixData::E4m3 { codes, scales, block, .. } => {
            for (what, side) in [("rows of a scale block", block[0]), ("columns of a scale block", block[1])]
            {
                equal(op, what, side, cadre_numerics::BLOCK)?;
            }
            equal(op, "bytes of e4m3 codes", codes.len(), elements)?;
            if let Some(index) = codes.iter().position(|code| e4m3::is_nan(*code)) {
                return Err(OpsError::BadValue { op, what: "e4m3 code", index, value: f32::NAN });
            }
            block_scales(op, matrix.rows, matrix.cols, scales)
        }
    }
}

/// As many scales as a matrix has blocks, each usable.
fn block_scales(op: &'static str, rows: usize, cols: usize, scales: &[f32]) -> Result<(), OpsError> {
    equal(op, "block scales", scales.len(), quant::blocks(rows) * quant::blocks(cols))?;
    let bad = |s: &f32| !(*s > 0.0 && (*s * e4m3::FOLD).is_finite());
    match scales.iter().position(bad) {
        None => Ok(()),
        Some(index) => Err(OpsError::BadValue { op, what: "scale", index, value: scales[index] }),
    }
}

/// Every value is finite.
pub fn finite(
    op: &'static str,
    what: &'static str,
    values: impl IntoIterator<Item = f32>,
) -> Result<(), OpsError> {
    match values.into_iter().enumerate().find(|(_, value)| !value.is_finite()) {
        None => Ok(()),
        Some((index, value)) => Err(OpsError::BadValue { op, what, index, value }),
    }
}

/// gate, up and down of a feed-forward block; returns (hidden, inner).
pub fn ffn(
    op: &'static str,
    gate: &HostMatrix<'_>,
    up: &HostMatrix<'_>,
    down: &HostMatrix<'_>,
) -> Result<(usize, usize), OpsError> {
    let dims = [gate, up, down].map(|matrix| Dims { rows: matrix.rows, cols: matrix.cols });
    let sizes = ffn_shapes(op, dims, gate.data.element_type() == up.data.element_type())?;
    [gate, up, down].into_iter().try_for_each(|part| matrix(op, part))?;
    Ok(sizes)
}

/// As [`ffn`], of matrices to be drawn.
pub fn drawn_ffn(
    op: &'static str,
    gate: &DrawnMatrix<'_>,
    up: &DrawnMatrix<'_>,
    down: &DrawnMatrix<'_>,
) -> Result<(usize, usize), OpsError> {
    let dims = [gate, up, down].map(|matrix| Dims { rows: matrix.rows, cols: matrix.cols });
    let sizes = ffn_shapes(op, dims, gate.element_type() == up.element_type())?;
    [gate, up, down].into_iter().try_for_each(|part| drawn_matrix(op, part))?;
    Ok(sizes)
}

fn ffn_shapes(
    op: &'static str,
    [gate, up, down]: [Dims; 3],
    one_type: bool,
) -> Result<(usize, usize), OpsError> {
    let (hidden, inner) = (gate.cols, gate.rows);
    equal(op, "rows of up_proj", up.rows, inner)?;
    equal(op, "columns of up_proj", up.cols, hidden)?;
    equal(op, "rows of down_proj", down.rows, hidden)?;
    equal(op, "columns of down_proj", down.cols, inner)?;
    if !one_type {
        let message = "gate_proj and up_proj have different element types".to_owned();
        return Err(OpsError::Device { op, message });
    }
    Ok((hidden, inner))
}

/// A matrix to be drawn: its size, its scales, and that no element comes out infinite.
pub fn drawn_matrix(op: &'static str, matrix: &DrawnMatrix<'_>) -> Result<(), OpsError> {
    product(op, matrix.rows, matrix.cols)?;
    let largest = draw::SUM_MAX * matrix.draw.factor;
    // BF16 rounds the last half of F32's last binade up to infinity.
    if !bf16::round(largest).is_finite() {
        return Err(OpsError::BadValue { op, what: "largest element", index: 0, value: largest });
    }
    match matrix.elements {
        DrawnElements::F32 | DrawnElements::Bf16 => Ok(()),
        DrawnElements::E4m3 { scales, .. } => block_scales(op, matrix.rows, matrix.cols, scales),
    }
}

/// kv_b of an attention shape.
pub fn kv_up(op: &'static str, shape: &AttentionShape, kv_b: &HostMatrix<'_>) -> Result<(), OpsError> {
    kv_up_shape(op, shape, kv_b.rows, kv_b.cols)?;
    matrix(op, kv_b)
}

/// As [`kv_up`], of a matrix to be drawn.
pub fn drawn_kv_up(op: &'static str, shape: &AttentionShape, kv_b: &DrawnMatrix<'_>) -> Result<(), OpsError> {
    kv_up_shape(op, shape, kv_b.rows, kv_b.cols)?;
    drawn_matrix(op, kv_b)
}

fn kv_up_shape(op: &'static str, shape: &AttentionShape, rows: usize, cols: usize) -> Result<(), OpsError> {
    attention_shape(op, shape)?;
    equal(op, "rows of kv_b", rows, shape.heads * (shape.nope + shape.v))?;
    equal(op, "columns of kv_b", cols, shape.kv_lora)
}
