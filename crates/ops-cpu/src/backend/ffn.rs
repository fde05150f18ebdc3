//! Feed-forward blocks, dense and grouped, in two parallel regions: gate, up and silu to the inner
//! activation; down. A task is one group's rows times a few panels, so that a decode step with many experts
//! of one row each is split as well as one matrix with many rows.

use std::{ops::Range, sync::Arc};

use cadre_numerics::{BLOCK, quant};
use cadre_ops::{
    Ffn, OpsError,
    check::{self, Dims},
    resident::HostPass,
};

use super::{
    Buffer, CpuBackend, CpuQueue,
    dense::product_ns,
    transfer::{self, DispatchRows, Out},
};
use crate::{
    kernels::product::{Product, Rows},
    lanes::LANES,
    packed::{Arrangement, Weight},
};

/// Panels (gate and up) of 128 inner channels, the unit of the quantiser.
const PANELS_PER_BLOCK: usize = 2 * BLOCK / LANES;

/// Consecutive pairs (of a dense block: rows) of one expert.
#[derive(Clone, Copy)]
struct Group {
    expert: usize,
    first: usize,
    pairs: usize,
}

/// The share of one group in a region: its tasks are numbered from `first_task`.
struct Share<'a> {
    ffn: &'a Ffn<Weight>,
    group: Group,
    first_task: usize,
}

/// The input of a block: plain values for matrices that take those, codes' values and scales for the others.
struct Input {
    plain: Rows,
    coded: Rows,
    /// `[pairs, blocks]`.
    scales: *const f32,
}

// SAFETY: tasks only read what it points to.
unsafe impl Sync for Input {}

/// A dense block.
pub(super) fn dense(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    x: &Buffer,
    ffn: &Ffn<Weight>,
    rows: usize,
    y: &mut Buffer,
) -> Result<(), OpsError> {
    let op = "ffn";
    check_ffn(op, x.dims, ffn, y)?;
    check::at_least(op, "row capacity of x", x.dims.rows, rows)?;
    check::at_least(op, "row capacity of y", y.dims.rows, rows)?;
    let plain = x.input();
    let input = if backend.quantises(&ffn.gate_up) {
        let q = transfer::quantise(backend, op, queue, x, rows, ffn.gate_up.powers_of_two)?;
        Input { plain, coded: Rows { base: q.values, ..plain }, scales: q.scales }
    } else {
        Input { plain, coded: plain, scales: std::ptr::null() }
    };
    let out = y.output();
    block(backend, op, queue, &[ffn], &[Group { expert: 0, first: 0, pairs: rows }], &input, out)
}

/// Received rows through the experts of a pass.
pub(super) fn grouped(
    backend: &CpuBackend,
    queue: &mut CpuQueue,
    pass: &HostPass,
    experts: &[Arc<Ffn<Weight>>],
    x: &DispatchRows,
    y: &mut Buffer,
) -> Result<(), OpsError> {
    let op = "grouped_ffn";
    let experts: Vec<&Ffn<Weight>> = experts.iter().map(|ffn| &**ffn).collect();
    for ffn in &experts {
        check_ffn(op, x.dims, ffn, y)?;
    }
    check::pass(op, pass.info(), experts.len(), x.dims, y.dims)?;
    let mut groups = Vec::with_capacity(pass.groups().len());
    let mut first = 0;
    for group in pass.groups().iter().filter(|group| group.rows > 0) {
        groups.push(Group { expert: group.expert, first, pairs: group.rows });
        first += group.rows;
    }
    let used = || groups.iter().map(|group| experts[group.expert]);
    let take_codes = used().any(|ffn| backend.quantises(&ffn.gate_up));
    let take_values = used().any(|ffn| !backend.quantises(&ffn.gate_up));
    let received = transfer::receive(backend, op, queue, x, pass, (take_codes, take_values))?;
    let rows = |base| Rows { base, stride: x.dims.cols, index: pass.input().as_ptr() };
    let (plain, coded) = (rows(received.values), rows(received.codes));
    let input = Input { plain, coded, scales: received.pair_scales };
    let out = Rows { index: pass.output().as_ptr(), ..y.output() };
    block(backend, op, queue, &experts, &groups, &input, out)
}

/// Both regions. Groups follow each other without gaps; the inputs exist for all their pairs, and so do the
/// rows of `out`, each for one pair.
fn block(
    backend: &CpuBackend,
    op: &'static str,
    queue: &mut CpuQueue,
    experts: &[&Ffn<Weight>],
    active: &[Group],
    input: &Input,
    out: Rows,
) -> Result<(), OpsError> {
    let end = active.last().map_or(0, |group| group.first + group.pairs);
    if end == 0 {
        return Ok(());
    }
    let stride = experts.first().map_or(0, |ffn| ffn.inner);
    let blocks = quant::blocks(stride);
    let inner = Out(queue.inner.floats(op, end * stride)?.as_mut_ptr());
    let inner_scales = Out(queue.inner_scales.floats(op, end * blocks)?.as_mut_ptr());
    let inner_rows = Rows { base: inner.get(), stride, index: std::ptr::null() };

    let chunk = gate_up_chunk(backend, active, experts);
    run(backend, experts, active, chunk, |ffn| &ffn.gate_up, &|share, panels, rows| {
        let ffn = share.ffn;
        let product = if backend.quantises(&ffn.gate_up) {
            Product::new(&ffn.gate_up, input.coded, inner_rows, backend.silu_finish())
                .with_input_scales(input.scales)
        } else {
            Product::new(&ffn.gate_up, input.plain, inner_rows, backend.silu_finish())
        };
        // SAFETY: the group's pairs have inputs and inner rows in the scratch; groups do not overlap and tasks
        // of a group differ in panels, so these inner channels are this task's.
        unsafe { (backend.kernels.product)(&product, panels.clone(), rows.clone()) };
        if backend.quantises(&ffn.down) {
            let first = panels.start / 2 * LANES;
            let width = (panels.end / 2 * LANES).min(ffn.inner) - first;
            for row in rows {
                // SAFETY: as above; chunks are whole quantiser blocks.
                unsafe {
                    let at = inner.get().add(row * stride + first);
                    let scales = inner_scales.get().add(row * blocks + first / BLOCK);
                    (backend.kernels.quantise)(at, width, ffn.down.powers_of_two, at, scales);
                }
            }
        }
    });

    let widest = experts.iter().map(|ffn| ffn.down.panels).max().unwrap_or(0);
    let chunk = chunk_of(backend, active, widest, 4);
    run(backend, experts, active, chunk, |ffn| &ffn.down, &|share, panels, rows| {
        let product = Product::new(&share.ffn.down, inner_rows, out, backend.finish());
        let product = if backend.quantises(&share.ffn.down) {
            product.with_input_scales(inner_scales.get())
        } else {
            product
        };
        // SAFETY: inner rows of the group are complete (the region before); these outputs are this task's.
        unsafe { (backend.kernels.product)(&product, panels, rows) };
    });
    Ok(())
}

fn check_ffn(op: &'static str, x: Dims, ffn: &Ffn<Weight>, y: &Buffer) -> Result<(), OpsError> {
    check::equal(op, "columns of x", x.cols, ffn.gate_up.dims.cols)?;
    check::equal(op, "columns of y", y.dims.cols, ffn.down.dims.rows)?;
    check::equal(op, "inner width of gate_up", ffn.gate_up.dims.rows, ffn.inner)?;
    check::equal(op, "columns of down", ffn.down.dims.cols, ffn.inner)?;
    let arranged = ffn.gate_up.arrangement == Arrangement::GateUp || ffn.inner == 0;
    if arranged && ffn.down.arrangement == Arrangement::Plain {
        return Ok(());
    }
    Err(OpsError::Device { op, message: "the block was not made by load_ffn".to_owned() })
}

/// Panels per task: about four tasks per thread over all groups, in multiples of `unit`.
fn chunk_of(backend: &CpuBackend, groups: &[Group], panels: usize, unit: usize) -> usize {
    let wanted = (4 * backend.threads()).div_ceil(groups.len().max(1));
    panels.div_ceil(wanted).next_multiple_of(unit).max(unit)
}

fn gate_up_chunk(backend: &CpuBackend, groups: &[Group], experts: &[&Ffn<Weight>]) -> usize {
    let panels = experts.iter().map(|ffn| ffn.gate_up.panels).max().unwrap_or(0);
    let quantises = experts.iter().any(|ffn| backend.quantises(&ffn.down));
    let unit = if quantises { PANELS_PER_BLOCK } else { 4 };
    chunk_of(backend, groups, panels, unit)
}

/// Computes some panels of a share's rows.
type Part<'f, 'a> = dyn Fn(&Share<'a>, Range<usize>, Range<usize>) + Sync + 'f;

/// One region: calls `f(share, panels, rows)` for every group and chunk of its matrix's panels.
fn run<'a>(
    backend: &CpuBackend,
    experts: &[&'a Ffn<Weight>],
    groups: &[Group],
    chunk: usize,
    matrix: impl Fn(&'a Ffn<Weight>) -> &'a Weight + Sync,
    f: &Part<'_, 'a>,
) {
    let mut shares: Vec<Share<'a>> = Vec::with_capacity(groups.len());
    let (mut tasks, mut cost) = (0, 0);
    for group in groups {
        let ffn = experts[group.expert];
        let weight = matrix(ffn);
        shares.push(Share { ffn, group: *group, first_task: tasks });
        tasks += weight.panels.div_ceil(chunk);
        cost += product_ns(weight.panels, weight.blocks.len, group.pairs);
    }
    backend.pool.run(tasks, cost, &|task, _| {
        let index = shares.partition_point(|share| share.first_task <= task) - 1;
        let share = &shares[index];
        let first = (task - share.first_task) * chunk;
        let panels = first..(first + chunk).min(matrix(share.ffn).panels);
        let rows = share.group.first..share.group.first + share.group.pairs;
        f(share, panels, rows);
    });
}
