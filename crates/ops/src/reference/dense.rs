//! Everything except attention: products, norms, feed-forward, gate, combine and row moves.

use cadre_numerics::{exp::silu, linear::Blocks, norm};
use cadre_types::TokenId;

use super::{Buffer, ReferenceBackend, Weight};
use crate::{
    backend::{Ffn, OpsError},
    check,
    gate::Chooser,
    host::HostRows,
    shape::{GateShape, RowGroup},
};

pub(super) fn embed(table: &Weight, ids: &[TokenId], y: &mut Buffer) -> Result<(), OpsError> {
    let op = "embed";
    check::equal(op, "columns of y", y.dims.cols, table.dims.cols)?;
    check::at_least(op, "row capacity of y", y.dims.rows, ids.len())?;
    ids.iter().try_for_each(|id| check::index(op, "token id", *id as usize, table.dims.rows))?;
    for (t, id) in ids.iter().enumerate() {
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
        let product = backend.product(x.row(row), x.coded(row), weight);
        for (y, value) in y.row_mut(row).iter_mut().zip(product) {
            *y = backend.round(value);
        }
    }
    Ok(())
}

pub(super) fn logits(
    backend: &ReferenceBackend,
    x: &Buffer,
    rows: &[usize],
    head: &Weight,
    out: &mut Vec<f32>,
) -> Result<(), OpsError> {
    check::equal("logits", "columns of x", x.dims.cols, head.dims.cols)?;
    rows.iter().try_for_each(|row| check::index("logits", "row", *row, x.dims.rows))?;
    out.clear();
    for row in rows {
        out.extend(backend.product(x.row(*row), x.coded(*row), head));
    }
    Ok(())
}

pub(super) fn grouped_ffn(
    backend: &ReferenceBackend,
    op: &'static str,
    x: &Buffer,
    experts: &[&Ffn<Weight>],
    groups: &[RowGroup],
    y: &mut Buffer,
) -> Result<(), OpsError> {
    for ffn in experts {
        check::equal(op, "columns of x", x.dims.cols, ffn.gate_up.dims.cols)?;
        check::equal(op, "columns of y", y.dims.cols, ffn.down.dims.rows)?;
        check::equal(op, "inner width of an expert", ffn.inner, experts[0].inner)?;
    }
    check::groups(op, groups, experts.len(), x.dims, y.dims)?;
    for group in groups {
        let ffn = experts[group.expert];
        for row in group.first_row..group.first_row + group.rows {
            let gate_up = backend.product(x.row(row), x.coded(row), &ffn.gate_up);
            let up = &gate_up[Weight::up_row(ffn.inner)..];
            let inner: Vec<f32> = gate_up[..ffn.inner]
                .iter()
                .zip(up)
                .map(|(gate, up)| backend.round(silu(*gate) * up))
                .collect();
            let product = backend.product(&inner, None, &ffn.down);
            for (y, value) in y.row_mut(row).iter_mut().zip(product) {
                *y = backend.round(value);
            }
        }
    }
    Ok(())
}

pub(super) fn gather_rows(x: &Buffer, rows: &[usize], y: &mut Buffer) -> Result<(), OpsError> {
    let op = "gather_rows";
    check::equal(op, "columns of y", y.dims.cols, x.dims.cols)?;
    check::at_least(op, "row capacity of y", y.dims.rows, rows.len())?;
    rows.iter().try_for_each(|row| check::index(op, "row", *row, x.dims.rows))?;
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for (to, from) in rows.iter().enumerate() {
        y.row_mut(to).copy_from_slice(x.row(*from));
        if let Some((c, s)) = x.coded(*from) {
            codes.extend_from_slice(c);
            scales.extend_from_slice(s);
        }
    }
    let all_coded = !rows.is_empty() && rows.iter().all(|row| x.coded(*row).is_some());
    y.set_coded(if all_coded { rows.len() } else { 0 }, codes, scales);
    Ok(())
}

pub(super) fn concat(a: &Buffer, b: &Buffer, rows: usize, y: &mut Buffer) -> Result<(), OpsError> {
    let op = "concat";
    check::equal(op, "columns of y", y.dims.cols, a.dims.cols + b.dims.cols)?;
    for (what, buffer) in [("row capacity of a", a), ("row capacity of b", b)] {
        check::at_least(op, what, buffer.dims.rows, rows)?;
    }
    check::at_least(op, "row capacity of y", y.dims.rows, rows)?;
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
    x: &Buffer,
    weight: &Weight,
    bias: &[f32],
    shape: &GateShape,
    rows: usize,
    topk_idx: &mut Vec<u16>,
    topk_weights: &mut Vec<f32>,
) -> Result<(), OpsError> {
    check::gate("gate", x.dims, weight.dims, bias.len(), shape, rows)?;
    topk_idx.clear();
    topk_weights.clear();
    let blocks = Blocks::aligned(weight.dims.cols);
    let mut chooser = Chooser::default();
    for row in 0..rows {
        let logits: Vec<f32> =
            (0..weight.dims.rows).map(|n| weight.output(n, x.row(row), blocks, |_| 1.0)).collect();
        chooser.choose(&logits, bias, shape, row, topk_idx, topk_weights)?;
    }
    Ok(())
}

pub(super) fn combine(
    expert_rows: &HostRows<'_>,
    topk_weights: &[f32],
    top_k: usize,
    shared: Option<&Buffer>,
    rows: usize,
    x: &mut Buffer,
) -> Result<(), OpsError> {
    let (op, shared_dims) = ("combine", shared.map(|s| s.dims));
    check::combine(op, expert_rows, topk_weights.len(), top_k, shared_dims, rows, x.dims)?;
    let mut decoded = vec![0.0; x.dims.cols];
    for t in 0..rows {
        let mut sum = vec![0.0_f32; x.dims.cols];
        for (j, weight) in topk_weights[t * top_k..(t + 1) * top_k].iter().enumerate() {
            let (data, scales) = check::host_row(expert_rows, t * top_k + j);
            check::decode_row(expert_rows.format, data, scales, &mut decoded);
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
