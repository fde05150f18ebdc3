//! Embedding, products, norms, dense feed-forward.

use super::{
    Suite,
    data::{Dtype, Matrix, Stream, activations, read, read_residual, residual, step_of},
    same_bits,
};
use crate::backend::Backend;

pub(super) fn embed<B: Backend>(suite: &Suite<'_, B>) {
    suite.each("embed", |stream, rows| {
        let (n, k) = (1 + stream.below(150), suite.width(stream, 200));
        let table = Matrix::any(stream, n, k);
        let ids: Vec<u32> = (0..rows).map(|_| stream.below(n) as u32).collect();
        let values = table.values();
        let expected: Vec<f32> =
            ids.iter().flat_map(|id| &values[*id as usize * k..(*id as usize + 1) * k]).copied().collect();
        let backend = suite.backend;
        let queue = &mut backend.queue().unwrap();
        let loaded = backend.load_matrix(table.host()).unwrap();
        let step = step_of(backend, queue, &ids, &[]);
        let mut y = backend.alloc_residual(rows, k).unwrap();
        backend.embed(queue, &step, &loaded, &mut y).unwrap();
        same_bits("embed", &read_residual(backend, queue, &y, rows), &expected, k);
    });
}

/// `linear` with two rows to spare, then `logits`.
fn products<B: Backend>(backend: &B, x: &[f32], rows: usize, weight: &Matrix) -> (Vec<f32>, Vec<f32>) {
    let queue = &mut backend.queue().unwrap();
    let loaded = backend.load_matrix(weight.host()).unwrap();
    let x = activations(backend, x, weight.cols, 1);
    let mut y = backend.alloc_activations(rows + 2, weight.rows).unwrap();
    backend.linear(queue, &x, &loaded, rows, &mut y).unwrap();
    let mut logits = backend.alloc_logits(rows, weight.rows).unwrap();
    backend.logits(queue, &x, &loaded, rows, &mut logits).unwrap();
    let mut out = Vec::new();
    backend.read_logits(queue, &logits, 0..rows, &mut out).unwrap();
    // Rows that do not take part are left alone.
    (read(backend, queue, &y, rows + 2), out)
}

pub(super) fn compare_products<B: Backend>(suite: &Suite<'_, B>, x: &[f32], rows: usize, weight: &Matrix) {
    let got = products(suite.backend, x, rows, weight);
    let expected = products(&suite.reference, x, rows, weight);
    suite.compare("linear", &got.0, &expected.0, weight.rows);
    suite.compare("logits", &got.1, &expected.1, weight.rows);
}

pub(super) fn linear<B: Backend>(suite: &Suite<'_, B>) {
    suite.each("linear", |stream, rows| {
        let (n, k) = (suite.width(stream, 80), suite.width(stream, 400));
        let weight = Matrix::any(stream, n, k);
        compare_products(suite, &stream.values(rows * k), rows, &weight);
    });
}

/// Several rows of 128x128 blocks, and more outputs than one task takes.
pub(super) fn many_outputs<B: Backend>(suite: &Suite<'_, B>) {
    suite.each("linear with many outputs", |stream, rows| {
        let rows = rows.min(33);
        let n = suite.granule * (120 + stream.below(280)).div_ceil(suite.granule);
        let k = [128, 256, suite.width(stream, 300)][stream.below(3)];
        let weight = Matrix::any(stream, n, k);
        compare_products(suite, &stream.values(rows * k), rows, &weight);
    });
}

/// Inputs beyond what kernels can grow by a power of two, beside ordinary blocks and rows.
pub(super) fn huge_and_tiny<B: Backend>(suite: &Suite<'_, B>) {
    for dtype in Dtype::ALL {
        for rows in [1, 2, 5, 9] {
            let stream = &mut Stream::new(77);
            let granules = |width: usize| suite.granule * width.div_ceil(suite.granule);
            let (n, k) = (granules(70), granules(300));
            let weight = Matrix::new(stream, dtype, n, k);
            let mut x = stream.values(rows * k);
            for (i, x) in x.iter_mut().enumerate() {
                match (i / k % 2, i % k / 128) {
                    (0, 0) => *x *= 1e6,
                    (0, 1) => *x *= 1e-38,
                    (1, 2) => *x *= 1e25,
                    _ => {}
                }
            }
            x[0] = 32768.0;
            compare_products(suite, &x, rows, &weight);
        }
    }
}

/// Both norms, and the sum with the norm of it.
fn norms_of<B: Backend>(backend: &B, x: &[f32], delta: &[f32], weight: &[f32], rows: usize) -> [Vec<f32>; 4] {
    let (queue, cols) = (&mut backend.queue().unwrap(), weight.len());
    let weight = backend.load_vector(weight).unwrap();
    let mut stream = residual(backend, x, cols, 1);
    let (narrow, delta) = (activations(backend, x, cols, 1), activations(backend, delta, cols, 1));
    let out = || backend.alloc_activations(rows + 1, cols).unwrap();
    let (mut a, mut b, mut c) = (out(), out(), out());
    backend.rms_norm(queue, &narrow, &weight, 1e-6, rows, &mut a).unwrap();
    backend.rms_norm_residual(queue, &stream, &weight, 1e-6, rows, &mut b).unwrap();
    backend.add_rms_norm(queue, &mut stream, &delta, &weight, 1e-6, rows, &mut c).unwrap();
    let sum = read_residual(backend, queue, &stream, rows + 1);
    [a, b, c]
        .map(|y| read(backend, queue, &y, rows + 1))
        .into_iter()
        .chain([sum])
        .collect::<Vec<_>>()
        .try_into()
        .unwrap()
}

pub(super) fn norms<B: Backend>(suite: &Suite<'_, B>) {
    suite.each("norms", |stream, rows| {
        let cols = suite.width(stream, 300);
        let (x, delta) = (stream.values(rows * cols), stream.values(rows * cols));
        let weight = stream.values(cols);
        let got = norms_of(suite.backend, &x, &delta, &weight, rows);
        let expected = norms_of(&suite.reference, &x, &delta, &weight, rows);
        for (what, i) in [("rms_norm", 0), ("rms_norm_residual", 1), ("add_rms_norm", 2)] {
            suite.compare(what, &got[i], &expected[i], cols);
        }
        same_bits("add", &got[3], &expected[3], cols);
    });
}

pub(super) fn feed_forward<B: Backend>(suite: &Suite<'_, B>) {
    suite.each("ffn", |stream, rows| {
        let (hidden, inner) = (suite.width(stream, 150), suite.width(stream, 300));
        let dtype = Dtype::any(stream);
        let gate = Matrix::new(stream, dtype, inner, hidden);
        let up = Matrix::new(stream, dtype, inner, hidden);
        let down = Matrix::any(stream, hidden, inner);
        let x = stream.values(rows * hidden);
        let got = ffn(suite.backend, &x, rows, [&gate, &up, &down]);
        suite.compare("ffn", &got, &ffn(&suite.reference, &x, rows, [&gate, &up, &down]), hidden);
    });
}

fn ffn<B: Backend>(backend: &B, x: &[f32], rows: usize, [gate, up, down]: [&Matrix; 3]) -> Vec<f32> {
    let queue = &mut backend.queue().unwrap();
    let ffn = backend.load_ffn(gate.host(), up.host(), down.host()).unwrap();
    let x = activations(backend, x, gate.cols, 1);
    let mut y = backend.alloc_activations(rows + 1, down.rows).unwrap();
    backend.ffn(queue, &x, &ffn, rows, &mut y).unwrap();
    read(backend, queue, &y, rows + 1)
}
