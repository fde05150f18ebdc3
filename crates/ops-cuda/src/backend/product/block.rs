//! Whole feed-forward blocks of experts in one launch (kernels/expert_block.cu): gate and up, SwiGLU, quantiser, down.
//!
//! The kernel gives the bits of the products one after the other, so it may be chosen by the number of rows: the part
//! "experts, whole blocks" of the suite compares pairs that come through it with the same pairs that do not.

use cadre_ops::{ElementType, Ffn, OpsError, RowFormat, RowGroup};
use cadre_types::config::ScaleFormat;

use super::{ExpertTable, Kind};
use crate::{
    backend::{
        CudaBackend, Pass,
        planes::{Plane, Rows},
        queue::{CudaQueue, Scratch},
        tensor::Plain,
        weights::Weight,
    },
    kernels::Kernel,
    launch::{Arg, Grid},
};

/// Rows of an expert that the kernel has room for (MAX_ROWS).
const MOST_ROWS: usize = 64;

/// Groups of one launch (MAX_GROUPS).
const MOST_GROUPS: usize = 512;

/// Threads of a block, and their shared memory (THREADS and BYTES).
const THREADS: u32 = 640;
const SHARED: usize = 211_520;

/// What the kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct BlockArgs {
    x: u64,
    xs: u64,
    gather: u64,
    scatter: u64,
    table: u64,
    counts: u64,
    offsets: u64,
    h: u64,
    hs: u64,
    y: u64,
    sync: u64,
    error: u64,
    x_row: i64,
    xs_row: i32,
    groups: i32,
    hidden: i32,
    inner: i32,
    pow2: i32,
    padding: i32,
}

impl Plain for BlockArgs {}

/// Bytes of inner activations and their scales in scratch memory, whatever the rows.
pub(crate) fn inner_bytes(groups: usize, inner: usize) -> (usize, usize) {
    let rows = groups.min(MOST_GROUPS) * MOST_ROWS;
    (rows * inner, rows * inner.div_ceil(128) * 4)
}

/// A group of a launch: the expert's matrices, its first pair, its pairs.
pub(super) type Group<'a> = (&'a Ffn<Weight>, usize, usize);

/// Groups that have pairs, of experts that are wanted.
pub(super) fn active<'a>(
    groups: &[RowGroup],
    experts: &'a ExpertTable,
    wanted: impl Fn(&Ffn<Weight>) -> bool,
) -> Vec<Group<'a>> {
    let mut first = 0;
    let mut found = Vec::new();
    for group in groups {
        let ffn = &*experts.experts[group.expert];
        if group.rows > 0 && wanted(ffn) {
            found.push((ffn, first, group.rows));
        }
        first += group.rows;
    }
    found
}

/// Puts what a launch reads of its groups on the device: addresses of both matrices and their scales, then pairs, then
/// first pairs. The addresses of the three.
pub(super) fn list(
    op: &'static str,
    queue: &mut CudaQueue,
    groups: &[Group<'_>],
) -> Result<(u64, u64, u64), OpsError> {
    let mut words = Vec::with_capacity(groups.len() * 10);
    for (ffn, ..) in groups {
        for weight in [&ffn.gate_up, &ffn.down] {
            let addresses = [weight.words.address(), super::scales_of(weight)];
            words.extend(addresses.iter().flat_map(|a| [*a as u32, (a >> 32) as u32]));
        }
    }
    words.extend(groups.iter().map(|(.., rows)| *rows as u32));
    words.extend(groups.iter().map(|(_, first, _)| *first as u32));
    let table = queue.arguments(op, &words)?;
    let counts = table + 32 * groups.len() as u64;
    Ok((table, counts, counts + 4 * groups.len() as u64))
}

impl CudaBackend {
    /// Whether a pass goes through in whole blocks: rows and matrices in codes, tiles of whole blocks of scales, one
    /// format of inner scales, and no expert with more rows than the kernel has room for.
    pub(super) fn covers_blocks(&self, pass: &Pass, experts: &ExpertTable, x: &Rows) -> bool {
        let Some(shape) = experts.experts.first() else { return false };
        let coded = |kind: &Kind| kind.tiles && kind.elements == ElementType::E4m3 && self.quantises(*kind);
        let (first, second) = (&experts.kinds.0, &experts.kinds.1);
        let hidden = shape.gate_up.dims.cols;
        x.format == RowFormat::E4m3
            && first.iter().chain(second).all(coded)
            && second.len() == 1
            && shape.inner.is_multiple_of(128)
            && hidden.is_multiple_of(256)
            && shape.down.dims.rows == hidden
            && pass.groups().iter().all(|group| group.rows <= MOST_ROWS)
    }

    /// A pass of covered experts.
    pub(super) fn whole_blocks(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        pass: &Pass,
        experts: &ExpertTable,
        x: &Rows,
        y: &Plane,
    ) -> Result<(), OpsError> {
        let groups = active(pass.groups(), experts, |_| true);
        let Some((shape, ..)) = groups.first() else { return Ok(()) };
        let (hidden, inner) = (shape.gate_up.dims.cols, shape.inner);
        let (codes, scales) = inner_bytes(groups.len(), inner);
        let h = queue.scratch(op, Scratch::Codes, codes)?;
        let hs = queue.scratch(op, Scratch::Scales, scales)?;
        let multiprocessors = self.device.info().multiprocessors;
        for groups in groups.chunks(MOST_GROUPS) {
            let (table, counts, offsets) = list(op, queue, groups)?;
            let args = BlockArgs {
                x: x.data(0),
                xs: x.scales(0),
                gather: pass.input(),
                scatter: pass.output(),
                table,
                counts,
                offsets,
                h,
                hs,
                y: y.memory.address(),
                // Counters of the groups, and two of the launch.
                sync: queue.zeros(op, 4 * (MOST_GROUPS + 2))?,
                error: queue.error(),
                x_row: hidden as i64,
                xs_row: (hidden / 128) as i32,
                groups: groups.len() as i32,
                hidden: hidden as i32,
                inner: inner as i32,
                pow2: (shape.down.input_scales == ScaleFormat::Ue8m0).into(),
                padding: 0,
            };
            let grid = Grid::of(multiprocessors, THREADS).shared(SHARED);
            queue.launch(Kernel::ExpertBlock, grid, &[Arg::Struct(args.bytes())])?;
        }
        Ok(())
    }
}
