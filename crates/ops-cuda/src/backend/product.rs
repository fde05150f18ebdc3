//! Products with one matrix, and feed-forward blocks; `experts` those of the routed experts.

mod block;
mod experts;

use cadre_numerics::quant;
use cadre_ops::{ElementType, Ffn, OpsError, check, check::Dims};
use cadre_types::config::ScaleFormat;

pub(crate) use self::block::inner_bytes;
pub use self::experts::ExpertTable;
use super::{
    CudaBackend,
    planes::Plane,
    queue::{CudaQueue, Scratch},
    step::TASK_ROWS,
    tensor,
    weights::{Weight, up_row},
};
use crate::{
    device::Memory,
    kernels::Kernel,
    launch::{Arg, Grid},
};

/// The input of a product: values, or codes and scales.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input {
    pub(crate) values: u64,
    pub(crate) bf16: bool,
    /// Addresses of codes and of scales; then `values` is of no account.
    pub(crate) codes: Option<(u64, u64)>,
    /// Elements between rows.
    pub(crate) stride: usize,
    /// List of rows, or 0.
    pub(crate) rows: u64,
}

/// The output of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) values: u64,
    pub(crate) bf16: bool,
    pub(crate) stride: usize,
    /// List of rows, or 0.
    pub(crate) rows: u64,
}

/// Which matrix each row meets.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Which<'a> {
    /// One matrix for so many rows.
    One(&'a Weight, usize),
    /// The expert of each task, if its matrix is of the kind: the table by expert, tasks, their number.
    Experts { table: u64, kind: Kind, tasks: u64, count: usize },
}

/// What makes one launch of a product differ from another: the elements, and how inputs are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    elements: ElementType,
    input_scales: ScaleFormat,
    tiles: bool,
}

impl Kind {
    fn of(weight: &Weight) -> Self {
        Self { elements: weight.elements, input_scales: weight.input_scales, tiles: weight.tiles }
    }

    /// Its number in the tables on the device.
    fn number(self) -> u32 {
        let number = match (self.elements, self.input_scales) {
            (ElementType::F32, _) => 0,
            (ElementType::Bf16, _) => 1,
            (ElementType::E4m3, ScaleFormat::F32) => 2,
            (ElementType::E4m3, ScaleFormat::Ue8m0) => 3,
        };
        number + if self.tiles { 4 } else { 0 }
    }
}

/// Where the scales of a matrix are; 0 where it has none.
fn scales_of(weight: &Weight) -> u64 {
    weight.scales.as_ref().map_or(0, Memory::address)
}

impl Input {
    pub(crate) fn of(plane: &Plane) -> Self {
        let (values, bf16) = (plane.memory.address(), plane.bf16);
        Self { values, bf16, codes: None, stride: plane.dims.cols, rows: 0 }
    }
}

impl Output {
    pub(crate) fn of(plane: &Plane) -> Self {
        let (values, bf16) = (plane.memory.address(), plane.bf16);
        Self { values, bf16, stride: plane.dims.cols, rows: 0 }
    }
}

/// Outputs `columns` of a product.
pub(crate) fn product(
    queue: &CudaQueue,
    elements: ElementType,
    x: Input,
    which: Which<'_>,
    cols: usize,
    columns: std::ops::Range<usize>,
    y: Output,
) -> Result<(), OpsError> {
    let kernel = match (elements, x.codes) {
        (ElementType::F32, _) => Kernel::ProductF32,
        (ElementType::Bf16, _) => Kernel::ProductBf16,
        (ElementType::E4m3, None) => Kernel::ProductE4m3,
        (ElementType::E4m3, Some(_)) => Kernel::ProductE4m3Coded,
    };
    let (codes, code_scales) = x.codes.unwrap_or((0, 0));
    let (words, scales, table, kind, tasks, rows, count) = match which {
        Which::One(weight, rows) => {
            (weight.words.address(), scales_of(weight), 0, 0, 0, rows, rows.div_ceil(TASK_ROWS))
        }
        Which::Experts { table, kind, tasks, count } => (0, 0, table, kind.number(), tasks, 0, count),
    };
    queue.launch(
        kernel,
        Grid::of(count, 128).by(columns.len().div_ceil(128)),
        &[
            Arg::Pointer(x.values),
            x.bf16.into(),
            Arg::Pointer(codes),
            Arg::Pointer(code_scales),
            Arg::U32(x.stride as u32),
            Arg::Pointer(x.rows),
            Arg::Pointer(words),
            Arg::Pointer(scales),
            Arg::Pointer(table),
            Arg::U32(kind),
            Arg::Pointer(tasks),
            Arg::U32(rows as u32),
            Arg::U32(cols as u32),
            Arg::U32(columns.start as u32),
            Arg::U32(columns.len() as u32),
            Arg::Pointer(y.rows),
            Arg::Pointer(y.values),
            y.bf16.into(),
            Arg::U32(y.stride as u32),
        ],
    )
}

/// Codes and scales of rows, into memory.
pub(crate) fn quantise(
    queue: &CudaQueue,
    x: (u64, bool),
    dims: Dims,
    scales: ScaleFormat,
    to: (u64, u64),
) -> Result<(), OpsError> {
    // Eight warps a block of threads, one warp a block of columns.
    let grid = Grid::of(dims.rows, 256).by(quant::blocks(dims.cols).div_ceil(8));
    let pow2 = scales == ScaleFormat::Ue8m0;
    let args = [
        Arg::Pointer(x.0),
        x.1.into(),
        Arg::U32(dims.cols as u32),
        pow2.into(),
        Arg::Pointer(to.0),
        Arg::Pointer(to.1),
    ];
    queue.launch(Kernel::Quantise, grid, &args)
}

impl CudaBackend {
    /// Whether the input of such a matrix is quantised.
    fn quantises(&self, kind: Kind) -> bool {
        self.class.quantises() && kind.elements == ElementType::E4m3
    }

    /// Quantises rows of `cols` columns if such a matrix wants it so.
    fn prepared(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        x: Input,
        dims: Dims,
        kind: Kind,
    ) -> Result<Input, OpsError> {
        if !self.quantises(kind) {
            return Ok(x);
        }
        let codes = queue.scratch(op, Scratch::Codes, check::product(op, dims.rows, dims.cols)?)?;
        let scales = queue.scratch(op, Scratch::Scales, dims.rows * quant::blocks(dims.cols) * 4)?;
        quantise(queue, (x.values, x.bf16), dims, kind.input_scales, (codes, scales))?;
        Ok(Input { codes: Some((codes, scales)), ..x })
    }

    /// `y = x W^T`, checked.
    pub(crate) fn matrix_product(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        x: &Plane,
        weight: &Weight,
        rows: usize,
        y: &Plane,
    ) -> Result<(), OpsError> {
        check::linear(op, x.dims, weight.dims, rows, y.dims)?;
        if rows == 0 {
            return Ok(());
        }
        let dims = Dims { rows, cols: weight.dims.cols };
        let x = self.prepared(op, queue, Input::of(x), dims, Kind::of(weight))?;
        self.one_product(queue, x, weight, rows, Output::of(y))
    }

    /// All outputs of one matrix, from a prepared input.
    fn one_product(
        &self,
        queue: &CudaQueue,
        x: Input,
        weight: &Weight,
        rows: usize,
        y: Output,
    ) -> Result<(), OpsError> {
        let outputs = weight.dims.rows;
        if weight.tiles {
            let x = x.codes.unwrap_or((x.values, 0));
            let mode = if y.bf16 { tensor::Y_BF16 } else { tensor::Y_F32 };
            return self.tile_product(queue, x, weight, rows, y.values, mode, outputs);
        }
        product(queue, weight.elements, x, Which::One(weight, rows), weight.dims.cols, 0..outputs, y)
    }

    /// Logits of the gate: its input is never quantised, but where e4m3 weights lie in tiles there is no other product.
    pub(crate) fn gate_logits(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        x: Input,
        weight: &Weight,
        rows: usize,
        y: Output,
    ) -> Result<(), OpsError> {
        if rows == 0 {
            return Ok(());
        }
        let x = match weight.tiles {
            true => self.prepared(op, queue, x, Dims { rows, cols: weight.dims.cols }, Kind::of(weight))?,
            false => x,
        };
        self.one_product(queue, x, weight, rows, y)
    }

    /// A feed-forward block over rows or pairs: gate and up (one launch for each input), SwiGLU, down (one launch for
    /// each kind).
    #[allow(clippy::too_many_arguments, reason = "two products and what lies between")]
    fn block(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        gate_up: &[(Kind, Input, Which<'_>)],
        down: &[(Kind, Which<'_>)],
        shape: &Ffn<Weight>,
        rows: usize,
        y: Output,
    ) -> Result<(), OpsError> {
        let inner = shape.inner;
        let a = self.gate_up(op, queue, gate_up, shape, rows)?;
        for (kind, which) in down {
            let a = self.prepared(op, queue, a, Dims { rows, cols: inner }, *kind)?;
            product(queue, kind.elements, a, *which, inner, 0..shape.down.dims.rows, y)?;
        }
        Ok(())
    }

    /// The first half of a block: the inner activation.
    fn gate_up(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        gate_up: &[(Kind, Input, Which<'_>)],
        shape: &Ffn<Weight>,
        rows: usize,
    ) -> Result<Input, OpsError> {
        let (inner, hidden, stride) = (shape.inner, shape.gate_up.dims.cols, shape.gate_up.dims.rows);
        let bf16 = self.rounds();
        let wide = queue.scratch(op, Scratch::Wide, check::product(op, rows, stride * 4)?)?;
        let to = Output { values: wide, bf16: false, stride, rows: 0 };
        for (kind, x, which) in gate_up {
            product(queue, kind.elements, *x, *which, hidden, 0..stride, to)?;
        }
        let a = queue.scratch(op, Scratch::Inner, check::product(op, rows, inner * 4)?)?;
        let args = [
            Arg::Pointer(wide),
            Arg::U32(stride as u32),
            Arg::U32(up_row(inner) as u32),
            Arg::U32(inner as u32),
            Arg::Pointer(a),
            bf16.into(),
        ];
        queue.launch(Kernel::Swiglu, Grid::of(rows, 256), &args)?;
        Ok(Input { values: a, bf16, codes: None, stride: inner, rows: 0 })
    }

    pub(crate) fn dense_ffn(
        &self,
        queue: &mut CudaQueue,
        x: &Plane,
        ffn: &Ffn<Weight>,
        rows: usize,
        y: &Plane,
    ) -> Result<(), OpsError> {
        let op = "ffn";
        let hidden = Dims { rows: ffn.down.dims.rows, cols: ffn.gate_up.dims.cols };
        check::linear(op, x.dims, hidden, rows, y.dims)?;
        if rows == 0 {
            return Ok(());
        }
        let (first, second) = (Kind::of(&ffn.gate_up), Kind::of(&ffn.down));
        let x = self.prepared(op, queue, Input::of(x), Dims { rows, cols: hidden.cols }, first)?;
        if !first.tiles && !second.tiles {
            let gate_up = [(first, x, Which::One(&ffn.gate_up, rows))];
            return self.block(
                op,
                queue,
                &gate_up,
                &[(second, Which::One(&ffn.down, rows))],
                ffn,
                rows,
                Output::of(y),
            );
        }
        let inner = ffn.inner;
        let a = if first.tiles {
            let a = queue.scratch(op, Scratch::Inner, check::product(op, rows, inner * 4)?)?;
            let x = x.codes.unwrap_or((x.values, 0));
            self.tile_product(queue, x, &ffn.gate_up, rows, a, tensor::Y_SWIGLU, inner)?;
            Input { values: a, bf16: true, codes: None, stride: inner, rows: 0 }
        } else {
            self.gate_up(op, queue, &[(first, x, Which::One(&ffn.gate_up, rows))], ffn, rows)?
        };
        let a = self.prepared(op, queue, a, Dims { rows, cols: inner }, second)?;
        self.one_product(queue, a, &ffn.down, rows, Output::of(y))
    }
}
