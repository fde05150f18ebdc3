//! Rows to and from the host, and from buffer to buffer.

use std::ops::Range;

use cadre_numerics::{BLOCK, bf16, e4m3, quant};
use cadre_ops::{
    HostRows, OpsError, RowFormat, RowLayout,
    check::{self, Dims},
    resident::{HostPass, HostStep},
};
use cadre_types::NumericsClass;

use super::{Buffer, CpuBackend, CpuQueue};
use crate::memory::Aligned;

/// Nanoseconds per element of a conversion on one thread.
const CONVERT_NS_PER_16: u64 = 8;

/// A pointer that tasks write disjoint parts through.
#[derive(Clone, Copy)]
pub(super) struct Out<T>(pub(super) *mut T);

// SAFETY: whoever makes an `Out` gives each task its own part of what it points to.
unsafe impl<T> Sync for Out<T> {}

impl<T> Out<T> {
    /// The pointer (a method, so that closures capture the whole `Out` and not its field).
    pub(super) fn get(&self) -> *mut T {
        self.0
    }
}

/// Rows in the dispatch format.
#[derive(Debug)]
pub struct DispatchRows {
    pub(super) dims: Dims,
    pub(super) store: Store,
}

/// How rows in the dispatch format are kept.
#[derive(Debug)]
pub(super) enum Store {
    /// Classes `f32` and `bf16`: as F32.
    Values(Aligned<f32>),
    /// Class `fp8`: `[rows, cols]` and `[rows, blocks]`.
    Codes { codes: Aligned<u8>, scales: Aligned<f32> },
}

impl DispatchRows {
    pub(super) fn new(op: &'static str, class: NumericsClass, dims: Dims) -> Result<Self, OpsError> {
        let elements = check::product(op, dims.rows, dims.cols)?;
        let store = match RowFormat::dispatch(class) {
            RowFormat::F32 | RowFormat::Bf16 => Store::Values(Aligned::zeroed(op, elements)?),
            RowFormat::E4m3 => Store::Codes {
                codes: Aligned::zeroed(op, elements)?,
                scales: Aligned::zeroed(op, dims.rows * quant::blocks(dims.cols))?,
            },
        };
        Ok(Self { dims, store })
    }
}

pub(super) fn encode(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    x: &Buffer,
    rows: usize,
    powers_of_two: bool,
    y: &mut DispatchRows,
) -> Result<(), OpsError> {
    let op = "encode";
    check::same_width(op, x.dims, y.dims, rows)?;
    let (cols, blocks) = (x.dims.cols, quant::blocks(x.dims.cols));
    match &mut y.store {
        Store::Values(values) => values[..rows * cols].copy_from_slice(&x.data[..rows * cols]),
        Store::Codes { codes, scales } => {
            let quantised = quantise(backend, op, queue, x, rows, powers_of_two)?;
            let (from, from_scales) = (Out(quantised.values), Out(quantised.scales.cast_mut()));
            let (to, to_scales) = (Out(codes.as_mut_ptr()), Out(scales.as_mut_ptr()));
            let cost = (rows * cols) as u64 / 16 * CONVERT_NS_PER_16;
            backend.run_rows(rows, cost, &|row| {
                // SAFETY: row `row` of the scratch and of `y` exist and are this call's.
                unsafe {
                    let from = from.get().add(row * cols);
                    (backend.kernels.encode_e4m3)(from, cols, to.get().add(row * cols));
                    let from = from_scales.get().add(row * blocks);
                    std::ptr::copy_nonoverlapping(from, to_scales.get().add(row * blocks), blocks);
                }
            });
        }
    }
    Ok(())
}

pub(super) fn download_rows(
    backend: &CpuBackend,
    x: &DispatchRows,
    rows: usize,
    memory: &mut [u8],
    at: usize,
) -> Result<(), OpsError> {
    let (op, cols) = ("download_rows", x.dims.cols);
    check::at_least(op, "row capacity of x", x.dims.rows, rows)?;
    let layout = RowLayout::of(RowFormat::dispatch(backend.class), rows, cols);
    check::memory(op, memory.len(), at, layout.bytes)?;
    let memory = &mut memory[at..at + layout.bytes];
    match &x.store {
        Store::Values(values) => write_values(backend, &values[..rows * cols], memory),
        Store::Codes { codes, scales } => {
            memory[..layout.data].copy_from_slice(&codes[..rows * cols]);
            let to = memory[layout.scales_at..].as_chunks_mut::<4>().0;
            to.iter_mut().zip(&scales[..]).for_each(|(to, scale)| *to = scale.to_le_bytes());
        }
    }
    Ok(())
}

pub(super) fn download_activations(
    backend: &CpuBackend,
    x: &Buffer,
    rows: Range<usize>,
    memory: &mut [u8],
    at: usize,
) -> Result<(), OpsError> {
    let op = "download_activations";
    check::rows(op, x.dims, &rows)?;
    let values = &x.data[rows.start * x.dims.cols..rows.end * x.dims.cols];
    let bytes = RowFormat::combine(backend.class).row_bytes(values.len());
    check::memory(op, memory.len(), at, bytes)?;
    write_values(backend, values, &mut memory[at..at + bytes]);
    Ok(())
}

/// Values as bf16, or F32 in class `f32`; `out` has room for exactly those.
fn write_values(backend: &CpuBackend, values: &[f32], out: &mut [u8]) {
    if backend.rounds() {
        // SAFETY: `values.len()` values are readable and as many bf16 writable.
        unsafe { (backend.kernels.narrow_bf16)(values.as_ptr(), values.len(), out.as_mut_ptr()) };
    } else {
        let out = out.as_chunks_mut::<4>().0;
        out.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_le_bytes());
    }
}

pub(super) fn upload_rows(
    backend: &CpuBackend,
    rows: &HostRows<'_>,
    first_row: usize,
    y: &mut DispatchRows,
) -> Result<(), OpsError> {
    check::upload_rows("upload_rows", rows, backend.class, first_row, y.dims)?;
    let (cols, blocks) = (rows.cols, quant::blocks(rows.cols));
    let (first, len) = (first_row * cols, rows.rows * cols);
    match &mut y.store {
        Store::Codes { codes, scales } => {
            codes[first..first + len].copy_from_slice(rows.data);
            let to = &mut scales[first_row * blocks..];
            for (to, bytes) in to.iter_mut().zip(rows.scales.as_chunks::<4>().0) {
                *to = f32::from_le_bytes(*bytes);
            }
        }
        Store::Values(values) if rows.format == RowFormat::Bf16 => {
            let to = values[first..first + len].as_mut_ptr();
            // SAFETY: `len` bf16 are readable (checked) and as many F32 writable.
            unsafe { (backend.kernels.widen_bf16)(rows.data.as_ptr(), len, to) };
        }
        Store::Values(values) => {
            check::decode_row(RowFormat::F32, rows.data, &[], &mut values[first..first + len]);
        }
    }
    Ok(())
}

pub(super) fn read(
    op: &'static str,
    x: &Buffer,
    rows: Range<usize>,
    out: &mut Vec<f32>,
) -> Result<(), OpsError> {
    check::rows(op, x.dims, &rows)?;
    out.extend_from_slice(&x.data[rows.start * x.dims.cols..rows.end * x.dims.cols]);
    Ok(())
}

pub(super) fn write(op: &'static str, values: &[f32], y: &mut Buffer) -> Result<usize, OpsError> {
    check::values(op, values.len(), y.dims)?;
    y.data[..values.len()].copy_from_slice(values);
    Ok(values.len())
}

pub(super) fn write_activations(
    backend: &CpuBackend,
    values: &[f32],
    y: &mut Buffer,
) -> Result<(), OpsError> {
    let written = write("write_activations", values, y)?;
    if backend.rounds() {
        y.data[..written].iter_mut().for_each(|value| *value = bf16::round(*value));
    }
    Ok(())
}

/// Copies the given rows of `x` to the leading rows of `y`.
pub(super) fn gather_wanted(step: &HostStep, x: &Buffer, y: &mut Buffer) -> Result<(), OpsError> {
    check::gather_wanted("gather_wanted", step.info(), x.dims, y.dims)?;
    for (to, from) in step.wanted().iter().enumerate() {
        y.row_mut(to).copy_from_slice(x.row(*from));
    }
    Ok(())
}

pub(super) fn assign(x: &mut Buffer, y: &Buffer, rows: usize) -> Result<(), OpsError> {
    check::same_width("assign", y.dims, x.dims, rows)?;
    let len = rows * x.dims.cols;
    x.data[..len].copy_from_slice(&y.data[..len]);
    Ok(())
}

pub(super) fn concat(a: &Buffer, b: &Buffer, rows: usize, y: &mut Buffer) -> Result<(), OpsError> {
    check::concat("concat", a.dims, b.dims, rows, y.dims)?;
    for row in 0..rows {
        let (left, right) = y.row_mut(row).split_at_mut(a.dims.cols);
        left.copy_from_slice(a.row(row));
        right.copy_from_slice(b.row(row));
    }
    Ok(())
}

/// Rows as codes' values in scratch memory, with scales.
pub(super) struct Quantised {
    /// `[rows, cols]`.
    pub(super) values: *mut f32,
    /// `[rows, blocks]`.
    pub(super) scales: *const f32,
}

// SAFETY: tasks only read what it points to.
unsafe impl Sync for Quantised {}

/// Quantises the leading rows of a buffer.
pub(super) fn quantise(
    backend: &CpuBackend,
    op: &'static str,
    queue: &mut CpuQueue,
    x: &Buffer,
    rows: usize,
    powers_of_two: bool,
) -> Result<Quantised, OpsError> {
    let (cols, blocks) = (x.dims.cols, quant::blocks(x.dims.cols));
    let values = Out(queue.codes.floats(op, rows * cols)?.as_mut_ptr());
    let scales = Out(queue.code_scales.floats(op, rows * blocks)?.as_mut_ptr());
    let cost = (rows * cols) as u64 / 16 * CONVERT_NS_PER_16;
    backend.run_rows(rows, cost, &|row| {
        // SAFETY: row `row` of `x` exists; row `row` of both scratch arrays is this task's.
        unsafe {
            let (to, to_scales) = (values.get().add(row * cols), scales.get().add(row * blocks));
            (backend.kernels.quantise)(x.row(row).as_ptr(), cols, powers_of_two, to, to_scales);
        }
    });
    Ok(Quantised { values: values.get(), scales: scales.get() })
}

/// What experts are given of received rows.
#[derive(Clone, Copy)]
pub(super) struct Received {
    /// `[rows, cols]` of plain values; null if nobody wants them.
    pub(super) values: *mut f32,
    /// `[rows, cols]` of codes' values; null if there are none or nobody wants them.
    pub(super) codes: *mut f32,
    /// `[pairs, blocks]`, beside `codes`.
    pub(super) pair_scales: *const f32,
}

// SAFETY: tasks only read what it points to.
unsafe impl Sync for Received {}

/// Decodes received rows, each once, for experts that take codes and for experts that take values.
pub(super) fn receive(
    backend: &CpuBackend,
    op: &'static str,
    queue: &mut CpuQueue,
    x: &DispatchRows,
    pass: &HostPass,
    (take_codes, take_values): (bool, bool),
) -> Result<Received, OpsError> {
    let (cols, blocks) = (x.dims.cols, quant::blocks(x.dims.cols));
    let null = std::ptr::null_mut();
    let (codes, scales) = match &x.store {
        Store::Values(values) => {
            let values = values.as_ptr().cast_mut();
            return Ok(Received { values, codes: null, pair_scales: null });
        }
        Store::Codes { codes, scales } => (codes, scales),
    };
    let rows = pass.info().input_end;
    let wanted = |wanted: bool| if wanted { rows * cols } else { 0 };
    let as_codes = Out(queue.codes.floats(op, wanted(take_codes))?.as_mut_ptr());
    let as_values = Out(queue.values.floats(op, wanted(take_values))?.as_mut_ptr());
    let cost = (rows * cols) as u64 / 16 * CONVERT_NS_PER_16;
    backend.run_rows(rows, cost, &|row| {
        let codes = &codes[row * cols..(row + 1) * cols];
        let scales = &scales[row * blocks..(row + 1) * blocks];
        for (block, codes) in codes.chunks(BLOCK).enumerate() {
            let at = row * cols + block * BLOCK;
            for (i, code) in codes.iter().enumerate() {
                let value = e4m3::decode(*code);
                // SAFETY: what is wanted has `rows * cols` elements, and row `row` is this call's.
                unsafe {
                    if take_codes {
                        *as_codes.get().add(at + i) = value;
                    }
                    if take_values {
                        *as_values.get().add(at + i) = value * scales[block];
                    }
                }
            }
        }
    });
    let pairs = if take_codes { pass.input() } else { &[] };
    let pair_scales = queue.code_scales.floats(op, pairs.len() * blocks)?;
    for (to, row) in pair_scales.chunks_exact_mut(blocks.max(1)).zip(pairs) {
        to.copy_from_slice(&scales[row * blocks..(row + 1) * blocks]);
    }
    Ok(Received {
        values: if take_values { as_values.get() } else { null },
        codes: if take_codes { as_codes.get() } else { null },
        pair_scales: pair_scales.as_ptr(),
    })
}
