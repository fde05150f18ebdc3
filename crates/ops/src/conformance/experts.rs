//! Gate, encoding, experts, combine.

use std::sync::Arc;

use cadre_types::config::ScaleFormat;

use super::{
    Suite, Tolerance,
    data::{Dtype, Matrix, Stream, activations, read, read_residual, residual, step_of},
    rows::unaligned,
    same_bits,
};
use crate::{
    backend::Backend,
    error::OpsError,
    exchange::{ExpertChunk, ExpertRows},
    host::{EncodedRows, RowFormat, RowLayout},
    plan::PassLimits,
    shape::{GateShape, GroupScore, Scoring},
    step::{PassRows, RowGroup},
};

pub(super) fn choose<B: Backend>(
    backend: &B,
    x: &[f32],
    ids: &[u32],
    weight: &Matrix,
    bias: &[f32],
    shape: &GateShape,
) -> Result<(Vec<u16>, Vec<f32>), OpsError> {
    let queue = &mut backend.queue().unwrap();
    let loaded = backend.load_matrix(weight.host()).unwrap();
    let bias = backend.load_vector(bias).unwrap();
    let x = activations(backend, x, weight.cols, 1);
    let step = step_of(backend, queue, ids, &[]);
    let mut routing = backend.alloc_routing(ids.len() + 1, shape.top_k).unwrap();
    // What an earlier step left must not show.
    let (old, one) = (vec![0; shape.top_k], vec![9.0; shape.top_k]);
    backend.write_routing(queue, &old, &one, &mut routing).unwrap();
    backend.gate(queue, &step, &x, &loaded, &bias, shape, &mut routing)?;
    let chosen = backend.routed(&routing)?.to_vec();
    let mut weights = Vec::new();
    backend.read_weights(queue, &routing, &mut weights).unwrap();
    Ok((chosen, weights))
}

fn gate_shape(stream: &mut Stream) -> GateShape {
    let (n_group, size) = (1 + stream.below(5), 1 + stream.below(8));
    let topk_group = 1 + stream.below(n_group);
    GateShape {
        scoring: [Scoring::Sigmoid, Scoring::Softmax][stream.below(2)],
        group_score: [GroupScore::TwoLargest, GroupScore::Largest][stream.below(2)],
        experts: n_group * size,
        n_group,
        topk_group,
        top_k: 1 + stream.below((topk_group * size).min(8)),
        norm_topk_prob: stream.coin(),
        routed_scaling_factor: 2.5,
    }
}

pub(super) fn gate<B: Backend>(suite: &Suite<'_, B>) {
    suite.each("gate", |stream, rows| {
        let shape = gate_shape(stream);
        let k = suite.width(stream, 200);
        let weight = Matrix::any(stream, shape.experts, k);
        let bias = stream.values(shape.experts);
        compare_gate(suite, &stream.values(rows * k), rows, &weight, &bias, &shape);
    });
}

pub(super) fn compare_gate<B: Backend>(
    suite: &Suite<'_, B>,
    x: &[f32],
    rows: usize,
    weight: &Matrix,
    bias: &[f32],
    shape: &GateShape,
) {
    let ids = vec![0; rows];
    let got = choose(suite.backend, x, &ids, weight, bias, shape).unwrap();
    let expected = choose(&suite.reference, x, &ids, weight, bias, shape).unwrap();
    assert_eq!(got.0.len(), rows * shape.top_k, "chosen experts");
    got.0.chunks(shape.top_k).for_each(|row| assert!(row.is_sorted_by(|a, b| a < b), "{row:?} ascends"));
    // Between classes, a row may fall on the other side of a tie; the rows that agree are compared.
    let rows_of = |chosen: &[u16]| chosen.chunks(shape.top_k).map(<[u16]>::to_vec).collect::<Vec<_>>();
    let same: Vec<bool> =
        rows_of(&got.0).iter().zip(rows_of(&expected.0)).map(|(got, expected)| *got == expected).collect();
    let differing = same.iter().filter(|same| !**same).count();
    match suite.tolerance {
        Tolerance::Bits => assert_eq!(got.0, expected.0, "chosen experts"),
        Tolerance::Distance(_) => {
            assert!(differing <= 1 + rows / 20, "{differing} of {rows} rows differ")
        }
    }
    let weights_of = |weights: &[f32]| -> Vec<f32> {
        let rows = weights.chunks(shape.top_k).zip(&same).filter(|(_, same)| **same);
        rows.flat_map(|(row, _)| row.to_vec()).collect()
    };
    suite.compare("gate weights", &weights_of(&got.1), &weights_of(&expected.1), shape.top_k);
}

/// A NaN is refused with its place when the choice is asked for, and the next gate is none the worse.
pub(super) fn nan_gate<B: Backend>(suite: &Suite<'_, B>) {
    let stream = &mut Stream::new(3);
    let k = 32usize.next_multiple_of(suite.granule);
    for scoring in [Scoring::Sigmoid, Scoring::Softmax] {
        let shape = GateShape {
            scoring,
            group_score: GroupScore::TwoLargest,
            experts: 24,
            n_group: 4,
            topk_group: 2,
            top_k: 4,
            norm_topk_prob: true,
            routed_scaling_factor: 1.0,
        };
        let weight = Matrix::new(stream, Dtype::Bf16, 24, k);
        let mut x = vec![0.5; 3 * k];
        x[k + 2] = f32::NAN;
        let run = |x: &[f32], ids: &[u32]| choose(suite.backend, x, ids, &weight, &[0.0; 24], &shape);
        assert_eq!(run(&x, &[0; 3]), Err(OpsError::NanGate { row: 1, expert: 0 }));
        assert!(run(&x[..k], &[0]).is_ok(), "rows before it are fine by themselves");
    }
}

/// Rows in the dispatch format of the class.
pub(super) fn encoded<B: Backend>(
    backend: &B,
    x: &[f32],
    rows: usize,
    cols: usize,
    scales: ScaleFormat,
) -> EncodedRows {
    let queue = &mut backend.queue().unwrap();
    let x = activations(backend, x, cols, 1);
    let mut sent = backend.alloc_rows(rows, cols).unwrap();
    backend.encode(queue, &x, rows, scales, &mut sent).unwrap();
    let format = RowFormat::dispatch(backend.class());
    let mut memory = backend.staging(RowLayout::of(format, rows, cols).bytes).unwrap();
    backend.download_rows(queue, &sent, rows, &mut memory, 0).unwrap();
    backend.synchronize(queue).unwrap();
    EncodedRows::in_memory(memory, format, rows, cols)
}

/// The quantiser is exact in every class: what shards receive is a function of the row.
pub(super) fn encode<B: Backend>(suite: &Suite<'_, B>) {
    suite.each("encode", |stream, rows| {
        let cols = suite.width(stream, 400);
        let x = stream.values(rows * cols);
        let scales = [ScaleFormat::F32, ScaleFormat::Ue8m0][stream.below(2)];
        let got = encoded(suite.backend, &x, rows, cols, scales);
        assert_eq!(got, encoded(&suite.reference, &x, rows, cols, scales));
    });
}

/// Experts of one shape, of element types of their own.
pub(super) struct Experts {
    pub(super) hidden: usize,
    pub(super) matrices: Vec<[Matrix; 3]>,
}

impl Experts {
    pub(super) fn new(stream: &mut Stream, count: usize, hidden: usize, inner: usize) -> Self {
        Self::of(stream, count, hidden, inner, None)
    }

    /// As [`Self::new`], all of one element type if it is given.
    pub(super) fn of(
        stream: &mut Stream,
        count: usize,
        hidden: usize,
        inner: usize,
        dtype: Option<Dtype>,
    ) -> Self {
        let expert = |_| {
            let mut drawn = || dtype.unwrap_or_else(|| Dtype::any(stream));
            let (up, down) = (drawn(), drawn());
            [
                Matrix::new(stream, up, inner, hidden),
                Matrix::new(stream, up, inner, hidden),
                Matrix::new(stream, down, hidden, inner),
            ]
        };
        Self { hidden, matrices: (0..count).map(expert).collect() }
    }

    pub(super) fn table<B: Backend>(&self, backend: &B) -> B::ExpertTable {
        let load =
            |m: &[Matrix; 3]| Arc::new(backend.load_ffn(m[0].host(), m[1].host(), m[2].host()).unwrap());
        backend.expert_table(self.matrices.iter().map(load).collect()).unwrap()
    }

    /// Uploads the rows and takes the pairs of a pass through the experts.
    pub(super) fn run<B: Backend>(
        &self,
        backend: &B,
        table: &B::ExpertTable,
        rows: &EncodedRows,
        pass: &PassRows<'_>,
    ) -> Vec<f32> {
        let queue = &mut backend.queue().unwrap();
        let pairs = pass.input.len();
        let mut received = backend.alloc_rows(rows.rows + 1, self.hidden).unwrap();
        backend.upload_rows(queue, rows, 0, &mut received).unwrap();
        let mut on_device = backend.alloc_pass(PassLimits { rows: rows.rows + 1, pairs: pairs + 1 }).unwrap();
        backend.begin_pass(queue, pass, &mut on_device).unwrap();
        let mut y = backend.alloc_activations(pairs + 1, self.hidden).unwrap();
        backend.grouped_ffn(queue, &on_device, table, &received, &mut y).unwrap();
        read(backend, queue, &y, pairs + 1)
    }
}

pub(super) fn grouped<B: Backend>(suite: &Suite<'_, B>) {
    suite.each("grouped_ffn", |stream, rows| {
        let (hidden, inner) = (suite.width(stream, 150), suite.width(stream, 300));
        let experts = Experts::new(stream, 3, hidden, inner);
        // Groups in any order of experts, some of them empty, one expert perhaps twice.
        let mut groups = Vec::new();
        let mut pairs = 0;
        while rows > 0 && groups.len() < 5 {
            let count = stream.below(2 * rows.min(40));
            groups.push(RowGroup { expert: stream.below(3), rows: count });
            pairs += count;
        }
        let input: Vec<u32> = (0..pairs).map(|_| stream.below(rows) as u32).collect();
        let mut output: Vec<u32> = (0..pairs as u32).collect();
        (1..pairs).for_each(|i| output.swap(i, stream.below(i + 1)));
        let pass = PassRows { input: &input, output: &output, groups: &groups };
        let x = encoded(&suite.reference, &stream.values(rows * hidden), rows, hidden, ScaleFormat::F32);
        let got = experts.run(suite.backend, &experts.table(suite.backend), &x, &pass);
        let expected = experts.run(&suite.reference, &experts.table(&suite.reference), &x, &pass);
        suite.compare("grouped_ffn", &got, &expected, hidden);
    });
}

/// Experts that a kernel may take in whole blocks, with as many rows as it has room for and one more: the same pairs
/// in a pass of few rows an expert and in one of many have the same bits, and both are near the reference.
pub(super) fn whole_blocks<B: Backend>(suite: &Suite<'_, B>) {
    for (case, dtype) in [Dtype::E4m3, Dtype::E4m3Powers].into_iter().enumerate() {
        let stream = &mut Stream::new(51 + case as u64);
        let (hidden, inner) = ([256, 512][case], [384, 128][case]);
        let experts = Experts::of(stream, 5, hidden, inner, Some(dtype));
        let rows = 90;
        let x = encoded(&suite.reference, &stream.values(rows * hidden), rows, hidden, ScaleFormat::F32);
        let (on_device, on_host) = (experts.table(suite.backend), experts.table(&suite.reference));
        // Pairs of each expert; the last has few at first, then more than any block takes.
        let pass = |last: usize| {
            let counts = [1, 0, 31, 33, last];
            let pairs: usize = counts.iter().sum();
            let input: Vec<u32> = (0..pairs).map(|pair| (pair * 7 % rows) as u32).collect();
            let mut output: Vec<u32> = (0..pairs as u32).collect();
            output[..65].reverse();
            let groups: Vec<RowGroup> =
                counts.iter().enumerate().map(|(expert, rows)| RowGroup { expert, rows: *rows }).collect();
            (input, output, groups)
        };
        let run = |last: usize| {
            let (input, output, groups) = pass(last);
            experts.run(
                suite.backend,
                &on_device,
                &x,
                &PassRows { input: &input, output: &output, groups: &groups },
            )
        };
        let few = run(64);
        for last in [0, 1, 8, 63, 65, 200] {
            let common = (65 + last.min(64)) * hidden;
            same_bits(
                &format!("beside an expert of {last} rows"),
                &run(last)[..common],
                &few[..common],
                hidden,
            );
        }
        let (input, output, groups) = pass(64);
        let pass = PassRows { input: &input, output: &output, groups: &groups };
        let expected = experts.run(&suite.reference, &on_host, &x, &pass);
        suite.compare("grouped_ffn", &few, &expected, hidden);
    }
}

struct Combine {
    x: Vec<f32>,
    shared: Option<Vec<f32>>,
    cols: usize,
    rows: usize,
    top_k: usize,
    weights: Vec<f32>,
    experts: ExpertRows,
}

impl Combine {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let queue = &mut backend.queue().unwrap();
        let mut x = residual(backend, &self.x, self.cols, 1);
        let shared = self.shared.as_ref().map(|shared| activations(backend, shared, self.cols, 1));
        let mut routing = backend.alloc_routing(self.rows + 1, self.top_k).unwrap();
        let ids: Vec<u16> = (0..self.rows * self.top_k).map(|i| (i % self.top_k) as u16).collect();
        backend.write_routing(queue, &ids, &self.weights, &mut routing).unwrap();
        backend.combine(queue, &self.experts, &routing, shared.as_ref(), &mut x).unwrap();
        read_residual(backend, queue, &x, self.rows + 1)
    }
}

pub(super) fn combine<B: Backend>(suite: &Suite<'_, B>) {
    suite.each("combine", |stream, rows| {
        let (cols, top_k) = (suite.width(stream, 200), 1 + stream.below(8));
        let (format, pairs) = (RowFormat::combine(suite.backend.class()), rows * top_k);
        // Answers of several shards: pairs in any order, payloads of any alignment, some empty.
        let mut order: Vec<u32> = (0..pairs as u32).collect();
        (1..pairs).for_each(|i| order.swap(i, stream.below(i + 1)));
        let mut chunks = Vec::new();
        let mut rest = &order[..];
        while !rest.is_empty() {
            let (targets, others) = rest.split_at(stream.below(rest.len() + 1));
            let values = stream.values(targets.len() * cols);
            let bytes: Vec<u8> = match format {
                RowFormat::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                _ => values.iter().flat_map(|v| cadre_numerics::bf16::encode(*v).to_le_bytes()).collect(),
            };
            chunks.push(ExpertChunk { rows: unaligned(&bytes), targets: targets.to_vec() });
            rest = others;
        }
        let case = Combine {
            x: stream.values(rows * cols),
            shared: stream.coin().then(|| stream.values(rows * cols)),
            cols,
            rows,
            top_k,
            weights: stream.values(pairs),
            experts: ExpertRows { format, pairs, hidden: cols, chunks },
        };
        same_bits("combine", &case.run(suite.backend), &case.run(&suite.reference), cols);
    });
}
