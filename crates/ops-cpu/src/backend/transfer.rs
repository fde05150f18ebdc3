//! Rows to and from the host, and from buffer to buffer.

use cadre_numerics::{BLOCK, e4m3, quant};
use cadre_ops::{HostRows, OpsError, RowFormat, check};

use super::{Buffer, CpuBackend, CpuQueue};

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

pub(super) fn download_rows(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    x: &Buffer,
    rows: usize,
    format: RowFormat,
    data: &mut Vec<u8>,
    scales: &mut Vec<u8>,
) -> Result<(), OpsError> {
    let op = "download_rows";
    check::at_least(op, "row capacity of x", x.dims.rows, rows)?;
    let cols = x.dims.cols;
    data.clear();
    scales.clear();
    match format {
        RowFormat::F32 => data.extend(x.data[..rows * cols].iter().flat_map(|v| v.to_le_bytes())),
        RowFormat::Bf16 => {
            data.resize(rows * cols * 2, 0);
            let (from, to) = (x.input(), data.as_mut_ptr());
            // SAFETY: `rows * cols` values are readable and as many bf16 writable; `data` is ours.
            unsafe { (backend.kernels.narrow_bf16)(from.base, rows * cols, to) };
        }
        RowFormat::E4m3 => {
            let blocks = quant::blocks(cols);
            let values = queue.codes.floats(op, cols)?;
            let row_scales = queue.code_scales.floats(op, blocks)?;
            data.resize(rows * cols, 0);
            for row in 0..rows {
                let codes = &mut data[row * cols..(row + 1) * cols];
                if let Some((arrived, own)) = x.coded(row) {
                    codes.copy_from_slice(arrived);
                    scales.extend(own.iter().flat_map(|s| s.to_le_bytes()));
                    continue;
                }
                let (to, to_scales) = (values.as_mut_ptr(), row_scales.as_mut_ptr());
                // SAFETY: the row, `values` and `codes` hold `cols` elements, `row_scales` one per block.
                unsafe {
                    (backend.kernels.quantise)(x.row(row).as_ptr(), cols, to, to_scales);
                    (backend.kernels.encode_e4m3)(to, cols, codes.as_mut_ptr());
                }
                scales.extend(row_scales.iter().flat_map(|s| s.to_le_bytes()));
            }
        }
    }
    Ok(())
}

pub(super) fn upload_rows(backend: &CpuBackend, rows: &HostRows<'_>, y: &mut Buffer) -> Result<(), OpsError> {
    let op = "upload_rows";
    check::host_rows(op, rows)?;
    check::equal(op, "columns of y", y.dims.cols, rows.cols)?;
    check::at_least(op, "row capacity of y", y.dims.rows, rows.rows)?;
    y.coded_rows = 0;
    match rows.format {
        RowFormat::Bf16 => {
            let (from, to) = (rows.data.as_ptr(), y.data.as_mut_ptr());
            // SAFETY: `rows * cols` bf16 are readable (checked) and as many F32 writable.
            unsafe { (backend.kernels.widen_bf16)(from, rows.rows * rows.cols, to) };
        }
        RowFormat::F32 | RowFormat::E4m3 => {
            for row in 0..rows.rows {
                let (data, scales) = check::host_row(rows, row);
                check::decode_row(rows.format, data, scales, y.row_mut(row));
            }
        }
    }
    if rows.format == RowFormat::E4m3 {
        y.coded_rows = rows.rows;
        y.codes.clear();
        y.codes.extend_from_slice(rows.data);
        y.scales.clear();
        y.scales.extend(rows.scales.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
    }
    Ok(())
}

pub(super) fn download_f32(x: &Buffer, rows: &[usize], out: &mut Vec<f32>) -> Result<(), OpsError> {
    rows.iter().try_for_each(|row| check::index("download_f32", "row", *row, x.dims.rows))?;
    out.clear();
    rows.iter().for_each(|row| out.extend_from_slice(x.row(*row)));
    Ok(())
}

pub(super) fn gather_rows(x: &Buffer, rows: &[usize], y: &mut Buffer) -> Result<(), OpsError> {
    let op = "gather_rows";
    check::equal(op, "columns of y", y.dims.cols, x.dims.cols)?;
    check::at_least(op, "row capacity of y", y.dims.rows, rows.len())?;
    rows.iter().try_for_each(|row| check::index(op, "row", *row, x.dims.rows))?;
    y.coded_rows = 0;
    for (to, from) in rows.iter().enumerate() {
        y.row_mut(to).copy_from_slice(x.row(*from));
    }
    if rows.iter().all(|row| *row < x.coded_rows) {
        y.codes.clear();
        y.scales.clear();
        for (codes, scales) in rows.iter().filter_map(|row| x.coded(*row)) {
            y.codes.extend_from_slice(codes);
            y.scales.extend_from_slice(scales);
        }
        y.coded_rows = rows.len();
    }
    Ok(())
}

pub(super) fn concat(a: &Buffer, b: &Buffer, rows: usize, y: &mut Buffer) -> Result<(), OpsError> {
    let op = "concat";
    check::equal(op, "columns of y", y.dims.cols, a.dims.cols + b.dims.cols)?;
    for (what, buffer) in [("row capacity of a", a), ("row capacity of b", b)] {
        check::at_least(op, what, buffer.dims.rows, rows)?;
    }
    check::at_least(op, "row capacity of y", y.dims.rows, rows)?;
    y.coded_rows = 0;
    for row in 0..rows {
        let (left, right) = y.row_mut(row).split_at_mut(a.dims.cols);
        left.copy_from_slice(a.row(row));
        right.copy_from_slice(b.row(row));
    }
    Ok(())
}

/// Rows as codes' values in scratch memory, with scales: codes that arrived, or quantised here.
pub(super) struct Quantised {
    /// `[rows, cols]`.
    pub(super) values: *mut f32,
    /// `[rows, blocks]`.
    pub(super) scales: *const f32,
}

// SAFETY: tasks only read what it points to.
unsafe impl Sync for Quantised {}

/// Quantises the given rows of a buffer (entry `i` becomes row `i` of the result).
pub(super) fn quantise(
    backend: &CpuBackend,
    op: &'static str,
    queue: &mut CpuQueue,
    x: &Buffer,
    rows: usize,
    row_of: &(dyn Fn(usize) -> usize + Sync),
) -> Result<Quantised, OpsError> {
    let (cols, blocks) = (x.dims.cols, quant::blocks(x.dims.cols));
    let values = Out(queue.codes.floats(op, rows * cols)?.as_mut_ptr());
    let scales = Out(queue.code_scales.floats(op, rows * blocks)?.as_mut_ptr());
    let chunk = rows.div_ceil(4 * backend.threads()).max(1);
    let cost = (rows * cols) as u64 / 16 * CONVERT_NS_PER_16;
    backend.pool.run(rows.div_ceil(chunk), cost, &|task, _| {
        for i in task * chunk..((task + 1) * chunk).min(rows) {
            // SAFETY: row `i` of both scratch arrays is this task's; they hold `rows` rows.
            unsafe {
                let (to, to_scales) = (values.get().add(i * cols), scales.get().add(i * blocks));
                match x.coded(row_of(i)) {
                    None => {
                        let from = x.row(row_of(i)).as_ptr();
                        (backend.kernels.quantise)(from, cols, to, to_scales);
                    }
                    Some((codes, own)) => {
                        let to = std::slice::from_raw_parts_mut(to, cols);
                        for (to, codes) in to.chunks_mut(BLOCK).zip(codes.chunks(BLOCK)) {
                            to.iter_mut().zip(codes).for_each(|(v, c)| *v = e4m3::decode(*c));
                        }
                        std::ptr::copy_nonoverlapping(own.as_ptr(), to_scales, blocks);
                    }
                }
            }
        }
    });
    Ok(Quantised { values: values.get(), scales: scales.get() })
}
