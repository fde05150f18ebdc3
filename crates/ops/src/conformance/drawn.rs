//! Weights that the device draws: the bits of the reference's draws, in every class.

use cadre_numerics::{
    draw::{Draw, SUM_MAX, Stream as Draws},
    e4m3, quant,
};
use cadre_types::config::ScaleFormat;

use super::{
    Suite, Widths,
    attention::Case,
    data::{Dtype, Stream, activations, read},
    same_bits,
};
use crate::{
    backend::{Backend, Ffn},
    drawn::{DrawnElements, DrawnMatrix},
    step::AttentionForm,
};

/// Draws of one matrix, and its scales.
struct Drawn {
    rows: usize,
    cols: usize,
    draw: Draw,
    dtype: Dtype,
    scales: Vec<f32>,
}

impl Drawn {
    fn new(stream: &mut Stream, dtype: Dtype, rows: usize, cols: usize) -> Self {
        let name = format!("matrix {}", stream.bits());
        let draws = Draws::new(stream.bits(), &name);
        let draw = match dtype {
            Dtype::F32 | Dtype::Bf16 => Draw::normal(draws, (cols as f64).recip().sqrt()),
            // All codes up to the largest, and a few that saturate.
            Dtype::E4m3 | Dtype::E4m3Powers => Draw { stream: draws, factor: 1.25 * e4m3::MAX / SUM_MAX },
        };
        let blocks = quant::blocks(rows) * quant::blocks(cols);
        let scales = (0..blocks).map(|_| 2e-4 + stream.value().abs() * 1e-4).collect();
        Self { rows, cols, draw, dtype, scales }
    }

    fn matrix(&self) -> DrawnMatrix<'_> {
        let e4m3 = |input_scales| DrawnElements::E4m3 { scales: &self.scales, input_scales };
        let elements = match self.dtype {
            Dtype::F32 => DrawnElements::F32,
            Dtype::Bf16 => DrawnElements::Bf16,
            Dtype::E4m3 => e4m3(ScaleFormat::F32),
            Dtype::E4m3Powers => e4m3(ScaleFormat::Ue8m0),
        };
        DrawnMatrix { rows: self.rows, cols: self.cols, draw: self.draw, elements }
    }

    fn bytes(&self) -> Vec<u8> {
        self.matrix().bytes("test").unwrap()
    }
}

fn products<B: Backend>(backend: &B, weight: &B::Weight, x: &[f32], cols: usize, out: usize) -> Vec<f32> {
    let queue = &mut backend.queue().unwrap();
    let rows = x.len() / cols;
    let x = activations(backend, x, cols, 0);
    let mut y = backend.alloc_activations(rows, out).unwrap();
    backend.linear(queue, &x, weight, rows, &mut y).unwrap();
    read(backend, queue, &y, rows)
}

fn block<B: Backend>(backend: &B, ffn: &Ffn<B::Weight>, x: &[f32], hidden: usize) -> Vec<f32> {
    let queue = &mut backend.queue().unwrap();
    let rows = x.len() / hidden;
    let x = activations(backend, x, hidden, 0);
    let mut y = backend.alloc_activations(rows, hidden).unwrap();
    backend.ffn(queue, &x, ffn, rows, &mut y).unwrap();
    read(backend, queue, &y, rows)
}

/// What is drawn computes as what is loaded does, bit for bit, whatever the class.
pub(super) fn weights<B: Backend>(suite: &Suite<'_, B>) {
    let backend = suite.backend;
    suite.each("drawn weights", |stream, rows| {
        let rows = 1 + rows % 8;
        let (n, k) = (suite.width(stream, 300), suite.width(stream, 400));
        let dtype = Dtype::any(stream);
        let drawn = Drawn::new(stream, dtype, n, k);
        let x = stream.values(rows * k);
        let [got, expected] = [
            backend.draw_matrix(&drawn.matrix()).unwrap(),
            backend.load_matrix(drawn.matrix().host(&drawn.bytes())).unwrap(),
        ]
        .map(|weight| products(backend, &weight, &x, k, n));
        same_bits("drawn matrix", &got, &expected, n);

        let down = Drawn::new(stream, dtype, k, n);
        let up = Drawn::new(stream, dtype, n, k);
        let bytes = [&drawn, &up, &down].map(Drawn::bytes);
        let views = [drawn.matrix(), up.matrix(), down.matrix()];
        let [got, expected] = [
            backend.draw_ffn(&views[0], &views[1], &views[2]).unwrap(),
            backend
                .load_ffn(views[0].host(&bytes[0]), views[1].host(&bytes[1]), views[2].host(&bytes[2]))
                .unwrap(),
        ]
        .map(|ffn| block(backend, &ffn, &x, k));
        same_bits("drawn block", &got, &expected, k);
    });
    let widths = suite.attention.first().copied().unwrap_or(Widths {
        heads: 3,
        nope: 20,
        rope: 8,
        v: 24,
        kv_lora: 36,
    });
    for (seed, dtype) in Dtype::ALL.into_iter().enumerate() {
        let case = Case::new(suite.seed + seed as u64, dtype, &widths, &[(70, 1), (0, 3)], 2.0);
        let stream = &mut Stream::new(suite.seed + seed as u64);
        let drawn = Drawn::new(stream, dtype, widths.heads * (widths.nope + widths.v), widths.kv_lora);
        let filled = case.fill(backend, 1);
        let [got, expected] = [
            backend.draw_kv_up(&case.shape, &drawn.matrix()).unwrap(),
            backend.load_kv_up(&case.shape, drawn.matrix().host(&drawn.bytes())).unwrap(),
        ]
        .map(|kv_up| {
            [AttentionForm::Naive, AttentionForm::Absorbed]
                .map(|form| case.attend_with(backend, &filled, &kv_up, 1, &case.q(), &case.segments(form)))
                .concat()
        });
        same_bits("attention with a drawn kv_b", &got, &expected, widths.heads * widths.v);
    }
}
