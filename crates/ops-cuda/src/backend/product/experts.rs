//! Experts: the table of a layer's matrices, and the feed-forward blocks of the pairs of a pass.

use std::sync::Arc;

use cadre_numerics::quant;
use cadre_ops::{Ffn, OpsError, RowFormat, check, check::Dims};

use super::{
    Input, Kind, Output, Which,
    block::{active, list},
    product, scales_of,
};
use crate::{
    backend::{
        CudaBackend, Pass, over,
        planes::{Plane, Rows},
        queue::{CudaQueue, Scratch},
        tensor::{self, GemmArgs},
        weights::Weight,
    },
    device::Memory,
    kernels::Kernel,
    launch::{Arg, Grid},
};

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
    pub(super) kinds: (Vec<Kind>, Vec<Kind>),
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
    pub(crate) fn table(
        &self,
        op: &'static str,
        experts: Vec<Arc<Ffn<Weight>>>,
    ) -> Result<ExpertTable, OpsError> {
        let shape = |ffn: &Arc<Ffn<Weight>>| (ffn.gate_up.dims.cols, ffn.inner, ffn.down.dims.rows);
        check::expert_table(op, experts.iter().map(shape))?;
        let row = |weight: &Weight| {
            [weight.words.address(), scales_of(weight), u64::from(Kind::of(weight).number())]
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
        if self.covers_blocks(pass, experts, x) {
            return self.whole_blocks(op, queue, pass, experts, x, y);
        }
        if experts.kinds.0.iter().chain(&experts.kinds.1).any(|kind| kind.tiles) {
            return self.experts_in_products(op, queue, pass, experts, x, y);
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

    /// Experts of which some lie in tiles, by products. In the first half what is computed on CUDA cores comes first: its
    /// SwiGLU writes every pair.
    pub(crate) fn experts_in_products(
        &self,
        op: &'static str,
        queue: &mut CudaQueue,
        pass: &Pass,
        experts: &ExpertTable,
        x: &Rows,
        y: &Plane,
    ) -> Result<(), OpsError> {
        let Some(shape) = experts.experts.first() else { return Ok(()) };
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
        for kind in experts.kinds.1.iter().filter(|kind| kind.tiles) {
            let a = self.prepared(op, queue, a, Dims { rows: pairs, cols: inner }, *kind)?;
            let args = GemmArgs {
                y: y.memory.address(),
                y_row: hidden as i64,
                n: hidden as i32,
                scatter: pass.output(),
                ..GemmArgs::default()
            };
            let input = a.codes.unwrap_or((a.values, 0));
            self.grouped(op, queue, pass, experts, *kind, false, input, 0, inner, args)?;
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
        let groups = active(pass.groups(), experts, |ffn| {
            Kind::of(if first_half { &ffn.gate_up } else { &ffn.down }) == kind
        });
        for groups in groups.chunks(MOST_GROUPS) {
            let (table, counts, offsets) = list(op, queue, groups)?;
            let pairs: usize = groups.iter().map(|(.., rows)| rows).sum();
            let args = GemmArgs {
                x: x.0,
                xs: x.1,
                gather,
                table,
                counts,
                offsets,
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
        queue.launch(Kernel::Convert, over(elements), &args)?;
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
