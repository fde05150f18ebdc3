//! Bad calls are typed errors, the same on the reference and on the CPU backend, and never a panic.

use cadre_ops::{
    AttentionShape, Backend, DecodeRow, GateShape, HostMatrix, HostRows, KvLayout, MatrixData, OpsError,
    PrefillSegment, ReferenceBackend, RowFormat, RowGroup,
};
use cadre_ops_cpu::{CpuBackend, CpuOptions, Isa};
use cadre_types::{NumericsClass, PageId};

use crate::{
    backends,
    data::{Dtype, Matrix, Stream, buffer},
};

/// Every bad call that has a name here, with its error.
fn refusals<B: Backend>(backend: &B) -> Vec<(&'static str, OpsError)> {
    let mut out = Vec::new();
    let mut refused = |what, result: Result<(), OpsError>| {
        out.push((what, result.expect_err(what)));
    };
    let queue = &mut backend.queue().unwrap();
    let stream = &mut Stream::new(1);
    let matrix = Matrix::new(stream, Dtype::E4m3, 24, 32);
    let weight = backend.load_matrix(matrix.host()).unwrap();
    let x = buffer(backend, &stream.values(4 * 32), 32, 0);
    let mut y = backend.alloc(4, 24).unwrap();
    let mut narrow = backend.alloc(4, 23).unwrap();

    refused("alloc", backend.alloc(usize::MAX, 3).map(drop));
    refused("rows", backend.linear(queue, &x, &weight, 5, &mut y));
    refused("columns of y", backend.linear(queue, &x, &weight, 4, &mut narrow));
    refused("columns of x", backend.linear(queue, &y, &weight, 1, &mut backend.alloc(1, 24).unwrap()));
    refused("logits row", backend.logits(queue, &x, &[0, 4], &weight, &mut Vec::new()));
    refused("token", backend.embed(queue, &weight, &[24], &mut backend.alloc(1, 32).unwrap()));
    refused("gather", backend.gather_rows(queue, &x, &[4], &mut backend.alloc(1, 32).unwrap()));
    refused("gather capacity", backend.gather_rows(queue, &x, &[0, 1], &mut backend.alloc(1, 32).unwrap()));
    refused("download", backend.download_f32(queue, &x, &[9], &mut Vec::new()));
    let format = RowFormat::Bf16;
    refused("download rows", backend.download_rows(queue, &x, 5, format, &mut Vec::new(), &mut Vec::new()));
    let short = HostRows { format, rows: 2, cols: 24, data: &[0; 95], scales: &[] };
    refused("short rows", backend.upload_rows(queue, short, &mut y));
    let huge = HostRows { format, rows: usize::MAX, cols: 24, data: &[], scales: &[] };
    refused("huge rows", backend.upload_rows(queue, huge, &mut y));
    let format = RowFormat::E4m3;
    let unscaled = HostRows { format, rows: 1, cols: 24, data: &[0; 24], scales: &[] };
    refused("missing scales", backend.upload_rows(queue, unscaled, &mut y));
    refused(
        "norm",
        backend.rms_norm(
            queue,
            &x,
            &backend.load_vector(&[1.0; 31]).unwrap(),
            1e-6,
            1,
            &mut backend.alloc(1, 32).unwrap(),
        ),
    );
    refused("concat", backend.concat(queue, &x, &y, 1, &mut narrow));
    refused("add", backend.add(queue, &mut y, &x, 1));

    for (what, data) in [
        ("nan code", MatrixData::E4m3 { codes: &[0x7F], scales: &[1.0] }),
        ("nan scale", MatrixData::E4m3 { codes: &[0], scales: &[f32::NAN] }),
        ("zero scale", MatrixData::E4m3 { codes: &[0], scales: &[0.0] }),
        ("no scale", MatrixData::E4m3 { codes: &[0], scales: &[] }),
        ("short bf16", MatrixData::Bf16(&[0])),
        ("infinite bf16", MatrixData::Bf16(&[0x80, 0x7F])),
        ("nan f32", MatrixData::F32(&[0, 0, 0xC0, 0x7F])),
    ] {
        refused(what, backend.load_matrix(HostMatrix { rows: 1, cols: 1, data }).map(drop));
    }
    refused("nan vector", backend.load_vector(&[0.0, f32::NAN]).map(drop));

    let gate = Matrix::new(stream, Dtype::E4m3, 16, 32);
    let down = Matrix::new(stream, Dtype::E4m3, 32, 16);
    let other = Matrix::new(stream, Dtype::Bf16, 16, 32);
    refused("ffn types", backend.load_ffn(gate.host(), other.host(), down.host()).map(drop));
    refused("ffn shapes", backend.load_ffn(gate.host(), gate.host(), gate.host()).map(drop));
    let ffn = backend.load_ffn(gate.host(), gate.host(), down.host()).unwrap();
    let mut wide = backend.alloc(4, 32).unwrap();
    let group = |expert, first_row, rows| RowGroup { expert, first_row, rows };
    for (what, groups) in [
        ("expert", vec![group(1, 0, 1)]),
        ("group rows", vec![group(0, 3, 2)]),
        ("group overflow", vec![group(0, usize::MAX, 2)]),
        ("overlap", vec![group(0, 0, 2), group(0, 1, 1)]),
    ] {
        refused(what, backend.grouped_ffn(queue, &x, &[&ffn], &groups, &mut wide));
    }

    let bias = backend.load_vector(&[0.0; 24]).unwrap();
    let shape = GateShape {
        experts: 24,
        n_group: 4,
        topk_group: 2,
        top_k: 4,
        norm_topk_prob: true,
        routed_scaling_factor: 1.0,
    };
    for (what, shape) in [
        ("gate experts", GateShape { experts: 23, ..shape }),
        ("gate groups", GateShape { n_group: 5, ..shape }),
        ("no groups", GateShape { n_group: 0, ..shape }),
        ("kept groups", GateShape { topk_group: 5, ..shape }),
        ("top k", GateShape { top_k: 13, ..shape }),
    ] {
        refused(what, backend.gate(queue, &x, &weight, &bias, &shape, 1, &mut Vec::new(), &mut Vec::new()));
    }
    let nan = buffer(backend, &[[0.5; 32], [f32::NAN; 32]].concat(), 32, 0);
    refused(
        "nan gate",
        backend.gate(queue, &nan, &weight, &bias, &shape, 2, &mut Vec::new(), &mut Vec::new()),
    );

    let rows = HostRows { format: RowFormat::F32, rows: 1, cols: 24, data: &[0; 96], scales: &[] };
    refused("combine pairs", backend.combine(queue, rows, &[1.0], 2, None, 1, &mut y));
    refused("combine weights", backend.combine(queue, rows, &[], 1, None, 1, &mut y));
    refused("combine shared", backend.combine(queue, rows, &[1.0], 1, Some(&x), 1, &mut y));
    refused("combine overflow", backend.combine(queue, rows, &[1.0], usize::MAX, None, 2, &mut y));

    let attention_shape = AttentionShape {
        heads: 2,
        nope: 8,
        rope: 4,
        v: 8,
        kv_lora: 16,
        softmax_scale: 1.0,
        inv_freq: vec![1.0, 0.1],
        rope_magnitude: 1.0,
        max_positions: 100,
    };
    let bad = AttentionShape { inv_freq: vec![1.0], ..attention_shape.clone() };
    refused("frequencies", backend.load_attention(&bad).map(drop));
    let attention = backend.load_attention(&attention_shape).unwrap();
    let kv_b = Matrix::new(stream, Dtype::Bf16, 32, 16);
    let short = Matrix::new(stream, Dtype::Bf16, 31, 16);
    refused("kv_b", backend.load_kv_up(&attention_shape, short.host()).map(drop));
    let kv_up = backend.load_kv_up(&attention_shape, kv_b.host()).unwrap();
    let layout = KvLayout { layers: 1, pages: 2, page_tokens: 64, kv_lora_rank: 16, qk_rope_head_dim: 4 };
    refused("page size", backend.kv_cache(KvLayout { page_tokens: 32, ..layout }).map(drop));
    refused("cache size", backend.kv_cache(KvLayout { pages: usize::MAX / 64, ..layout }).map(drop));
    let mut cache = backend.kv_cache(layout).unwrap();
    let norm = backend.load_vector(&[1.0; 16]).unwrap();
    let kv_a = backend.alloc(2, 20).unwrap();
    let table = [PageId(1), PageId(2)];
    let mut append = |what, positions: &[u32], tables: &[&[PageId]], layer| {
        refused(
            what,
            backend.kv_append(queue, &attention, &kv_a, &norm, 1e-6, positions, tables, layer, &mut cache),
        );
    };
    append("append layer", &[0], &[&table], 1);
    append("append page", &[64], &[&table], 0);
    append("append table", &[0], &[&[]], 0);
    append("append position", &[100], &[&table], 0);
    append("append tables", &[0, 1], &[&table], 0);
    append("append rows", &[0, 1, 2], &[&table, &table, &table], 0);
    let mut q = backend.alloc(3, 24).unwrap();
    refused("rope position", backend.rope_query(queue, &attention, &[100], &mut q));
    refused("rope rows", backend.rope_query(queue, &attention, &[0; 4], &mut q));
    let mut o = backend.alloc(3, 16).unwrap();
    for (what, first_row, rows, first_position) in
        [("prefill rows", 2, 2, 0), ("prefill page", 0, 1, 64), ("prefill position", 0, 2, 99)]
    {
        let segment = PrefillSegment { first_row, rows, first_position, block_table: &table };
        refused(
            what,
            backend.attention_prefill(queue, &attention, &kv_up, &q, &[segment], 0, &cache, &mut o),
        );
    }
    for (what, row, position) in [("decode row", 3, 0), ("decode page", 0, 64), ("decode position", 0, 100)] {
        let row = DecodeRow { row, position, block_table: &table };
        refused(what, backend.attention_decode(queue, &attention, &kv_up, &q, &[row], 0, &cache, &mut o));
    }
    let row = DecodeRow { row: 1, position: 0, block_table: &table };
    refused(
        "decode twice",
        backend.attention_decode(queue, &attention, &kv_up, &q, &[row, row], 0, &cache, &mut o),
    );
    refused("kv read", backend.kv_read(queue, &cache, 0, &table, 60, 5, &mut Vec::new()));
    refused("kv write", backend.kv_write(queue, &mut cache, 0, &table, 0, 2, &[0; 3]));
    out
}

#[test]
fn both_backends_refuse_alike() {
    for class in NumericsClass::ALL {
        let expected = refusals(&ReferenceBackend::new(class));
        for backend in backends(class) {
            let got = refusals(backend);
            assert_eq!(got.len(), expected.len());
            for ((what, got), (_, expected)) in got.iter().zip(&expected) {
                // As text: a NaN in an error is not equal to itself.
                assert_eq!(got.to_string(), expected.to_string(), "{what}, {}", backend.describe());
            }
        }
    }
}

#[test]
fn empty_batches_do_nothing() {
    for backend in backends(NumericsClass::Fp8) {
        let queue = &mut backend.queue().unwrap();
        let stream = &mut Stream::new(2);
        let matrix = Matrix::new(stream, Dtype::E4m3, 24, 32);
        let weight = backend.load_matrix(matrix.host()).unwrap();
        let x = backend.alloc(0, 32).unwrap();
        let mut y = backend.alloc(0, 24).unwrap();
        backend.linear(queue, &x, &weight, 0, &mut y).unwrap();
        let mut out = vec![1.0];
        backend.logits(queue, &x, &[], &weight, &mut out).unwrap();
        assert!(out.is_empty());
        backend.embed(queue, &weight, &[], &mut backend.alloc(0, 32).unwrap()).unwrap();
    }
}

#[test]
fn an_instruction_set_that_is_missing_is_refused() {
    for isa in Isa::ALL {
        let options = CpuOptions { isa: Some(isa), threads: Some(1), ..CpuOptions::new(NumericsClass::F32) };
        match CpuBackend::new(options) {
            Ok(backend) => assert!(isa.available() && backend.isa() == isa),
            Err(error) => {
                assert!(!isa.available());
                assert!(error.to_string().contains(isa.name()), "{error}");
            }
        }
    }
}
