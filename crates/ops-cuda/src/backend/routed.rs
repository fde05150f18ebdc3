//! The choice of experts, and the sum of what comes back from them.

use cadre_ops::{ExpertRows, GateShape, GroupScore, OpsError, RowFormat, Scoring, check};

use super::{
    CudaBackend, THREADS,
    planes::Plane,
    product::{Input, Output},
    queue::{CudaQueue, Scratch},
    step::{Routing, Step},
    weights::{Vector, Weight},
};
use crate::{
    kernels::Kernel,
    launch::{Arg, Grid},
};

impl CudaBackend {
    #[allow(clippy::too_many_arguments, reason = "the trait's operation")]
    pub(crate) fn choose(
        &self,
        queue: &mut CudaQueue,
        step: &Step,
        x: &Plane,
        weight: &Weight,
        bias: &Vector,
        shape: &GateShape,
        routing: &mut Routing,
    ) -> Result<(), OpsError> {
        let (op, rows) = ("gate", step.info().rows);
        check::gate(op, x.dims, weight.dims, bias.len, shape, rows)?;
        routing.check(op, rows, shape.top_k)?;
        // Scores, selections, groups and choices of a row lie in shared memory.
        let words = 2 * shape.experts + shape.n_group + shape.top_k;
        let most = self.device.shared_bytes(Kernel::Choose) / 4;
        check::at_least(op, "elements of shared memory for a row", most, words)?;
        let logits = queue.scratch(op, Scratch::Wide, check::product(op, rows, shape.experts * 4)?.max(4))?;
        let to = Output { values: logits, bf16: false, stride: shape.experts, rows: 0 };
        self.gate_logits(op, queue, Input::of(x), weight, rows, to)?;
        let (marks, ids) = routing.places(rows);
        let args = [
            Arg::Pointer(logits),
            (&bias.memory).into(),
            Arg::U32(shape.experts as u32),
            Arg::U32(shape.n_group as u32),
            Arg::U32(shape.topk_group as u32),
            Arg::U32(shape.top_k as u32),
            shape.norm_topk_prob.into(),
            shape.routed_scaling_factor.into(),
            (shape.scoring == Scoring::Softmax).into(),
            (shape.group_score == GroupScore::Largest).into(),
            Arg::Pointer(ids),
            (&routing.weights).into(),
            Arg::Pointer(marks),
        ];
        queue.launch(Kernel::Choose, Grid::of(rows, 128).shared(4 * words), &args)?;
        routing.chosen(op, queue, rows)
    }

    pub(crate) fn chosen_weights(
        &self,
        queue: &mut CudaQueue,
        routing: &Routing,
        out: &mut Vec<f32>,
    ) -> Result<(), OpsError> {
        let op = "read_weights";
        let bytes = routing.rows * routing.top_k() * 4;
        let host = self.pool.take(bytes)?;
        queue.stream.download(op, routing.weights.address(), host.address(), bytes)?;
        queue.stream.synchronize(op)?;
        out.extend(host.as_ref().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
        Ok(())
    }
}

pub(crate) fn combine(
    queue: &mut CudaQueue,
    experts: &ExpertRows,
    routing: &Routing,
    shared: Option<&Plane>,
    x: &mut Plane,
) -> Result<(), OpsError> {
    let (op, rows, top_k) = ("combine", routing.rows, routing.top_k());
    check::combine(op, experts, top_k, shared.map(|shared| shared.dims), rows, x.dims)?;
    let bytes = check::product(op, experts.pairs, experts.row_bytes())?;
    let arrived = queue.scratch(op, Scratch::Arrived, bytes.max(4))?;
    let mut index = vec![0_u32; experts.pairs];
    let mut at = 0;
    for chunk in &experts.chunks {
        queue.upload(op, &chunk.rows, arrived + (at * experts.row_bytes()) as u64)?;
        for (row, target) in (at as u32..).zip(&chunk.targets) {
            index[*target as usize] = row;
        }
        at += chunk.targets.len();
    }
    let index = queue.arguments(op, &index)?;
    let args = [
        Arg::Pointer(arrived),
        (experts.format == RowFormat::Bf16).into(),
        Arg::Pointer(index),
        (&routing.weights).into(),
        Arg::U32(top_k as u32),
        Arg::Pointer(shared.map_or(0, |shared| shared.memory.address())),
        shared.is_some_and(|shared| shared.bf16).into(),
        Arg::U32(x.dims.cols as u32),
        (&*x).into(),
    ];
    queue.launch(Kernel::Combine, Grid::of(rows, THREADS), &args)
}
