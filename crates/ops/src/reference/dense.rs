//! Everything except attention: products, norms, feed-forward, gate, combine and row moves.

use std::sync::Arc;

use cadre_numerics::{exp::silu, linear::Blocks, norm};

use super::{Buffer, ReferenceBackend, Rows, Weight};
use crate::{
    backend::Ffn,
    check::{self, Dims},
    error::OpsError,
    exchange::ExpertRows,
    gate::Chooser,
    resident::{HostPass, HostRouting, HostStep},
    shape::GateShape,
};

pub(super) fn embed(step: &HostStep, table: &Weight, y: &mut Buffer) -> Result<(), OpsError> {
    check::embed("embed", step.info(), table.dims, y.dims)?;
    for (t, id) in step.ids().iter().enumerate() {
        for (k, value) in y.row_mut(t).iter_mut().enumerate() {
            *value = table.value(*id as usize, k) * table.scale(*id as usize, k);
        }
    }
    Ok(())
}

pub(super) fn rms_norm(
    backend: &ReferenceBackend,
    x: &Buffer,
    weight: &[f32],
    eps: f32,
    rows: usize,
    y: &mut Buffer,
) -> Result<(), OpsError> {
    check::same_width("rms_norm", x.dims, y.dims, rows)?;
    check::equal("rms_norm", "entries of the weight", weight.len(), x.dims.cols)?;
    for row in 0..rows {
        let inverse = norm::inverse_rms(x.row(row), eps);
        for ((y, x), w) in y.row_mut(row).iter_mut().zip(x.row(row)).zip(weight) {
            *y = backend.round(norm::scaled(*x, inverse, *w));
        }
    }
    Ok(())
}

pub(super) fn linear(
    backend: &ReferenceBackend,
    x: &Buffer,
    weight: &Weight,
    rows: usize,
    y: &mut Buffer,
) -> Result<(), OpsError> {
    check::linear("linear", x.dims, weight.dims, rows, y.dims)?;
    for row in 0..rows {
        let product = backend.product(x.row(row), None, weight);
        for (y, value) in y.row_mut(row).iter_mut().zip(product) {
            *y = backend.round(value);
        }
    }
    Ok(())
}

pub(super) fn logits(
    backend: &ReferenceBackend,
    x: &Buffer,
    head: &Weight,
    rows: usize,
    y: &mut Buffer,
) -> Result<(), OpsError> {
    check::linear("logits", x.dims, head.dims, rows, y.dims)?;
    for row in 0..rows {
        let product = backend.product(x.row(row), None, head);
        y.row_mut(row).copy_from_slice(&product);
    }
    Ok(())
}

/// One row through a feed-forward block.
fn ffn_row(
    backend: &ReferenceBackend,
    ffn: &Ffn<Weight>,
    x: &[f32],
    codes: Option<(&[u8], &[f32])>,
    y: &mut [f32],
) {
    let gate_up = backend.product(x, codes, &ffn.gate_up);
    let up = &gate_up[Weight::up_row(ffn.inner)..];
    let inner: Vec<f32> =
        gate_up[..ffn.inner].iter().zip(up).map(|(gate, up)| backend.round(silu(*gate) * up)).collect();
    let product = backend.product(&inner, None, &ffn.down);
    y.iter_mut().zip(product).for_each(|(y, value)| *y = backend.round(value));
}

pub(super) fn ffn(
    backend: &ReferenceBackend,
    x: &Buffer,
    ffn: &Ffn<Weight>,
    rows: usize,
    y: &mut Buffer,
) -> Result<(), OpsError> {
    let op = "ffn";
    check::equal(op, "columns of x", x.dims.cols, ffn.gate_up.dims.cols)?;
    check::equal(op, "columns of y", y.dims.cols, ffn.down.dims.rows)?;
    check::at_least(op, "row capacity of x", x.dims.rows, rows)?;
    check::at_least(op, "row capacity of y", y.dims.rows, rows)?;
    for row in 0..rows {
        ffn_row(backend, ffn, x.row(row), None, y.row_mut(row));
    }
    Ok(())
}

pub(super) fn grouped_ffn(
    backend: &ReferenceBackend,
    pass: &HostPass,
    experts: &[Arc<Ffn<Weight>>],
    x: &Rows,
    y: &mut Buffer,
) -> Result<(), OpsError> {
    let op = "grouped_ffn";
    if let Some(ffn) = experts.first() {
        check::equal(op, "columns of x", x.dims().cols, ffn.gate_up.dims.cols)?;
        check::equal(op, "columns of y", y.dims.cols, ffn.down.dims.rows)?;
    }
    check::pass(op, pass.info(), experts.len(), x.dims(), y.dims)?;
    let experts =
        pass.groups().iter().flat_map(|group| std::iter::repeat_n(&experts[group.expert], group.rows));
    for ((expert, from), to) in experts.zip(pass.input()).zip(pass.output()) {
        ffn_row(backend, expert, x.values.row(*from), x.coded(*from), y.row_mut(*to));
    }
    Ok(())
}

pub(super) fn gather_wanted(step: &HostStep, x: &Buffer, y: &mut Buffer) -> Result<(), OpsError> {
    check::gather_wanted("gather_wanted", step.info(), x.dims, y.dims)?;
    for (to, from) in step.wanted().iter().enumerate() {
        y.row_mut(to).copy_from_slice(x.row(*from));
    }
    Ok(())
}

pub(super) fn assign(x: &mut Buffer, y: &Buffer, rows: usize) -> Result<(), OpsError> {
    check::same_width("assign", y.dims, x.dims, rows)?;
    (0..rows).for_each(|row| x.row_mut(row).copy_from_slice(y.row(row)));
    Ok(())
}

pub(super) fn concat(a: &Buffer, b: &Buffer, rows: usize, y: &mut Buffer) -> Result<(), OpsError> {
    check::concat("concat", a.dims, b.dims, rows, y.dims)?;
    for row in 0..rows {
        let (left, right) = y.row_mut(row).split_at_mut(a.dims.cols);
        left.copy_from_slice(a.row(row));
        right.copy_from_slice(b.row(row));
    }
    Ok(())
}

pub(super) fn add(x: &mut Buffer, delta: &Buffer, rows: usize) -> Result<(), OpsError> {
    check::same_width("add", delta.dims, x.dims, rows)?;
    for row in 0..rows {
        for (x, delta) in x.row_mut(row).iter_mut().zip(delta.row(row)) {
            *x += delta;
        }
    }
    Ok(())
}

pub(super) fn gate(
    step: &HostStep,
    x: &Buffer,
    weight: &Weight,
    bias: &[f32],
    shape: &GateShape,
    routing: &mut HostRouting,
) -> Result<(), OpsError> {
    let (op, rows) = ("gate", step.info().rows);
    check::gate(op, x.dims, weight.dims, bias.len(), shape, rows)?;
    let blocks = Blocks::aligned(weight.dims.cols);
    let mut chooser = Chooser::default();
    routing.fill(op, rows, shape.top_k, |row, ids, weights| {
        let logits: Vec<f32> =
            (0..weight.dims.rows).map(|n| weight.output(n, x.row(row), blocks, |_| 1.0)).collect();
        chooser.choose(&logits, bias, shape, row, ids, weights)
    })
}

pub(super) fn combine(
    experts: &ExpertRows,
    routing: &HostRouting,
    shared: Option<&Buffer>,
    x: &mut Buffer,
) -> Result<(), OpsError> {
    let (rows, top_k) = (routing.rows(), routing.top_k());
    check::combine("combine", experts, top_k, shared.map(|s| s.dims), rows, x.dims)?;
    let expert_rows = experts.in_order();
    let width = experts.row_bytes();
    let Dims { cols, .. } = x.dims;
    let mut decoded = vec![0.0; cols];
    for t in 0..rows {
        let mut sum = vec![0.0_f32; cols];
        for (pair, weight) in (t * top_k..).zip(&routing.weights()[t * top_k..(t + 1) * top_k]) {
            let row = &expert_rows[pair * width..(pair + 1) * width];
            check::decode_row(experts.format, row, &[], &mut decoded);
            for (sum, value) in sum.iter_mut().zip(&decoded) {
                *sum = weight.mul_add(*value, *sum);
            }
        }
        if let Some(shared) = shared {
            for (sum, value) in sum.iter_mut().zip(shared.row(t)) {
                *sum += value;
            }
        }
        for (x, sum) in x.row_mut(t).iter_mut().zip(&sum) {
            *x += sum;
        }
    }
    Ok(())
}
