//! Host-side data that enters or leaves a backend: checkpoint matrices and encoded activation rows.

use bytes::Bytes;
use cadre_types::{NumericsClass, config::ScaleFormat};

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
    /// e4m3fn codes, one byte each, with one multiplier per block of 128 x 128:
    /// `scales[(r / 128) * cols.div_ceil(128) + c / 128]`, real value = code x scale.
    E4m3 {
        /// Codes.
        codes: &'a [u8],
        /// Multipliers, row-major `[rows.div_ceil(128), cols.div_ceil(128)]`, finite and positive.
        scales: &'a [f32],
        /// Rows and columns that share a multiplier.
        block: [usize; 2],
        /// How scales of a quantised input of this matrix are rounded (class fp8).
        input_scales: ScaleFormat,
    },
}

/// Element type of a matrix, by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// F32.
    F32,
    /// BF16.
    Bf16,
    /// e4m3fn with block scales.
    E4m3,
}

impl MatrixData<'_> {
    /// The one block shape that there is (spec §7).
    pub const BLOCK: [usize; 2] = [128, 128];

    /// Its element type.
    pub fn element_type(&self) -> ElementType {
        match self {
            Self::F32(_) => ElementType::F32,
            Self::Bf16(_) => ElementType::Bf16,
            Self::E4m3 { .. } => ElementType::E4m3,
        }
    }
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
            NumericsClass::Fp8 | NumericsClass::CudaFp8 => Self::E4m3,
        }
    }

    /// The format in which expert outputs come back, and KV pages are cached and handed off.
    pub fn combine(class: NumericsClass) -> Self {
        match class {
            NumericsClass::F32 => Self::F32,
            NumericsClass::Bf16 | NumericsClass::Fp8 | NumericsClass::CudaFp8 => Self::Bf16,
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

/// Rows in memory of which slices can be kept without a copy: what travels.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodedRows {
    /// Encoding.
    pub format: RowFormat,
    /// Number of rows.
    pub rows: usize,
    /// Elements per row.
    pub cols: usize,
    /// `rows * format.row_bytes(cols)` bytes.
    pub data: Bytes,
    /// `rows * format.row_scales(cols)` F32 little-endian.
    pub scales: Bytes,
}

impl EncodedRows {
    /// The rows that were downloaded to the start of `memory`; takes the memory over and copies nothing.
    pub fn in_memory(memory: impl HostMemory, format: RowFormat, rows: usize, cols: usize) -> Self {
        let layout = RowLayout::of(format, rows, cols);
        let bytes = Bytes::from_owner(memory);
        let scales = bytes.slice(layout.scales_at..layout.bytes);
        Self { format, rows, cols, data: bytes.slice(..layout.data), scales }
    }

    /// The rows, borrowed.
    pub fn as_host_rows(&self) -> HostRows<'_> {
        let Self { format, rows, cols, .. } = *self;
        HostRows { format, rows, cols, data: &self.data, scales: &self.scales }
    }
}

/// Where encoded rows lie in one block of memory: elements, then (from a multiple of 4 on) scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowLayout {
    /// Bytes of elements, from 0 on.
    pub data: usize,
    /// First byte of the scales.
    pub scales_at: usize,
    /// All bytes.
    pub bytes: usize,
}

impl RowLayout {
    /// The layout of rows.
    pub fn of(format: RowFormat, rows: usize, cols: usize) -> Self {
        let data = rows * format.row_bytes(cols);
        let scales = rows * format.row_scales(cols) * 4;
        if scales == 0 {
            return Self { data, scales_at: data, bytes: data };
        }
        let scales_at = data.next_multiple_of(4);
        Self { data, scales_at, bytes: scales_at + scales }
    }
}

/// Host memory of a backend. `as_ref` and `as_mut` give all of it, always at the same place, and wait until
/// transfers under way are done.
pub trait HostMemory: AsRef<[u8]> + AsMut<[u8]> + Send + Sync + 'static {}

impl<T: AsRef<[u8]> + AsMut<[u8]> + Send + Sync + 'static> HostMemory for T {}
