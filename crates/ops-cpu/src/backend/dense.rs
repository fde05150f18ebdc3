//! Products, norms, gate, combine and row arithmetic.

use cadre_ops::{
    GateShape, OpsError, RowFormat, SampleRow, Scoring,
    check::{self, Dims},
    resident::{HostRouting, HostStep},
};
use cadre_sampler::{Sample, SampleError, Sampler};

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
    step: &HostStep,
    table: &Weight,
    y: &mut Buffer,
) -> Result<(), OpsError> {
    let op = "embed";
    plain(op, table)?;
    check::embed(op, step.info(), table.dims, y.dims)?;
    let (ids, cols) = (step.ids(), y.dims.cols);
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

/// `x W^T` of the leading rows.
#[allow(clippy::too_many_arguments, reason = "two operations of the trait")]
pub(super) fn linear(
    backend: &CpuBackend,
    op: &'static str,
    queue: &mut CpuQueue,
    x: &Buffer,
    weight: &Weight,
    rows: usize,
    finish: Finish,
    y: &mut Buffer,
) -> Result<(), OpsError> {
    plain(op, weight)?;
    check::linear(op, x.dims, weight.dims, rows, y.dims)?;
    let out = y.output();
    let product = if backend.quantises(weight) {
        let q = transfer::quantise(backend, op, queue, x, rows, weight.powers_of_two)?;
        let input = Rows { base: q.values, stride: x.dims.cols, index: std::ptr::null() };
        Product::new(weight, input, out, finish).with_input_scales(q.scales)
    } else {
        Product::new(weight, x.input(), out, finish)
    };
    // SAFETY: `rows` rows of both exist (checked), `y` is borrowed exclusively, scratch by `queue`.
    unsafe { backend.run_product(&product, weight, rows) };
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(super) fn gate(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    step: &HostStep,
    x: &Buffer,
    weight: &Weight,
    bias: &Vector,
    shape: &GateShape,
    routing: &mut HostRouting,
) -> Result<(), OpsError> {
    let (op, rows) = ("gate", step.info().rows);
    plain(op, weight)?;
    check::gate(op, x.dims, weight.dims, bias.0.len(), shape, rows)?;
    let logits = queue.logits.floats(op, rows * shape.experts)?;
    let y = Rows { base: logits.as_mut_ptr(), stride: shape.experts, index: std::ptr::null() };
    let product = Product::new(weight, x.input(), y, Finish::Exact);
    // SAFETY: `rows` rows of `x` exist (checked) and of `logits` by its size; scratch is `queue`'s.
    unsafe { backend.run_product(&product, weight, rows) };
    if shape.scoring == Scoring::Sigmoid {
        // SAFETY: all of `logits`.
        unsafe { (backend.kernels.sigmoid)(logits.as_mut_ptr(), logits.len()) };
    }
    let (chooser, experts) = (&mut queue.chooser, shape.experts);
    routing.fill(op, rows, shape.top_k, |row, ids, weights| {
        let row_of = &logits[row * experts..(row + 1) * experts];
        match shape.scoring {
            Scoring::Sigmoid => chooser.choose_scored(row_of, &bias.0, shape, row, ids, weights),
            Scoring::Softmax => chooser.choose(row_of, &bias.0, shape, row, ids, weights),
        }
    })
}

pub(super) fn combine(
    backend: &CpuBackend,
    experts: &cadre_ops::ExpertRows,
    routing: &HostRouting,
    shared: Option<&Buffer>,
    x: &mut Buffer,
) -> Result<(), OpsError> {
    let (op, cols) = ("combine", x.dims.cols);
    let (rows, top_k) = (routing.rows(), routing.top_k());
    check::combine(op, experts, top_k, shared.map(|s| s.dims), rows, x.dims)?;
    // Rows are read where they arrived.
    let mut places = vec![std::ptr::null::<u8>(); rows * top_k];
    let width = experts.row_bytes();
    for chunk in &experts.chunks {
        for (row, target) in chunk.rows.chunks_exact(width.max(1)).zip(&chunk.targets) {
            places[*target as usize] = row.as_ptr();
        }
    }
    let places = Out(places.as_mut_ptr());
    let bf16 = experts.format == RowFormat::Bf16;
    let out = Out(x.output().base);
    let cost = (rows * cols * (top_k + 2)) as u64 / 16;
    backend.run_rows(rows, cost, &|t| {
        let shared = shared.map_or(std::ptr::null(), |shared| shared.row(t).as_ptr());
        // SAFETY: `places` and the chunks outlive the call; token `t` has `top_k` rows and weights (checked);
        // row `t` of `x` is this call's.
        unsafe {
            let pairs = ExpertRows { rows: places.get().add(t * top_k), bf16 };
            let weights = routing.weights().as_ptr().add(t * top_k);
            let x = out.get().add(t * cols);
            (backend.kernels.combine)(&pairs, weights, top_k, shared, cols, x);
        }
    });
    Ok(())
}

/// One token per entry, row by row on all threads.
pub(super) fn sample(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    logits: &mut Buffer,
    rows: &[SampleRow<'_>],
) -> Result<Vec<Result<Sample, SampleError>>, OpsError> {
    check::sample_rows("sample", logits.dims.rows, rows.iter().map(|row| row.row))?;
    let cols = logits.dims.cols;
    queue.samplers.resize_with(backend.threads(), Sampler::new);
    let mut drawn: Vec<Option<Result<Sample, SampleError>>> = vec![None; rows.len()];
    let (samplers, to) = (Out(queue.samplers.as_mut_ptr()), Out(drawn.as_mut_ptr()));
    let from = Out(logits.output().base);
    // A scan or two over the row.
    let cost = (rows.len() * cols) as u64 / 4;
    backend.pool.run(rows.len(), cost, &|task, thread| {
        let row = &rows[task];
        // SAFETY: rows differ (checked) and exist; entry `task` of `drawn` and the sampler of this thread are
        // this call's.
        unsafe {
            let logits = std::slice::from_raw_parts_mut(from.get().add(row.row * cols), cols);
            let sampler = &mut *samplers.get().add(thread);
            *to.get().add(task) = Some(sampler.sample(logits, row.params, row.history, row.position));
        }
    });
    Ok(drawn.into_iter().flatten().collect())
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
