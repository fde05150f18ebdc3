//! Bad calls are typed errors, the same as the reference's, and never a panic.

use bytes::Bytes;
use cadre_sampler::History;
use cadre_types::{PageId, SamplingParams, config::ScaleFormat};

use super::{
    Suite, Tolerance,
    data::{Dtype, Matrix, Stream, activations, attending, residual, step_of},
};
use crate::{
    backend::Backend,
    error::OpsError,
    exchange::{ExpertChunk, ExpertRows},
    host::{EncodedRows, HostMatrix, MatrixData, RowFormat},
    plan::PassLimits,
    shape::{AttentionShape, GateShape, GroupScore, KvLayout, Scoring},
    step::{AttentionForm, PassRows, RowGroup, SampleRow, StepRows, StepSegment},
};

type Refusals = Vec<(&'static str, OpsError)>;

fn refused(out: &mut Refusals, what: &'static str, result: Result<(), OpsError>) {
    out.push((what, result.expect_err(what)));
}

/// Every bad call that has a name here, with its error.
fn refusals<B: Backend>(backend: &B) -> Refusals {
    let mut out = Vec::new();
    dense(backend, &mut out);
    loads(backend, &mut out);
    steps(backend, &mut out);
    transfers(backend, &mut out);
    experts(backend, &mut out);
    attention(backend, &mut out);
    out
}

fn dense<B: Backend>(backend: &B, out: &mut Refusals) {
    let queue = &mut backend.queue().unwrap();
    let stream = &mut Stream::new(1);
    let weight = backend.load_matrix(Matrix::new(stream, Dtype::E4m3, 32, 64).host()).unwrap();
    let x = activations(backend, &stream.values(4 * 64), 64, 0);
    let wide = |rows| backend.alloc_activations(rows, 64).unwrap();
    let narrow = |rows| backend.alloc_activations(rows, 32).unwrap();
    refused(out, "alloc", backend.alloc_activations(usize::MAX, 3).map(drop));
    refused(out, "alloc rows", backend.alloc_rows(usize::MAX, 3).map(drop));
    refused(out, "rows", backend.linear(queue, &x, &weight, 5, &mut narrow(5)));
    refused(out, "rows of y", backend.linear(queue, &x, &weight, 4, &mut narrow(3)));
    refused(out, "columns of y", backend.linear(queue, &x, &weight, 4, &mut wide(4)));
    refused(out, "columns of x", backend.linear(queue, &narrow(1), &weight, 1, &mut narrow(1)));
    let mut logits = backend.alloc_logits(3, 32).unwrap();
    refused(out, "logits", backend.logits(queue, &x, &weight, 4, &mut logits));
    let step = step_of(backend, queue, &[32], &[]);
    refused(out, "token", backend.embed(queue, &step, &weight, &mut backend.alloc_residual(1, 64).unwrap()));
    let short = backend.load_vector(&[1.0; 31]).unwrap();
    refused(out, "norm", backend.rms_norm(queue, &x, &short, 1e-6, 1, &mut wide(1)));
    let mut residual = residual(backend, &[0.0; 64], 64, 0);
    let norm = backend.rms_norm_residual(queue, &residual, &short, 1e-6, 1, &mut wide(1));
    refused(out, "residual norm", norm);
    refused(out, "concat", backend.concat(queue, &x, &x, 1, &mut wide(1)));
    refused(out, "add", backend.add(queue, &mut residual, &narrow(1), 1));
    refused(out, "assign", backend.assign(queue, &mut residual, &x, 2));
    let step = step_of(backend, queue, &[0; 3], &[0, 2]);
    let mut one = backend.alloc_residual(1, 64).unwrap();
    let three = backend.alloc_residual(3, 64).unwrap();
    refused(out, "gather", backend.gather_wanted(queue, &step, &three, &mut one));
    let params = SamplingParams::default();
    let row = |row| SampleRow { row, params: &params, history: History::default(), position: 0 };
    refused(out, "sample", backend.sample(queue, &mut logits, &[row(3)]).map(drop));
    refused(out, "sample twice", backend.sample(queue, &mut logits, &[row(1), row(1)]).map(drop));
}

fn e4m3<'a>(codes: &'a [u8], scales: &'a [f32], block: [usize; 2]) -> MatrixData<'a> {
    MatrixData::E4m3 { codes, scales, block, input_scales: ScaleFormat::F32 }
}

fn loads<B: Backend>(backend: &B, out: &mut Refusals) {
    let stream = &mut Stream::new(2);
    let block = MatrixData::BLOCK;
    for (what, data) in [
        ("nan code", e4m3(&[0x7F], &[1.0], block)),
        ("nan scale", e4m3(&[0], &[f32::NAN], block)),
        ("zero scale", e4m3(&[0], &[0.0], block)),
        ("no scale", e4m3(&[0], &[], block)),
        ("block", e4m3(&[0], &[1.0], [1, 128])),
        ("short bf16", MatrixData::Bf16(&[0])),
        ("infinite bf16", MatrixData::Bf16(&[0x80, 0x7F])),
        ("nan f32", MatrixData::F32(&[0, 0, 0xC0, 0x7F])),
    ] {
        refused(out, what, backend.load_matrix(HostMatrix { rows: 1, cols: 1, data }).map(drop));
    }
    refused(out, "nan vector", backend.load_vector(&[0.0, f32::NAN]).map(drop));
    let gate = Matrix::new(stream, Dtype::E4m3, 32, 64);
    let down = Matrix::new(stream, Dtype::E4m3, 64, 32);
    let other = Matrix::new(stream, Dtype::Bf16, 32, 64);
    refused(out, "ffn types", backend.load_ffn(gate.host(), other.host(), down.host()).map(drop));
    refused(out, "ffn shapes", backend.load_ffn(gate.host(), gate.host(), gate.host()).map(drop));
    let bad = AttentionShape { inv_freq: vec![1.0], ..attention_shape() };
    refused(out, "frequencies", backend.load_attention(&bad).map(drop));
    let short = Matrix::new(stream, Dtype::Bf16, 63, 32);
    refused(out, "kv_b", backend.load_kv_up(&attention_shape(), short.host()).map(drop));
    refused(out, "page size", backend.kv_cache(KvLayout { page_tokens: 32, ..layout() }).map(drop));
    refused(out, "cache size", backend.kv_cache(KvLayout { pages: usize::MAX / 64, ..layout() }).map(drop));
}

fn steps<B: Backend>(backend: &B, out: &mut Refusals) {
    let queue = &mut backend.queue().unwrap();
    let mut step = backend.alloc_step(4).unwrap();
    let pages = [PageId(1), PageId(2)];
    let segment = |rows, first_position, block_table| StepSegment {
        form: AttentionForm::Naive,
        rows,
        first_position,
        block_table,
    };
    let mut begin = |what, ids: &[u32], segments: &[StepSegment<'_>], wanted: &[u32]| {
        refused(out, what, backend.begin_step(queue, &StepRows { ids, segments, wanted }, &mut step));
    };
    begin("too many rows", &[0; 5], &[], &[]);
    begin("rows of segments", &[0; 2], &[segment(3, 0, &pages)], &[]);
    begin("wanted row", &[0; 2], &[], &[2]);
    begin("wanted order", &[0; 2], &[], &[1, 0]);
    begin("wanted twice", &[0; 2], &[], &[1, 1]);
    begin("table", &[0], &[segment(1, 128, &pages)], &[]);
    begin("no table", &[0], &[segment(1, 0, &[])], &[]);
    begin("position", &[0; 2], &[segment(2, u32::MAX, &pages)], &[]);
    begin("one place", &[0; 4], &[segment(3, 60, &pages), segment(1, 62, &pages)], &[]);
    let limits = PassLimits { rows: 4, pairs: 4 };
    let mut pass = backend.alloc_pass(limits).unwrap();
    let mut begin = |what, input: &[u32], output: &[u32], groups: &[RowGroup]| {
        refused(out, what, backend.begin_pass(queue, &PassRows { input, output, groups }, &mut pass));
    };
    let group = |rows| RowGroup { expert: 0, rows };
    begin("too many pairs", &[0; 5], &[0, 1, 2, 3, 4], &[group(5)]);
    begin("pairs of groups", &[0; 2], &[0, 1], &[group(1)]);
    begin("group overflow", &[0; 2], &[0, 1], &[group(usize::MAX), group(3)]);
    begin("outputs", &[0; 2], &[0], &[group(2)]);
    begin("an output twice", &[0; 2], &[1, 1], &[group(2)]);
    begin("an output beyond", &[0; 2], &[0, 2], &[group(2)]);
}

fn transfers<B: Backend>(backend: &B, out: &mut Refusals) {
    let queue = &mut backend.queue().unwrap();
    let class = backend.class();
    let format = RowFormat::dispatch(class);
    let x = activations(backend, &[0.5; 2 * 64], 64, 0);
    let mut rows = backend.alloc_rows(2, 64).unwrap();
    let mut memory = backend.staging(64).unwrap();
    refused(out, "encode", backend.encode(queue, &x, 3, ScaleFormat::F32, &mut rows));
    refused(out, "download rows", backend.download_rows(queue, &rows, 3, &mut memory, 0));
    refused(out, "download room", backend.download_rows(queue, &rows, 2, &mut memory, 0));
    refused(out, "download place", backend.download_rows(queue, &rows, 1, &mut memory, usize::MAX));
    refused(out, "activations", backend.download_activations(queue, &x, 1..3, &mut memory, 0));
    let backwards = std::ops::Range { start: 2, end: 1 };
    refused(out, "backwards", backend.download_activations(queue, &x, backwards, &mut memory, 0));
    refused(out, "activations' room", backend.download_activations(queue, &x, 0..2, &mut memory, 0));
    let sent = |rows: usize, bytes: usize| EncodedRows {
        format,
        rows,
        cols: 64,
        data: Bytes::from(vec![0; bytes]),
        scales: Bytes::from(vec![0; rows.min(9) * format.row_scales(64) * 4]),
    };
    let width = format.row_bytes(64);
    refused(out, "short rows", backend.upload_rows(queue, &sent(2, 2 * width - 1), 0, &mut rows));
    refused(out, "huge rows", backend.upload_rows(queue, &sent(usize::MAX, 0), 0, &mut rows));
    refused(out, "rows beyond", backend.upload_rows(queue, &sent(2, 2 * width), 1, &mut rows));
    let unscaled = EncodedRows { scales: Bytes::from(vec![0; 2]), ..sent(2, 2 * width) };
    refused(out, "scales", backend.upload_rows(queue, &unscaled, 0, &mut rows));
    let other = if format == RowFormat::F32 { RowFormat::Bf16 } else { RowFormat::F32 };
    let bytes = Bytes::from(vec![0; 2 * other.row_bytes(64)]);
    let other = EncodedRows { format: other, rows: 2, cols: 64, data: bytes, scales: Bytes::new() };
    refused(out, "another format", backend.upload_rows(queue, &other, 0, &mut rows));
    refused(out, "read", backend.read_activations(queue, &x, 1..3, &mut Vec::new()));
    let mut y = backend.alloc_activations(1, 64).unwrap();
    refused(out, "write", backend.write_activations(queue, &[0.0; 65], &mut y));
    refused(out, "write rows", backend.write_activations(queue, &[0.0; 128], &mut y));
}

fn experts<B: Backend>(backend: &B, out: &mut Refusals) {
    let queue = &mut backend.queue().unwrap();
    let stream = &mut Stream::new(3);
    let [gate, up] = [(); 2].map(|()| Matrix::new(stream, Dtype::E4m3, 32, 64));
    let down = Matrix::new(stream, Dtype::E4m3, 64, 32);
    let load = || std::sync::Arc::new(backend.load_ffn(gate.host(), up.host(), down.host()).unwrap());
    let (wide, back) = (Matrix::new(stream, Dtype::E4m3, 64, 64), Matrix::new(stream, Dtype::E4m3, 64, 64));
    let other = backend.load_ffn(wide.host(), wide.host(), back.host()).unwrap();
    refused(out, "two shapes", backend.expert_table(vec![load(), std::sync::Arc::new(other)]).map(drop));
    let table = backend.expert_table(vec![load()]).unwrap();
    let x = backend.alloc_rows(2, 64).unwrap();
    let mut pass = backend.alloc_pass(PassLimits { rows: 4, pairs: 4 }).unwrap();
    let mut run = |what, input: &[u32], expert, rows_of_y| {
        let output: Vec<u32> = (0..input.len() as u32).collect();
        let groups = [RowGroup { expert, rows: input.len() }];
        let rows = PassRows { input, output: &output, groups: &groups };
        backend.begin_pass(queue, &rows, &mut pass).unwrap();
        let mut y = backend.alloc_activations(rows_of_y, 64).unwrap();
        refused(out, what, backend.grouped_ffn(queue, &pass, &table, &x, &mut y));
    };
    run("expert", &[0], 1, 1);
    run("input row", &[2], 0, 1);
    run("output room", &[0, 1], 0, 1);

    let bias = backend.load_vector(&[0.0; 32]).unwrap();
    let weight = backend.load_matrix(gate.host()).unwrap();
    let shape = GateShape {
        scoring: Scoring::Sigmoid,
        group_score: GroupScore::TwoLargest,
        experts: 32,
        n_group: 4,
        topk_group: 2,
        top_k: 4,
        norm_topk_prob: true,
        routed_scaling_factor: 1.0,
    };
    let x = activations(backend, &[0.5; 2 * 64], 64, 0);
    let (one, three) = (step_of(backend, queue, &[0], &[]), step_of(backend, queue, &[0; 3], &[]));
    for (what, shape, step, rows) in [
        ("experts", GateShape { experts: 31, ..shape }, &one, 1),
        ("groups", GateShape { n_group: 5, ..shape }, &one, 1),
        ("no groups", GateShape { n_group: 0, ..shape }, &one, 1),
        ("kept groups", GateShape { topk_group: 5, ..shape }, &one, 1),
        ("candidates", GateShape { top_k: 17, ..shape }, &one, 1),
        ("choices of another width", GateShape { top_k: 3, ..shape }, &one, 1),
        ("gate rows", shape, &three, 3),
        ("routing rows", shape, &one, 0),
    ] {
        let mut routing = backend.alloc_routing(rows, 4).unwrap();
        refused(out, what, backend.gate(queue, step, &x, &weight, &bias, &shape, &mut routing));
    }

    let mut stream = residual(backend, &[0.0; 64], 64, 0);
    let mut routing = backend.alloc_routing(1, 2).unwrap();
    refused(out, "half a row", backend.write_routing(queue, &[0], &[1.0], &mut routing));
    refused(out, "weights", backend.write_routing(queue, &[0, 1], &[1.0], &mut routing));
    backend.write_routing(queue, &[0, 1], &[1.0, 1.0], &mut routing).unwrap();
    let format = RowFormat::combine(backend.class());
    let width = format.row_bytes(64);
    let chunk =
        |bytes, targets: &[u32]| ExpertChunk { rows: vec![0; bytes].into(), targets: targets.to_vec() };
    for (what, pairs, hidden, chunks) in [
        ("pairs", 1, 64, vec![chunk(width, &[0])]),
        ("hidden", 2, 32, vec![chunk(width, &[0, 1])]),
        ("a pair is missing", 2, 64, vec![chunk(width, &[1])]),
        ("a pair twice", 2, 64, vec![chunk(width, &[1]), chunk(width, &[1])]),
        ("a pair beyond", 2, 64, vec![chunk(2 * width, &[1, 2])]),
        ("bytes", 2, 64, vec![chunk(2 * width - 1, &[1, 0])]),
    ] {
        let experts = ExpertRows { format, pairs, hidden, chunks };
        refused(out, what, backend.combine(queue, &experts, &routing, None, &mut stream));
    }
    let experts = ExpertRows { format, pairs: 2, hidden: 64, chunks: vec![chunk(2 * width, &[0, 1])] };
    let shared = backend.alloc_activations(1, 32).unwrap();
    refused(out, "shared", backend.combine(queue, &experts, &routing, Some(&shared), &mut stream));
}

fn attention_shape() -> AttentionShape {
    AttentionShape {
        heads: 2,
        nope: 16,
        rope: 16,
        v: 16,
        kv_lora: 32,
        softmax_scale: 1.0,
        inv_freq: vec![0.5; 8],
        rope_magnitude: 1.0,
        max_positions: 100,
    }
}

fn layout() -> KvLayout {
    KvLayout { layers: 1, pages: 2, page_tokens: 64, kv_lora_rank: 32, qk_rope_head_dim: 16 }
}

fn attention<B: Backend>(backend: &B, out: &mut Refusals) {
    let queue = &mut backend.queue().unwrap();
    let shape = attention_shape();
    let attention = backend.load_attention(&shape).unwrap();
    let kv_b = Matrix::new(&mut Stream::new(4), Dtype::Bf16, 64, 32);
    let kv_up = backend.load_kv_up(&shape, kv_b.host()).unwrap();
    let mut cache = backend.kv_cache(layout()).unwrap();
    let norm = backend.load_vector(&[1.0; 32]).unwrap();
    let kv_a = backend.alloc_activations(2, 48).unwrap();
    let mut q = backend.alloc_activations(2, 64).unwrap();
    let mut o = backend.alloc_activations(2, 32).unwrap();
    let (inside, outside) = ([PageId(1), PageId(0)], [PageId(1), PageId(2)]);
    let cases = [
        ("layer", 1, 0, 1, &inside),
        ("page", 1, 64, 0, &outside),
        ("position", 1, 100, 0, &inside),
        ("rows", 3, 0, 0, &inside),
    ];
    for (what, rows, first_position, layer, block_table) in cases {
        for form in [AttentionForm::Naive, AttentionForm::Absorbed] {
            let segment = StepSegment { form, rows, first_position, block_table };
            let step = attending(backend, queue, &[segment]);
            let append = backend.kv_append(queue, &step, &attention, &kv_a, &norm, 1e-6, layer, &mut cache);
            refused(out, what, append);
            refused(out, what, backend.attend(queue, &step, &attention, &kv_up, &q, layer, &cache, &mut o));
            if what == "position" || what == "rows" {
                refused(out, what, backend.rope_query(queue, &step, &attention, &mut q));
            }
        }
    }
    let step = step_of(backend, queue, &[0], &[]);
    refused(out, "no segments", backend.rope_query(queue, &step, &attention, &mut q));
    refused(out, "no segments", backend.attend(queue, &step, &attention, &kv_up, &q, 0, &cache, &mut o));
    let mut memory = backend.staging(64).unwrap();
    let table = &inside;
    refused(out, "kv table", backend.kv_read(queue, &cache, 0, &table[..1], 60, 5, &mut memory, 0));
    refused(out, "kv room", backend.kv_read(queue, &cache, 0, table, 0, 2, &mut memory, 0));
    let three = Bytes::from_static(&[0; 3]);
    refused(out, "kv bytes", backend.kv_write(queue, &mut cache, 0, table, 0, 2, &three));
    refused(out, "kv layer", backend.kv_write(queue, &mut cache, 1, table, 0, 0, &Bytes::new()));
}

pub(super) fn alike<B: Backend>(suite: &Suite<'_, B>) {
    let (got, expected) = (refusals(suite.backend), refusals(&suite.reference));
    assert_eq!(got.len(), expected.len());
    for ((what, got), (_, expected)) in got.iter().zip(&expected) {
        // As text: a NaN in an error is not equal to itself. Sizes in bytes are a matter of the class.
        match suite.tolerance {
            Tolerance::Bits => assert_eq!(got.to_string(), expected.to_string(), "{what}"),
            Tolerance::Distance(_) => {
                assert_eq!(std::mem::discriminant(got), std::mem::discriminant(expected), "{what}: {got}");
            }
        }
    }
}

/// Nothing is nothing, and no error.
pub(super) fn empty<B: Backend>(suite: &Suite<'_, B>) {
    let backend = suite.backend;
    let queue = &mut backend.queue().unwrap();
    let weight = backend.load_matrix(Matrix::new(&mut Stream::new(2), Dtype::E4m3, 32, 64).host()).unwrap();
    let x = backend.alloc_activations(0, 64).unwrap();
    let mut y = backend.alloc_activations(0, 32).unwrap();
    backend.linear(queue, &x, &weight, 0, &mut y).unwrap();
    backend.logits(queue, &x, &weight, 0, &mut backend.alloc_logits(0, 32).unwrap()).unwrap();
    let step = attending(backend, queue, &[]);
    assert_eq!(backend.step_info(&step).rows, 0);
    backend.embed(queue, &step, &weight, &mut backend.alloc_residual(0, 64).unwrap()).unwrap();
    let table = backend.expert_table(Vec::new()).unwrap();
    let mut pass = backend.alloc_pass(PassLimits { rows: 0, pairs: 0 }).unwrap();
    backend.begin_pass(queue, &PassRows::default(), &mut pass).unwrap();
    let rows = backend.alloc_rows(0, 64).unwrap();
    backend.grouped_ffn(queue, &pass, &table, &rows, &mut backend.alloc_activations(0, 64).unwrap()).unwrap();
    backend.synchronize(queue).unwrap();
}
