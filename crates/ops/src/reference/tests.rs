#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! The reference against formulas in F64, and its two forms of attention against each other.

use super::*;
use crate::{
    conformance::{self, Suite, Tolerance},
    host::{MatrixData, RowLayout},
    step::{AttentionForm, RowGroup, StepSegment},
};

/// Deterministic values in [-1, 1).
fn values(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn upload(backend: &ReferenceBackend, x: &[f32], cols: usize) -> Buffer {
    let mut buffer = backend.alloc_activations(x.len() / cols, cols).unwrap();
    backend.write_activations(&mut Queue::default(), x, &mut buffer).unwrap();
    buffer
}

fn download(backend: &ReferenceBackend, buffer: &Buffer) -> Vec<f32> {
    let mut out = Vec::new();
    backend.read_activations(&mut Queue::default(), buffer, 0..buffer.dims.rows, &mut out).unwrap();
    out
}

fn e4m3<'a>(codes: &'a [u8], scales: &'a [f32]) -> MatrixData<'a> {
    MatrixData::E4m3 { codes, scales, block: MatrixData::BLOCK, input_scales: ScaleFormat::F32 }
}

fn codes(seed: u64, len: usize) -> Vec<u8> {
    values(seed, len).iter().map(|v| cadre_numerics::e4m3::encode(v * 3.0)).collect()
}

#[test]
fn linear_with_ragged_scales_agrees_with_f64() {
    let backend = ReferenceBackend::new(NumericsClass::F32);
    let (n, k) = (130, 150);
    let codes = codes(1, n * k);
    let scales = [0.5, 2.0, 0.25, 3.0];
    let data = e4m3(&codes, &scales);
    let weight = backend.load_matrix(HostMatrix { rows: n, cols: k, data }).unwrap();
    let x = values(2, 2 * k);
    let mut y = backend.alloc_activations(2, n).unwrap();
    backend.linear(&mut Queue::default(), &upload(&backend, &x, k), &weight, 2, &mut y).unwrap();
    for (row, got) in download(&backend, &y).chunks(n).enumerate() {
        for (n, got) in got.iter().enumerate() {
            let exact: f64 = (0..k)
                .map(|i| {
                    let scale = scales[n / 128 * 2 + i / 128];
                    let w = cadre_numerics::e4m3::decode(codes[n * k + i]) * scale;
                    f64::from(x[row * k + i]) * f64::from(w)
                })
                .sum();
            assert!((f64::from(*got) - exact).abs() < 1e-4, "{row} {n}: {got} {exact}");
        }
    }
}

#[test]
fn class_bf16_rounds_once() {
    let exact = ReferenceBackend::new(NumericsClass::F32);
    let rounded = ReferenceBackend::new(NumericsClass::Bf16);
    let w = values(3, 20 * 30);
    // Activations of class bf16 are bf16.
    let x: Vec<f32> = values(4, 30).into_iter().map(bf16::round).collect();
    let data = bytes(&w);
    let run = |backend: &ReferenceBackend| {
        let matrix = HostMatrix { rows: 20, cols: 30, data: MatrixData::F32(&data) };
        let weight = backend.load_matrix(matrix).unwrap();
        let mut y = backend.alloc_activations(1, 20).unwrap();
        let x = upload(backend, &x, 30);
        backend.linear(&mut Queue::default(), &x, &weight, 1, &mut y).unwrap();
        download(backend, &y)
    };
    let expected: Vec<f32> = run(&exact).into_iter().map(bf16::round).collect();
    assert_eq!(run(&rounded), expected);
}

/// Codes that arrive are used as they are; quantising the original row here gives the same result.
#[test]
fn class_fp8_uses_the_senders_codes() {
    let backend = ReferenceBackend::new(NumericsClass::Fp8);
    let queue = &mut Queue::default();
    let (hidden, inner) = (200, 40);
    let (up, down) = (codes(5, inner * hidden), codes(6, hidden * inner));
    let matrix = |rows, cols, codes| HostMatrix { rows, cols, data: e4m3(codes, &[0.1, 0.3]) };
    let ffn = || {
        let (gate, up) = (matrix(inner, hidden, &up), matrix(inner, hidden, &up));
        backend.load_ffn(gate, up, matrix(hidden, inner, &down)).unwrap()
    };
    let x = upload(&backend, &values(7, 3 * hidden), hidden);
    let mut sent = backend.alloc_rows(3, hidden).unwrap();
    backend.encode(queue, &x, 3, ScaleFormat::F32, &mut sent).unwrap();
    let format = RowFormat::E4m3;
    let mut memory = backend.staging(RowLayout::of(format, 3, hidden).bytes).unwrap();
    backend.download_rows(queue, &sent, 3, &mut memory, 0).unwrap();
    let rows = EncodedRows::in_memory(memory, format, 3, hidden);
    let mut arrived = backend.alloc_rows(3, hidden).unwrap();
    backend.upload_rows(queue, &rows, 0, &mut arrived).unwrap();
    let mut pass = backend.alloc_pass(PassLimits { rows: 3, pairs: 2 }).unwrap();
    let groups = [RowGroup { expert: 0, rows: 2 }];
    let described = PassRows { input: &[2, 0], output: &[0, 1], groups: &groups };
    backend.begin_pass(queue, &described, &mut pass).unwrap();
    let table = backend.expert_table(vec![Arc::new(ffn())]).unwrap();
    let mut there = backend.alloc_activations(2, hidden).unwrap();
    backend.grouped_ffn(queue, &pass, &table, &arrived, &mut there).unwrap();
    let mut here = backend.alloc_activations(3, hidden).unwrap();
    backend.ffn(queue, &x, &ffn(), 3, &mut here).unwrap();
    let (here, there) = (download(&backend, &here), download(&backend, &there));
    assert_eq!(there[..hidden], here[2 * hidden..]);
    assert_eq!(there[hidden..], here[..hidden]);
    assert!(there.iter().any(|value| *value != 0.0));
}

/// Naive and absorbed attention are the same function, and both forget what is after the position.
#[test]
fn naive_equals_absorbed_within_rounding() {
    let backend = ReferenceBackend::new(NumericsClass::F32);
    let queue = &mut Queue::default();
    let shape = AttentionShape {
        heads: 3,
        nope: 24,
        rope: 8,
        v: 20,
        kv_lora: 136,
        softmax_scale: 0.2,
        inv_freq: vec![1.0, 0.1, 0.01, 0.001],
        rope_magnitude: 1.0,
        max_positions: 512,
    };
    let layout = KvLayout { layers: 2, pages: 5, page_tokens: 64, kv_lora_rank: 136, qk_rope_head_dim: 8 };
    let table = [PageId(4), PageId(0), PageId(2)];
    let n = 3 * (24 + 20);
    let codes = codes(7, n * 136);
    let data = e4m3(&codes, &[0.05, 0.07, 0.06, 0.04]);
    let kv_b = HostMatrix { rows: n, cols: 136, data };
    let kv_up = backend.load_kv_up(&shape, kv_b).unwrap();
    let attention = backend.load_attention(&shape).unwrap();
    let mut cache = backend.kv_cache(layout).unwrap();
    let tokens = 150;
    let kv_a = upload(&backend, &values(8, tokens * 144), 144);
    let step = |form| {
        let segment = StepSegment { form, rows: tokens, first_position: 0, block_table: &table };
        let mut step = backend.alloc_step(tokens).unwrap();
        let ids = vec![0; tokens];
        let rows = StepRows { ids: &ids, segments: &[segment], wanted: &[] };
        backend.begin_step(&mut Queue::default(), &rows, &mut step).unwrap();
        step
    };
    let prompt = step(AttentionForm::Naive);
    let norm = values(9, 136);
    backend.kv_append(queue, &prompt, &attention, &kv_a, &norm, 1e-6, 1, &mut cache).unwrap();
    let mut q = upload(&backend, &values(10, tokens * 96), 96);
    backend.rope_query(queue, &prompt, &attention, &mut q).unwrap();
    let out = || backend.alloc_activations(tokens, 60).unwrap();
    let (mut naive, mut absorbed) = (out(), out());
    backend.attend(queue, &prompt, &attention, &kv_up, &q, 1, &cache, &mut naive).unwrap();
    let generated = step(AttentionForm::Absorbed);
    backend.attend(queue, &generated, &attention, &kv_up, &q, 1, &cache, &mut absorbed).unwrap();
    let (naive, absorbed) = (download(&backend, &naive), download(&backend, &absorbed));
    let largest = naive.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    assert!(largest > 0.1);
    for (a, b) in naive.iter().zip(&absorbed) {
        assert!((a - b).abs() < 1e-5 * largest, "{a} {b}");
    }
}

#[test]
fn bad_calls_are_typed_errors() {
    let backend = ReferenceBackend::new(NumericsClass::F32);
    let queue = &mut Queue::default();
    let data = bytes(&values(1, 12));
    let matrix = HostMatrix { rows: 3, cols: 4, data: MatrixData::F32(&data) };
    let weight = backend.load_matrix(matrix).unwrap();
    let x = backend.alloc_activations(2, 4).unwrap();
    let mut y = backend.alloc_activations(2, 3).unwrap();
    let error = backend.linear(queue, &x, &weight, 3, &mut y);
    assert_eq!(
        error,
        Err(OpsError::Shape { op: "linear", what: "row capacity of x", found: 2, expected: 3 })
    );
    let mut step = backend.alloc_step(1).unwrap();
    backend.begin_step(queue, &StepRows { ids: &[7], ..StepRows::default() }, &mut step).unwrap();
    let error = backend.embed(queue, &step, &weight, &mut backend.alloc_residual(1, 4).unwrap());
    assert!(matches!(error, Err(OpsError::Range { what: "token id", index: 7, limit: 3, .. })));
    assert!(backend.alloc_activations(usize::MAX, 2).is_err());
}

/// The suite itself runs, and the reference of a class is no match for another class.
#[test]
fn the_reference_conforms_to_itself_alone() {
    let backend = ReferenceBackend::new(NumericsClass::Fp8);
    let suite = Suite { granule: 16, ..Suite::exact(&backend, 2) };
    conformance::run(&suite);
    let exact = ReferenceBackend::new(NumericsClass::F32);
    let (_, linear) =
        conformance::parts().into_iter().find(|(name, _)| *name == "linear and logits").unwrap();
    let other = Suite { reference: exact, cases: 8, ..Suite::exact(&backend, 8) };
    let fails = |part: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(part)).is_err();
    assert!(fails(&|| linear(&other)), "fp8 has not the bits of f32");
    let far = Suite { tolerance: Tolerance::Distance(0.1), ..other.clone() };
    linear(&far);
    assert!(far.largest.get() > 1e-4, "the largest distance is kept");
    let near = Suite { tolerance: Tolerance::Distance(1e-4), ..other };
    assert!(fails(&|| linear(&near)), "a distance is measured");
}
