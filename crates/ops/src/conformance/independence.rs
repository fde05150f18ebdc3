//! What results may not depend on: the rest of the batch, chunks, company, places of pages. Exact in every
//! class.

use cadre_types::{PageId, config::ScaleFormat};

use super::{
    Suite, Widths,
    attention::{Case, segment_of},
    data::{Dtype, Matrix, Stream, activations, read, residual},
    experts::Experts,
    same_bits,
};
use crate::{
    backend::Backend,
    host::{EncodedRows, RowFormat, RowLayout},
    step::{AttentionForm, PassRows, RowGroup, StepSegment},
};

/// Batches of which each row has to be what it is alone: around register tiles, tiles of 32 and of 64, and the
/// 128 rows of a decode batch.
const BATCHES: [usize; 9] = [2, 3, 7, 8, 20, 31, 33, 65, 128];

/// Products, norms and feed-forward: a row alone equals the row in a batch.
pub(super) fn dense_rows<B: Backend>(suite: &Suite<'_, B>) {
    let granules = |width: usize| width.next_multiple_of(suite.granule);
    let (n, k, inner) = (granules(72), granules(300), granules(140));
    let most = BATCHES[BATCHES.len() - 1];
    for dtype in Dtype::ALL {
        let stream = &mut Stream::new(11);
        let weight = Matrix::new(stream, dtype, n, k);
        let block =
            [(inner, k), (inner, k), (k, inner)].map(|(rows, cols)| Matrix::new(stream, dtype, rows, cols));
        let x = stream.values(most * k);
        let backend = suite.backend;
        let queue = &mut backend.queue().unwrap();
        let loaded = backend.load_matrix(weight.host()).unwrap();
        let ffn = backend.load_ffn(block[0].host(), block[1].host(), block[2].host()).unwrap();
        let norm = backend.load_vector(&vec![1.5; k]).unwrap();
        let mut run = |rows: &[f32]| -> [Vec<f32>; 4] {
            let count = rows.len() / k;
            let (x, stream) = (activations(backend, rows, k, 0), residual(backend, rows, k, 0));
            let mut y = backend.alloc_activations(count, n).unwrap();
            backend.linear(queue, &x, &loaded, count, &mut y).unwrap();
            let mut z = backend.alloc_activations(count, k).unwrap();
            backend.ffn(queue, &x, &ffn, count, &mut z).unwrap();
            let mut normed = backend.alloc_activations(count, k).unwrap();
            backend.rms_norm_residual(queue, &stream, &norm, 1e-6, count, &mut normed).unwrap();
            let mut logits = backend.alloc_logits(count, n).unwrap();
            backend.logits(queue, &x, &loaded, count, &mut logits).unwrap();
            let mut out = Vec::new();
            backend.read_logits(queue, &logits, 0..count, &mut out).unwrap();
            let mut read = |y| read(backend, queue, y, count);
            [read(&y), read(&z), read(&normed), out]
        };
        let alone: Vec<[Vec<f32>; 4]> = x.chunks(k).map(&mut run).collect();
        for rows in BATCHES {
            let batch = run(&x[..rows * k]);
            for (i, what) in ["linear", "ffn", "norm", "logits"].into_iter().enumerate() {
                let alone: Vec<f32> = alone[..rows].iter().flat_map(|row| row[i].iter().copied()).collect();
                same_bits(&format!("{what}, {dtype:?}, {rows} rows"), &batch[i], &alone, alone.len() / rows);
            }
        }
    }
}

/// An expert's row does not depend on which other rows and experts share the pass, nor on where it lies.
pub(super) fn expert_rows<B: Backend>(suite: &Suite<'_, B>) {
    let granules = |width: usize| width.next_multiple_of(suite.granule);
    expert_rows_of(suite, granules(96), granules(200), None);
    // What kernels of whole blocks take.
    expert_rows_of(suite, 256, 128, Some(Dtype::E4m3));
}

fn expert_rows_of<B: Backend>(suite: &Suite<'_, B>, hidden: usize, inner: usize, dtype: Option<Dtype>) {
    let stream = &mut Stream::new(12);
    let experts = Experts::of(stream, 2, hidden, inner, dtype);
    let backend = suite.backend;
    let table = experts.table(backend);
    let rows = 150;
    let x = activations(backend, &stream.values(rows * hidden), hidden, 0);
    let queue = &mut backend.queue().unwrap();
    let mut sent = backend.alloc_rows(rows, hidden).unwrap();
    backend.encode(queue, &x, rows, ScaleFormat::F32, &mut sent).unwrap();
    let format = RowFormat::dispatch(backend.class());
    let mut memory = backend.staging(RowLayout::of(format, rows, hidden).bytes).unwrap();
    backend.download_rows(queue, &sent, rows, &mut memory, 0).unwrap();
    backend.synchronize(queue).unwrap();
    let x = EncodedRows::in_memory(memory, format, rows, hidden);
    let alone = |row: usize, expert: usize| {
        let (data, scales) = (format.row_bytes(hidden), 4 * format.row_scales(hidden));
        let one = EncodedRows {
            rows: 1,
            data: x.data.slice(row * data..(row + 1) * data),
            scales: x.scales.slice(row * scales..(row + 1) * scales),
            ..x.clone()
        };
        let groups = [RowGroup { expert, rows: 1 }];
        let pass = PassRows { input: &[0], output: &[0], groups: &groups };
        experts.run(backend, &table, &one, &pass)[..hidden].to_vec()
    };
    let alone: Vec<[Vec<f32>; 2]> = (0..rows).map(|row| [alone(row, 0), alone(row, 1)]).collect();
    for pairs in BATCHES {
        // Two experts, the second with more rows, some rows through both; results in reverse.
        let first = pairs / 3;
        let input: Vec<u32> = (0..pairs).map(|pair| ((pair * 7) % rows) as u32).collect();
        let output: Vec<u32> = (0..pairs as u32).rev().collect();
        let group = |expert, rows| RowGroup { expert, rows };
        let groups = [group(1, first), group(0, 0), group(0, pairs - first)];
        let pass = PassRows { input: &input, output: &output, groups: &groups };
        let got = experts.run(backend, &table, &x, &pass);
        for pair in 0..pairs {
            let expected = &alone[input[pair] as usize][usize::from(pair < first)];
            let at = output[pair] as usize * hidden;
            same_bits(&format!("pair {pair} of {pairs}"), &got[at..at + hidden], expected, hidden);
        }
    }
}

/// One chunk, chunks of odd sizes, and single rows give the same bits in naive form.
pub(super) fn chunks<B: Backend>(suite: &Suite<'_, B>) {
    let small = Widths { heads: 3, nope: 24, rope: 8, v: 20, kv_lora: 72 };
    let widths = suite.attention.first().unwrap_or(&small);
    let rows = 150;
    let case = Case::new(13, Dtype::E4m3, widths, &[(0, rows)], 2.0);
    let sequence = &case.sequences[0];
    let (query, cols) = (widths.heads * (widths.nope + widths.rope), widths.heads * widths.v);
    let filled = case.fill(suite.backend, 0);
    let run = |chunks: &[usize]| {
        let (mut out, mut first) = (Vec::new(), 0);
        for chunk in chunks {
            let segment = StepSegment {
                form: AttentionForm::Naive,
                rows: *chunk,
                first_position: first as u32,
                block_table: &sequence.table,
            };
            let q = &sequence.q[first * query..(first + chunk) * query];
            out.extend_from_slice(&case.attend(suite.backend, &filled, 0, q, &[segment])[..chunk * cols]);
            first += chunk;
        }
        assert_eq!(first, rows);
        out
    };
    let whole = run(&[rows]);
    same_bits("odd chunks", &run(&[1, 63, 64, 7, 15]), &whole, cols);
    same_bits("single rows", &run(&vec![1; rows]), &whole, cols);
}

/// A generated row alone equals the row beside others, beside chunks of prompts, in another order, and when
/// other pages hold the same sequence.
pub(super) fn company<B: Backend>(suite: &Suite<'_, B>) {
    let small = Widths { heads: 5, nope: 16, rope: 16, v: 16, kv_lora: 48 };
    let widths = suite.attention.first().unwrap_or(&small);
    let mut case = Case::new(14, Dtype::Bf16, widths, &[(130, 1), (64, 1), (3, 1), (200, 2), (10, 40)], 2.0);
    let cols = widths.heads * widths.v;
    let run = |case: &Case, picked: &[usize]| -> Vec<Vec<f32>> {
        let filled = case.fill(suite.backend, 1);
        let form = |i| if i == 4 { AttentionForm::Naive } else { AttentionForm::Absorbed };
        let segments: Vec<StepSegment<'_>> =
            picked.iter().map(|&i| segment_of(&case.sequences[i], form(i))).collect();
        let q: Vec<f32> = picked.iter().flat_map(|&i| case.sequences[i].q.iter().copied()).collect();
        let out = case.attend(suite.backend, &filled, 1, &q, &segments);
        let mut at = 0;
        let mut by_sequence = vec![Vec::new(); case.sequences.len()];
        for &i in picked {
            let len = case.sequences[i].rows * cols;
            by_sequence[i] = out[at..at + len].to_vec();
            at += len;
        }
        by_sequence
    };
    let all = run(&case, &[0, 1, 2, 3, 4]);
    let reordered = run(&case, &[4, 2, 0, 3, 1]);
    for i in 0..case.sequences.len() {
        same_bits("alone", &run(&case, &[i])[i], &all[i], cols);
        same_bits("in another order", &reordered[i], &all[i], cols);
    }
    let last = case.layout.pages as u32 - 1;
    for sequence in &mut case.sequences {
        sequence.table.iter_mut().for_each(|page| *page = PageId(last - page.0));
    }
    for (mirrored, all) in run(&case, &[0, 1, 2, 3, 4]).iter().zip(&all) {
        same_bits("on other pages", mirrored, all, cols);
    }
}
