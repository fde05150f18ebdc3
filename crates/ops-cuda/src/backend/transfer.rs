//! Rows between the device and pinned memory: dispatched rows, activations, cached rows.

use std::ops::Range;

use bytes::Bytes;
use cadre_ops::{EncodedRows, KvLayout, OpsError, RowLayout, check};
use cadre_types::{NumericsClass, PageId, Position};

use super::{
    CudaBackend,
    attend::KvCache,
    planes::{Plane, Rows},
    queue::{CudaQueue, Scratch},
    staging::Staging,
};
use crate::{
    kernels::Kernel,
    launch::{Arg, Grid},
};

impl CudaBackend {
    /// Values of rows, appended; waits.
    pub(crate) fn read(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        x: &Plane,
        rows: &Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        check::rows(op, x.dims, rows)?;
        let mut host = self.pool.take(rows.len() * x.row_bytes())?;
        x.read(op, queue, &mut host, rows, out)
    }
}

/// page x 64 + slot of positions `first..first + count` of a sequence, checked.
fn places(table: &[PageId], first: Position, count: usize) -> Vec<u32> {
    let place = |position: usize| {
        table[position / KvLayout::PAGE_TOKENS].index() * KvLayout::PAGE_TOKENS
            + position % KvLayout::PAGE_TOKENS
    };
    (first as usize..first as usize + count).map(|position| place(position) as u32).collect()
}

pub(crate) fn download_rows(
    queue: &mut CudaQueue,
    x: &Rows,
    rows: usize,
    memory: &mut Staging,
    at: usize,
) -> Result<(), OpsError> {
    let op = "download_rows";
    check::at_least(op, "row capacity of x", x.dims.rows, rows)?;
    let layout = RowLayout::of(x.format, rows, x.dims.cols);
    check::memory(op, memory.len(), at, layout.bytes)?;
    let to = memory.address() + at as u64;
    queue.stream.download(op, x.data(0), to, layout.data)?;
    let scales = layout.bytes - layout.scales_at;
    queue.stream.download(op, x.scales(0), to + layout.scales_at as u64, scales)?;
    memory.used_until(queue.stream.record(op)?);
    Ok(())
}

pub(crate) fn upload_rows(
    class: NumericsClass,
    queue: &mut CudaQueue,
    rows: &EncodedRows,
    first_row: usize,
    y: &mut Rows,
) -> Result<(), OpsError> {
    let op = "upload_rows";
    check::upload_rows(op, &rows.as_host_rows(), class, first_row, y.dims)?;
    queue.upload(op, &rows.data, y.data(first_row))?;
    queue.upload(op, &rows.scales, y.scales(first_row))
}

pub(crate) fn download_activations(
    queue: &mut CudaQueue,
    x: &Plane,
    rows: Range<usize>,
    memory: &mut Staging,
    at: usize,
) -> Result<(), OpsError> {
    let op = "download_activations";
    check::rows(op, x.dims, &rows)?;
    // Activations are stored as they travel.
    let bytes = rows.len() * x.row_bytes();
    check::memory(op, memory.len(), at, bytes)?;
    let from = x.memory.at(rows.start * x.row_bytes());
    queue.stream.download(op, from, memory.address() + at as u64, bytes)?;
    memory.used_until(queue.stream.record(op)?);
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "the trait's operation")]
pub(crate) fn kv_read(
    queue: &mut CudaQueue,
    cache: &KvCache,
    layer: usize,
    block_table: &[PageId],
    first: Position,
    count: usize,
    memory: &mut Staging,
    at: usize,
) -> Result<(), OpsError> {
    let op = "kv_read";
    check::index(op, "layer", layer, cache.layout.layers)?;
    check::pages(op, &cache.layout, block_table, first, count)?;
    let bytes = check::product(op, count, cache.row_bytes())?;
    check::memory(op, memory.len(), at, bytes)?;
    if count == 0 {
        return Ok(());
    }
    let rows = queue.scratch(op, Scratch::Arrived, bytes)?;
    let places = queue.arguments(op, &places(block_table, first, count))?;
    let mut args = cache.args(layer).to_vec();
    args.extend([Arg::Pointer(places), Arg::Pointer(rows)]);
    queue.launch(Kernel::KvRead, Grid::of(count, 128), &args)?;
    queue.stream.download(op, rows, memory.address() + at as u64, bytes)?;
    memory.used_until(queue.stream.record(op)?);
    Ok(())
}

pub(crate) fn kv_write(
    queue: &mut CudaQueue,
    cache: &mut KvCache,
    layer: usize,
    block_table: &[PageId],
    first: Position,
    count: usize,
    rows: &Bytes,
) -> Result<(), OpsError> {
    let op = "kv_write";
    check::index(op, "layer", layer, cache.layout.layers)?;
    check::pages(op, &cache.layout, block_table, first, count)?;
    check::equal(op, "bytes of rows", rows.len(), check::product(op, count, cache.row_bytes())?)?;
    if count == 0 {
        return Ok(());
    }
    let arrived = queue.scratch(op, Scratch::Arrived, rows.len())?;
    queue.upload(op, rows, arrived)?;
    let places = queue.arguments(op, &places(block_table, first, count))?;
    let mut args = cache.args(layer).to_vec();
    args.extend([Arg::Pointer(places), Arg::Pointer(arrived)]);
    queue.launch(Kernel::KvWrite, Grid::of(count, 128), &args)
}
