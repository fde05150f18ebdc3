//! Host-side data that enters or leaves a backend: checkpoint matrices and encoded activation rows.

use cadre_types::NumericsClass;

/// A matrix as the checkpoint stores it: row-major `[rows, cols]`, little-endian, any alignment.
#[derive(Clone, Copy, Debug)]
pub struct HostMatrix<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The elements.
    pub data: MatrixData<'a>,
}

/// Elements of a [`HostMatrix`].
#[derive(Clone, Copy, Debug)]
pub enum MatrixData<'a> {
    /// F32, 4 bytes each.
    F32(&'a [u8]),
    /// BF16, 2 bytes each.
    Bf16(&'a [u8]),
    /// e4m3fn codes, one byte each, with one multiplier per 128x128 block:
    /// `scales[(r / 128) * cols.div_ceil(128) + c / 128]`, real value = code x scale.
    E4m3 {
        /// Codes.
        codes: &'a [u8],
        /// Multipliers, row-major `[rows.div_ceil(128), cols.div_ceil(128)]`, finite and positive.
        scales: &'a [f32],
    },
}

/// A vector in F32 (norm weights, gate bias), converted from the checkpoint's dtype.
pub type HostVector<'a> = &'a [f32];

/// How activation rows are encoded on the wire and between exchanges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowFormat {
    /// `cols` x F32 little-endian.
    F32,
    /// `cols` x BF16 little-endian.
    Bf16,
    /// `cols` e4m3 codes; the F32 scales (one per 128 columns) travel beside them.
    E4m3,
}

impl RowFormat {
    /// The format in which activations go to experts.
    pub fn dispatch(class: NumericsClass) -> Self {
        match class {
            NumericsClass::F32 => Self::F32,
            NumericsClass::Bf16 => Self::Bf16,
            NumericsClass::Fp8 => Self::E4m3,
        }
    }

    /// The format in which expert outputs come back, and KV pages are cached and handed off.
    pub fn combine(class: NumericsClass) -> Self {
        match class {
            NumericsClass::F32 => Self::F32,
            NumericsClass::Bf16 | NumericsClass::Fp8 => Self::Bf16,
        }
    }

    /// Bytes of one row's elements, without scales.
    pub fn row_bytes(self, cols: usize) -> usize {
        match self {
            Self::F32 => cols * 4,
            Self::Bf16 => cols * 2,
            Self::E4m3 => cols,
        }
    }

    /// F32 scales that accompany one row.
    pub fn row_scales(self, cols: usize) -> usize {
        match self {
            Self::E4m3 => cols.div_ceil(128),
            Self::F32 | Self::Bf16 => 0,
        }
    }
}

/// Encoded rows in host memory, borrowed: `data` holds `rows * format.row_bytes(cols)` bytes,
/// `scales` `rows * format.row_scales(cols)` F32 little-endian.
#[derive(Clone, Copy, Debug)]
pub struct HostRows<'a> {
    /// Encoding.
    pub format: RowFormat,
    /// Number of rows.
    pub rows: usize,
    /// Elements per row.
    pub cols: usize,
    /// Elements.
    pub data: &'a [u8],
    /// Scales, as bytes (a slice of a frame has any alignment).
    pub scales: &'a [u8],
}
