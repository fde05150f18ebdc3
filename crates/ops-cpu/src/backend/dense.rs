//! Products, norms, gate, combine and row arithmetic.

use cadre_ops::{
    GateShape, HostRows, OpsError, RowFormat,
    check::{self, Dims},
};
use cadre_types::TokenId;

use super::{
    Buffer, CpuBackend, CpuQueue, Vector,
    transfer::{self, Out},
};
use crate::{
    kernels::{
        product::{Finish, Product, Rows},
        rows::ExpertRows,
    },
    packed::{Arrangement, Weight},
};

/// Nanoseconds of 16 elements of a simple row operation on one thread.
const ROW_NS_PER_16: u64 = 4;

impl CpuBackend {
    /// Runs a product: `rows` entries, all panels, split into tasks by panels and, if those are few, by rows.
    ///
    /// # Safety
    /// The product's pointers are valid for `rows` entries and `panels` panels, and its outputs are written by
    /// nobody else meanwhile.
    pub(super) unsafe fn run_product(&self, product: &Product, weight: &Weight, rows: usize) {
        let cost = product_ns(weight.panels, weight.blocks.len, rows);
        let tasks = Tasks::of(weight.panels, 4, rows, self.threads());
        self.pool.run(tasks.count(), cost, &|task, _| {
            let (panels, rows) = tasks.task(task);
            // SAFETY: the caller's contract; tasks are disjoint in panels or rows.
            unsafe { (self.kernels.product)(product, panels, rows) };
        });
    }

    /// Runs a function over chunks of rows.
    pub(super) fn run_rows(&self, rows: usize, cost_ns: u64, f: &(dyn Fn(usize) + Sync)) {
        let chunk = rows.div_ceil(4 * self.threads()).max(1);
        self.pool.run(rows.div_ceil(chunk), cost_ns, &|task, _| {
            (task * chunk..((task + 1) * chunk).min(rows)).for_each(f);
        });
    }
}

/// Estimated time of a product on one thread.
pub(super) fn product_ns(panels: usize, len: usize, rows: usize) -> u64 {
    // A vector of 16 weights takes 0.7 ns to widen and 0.35 ns per row to multiply.
    (panels * len) as u64 * (7 + 4 * rows as u64) / 10
}

/// A grid of tasks over panels and rows.
#[derive(Clone, Copy)]
pub(super) struct Tasks {
    panels: usize,
    rows: usize,
    panel_chunk: usize,
    row_chunk: usize,
    row_chunks: usize,
}

impl Tasks {
    /// About four tasks per thread, in multiples of `unit` panels; rows are only cut where panels are few, and
    /// not below 48.
    pub(super) fn of(panels: usize, unit: usize, rows: usize, threads: usize) -> Self {
        let wanted = 4 * threads;
        let panel_chunk = panels.div_ceil(wanted).next_multiple_of(unit).max(unit);
        let row_chunks = (wanted / panels.div_ceil(panel_chunk).max(1)).clamp(1, rows / 48 + 1);
        let row_chunk = rows.div_ceil(row_chunks).max(1);
        let row_chunks = rows.div_ceil(row_chunk);
        Self { panels, rows, panel_chunk, row_chunk, row_chunks }
    }

    pub(super) fn count(&self) -> usize {
        self.panels.div_ceil(self.panel_chunk) * self.row_chunks
    }

    pub(super) fn task(&self, task: usize) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let (panel, row) = (task / self.row_chunks, task % self.row_chunks);
        let part = |index: usize, chunk: usize, all: usize| index * chunk..((index + 1) * chunk).min(all);
        (part(panel, self.panel_chunk, self.panels), part(row, self.row_chunk, self.rows))
    }
}

/// A matrix that is not a pair of gate_proj and up_proj.
fn plain(op: &'static str, weight: &Weight) -> Result<(), OpsError> {
    match weight.arrangement {
        Arrangement::Plain => Ok(()),
        Arrangement::GateUp => {
            let message = "gate_proj and up_proj are packed for ffn and grouped_ffn".to_owned();
            Err(OpsError::Device { op, message })
        }
    }
}

pub(super) fn embed(
    backend: &CpuBackend,
    table: &Weight,
    ids: &[TokenId],
    y: &mut Buffer,
) -> Result<(), OpsError> {
    let op = "embed";
    plain(op, table)?;
    check::equal(op, "columns of y", y.dims.cols, table.dims.cols)?;
    check::at_least(op, "row capacity of y", y.dims.rows, ids.len())?;
    ids.iter().try_for_each(|id| check::index(op, "token id", *id as usize, table.dims.rows))?;
    let cols = y.dims.cols;
    let out = Out(y.output().base);
    // One element costs about as much as 16 of a row operation: they lie a cache line apart.
    let cost = (ids.len() * cols) as u64 * 2;
    backend.run_rows(ids.len(), cost, &|t| {
        // SAFETY: row `t` of `y` is this call's.
        let row = unsafe { std::slice::from_raw_parts_mut(out.get().add(t * cols), cols) };
        table.read_row(ids[t] as usize, row);
    });
    Ok(())
}

pub(super) fn rms_norm(
    backend: &CpuBackend,
    x: &Buffer,
    weight: &Vector,
    eps: f32,
    rows: usize,
    y: &mut Buffer,
) -> Result<(), OpsError> {
    check::same_width("rms_norm", x.dims, y.dims, rows)?;
    check::equal("rms_norm", "entries of the weight", weight.0.len(), x.dims.cols)?;
    let (cols, round) = (x.dims.cols, backend.rounds());
    let out = Out(y.output().base);
    backend.run_rows(rows, (rows * cols) as u64 / 16 * ROW_NS_PER_16, &|row| {
        let (x, w) = (x.row(row).as_ptr(), weight.0.as_ptr());
        // SAFETY: rows of `cols` values; row `row` of `y` is this call's.
        unsafe { (backend.kernels.rms_norm)(x, w, eps, cols, round, out.get().add(row * cols)) };
    });
    Ok(())
}

pub(super) fn linear(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    x: &Buffer,
    weight: &Weight,
    rows: usize,
    y: &mut Buffer,
) -> Result<(), OpsError> {
    let op = "linear";
    plain(op, weight)?;
    check::linear(op, x.dims, weight.dims, rows, y.dims)?;
    let (finish, out) = (backend.finish(), y.output());
    let product = if backend.quantises(weight) {
        let q = transfer::quantise(backend, op, queue, x, rows, &|row| row)?;
        let input = Rows { base: q.values, stride: x.dims.cols, index: std::ptr::null() };
        Product::new(weight, input, out, finish).with_input_scales(q.scales)
    } else {
        Product::new(weight, x.input(), out, finish)
    };
    // SAFETY: `rows` rows of both exist (checked), `y` is borrowed exclusively, scratch by `queue`.
    unsafe { backend.run_product(&product, weight, rows) };
    Ok(())
}

pub(super) fn logits(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    x: &Buffer,
    rows: &[usize],
    head: &Weight,
    out: &mut Vec<f32>,
) -> Result<(), OpsError> {
    let op = "logits";
    plain(op, head)?;
    check::equal(op, "columns of x", x.dims.cols, head.dims.cols)?;
    rows.iter().try_for_each(|row| check::index(op, "row", *row, x.dims.rows))?;
    // Everything is written below: growing without clearing would only save the zeroing of what is new.
    out.clear();
    out.resize(check::product(op, rows.len(), head.dims.rows)?, 0.0);
    let y = Rows { base: out.as_mut_ptr(), stride: head.dims.rows, index: std::ptr::null() };
    let product = if backend.quantises(head) {
        let q = transfer::quantise(backend, op, queue, x, rows.len(), &|i| rows[i])?;
        let input = Rows { base: q.values, stride: x.dims.cols, index: std::ptr::null() };
        Product::new(head, input, y, Finish::Exact).with_input_scales(q.scales)
    } else {
        let input = Rows { index: rows.as_ptr(), ..x.input() };
        Product::new(head, input, y, Finish::Exact)
    };
    // SAFETY: indexed rows exist (checked), `out` has a row for each and is ours.
    unsafe { backend.run_product(&product, head, rows.len()) };
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(super) fn gate(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    x: &Buffer,
    weight: &Weight,
    bias: &Vector,
    shape: &GateShape,
    rows: usize,
    topk_idx: &mut Vec<u16>,
    topk_weights: &mut Vec<f32>,
) -> Result<(), OpsError> {
    let op = "gate";
    plain(op, weight)?;
    check::gate(op, x.dims, weight.dims, bias.0.len(), shape, rows)?;
    let logits = queue.logits.floats(op, rows * shape.experts)?;
    let y = Rows { base: logits.as_mut_ptr(), stride: shape.experts, index: std::ptr::null() };
    let product = Product::new(weight, x.input(), y, Finish::Exact);
    // SAFETY: `rows` rows of `x` exist (checked) and of `logits` by its size; scratch is `queue`'s.
    unsafe { backend.run_product(&product, weight, rows) };
    topk_idx.clear();
    topk_weights.clear();
    // SAFETY: all of `logits`.
    unsafe { (backend.kernels.sigmoid)(logits.as_mut_ptr(), logits.len()) };
    for (row, scores) in logits.chunks_exact(shape.experts).enumerate() {
        queue.chooser.choose_scored(scores, &bias.0, shape, row, topk_idx, topk_weights)?;
    }
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(super) fn combine(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    expert_rows: &HostRows<'_>,
    topk_weights: &[f32],
    top_k: usize,
    shared: Option<&Buffer>,
    rows: usize,
    x: &mut Buffer,
) -> Result<(), OpsError> {
    let (op, cols) = ("combine", x.dims.cols);
    let shared_dims = shared.map(|s| s.dims);
    check::combine(op, expert_rows, topk_weights.len(), top_k, shared_dims, rows, x.dims)?;
    let mut input = ExpertRows {
        data: expert_rows.data.as_ptr(),
        row_bytes: expert_rows.format.row_bytes(cols),
        bf16: expert_rows.format == RowFormat::Bf16,
    };
    if expert_rows.format == RowFormat::E4m3 {
        let decoded = queue.inner.floats(op, rows * top_k * cols)?;
        for (pair, to) in decoded.chunks_exact_mut(cols.max(1)).enumerate() {
            let (data, scales) = check::host_row(expert_rows, pair);
            check::decode_row(expert_rows.format, data, scales, to);
        }
        input = ExpertRows { data: decoded.as_ptr().cast(), row_bytes: cols * 4, bf16: false };
    }
    let input = Out((&raw const input).cast_mut());
    let out = Out(x.output().base);
    let cost = (rows * cols * (top_k + 2)) as u64 / 16;
    backend.run_rows(rows, cost, &|t| {
        let shared = shared.map_or(std::ptr::null(), |shared| shared.row(t).as_ptr());
        // SAFETY: `input` outlives the call; token `t` has `top_k` rows and weights (checked); row `t` of `x`
        // is this call's.
        unsafe {
            let input = *input.get();
            let pairs = ExpertRows { data: input.data.add(t * top_k * input.row_bytes), ..input };
            let weights = topk_weights.as_ptr().add(t * top_k);
            let x = out.get().add(t * cols);
            (backend.kernels.combine)(&pairs, weights, top_k, shared, cols, x);
        }
    });
    Ok(())
}

pub(super) fn add(backend: &CpuBackend, x: &mut Buffer, delta: &Buffer, rows: usize) -> Result<(), OpsError> {
    check::same_width("add", delta.dims, x.dims, rows)?;
    let Dims { cols, .. } = x.dims;
    let out = Out(x.output().base);
    backend.run_rows(rows, (rows * cols) as u64 / 16 * ROW_NS_PER_16, &|row| {
        // SAFETY: rows of `cols` values; row `row` of `x` is this call's.
        unsafe {
            (backend.kernels.add)(out.get().add(row * cols), delta.row(row).as_ptr(), cols);
        }
    });
    Ok(())
}
