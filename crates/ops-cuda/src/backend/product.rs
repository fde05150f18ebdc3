//! Products, feed-forward blocks and experts.

use std::sync::Arc;

use cadre_numerics::quant;
use cadre_ops::{ElementType, Ffn, OpsError, RowFormat, check, check::Dims};
use cadre_types::config::ScaleFormat;

use super::{
    CudaBackend, Pass,
    planes::{Plane, Rows},
    queue::{CudaQueue, Scratch},
    step::TASK_ROWS,
    tensor::{self, GemmArgs},
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
            let scales = weight.scales.as_ref().map_or(0, Memory::address);
            (weight.words.address(), scales, 0, 0, 0, rows, rows.div_ceil(TASK_ROWS))
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

/// Groups of one launch of a product in tiles.
const MOST_GROUPS: usize = 1024;

/// The experts of a layer, by slot.
#[derive(Debug)]
pub struct ExpertTable {
    /// Keeps the matrices.
    pub(crate) experts: Vec<Arc<Ffn<Weight>>>,
    /// Per expert the addresses of words and scales and the kind: of gate_up, then of down.
    addresses: Memory,
    /// The kinds that there are.
    kinds: (Vec<Kind>, Vec<Kind>),
}

impl ExpertTable {
    fn gate_up(&self) -> u64 {
        self.addresses.address()
    }

    fn down(&self) -> u64 {
        self.addresses.at(24 * self.experts.len())
    }
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

    pub(crate) fn table(
        &self,
        op: &'static str,
        experts: Vec<Arc<Ffn<Weight>>>,
    ) -> Result<ExpertTable, OpsError> {
        let shape = |ffn: &Arc<Ffn<Weight>>| (ffn.gate_up.dims.cols, ffn.inner, ffn.down.dims.rows);
        check::expert_table(op, experts.iter().map(shape))?;
        let row = |weight: &Weight| {
            let scales = weight.scales.as_ref().map_or(0, Memory::address);
            [weight.words.address(), scales, u64::from(Kind::of(weight).number())]
        };
        let kinds = |part: fn(&Ffn<Weight>) -> &Weight| {
            let mut kinds: Vec<Kind> = experts.iter().map(|ffn| Kind::of(part(ffn))).collect();
            kinds.sort_unstable_by_key(|kind| kind.number());
            kinds.dedup();
            kinds
        };
        let gate_up = experts.iter().flat_map(|ffn| row(&ffn.gate_up));
        let down = experts.iter().flat_map(|ffn| row(&ffn.down));
        let bytes: Vec<u8> = gate_up.chain(down).flat_map(u64::to_le_bytes).collect();
        let kinds = (kinds(|ffn| &ffn.gate_up), kinds(|ffn| &ffn.down));
        Ok(ExpertTable { addresses: self.loader.bytes(op, &bytes)?, kinds, experts })
    }

    pub(crate) fn experts(
        &self,
        queue: &mut CudaQueue,
        pass: &Pass,
        experts: &ExpertTable,
        x: &Rows,
        y: &Plane,
    ) -> Result<(), OpsError> {
        let op = "grouped_ffn";
        check::pass(op, pass.info(), experts.experts.len(), x.dims, y.dims)?;
        let Some(shape) = experts.experts.first() else { return Ok(()) };
        check::equal(op, "columns of x", x.dims.cols, shape.gate_up.dims.cols)?;
        check::equal(op, "columns of y", y.dims.cols, shape.down.dims.rows)?;
        let pairs = pass.info().pairs;
        if pairs == 0 {
            return Ok(());
        }
        if experts.kinds.0.iter().chain(&experts.kinds.1).any(|kind| kind.tiles) {
            return self.tile_experts(op, queue, pass, experts, shape, x, y);
        }
        let (tasks, count) = pass.tasks();
        let which = |table, kind| Which::Experts { table, kind, tasks, count };
        let mut gate_up = Vec::with_capacity(experts.kinds.0.len());
        for kind in &experts.kinds.0 {
            let input = self.received(op, queue, x, pass.info().input_end, *kind)?;
            gate_up.push((*kind, Input { rows: pass.input(), ..input }, which(experts.gate_up(), *kind)));
        }
        let down: Vec<_> = experts.kinds.1.iter().map(|kind| (*kind, which(experts.down(), *kind))).collect();
        let output = Output { rows: pass.output(), ..Output::of(y) };
        self.block(op, queue, &gate_up, &down, shape, pairs, output)
    }

    /// Experts of which some lie in tiles. What is computed on CUDA cores comes first where it writes every pair, and
    /// last where it writes its own.
    #[allow(clippy::too_many_arguments, reason = "the trait's operation and its shape")]
    fn tile_experts(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        pass: &Pass,
        experts: &ExpertTable,
        shape: &Ffn<Weight>,
        x: &Rows,
        y: &Plane,
    ) -> Result<(), OpsError> {
        let (pairs, inner, hidden) = (pass.info().pairs, shape.inner, shape.down.dims.rows);
        let (tasks, count) = pass.tasks();
        let mut plain = Vec::new();
        for kind in experts.kinds.0.iter().filter(|kind| !kind.tiles) {
            let input = self.received(op, queue, x, pass.info().input_end, *kind)?;
            let which = Which::Experts { table: experts.gate_up(), kind: *kind, tasks, count };
            plain.push((*kind, Input { rows: pass.input(), ..input }, which));
        }
        let a = if plain.is_empty() {
            let values = queue.scratch(op, Scratch::Inner, check::product(op, pairs, inner * 4)?)?;
            Input { values, bf16: true, codes: None, stride: inner, rows: 0 }
        } else {
            // SwiGLU runs over all pairs, also over those whose gate and up are not made here.
            let bytes = check::product(op, pairs, shape.gate_up.dims.rows * 4)?;
            let wide = queue.scratch(op, Scratch::Wide, bytes)?;
            queue.stream.zero(op, wide, bytes)?;
            self.gate_up(op, queue, &plain, shape, pairs)?
        };
        for kind in experts.kinds.0.iter().filter(|kind| kind.tiles) {
            let input = self.received_in_type(op, queue, x, pass.info().input_end, *kind)?;
            let args = GemmArgs {
                y: a.values,
                y_row: inner as i64,
                n: inner as i32,
                y_mode: tensor::Y_SWIGLU,
                ..GemmArgs::default()
            };
            self.grouped(
                op,
                queue,
                pass,
                experts,
                *kind,
                true,
                input,
                pass.input(),
                shape.gate_up.dims.cols,
                args,
            )?;
        }
        let bytes = check::product(op, pairs, hidden * 2)?;
        let ordered = queue.scratch(op, Scratch::Wide, bytes)?;
        if experts.kinds.1.iter().any(|kind| !kind.tiles) {
            // All pairs are moved, also those that are not made here.
            queue.stream.zero(op, ordered, bytes)?;
        }
        let mut scattered = false;
        for kind in experts.kinds.1.iter().filter(|kind| kind.tiles) {
            let a = self.prepared(op, queue, a, Dims { rows: pairs, cols: inner }, *kind)?;
            let args = GemmArgs { y: ordered, y_row: hidden as i64, n: hidden as i32, ..GemmArgs::default() };
            let input = a.codes.unwrap_or((a.values, 0));
            self.grouped(op, queue, pass, experts, *kind, false, input, 0, inner, args)?;
            scattered = true;
        }
        if scattered {
            // An even number of outputs: whole words.
            let args =
                [Arg::Pointer(ordered), Arg::Pointer(pass.output()), Arg::U32(hidden as u32 / 2), y.into()];
            queue.launch(Kernel::ScatterRows, Grid::of(pairs, 128), &args)?;
        }
        let output = Output { rows: pass.output(), ..Output::of(y) };
        for kind in experts.kinds.1.iter().filter(|kind| !kind.tiles) {
            let a = self.prepared(op, queue, a, Dims { rows: pairs, cols: inner }, *kind)?;
            let which = Which::Experts { table: experts.down(), kind: *kind, tasks, count };
            product(queue, kind.elements, a, which, inner, 0..hidden, output)?;
        }
        Ok(())
    }

    /// One launch of experts in tiles: the groups whose matrix is of the kind.
    #[allow(clippy::too_many_arguments, reason = "a grouped product")]
    fn grouped(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        pass: &Pass,
        experts: &ExpertTable,
        kind: Kind,
        first_half: bool,
        x: (u64, u64),
        gather: u64,
        cols: usize,
        args: GemmArgs,
    ) -> Result<(), OpsError> {
        let mut first = 0;
        let mut groups = Vec::new();
        for group in pass.groups() {
            let ffn = &experts.experts[group.expert];
            let weight = if first_half { &ffn.gate_up } else { &ffn.down };
            if group.rows > 0 && Kind::of(weight) == kind {
                groups.push((ffn, first, group.rows));
            }
            first += group.rows;
        }
        for groups in groups.chunks(MOST_GROUPS) {
            // Addresses of both matrices, then rows, then first pairs.
            let mut words = Vec::with_capacity(groups.len() * 10);
            for (ffn, ..) in groups {
                for weight in [&ffn.gate_up, &ffn.down] {
                    let scales = weight.scales.as_ref().map_or(0, Memory::address);
                    words.extend(
                        [weight.words.address(), scales].iter().flat_map(|a| [*a as u32, (a >> 32) as u32]),
                    );
                }
            }
            words.extend(groups.iter().map(|(.., rows)| *rows as u32));
            words.extend(groups.iter().map(|(_, first, _)| *first as u32));
            let table = queue.arguments(op, &words)?;
            let counts = table + 32 * groups.len() as u64;
            let pairs: usize = groups.iter().map(|(.., rows)| rows).sum();
            let args = GemmArgs {
                x: x.0,
                xs: x.1,
                gather,
                table,
                counts,
                offsets: counts + 4 * groups.len() as u64,
                x_row: tensor::row_bytes(cols, kind.elements),
                xs_row: quant::blocks(cols) as i32,
                groups: groups.len() as i32,
                rows: groups.iter().map(|(.., rows)| *rows).max().unwrap_or(0) as i32,
                k: cols as i32,
                table_at: if first_half { 0 } else { 2 },
                ..args
            };
            self.gemm(queue, kind.elements, pairs.div_ceil(groups.len()), &args)?;
        }
        Ok(())
    }

    /// Received rows for a matrix in tiles: codes and scales, or BF16.
    fn received_in_type(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        x: &Rows,
        rows: usize,
        kind: Kind,
    ) -> Result<(u64, u64), OpsError> {
        let input = self.received(op, queue, x, rows, kind)?;
        if let Some(codes) = input.codes {
            return Ok(codes);
        }
        // Values of codes and scales are F32; BF16 matrices take BF16.
        let elements = rows * x.dims.cols;
        let values = queue.scratch(op, Scratch::Codes, check::product(op, elements, 2)?)?;
        let args = [
            Arg::Pointer(input.values),
            input.bf16.into(),
            Arg::U64(elements as u64),
            Arg::Pointer(values),
            true.into(),
        ];
        queue.launch(Kernel::Convert, super::over(elements), &args)?;
        Ok((values, 0))
    }

    /// Received rows as the input of a matrix: codes where it multiplies codes, values where not.
    fn received(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        x: &Rows,
        rows: usize,
        kind: Kind,
    ) -> Result<Input, OpsError> {
        let cols = x.dims.cols;
        let plain = Input {
            values: x.data(0),
            bf16: x.format == RowFormat::Bf16,
            codes: None,
            stride: cols,
            rows: 0,
        };
        if x.format != RowFormat::E4m3 {
            return Ok(plain);
        }
        let codes = (x.data(0), x.scales(0));
        if self.quantises(kind) {
            return Ok(Input { codes: Some(codes), ..plain });
        }
        let values = queue.scratch(op, Scratch::Arrived, check::product(op, rows, cols * 4)?)?;
        queue.launch(
            Kernel::DecodeCodes,
            Grid::of(rows, 256),
            &[Arg::Pointer(codes.0), Arg::Pointer(codes.1), Arg::U32(cols as u32), Arg::Pointer(values)],
        )?;
        Ok(Input { values, bf16: false, ..plain })
    }
}
