//! Operations on rows of their own: embedding, norms, sums, moves, and the dispatch format.

use cadre_ops::{OpsError, RowFormat, check, check::Dims};
use cadre_types::config::ScaleFormat;

use super::{
    THREADS, over,
    planes::{Plane, Rows},
    product::quantise,
    queue::CudaQueue,
    step::Step,
    weights::{Vector, Weight, element_bytes},
};
use crate::{
    device::Memory,
    kernels::Kernel,
    launch::{Arg, Grid},
};

pub(crate) fn rms_norm(
    queue: &CudaQueue,
    x: &Plane,
    weight: &Vector,
    eps: f32,
    rows: usize,
    y: &Plane,
) -> Result<(), OpsError> {
    let op = "rms_norm";
    check::same_width(op, x.dims, y.dims, rows)?;
    check::equal(op, "entries of the weight", weight.len, x.dims.cols)?;
    let args = [
        x.into(),
        x.bf16.into(),
        (&weight.memory).into(),
        eps.into(),
        Arg::U32(x.dims.cols as u32),
        y.into(),
        y.bf16.into(),
    ];
    queue.launch(Kernel::RmsNorm, Grid::of(rows, THREADS), &args)
}

pub(crate) fn embed(
    queue: &mut CudaQueue,
    step: &Step,
    table: &Weight,
    y: &mut Plane,
) -> Result<(), OpsError> {
    check::embed("embed", step.info(), table.dims, y.dims)?;
    let args = [
        (&table.words).into(),
        Arg::Pointer(table.scales.as_ref().map_or(0, Memory::address)),
        Arg::U32(element_bytes(table.elements) as u32),
        table.tiles.into(),
        Arg::U32(table.dims.cols as u32),
        Arg::Pointer(step.ids()),
        (&*y).into(),
    ];
    queue.launch(Kernel::Embed, Grid::of(step.info().rows, THREADS), &args)
}

pub(crate) fn add(queue: &mut CudaQueue, x: &mut Plane, delta: &Plane, rows: usize) -> Result<(), OpsError> {
    check::same_width("add", delta.dims, x.dims, rows)?;
    let elements = rows * x.dims.cols;
    let args = [(&*x).into(), delta.into(), delta.bf16.into(), Arg::U64(elements as u64)];
    queue.launch(Kernel::Add, over(elements), &args)
}

pub(crate) fn assign(queue: &mut CudaQueue, x: &mut Plane, y: &Plane, rows: usize) -> Result<(), OpsError> {
    check::same_width("assign", y.dims, x.dims, rows)?;
    let elements = rows * x.dims.cols;
    let args = [y.into(), y.bf16.into(), Arg::U64(elements as u64), (&*x).into(), x.bf16.into()];
    queue.launch(Kernel::Convert, over(elements), &args)
}

pub(crate) fn gather_wanted(
    queue: &mut CudaQueue,
    step: &Step,
    x: &Plane,
    y: &mut Plane,
) -> Result<(), OpsError> {
    check::gather_wanted("gather_wanted", step.info(), x.dims, y.dims)?;
    let args = [x.into(), Arg::U32(x.dims.cols as u32), Arg::Pointer(step.wanted()), (&*y).into()];
    queue.launch(Kernel::GatherRows, Grid::of(step.info().wanted, THREADS), &args)
}

pub(crate) fn concat(
    queue: &mut CudaQueue,
    a: &Plane,
    b: &Plane,
    rows: usize,
    y: &mut Plane,
) -> Result<(), OpsError> {
    check::concat("concat", a.dims, b.dims, rows, y.dims)?;
    let args = [
        a.into(),
        Arg::U32(a.dims.cols as u32),
        b.into(),
        Arg::U32(b.dims.cols as u32),
        y.bf16.into(),
        (&*y).into(),
    ];
    queue.launch(Kernel::Concat, Grid::of(rows, THREADS), &args)
}

pub(crate) fn encode(
    queue: &mut CudaQueue,
    x: &Plane,
    rows: usize,
    scales: ScaleFormat,
    y: &mut Rows,
) -> Result<(), OpsError> {
    let op = "encode";
    check::same_width(op, x.dims, y.dims, rows)?;
    if y.format == RowFormat::E4m3 {
        let dims = Dims { rows, cols: x.dims.cols };
        return quantise(queue, (x.memory.address(), x.bf16), dims, scales, (y.data(0), y.scales(0)));
    }
    Ok(queue.stream.copy(op, x.memory.address(), y.data(0), rows * x.row_bytes())?)
}
