#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! The reference against formulas in F64, and its two forms of attention against each other.

use super::*;
use crate::host::MatrixData;

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
    let rows = x.len() / cols;
    let mut buffer = backend.alloc(rows, cols).unwrap();
    let host = HostRows { format: RowFormat::F32, rows, cols, data: &bytes(x), scales: &[] };
    backend.upload_rows(&mut Queue::default(), host, &mut buffer).unwrap();
    buffer
}

fn download(backend: &ReferenceBackend, buffer: &Buffer) -> Vec<f32> {
    let rows: Vec<usize> = (0..buffer.dims.rows).collect();
    let mut out = Vec::new();
    backend.download_f32(&mut Queue::default(), buffer, &rows, &mut out).unwrap();
    out
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
    let data = MatrixData::E4m3 { codes: &codes, scales: &scales };
    let weight = backend.load_matrix(HostMatrix { rows: n, cols: k, data }).unwrap();
    let x = values(2, 2 * k);
    let mut y = backend.alloc(2, n).unwrap();
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
    let (w, x) = (values(3, 20 * 30), values(4, 30));
    let data = bytes(&w);
    let run = |backend: &ReferenceBackend| {
        let matrix = HostMatrix { rows: 20, cols: 30, data: MatrixData::F32(&data) };
        let weight = backend.load_matrix(matrix).unwrap();
        let mut y = backend.alloc(1, 20).unwrap();
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
    let (n, k) = (40, 200);
    let codes = codes(5, n * k);
    let data = MatrixData::E4m3 { codes: &codes, scales: &[0.1, 0.3] };
    let weight = backend.load_matrix(HostMatrix { rows: n, cols: k, data }).unwrap();
    let x = upload(&backend, &values(6, 3 * k), k);
    let (mut data, mut scales) = (Vec::new(), Vec::new());
    backend.download_rows(queue, &x, 3, RowFormat::E4m3, &mut data, &mut scales).unwrap();
    let rows = HostRows { format: RowFormat::E4m3, rows: 3, cols: k, data: &data, scales: &scales };
    let mut arrived = backend.alloc(3, k).unwrap();
    backend.upload_rows(queue, rows, &mut arrived).unwrap();
    let (mut here, mut there) = (backend.alloc(3, n).unwrap(), backend.alloc(3, n).unwrap());
    backend.linear(queue, &x, &weight, 3, &mut here).unwrap();
    backend.linear(queue, &arrived, &weight, 3, &mut there).unwrap();
    assert_eq!(download(&backend, &here), download(&backend, &there));
    // A gathered row keeps its codes.
    let mut gathered = backend.alloc(1, k).unwrap();
    backend.gather_rows(queue, &arrived, &[2], &mut gathered).unwrap();
    let mut one = backend.alloc(1, n).unwrap();
    backend.linear(queue, &gathered, &weight, 1, &mut one).unwrap();
    assert_eq!(download(&backend, &one), download(&backend, &here)[2 * n..]);
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
    let data = MatrixData::E4m3 { codes: &codes, scales: &[0.05, 0.07, 0.06, 0.04] };
    let kv_b = HostMatrix { rows: n, cols: 136, data };
    let kv_up = backend.load_kv_up(&shape, kv_b).unwrap();
    let attention = backend.load_attention(&shape).unwrap();
    let mut cache = backend.kv_cache(layout).unwrap();
    let tokens = 150;
    let kv_a = upload(&backend, &values(8, tokens * 144), 144);
    let positions: Vec<Position> = (0..tokens as u32).collect();
    let tables = vec![&table[..]; tokens];
    let norm = values(9, 136);
    backend.kv_append(queue, &attention, &kv_a, &norm, 1e-6, &positions, &tables, 1, &mut cache).unwrap();
    let mut q = upload(&backend, &values(10, tokens * 96), 96);
    backend.rope_query(queue, &attention, &positions, &mut q).unwrap();
    let (mut naive, mut absorbed) = (backend.alloc(tokens, 60).unwrap(), backend.alloc(tokens, 60).unwrap());
    let segment = PrefillSegment { first_row: 0, rows: tokens, first_position: 0, block_table: &table };
    backend.attention_prefill(queue, &attention, &kv_up, &q, &[segment], 1, &cache, &mut naive).unwrap();
    let rows: Vec<DecodeRow<'_>> =
        (0..tokens).map(|row| DecodeRow { row, position: row as u32, block_table: &table }).collect();
    backend.attention_decode(queue, &attention, &kv_up, &q, &rows, 1, &cache, &mut absorbed).unwrap();
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
    let x = backend.alloc(2, 4).unwrap();
    let mut y = backend.alloc(2, 3).unwrap();
    let error = backend.linear(queue, &x, &weight, 3, &mut y);
    assert_eq!(
        error,
        Err(OpsError::Shape { op: "linear", what: "row capacity of x", found: 2, expected: 3 })
    );
    let error = backend.embed(queue, &weight, &[7], &mut backend.alloc(1, 4).unwrap());
    assert!(matches!(error, Err(OpsError::Range { what: "token id", index: 7, limit: 3, .. })));
    assert!(backend.alloc(usize::MAX, 2).is_err());
}
