//! The shapes of published checkpoints, which random shapes do not reach: V3, V3.1 (scales that are powers of two), Kimi K2,
//! and the bundled one. Rows are few, so that the reference takes seconds.

use cadre_types::config::ScaleFormat;

use super::{
    Suite, Widths,
    attention::{self, Case},
    data::{Dtype, Matrix, Stream},
    dense,
    experts::{self, Experts},
    same_bits,
};
use crate::{
    backend::Backend,
    shape::{GateShape, GroupScore, Scoring},
    step::{PassRows, RowGroup},
};

struct Checkpoint {
    name: &'static str,
    dtype: Dtype,
    scales: ScaleFormat,
    hidden: usize,
    q_lora: usize,
    attention: Widths,
    /// Of a routed expert.
    inner: usize,
    experts: usize,
    n_group: usize,
    topk_group: usize,
    top_k: usize,
    routed_scaling_factor: f32,
}

const V3: Checkpoint = Checkpoint {
    name: "V3",
    dtype: Dtype::E4m3,
    scales: ScaleFormat::F32,
    hidden: 7168,
    q_lora: 1536,
    attention: Widths { heads: 128, nope: 128, rope: 64, v: 128, kv_lora: 512 },
    inner: 2048,
    experts: 256,
    n_group: 8,
    topk_group: 4,
    top_k: 8,
    routed_scaling_factor: 2.5,
};

const CHECKPOINTS: [Checkpoint; 4] = [
    V3,
    Checkpoint { name: "V3.1", dtype: Dtype::E4m3Powers, scales: ScaleFormat::Ue8m0, ..V3 },
    Checkpoint {
        name: "Kimi K2",
        attention: Widths { heads: 64, ..V3.attention },
        experts: 384,
        n_group: 1,
        topk_group: 1,
        routed_scaling_factor: 2.827,
        ..V3
    },
    Checkpoint {
        name: "pocket",
        dtype: Dtype::Bf16,
        hidden: 256,
        q_lora: 128,
        attention: Widths { heads: 4, nope: 64, rope: 32, v: 64, kv_lora: 128 },
        inner: 128,
        experts: 32,
        n_group: 4,
        topk_group: 2,
        top_k: 4,
        ..V3
    },
];

/// Multiplications of the reference in one product: a tenth of a second.
const PRODUCTS: usize = 100_000_000;

/// Every matrix of an attention layer, and outputs of the head. (V3.1's are V3's with other scales, which the experts have.)
pub(super) fn products<B: Backend>(suite: &Suite<'_, B>) {
    for checkpoint in CHECKPOINTS.iter().filter(|checkpoint| checkpoint.scales == ScaleFormat::F32) {
        let Checkpoint { dtype, hidden, q_lora, attention, .. } = *checkpoint;
        let stream = &mut Stream::new(31);
        let matrices = [
            (dtype, q_lora, hidden),
            (dtype, attention.heads * (attention.nope + attention.rope), q_lora),
            (dtype, attention.kv_lora + attention.rope, hidden),
            (dtype, hidden, attention.heads * attention.v),
            (Dtype::Bf16, 2048, hidden),
        ];
        for (dtype, n, k) in matrices {
            let rows = (PRODUCTS / (n * k)).clamp(1, 33);
            suite.named(&format!("{}, {n} x {k} {dtype:?}, {rows} rows", checkpoint.name), || {
                let weight = Matrix::new(stream, dtype, n, k);
                dense::compare_products(suite, &stream.values(rows * k), rows, &weight);
            });
        }
    }
}

/// Some experts; a pair's bits are the same when its expert has more rows than a kernel of few rows takes. (Kimi K2's are V3's.)
pub(super) fn blocks<B: Backend>(suite: &Suite<'_, B>) {
    for checkpoint in CHECKPOINTS.iter().filter(|checkpoint| checkpoint.n_group > 1) {
        let Checkpoint { dtype, scales, hidden, inner, .. } = *checkpoint;
        let stream = &mut Stream::new(32);
        let few = 9;
        let x = experts::encoded(&suite.reference, &stream.values(70 * hidden), 70, hidden, scales);
        let experts = Experts::of(stream, 3, hidden, inner, Some(dtype));
        let pass = |first: usize| {
            let pairs = first + 1;
            let input: Vec<u32> = (0..pairs as u32).collect();
            let group = |expert, rows| RowGroup { expert, rows };
            (input.clone(), input, [group(1, first), group(0, 0), group(2, 1)])
        };
        let table = experts.table(suite.backend);
        let run = |rows: usize| {
            let (input, output, groups) = pass(rows);
            let pass = PassRows { input: &input, output: &output, groups: &groups };
            experts.run(suite.backend, &table, &x, &pass)
        };
        suite.named(&format!("experts of {}", checkpoint.name), || {
            let got = run(few);
            let (input, output, groups) = pass(few);
            let pass = PassRows { input: &input, output: &output, groups: &groups };
            let expected = experts.run(&suite.reference, &experts.table(&suite.reference), &x, &pass);
            suite.compare("experts", &got, &expected, hidden);
            same_bits("beside more rows", &run(66)[..few * hidden], &got[..few * hidden], hidden);
        });
    }
}

/// The choice among as many experts as there are.
pub(super) fn gates<B: Backend>(suite: &Suite<'_, B>) {
    for checkpoint in &CHECKPOINTS {
        let shape = GateShape {
            scoring: Scoring::Sigmoid,
            group_score: GroupScore::TwoLargest,
            experts: checkpoint.experts,
            n_group: checkpoint.n_group,
            topk_group: checkpoint.topk_group,
            top_k: checkpoint.top_k,
            norm_topk_prob: true,
            routed_scaling_factor: checkpoint.routed_scaling_factor,
        };
        let stream = &mut Stream::new(33);
        suite.named(&format!("gate of {}", checkpoint.name), || {
            let weight = Matrix::new(stream, Dtype::Bf16, shape.experts, checkpoint.hidden);
            let bias = stream.values(shape.experts);
            experts::compare_gate(suite, &stream.values(33 * checkpoint.hidden), 33, &weight, &bias, &shape);
        });
    }
}

/// All heads, in both forms.
pub(super) fn heads<B: Backend>(suite: &Suite<'_, B>) {
    for checkpoint in &CHECKPOINTS {
        suite.named(&format!("attention of {}", checkpoint.name), || {
            let case = Case::new(34, checkpoint.dtype, &checkpoint.attention, &[(20, 2)], 2.0);
            attention::compare(suite, &case);
        });
    }
}
