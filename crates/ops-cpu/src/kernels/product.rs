//! Matrix products over packed panels.
//!
//! One output is, as docs/numerics.md says, an FMA chain over `k` inside each block, and an FMA chain of
//! block sums times scales. 16 outputs share a vector; a group of up to four panels is computed together,
//! block after block. Few rows: weights are widened in registers, once for all rows of the tile ("fused").
//! Many rows: a panel's block is widened into scratch memory once and used for up to [`ROWS`] rows
//! ("tiled"). Both add in the same order.

mod fused;
mod tiled;
mod widen;

use std::ops::Range;

use cadre_numerics::linear::Blocks;

pub(crate) use self::tiled::tile;
use self::widen::{Bf16, E4m3, F32, Widen};
use crate::{
    lanes::{LANES, Lanes, Work},
    packed::{Format, GROUP, Weight},
};

/// Most rows of one pass: bounds the sums kept on the stack (192 x 64 F32 = 48 KiB).
pub(crate) const ROWS: usize = 192;
/// Most rows of a fused pass, on any instruction set.
const FUSED_ROWS: usize = 6;

/// Rows of a matrix in memory, with an optional indirection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    /// Element 0 of row 0.
    pub(crate) base: *mut f32,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    /// Row number of entry `i`; null means `i` itself.
    pub(crate) index: *const usize,
}

// SAFETY: a `Rows` says where rows are; whoever follows it guarantees that they exist and that concurrent
// writers write different elements.
unsafe impl Sync for Rows {}

impl Rows {
    /// # Safety
    /// Entry `i` must exist in the index (if any) and its row in memory.
    #[inline(always)]
    pub(crate) unsafe fn row(&self, i: usize) -> *mut f32 {
        // SAFETY: the caller's contract.
        unsafe {
            let row = if self.index.is_null() { i } else { *self.index.add(i) };
            self.base.add(row * self.stride)
        }
    }
}

/// What happens to finished outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// Stored as F32.
    Exact,
    /// Rounded to bf16 and stored.
    Bf16,
    /// `silu(gate) * up`, stored as F32.
    SiluExact,
    /// `silu(gate) * up`, rounded to bf16 and stored.
    SiluBf16,
}

/// A product `y = x W^T`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    format: Format,
    data: *const u8,
    panel_bytes: usize,
    /// All panels of the matrix.
    panels: usize,
    /// Null: all scales are 1.
    scales: *const f32,
    lane_scales: bool,
    blocks: Blocks,
    /// Outputs: those beyond are padding and not stored.
    outputs: usize,
    /// Inputs.
    x: Rows,
    /// Input scales `[entry][block]`, or null. Entries are numbered like those of `x` without its index.
    x_scales: *const f32,
    /// Outputs.
    y: Rows,
    finish: Finish,
}

// SAFETY: a `Product` is a description; whoever runs one guarantees that what it points to is readable, and
// that concurrent runs write different rows or panels.
unsafe impl Sync for Product {}

impl Product {
    /// Describes a product; pointers as in the fields' notes.
    pub(crate) fn new(weight: &Weight, x: Rows, y: Rows, finish: Finish) -> Self {
        let scaled = weight.format == Format::E4m3;
        Self {
            format: weight.format,
            data: weight.data.as_ptr(),
            panel_bytes: weight.panel_bytes,
            panels: weight.panels,
            scales: if scaled { weight.scales.as_ptr() } else { std::ptr::null() },
            lane_scales: weight.lane_scales,
            blocks: weight.blocks,
            outputs: weight.dims.rows,
            x,
            x_scales: std::ptr::null(),
            y,
            finish,
        }
    }

    /// With inputs that are codes (as values) with a scale per row and block.
    pub(crate) fn with_input_scales(self, x_scales: *const f32) -> Self {
        Self { x_scales, ..self }
    }

    /// The factor on a block's sums of one panel for one row.
    #[inline(always)]
    unsafe fn scale<V: Lanes>(&self, panel: usize, block: usize, row: usize) -> V {
        // SAFETY: `run`'s contract: panel, block and row exist.
        unsafe {
            let count = self.blocks.count();
            let weight = if self.scales.is_null() {
                V::splat(1.0)
            } else if self.lane_scales {
                V::load(self.scales.add((panel * count + block) * LANES))
            } else {
                V::splat(*self.scales.add(panel * count + block))
            };
            if self.x_scales.is_null() {
                weight
            } else {
                weight.mul(V::splat(*self.x_scales.add(row * count + block)))
            }
        }
    }
}

/// Computes entries `rows` of the panels `panels`.
///
/// # Safety
/// The machine has `V`'s instruction set. Panels exist in the weights; every entry exists in `x`, `y` and the
/// input scales; rows of `x` hold the reduction, rows of `y` the outputs. `panels` starts at a whole group. Nobody else writes or reads those outputs meanwhile.
#[inline(always)]
pub(crate) unsafe fn run<V: Lanes>(p: &Product, panels: Range<usize>, rows: Range<usize>) {
    // SAFETY: the caller's contract.
    unsafe {
        match p.format {
            Format::E4m3 => run_format::<V, E4m3>(p, panels, rows),
            Format::Bf16 => run_format::<V, Bf16>(p, panels, rows),
            Format::F32 => run_format::<V, F32>(p, panels, rows),
        }
    }
}

#[inline(always)]
unsafe fn run_format<V: Lanes, W: Widen>(p: &Product, panels: Range<usize>, rows: Range<usize>) {
    for first in rows.clone().step_by(ROWS) {
        let count = (rows.end - first).min(ROWS);
        for panel in panels.clone().step_by(GROUP) {
            let here = GROUP.min(p.panels - panel);
            // SAFETY: the group's weights, of which this task may want only some panels, start here.
            let w = unsafe { p.data.add(panel * p.panel_bytes) };
            let at = Group { p, panel, here, wanted: here.min(panels.end - panel), first, count, w };
            // SAFETY: the caller's contract on a part of the rows and panels.
            unsafe {
                if const { W::FUSED } && count <= V::FUSED_ROWS {
                    fused::fused::<V, W>(at);
                } else {
                    tiled::tiled::<V, W>(at);
                }
            }
        }
    }
}

/// Some rows and one group of panels.
#[derive(Clone, Copy)]
struct Group<'a> {
    p: &'a Product,
    /// First panel of the group.
    panel: usize,
    /// Panels that are stored together.
    here: usize,
    /// Panels that are computed.
    wanted: usize,
    first: usize,
    count: usize,
    /// The group's weights.
    w: *const u8,
}

/// Finishes `[count][wanted][16]` sums.
struct Done<'a> {
    at: Group<'a>,
    sums: *const f32,
}

impl Work for Done<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Group { p, panel, wanted, first, count, .. } = self.at;
        // SAFETY: sums are filled; rows exist in `y`; only outputs that exist are stored.
        unsafe {
            for row in 0..count {
                let y = p.y.row(first + row);
                let sums = self.sums.add(row * wanted * LANES);
                match p.finish {
                    Finish::Exact | Finish::Bf16 => {
                        for n in 0..wanted {
                            let v = V::load(sums.add(n * LANES));
                            let v = if p.finish == Finish::Bf16 { v.round_bf16() } else { v };
                            let at = (panel + n) * LANES;
                            store::<V>(v, y.add(at), p.outputs - at);
                        }
                    }
                    Finish::SiluExact | Finish::SiluBf16 => {
                        for n in 0..wanted / 2 {
                            let gate = V::load(sums.add(2 * n * LANES));
                            let up = V::load(sums.add((2 * n + 1) * LANES));
                            let v = gate.silu().mul(up);
                            let v = if p.finish == Finish::SiluBf16 { v.round_bf16() } else { v };
                            let at = (panel / 2 + n) * LANES;
                            store::<V>(v, y.add(at), p.outputs - at);
                        }
                    }
                }
            }
        }
    }
}

/// Stores the lanes that exist.
#[inline(always)]
pub(crate) unsafe fn store<V: Lanes>(v: V, to: *mut f32, exist: usize) {
    // SAFETY: `to` has room for `min(exist, 16)` elements.
    unsafe {
        if exist >= LANES {
            v.store(to);
        } else {
            let mut lanes = [0.0_f32; LANES];
            v.store(lanes.as_mut_ptr());
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, exist);
        }
    }
}
