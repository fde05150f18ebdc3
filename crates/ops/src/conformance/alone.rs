//! What is computed per row beside products and attention: a row alone equals the row among 128, bit for bit, in every class.

use bytes::Bytes;
use cadre_sampler::History;
use cadre_types::{SamplingParams, config::ScaleFormat};

use super::{
    Suite, Widths,
    attention::{Case, rows_of, segment_of},
    data::{Dtype, Matrix, Stream, activations, attending, read, read_residual, residual, step_of},
    experts, same_bits,
};
use crate::{
    backend::Backend,
    exchange::{ExpertChunk, ExpertRows},
    host::RowFormat,
    shape::{GateShape, GroupScore, Scoring},
    step::{AttentionForm, SampleRow},
};

/// A decode batch.
const ROWS: usize = 128;

/// Runs 128 rows at once and each by itself; `run` takes a range of rows and appends what came out.
fn alike(what: &str, cols: usize, run: impl Fn(std::ops::Range<usize>) -> Vec<f32>) {
    let all = run(0..ROWS);
    assert_eq!(all.len(), ROWS * cols, "{what}: length");
    for row in 0..ROWS {
        same_bits(
            &format!("{what}, row {row}"),
            &run(row..row + 1),
            &all[row * cols..(row + 1) * cols],
            cols,
        );
    }
}

/// Embedding, norms, sums, the dispatch format.
pub(super) fn rows<B: Backend>(suite: &Suite<'_, B>) {
    let cols = 300_usize.next_multiple_of(suite.granule);
    let stream = &mut Stream::new(41);
    let table = Matrix::new(stream, Dtype::Bf16, 90, cols);
    let ids: Vec<u32> = (0..ROWS).map(|_| stream.below(90) as u32).collect();
    let (x, delta, weight) = (stream.values(ROWS * cols), stream.values(ROWS * cols), stream.values(cols));
    let backend = suite.backend;
    let (loaded, norm) = (backend.load_matrix(table.host()).unwrap(), backend.load_vector(&weight).unwrap());
    let part =
        |values: &[f32], rows: &std::ops::Range<usize>| values[rows.start * cols..rows.end * cols].to_vec();
    alike("embed", cols, |rows| {
        let queue = &mut backend.queue().unwrap();
        let step = step_of(backend, queue, &ids[rows.clone()], &[]);
        let mut y = backend.alloc_residual(rows.len(), cols).unwrap();
        backend.embed(queue, &step, &loaded, &mut y).unwrap();
        read_residual(backend, queue, &y, rows.len())
    });
    alike("rms_norm", cols, |rows| {
        let queue = &mut backend.queue().unwrap();
        let x = activations(backend, &part(&x, &rows), cols, 0);
        let mut y = backend.alloc_activations(rows.len(), cols).unwrap();
        backend.rms_norm(queue, &x, &norm, 1e-6, rows.len(), &mut y).unwrap();
        read(backend, queue, &y, rows.len())
    });
    alike("add_rms_norm", cols, |rows| {
        let queue = &mut backend.queue().unwrap();
        let mut x = residual(backend, &part(&x, &rows), cols, 0);
        let delta = activations(backend, &part(&delta, &rows), cols, 0);
        let mut y = backend.alloc_activations(rows.len(), cols).unwrap();
        backend.add_rms_norm(queue, &mut x, &delta, &norm, 1e-6, rows.len(), &mut y).unwrap();
        read(backend, queue, &y, rows.len())
    });
    for scales in [ScaleFormat::F32, ScaleFormat::Ue8m0] {
        let all = experts::encoded(backend, &x, ROWS, cols, scales);
        let (data, scale) = (all.data.len() / ROWS, all.scales.len() / ROWS);
        for row in 0..ROWS {
            let one = experts::encoded(backend, &part(&x, &(row..row + 1)), 1, cols, scales);
            assert_eq!(one.data, all.data.slice(row * data..(row + 1) * data), "encode, row {row}");
            assert_eq!(one.scales, all.scales.slice(row * scale..(row + 1) * scale), "encode, row {row}");
        }
    }
}

/// The gate and the sum of what comes back.
pub(super) fn routed<B: Backend>(suite: &Suite<'_, B>) {
    let cols = 300_usize.next_multiple_of(suite.granule);
    let shape = GateShape {
        scoring: Scoring::Sigmoid,
        group_score: GroupScore::TwoLargest,
        experts: 64,
        n_group: 8,
        topk_group: 4,
        top_k: 6,
        norm_topk_prob: true,
        routed_scaling_factor: 2.5,
    };
    let top_k = shape.top_k;
    let stream = &mut Stream::new(42);
    let (x, bias) = (stream.values(ROWS * cols), stream.values(shape.experts));
    let backend = suite.backend;
    for dtype in [Dtype::Bf16, Dtype::E4m3, Dtype::F32] {
        let weight = Matrix::new(stream, dtype, shape.experts, cols);
        alike(&format!("gate, {dtype:?}"), 2 * top_k, |rows| {
            let ids = vec![0; rows.len()];
            let x = &x[rows.start * cols..rows.end * cols];
            let (chosen, weights) = experts::choose(backend, x, &ids, &weight, &bias, &shape).unwrap();
            let chosen =
                chosen.chunks(top_k).map(|row| row.iter().map(|id| f32::from(*id)).collect::<Vec<_>>());
            chosen
                .zip(weights.chunks(top_k))
                .flat_map(|(mut row, weights)| {
                    row.extend_from_slice(weights);
                    row
                })
                .collect()
        });
    }
    let format = RowFormat::combine(backend.class());
    let width = format.row_bytes(cols);
    let values = stream.values(ROWS * top_k * cols);
    let bytes: Vec<u8> = match format {
        RowFormat::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| cadre_numerics::bf16::encode(*v).to_le_bytes()).collect(),
    };
    let (weights, shared) = (stream.values(ROWS * top_k), stream.values(ROWS * cols));
    alike("combine", cols, |rows| {
        let queue = &mut backend.queue().unwrap();
        let mut x = residual(backend, &x[rows.start * cols..rows.end * cols], cols, 0);
        let shared = activations(backend, &shared[rows.start * cols..rows.end * cols], cols, 0);
        let mut routing = backend.alloc_routing(rows.len(), top_k).unwrap();
        let ids: Vec<u16> = (0..rows.len() * top_k).map(|i| (i % top_k) as u16).collect();
        let pairs = rows.start * top_k..rows.end * top_k;
        backend.write_routing(queue, &ids, &weights[pairs.clone()], &mut routing).unwrap();
        let chunk = ExpertChunk {
            rows: Bytes::copy_from_slice(&bytes[pairs.start * width..pairs.end * width]),
            targets: (0..pairs.len() as u32).collect(),
        };
        let experts = ExpertRows { format, pairs: pairs.len(), hidden: cols, chunks: vec![chunk] };
        backend.combine(queue, &experts, &routing, Some(&shared), &mut x).unwrap();
        read_residual(backend, queue, &x, rows.len())
    });
}

/// Cached rows and rotated queries, appended at once and one by one.
pub(super) fn cached<B: Backend>(suite: &Suite<'_, B>) {
    let small = Widths { heads: 3, nope: 24, rope: 8, v: 20, kv_lora: 72 };
    let widths = suite.attention.first().unwrap_or(&small);
    let case = Case::new(43, Dtype::Bf16, widths, &[(0, ROWS)], 2.0);
    let sequence = &case.sequences[0];
    let backend = suite.backend;
    let queue = &mut backend.queue().unwrap();
    let (attention, together) = case.fill(backend, 1);
    let norm = backend.load_vector(&case.norm).unwrap();
    let mut apart = backend.kv_cache(case.layout).unwrap();
    let (width, query) = (widths.kv_lora + widths.rope, widths.heads * (widths.nope + widths.rope));
    let rotated = |rows: std::ops::Range<usize>| {
        let queue = &mut backend.queue().unwrap();
        let mut segment = segment_of(sequence, AttentionForm::Absorbed);
        (segment.first_position, segment.rows) = (rows.start as u32, rows.len());
        let step = attending(backend, queue, &[segment]);
        let mut q = activations(backend, &sequence.q[rows.start * query..rows.end * query], query, 0);
        backend.rope_query(queue, &step, &attention, &mut q).unwrap();
        read(backend, queue, &q, rows.len())
    };
    alike("rope_query", query, rotated);
    for row in 0..ROWS {
        let mut segment = segment_of(sequence, AttentionForm::Absorbed);
        (segment.first_position, segment.rows) = (row as u32, 1);
        let step = attending(backend, queue, &[segment]);
        let kv_a = activations(backend, &sequence.kv_a[row * width..(row + 1) * width], width, 0);
        backend.kv_append(queue, &step, &attention, &kv_a, &norm, 1e-6, 1, &mut apart).unwrap();
    }
    backend.synchronize(queue).unwrap();
    let rows = |cache| rows_of(backend, (cache, &case.layout), 1, &sequence.table, 0, ROWS);
    assert_eq!(rows(&apart), rows(&together), "kv_append");
}

/// Tokens drawn alone and among others.
pub(super) fn tokens<B: Backend>(suite: &Suite<'_, B>) {
    let vocab = 1000;
    let stream = &mut Stream::new(44);
    let logits = stream.values(ROWS * vocab);
    let params: Vec<SamplingParams> = (0..ROWS)
        .map(|row| SamplingParams {
            temperature: [0.0, 0.7, 1.0][row % 3],
            seed: stream.bits(),
            logprobs: (row % 5 == 0).then_some(3),
            ..SamplingParams::default()
        })
        .collect();
    let backend = suite.backend;
    let draw = |rows: std::ops::Range<usize>| {
        let queue = &mut backend.queue().unwrap();
        let mut on_device = backend.alloc_logits(rows.len(), vocab).unwrap();
        backend.write_logits(queue, &logits[rows.start * vocab..rows.end * vocab], &mut on_device).unwrap();
        let asked: Vec<SampleRow<'_>> = rows
            .clone()
            .map(|row| SampleRow {
                row: row - rows.start,
                params: &params[row],
                history: History { prompt: &[], output: &[], banned: &[] },
                position: row as u32,
            })
            .collect();
        let samples = backend.sample(queue, &mut on_device, &asked).unwrap();
        backend.samples(queue, &mut on_device, samples).unwrap()
    };
    let all = draw(0..ROWS);
    assert_eq!(all.len(), ROWS);
    for (row, among) in all.iter().enumerate() {
        assert_eq!(draw(row..row + 1)[0], *among, "sample, row {row}");
    }
}
