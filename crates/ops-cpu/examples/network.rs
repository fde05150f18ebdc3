//! Where the time of a step goes: the operations of a whole network in order, with generated weights, timed
//! one by one: `cargo run --release -p cadre-ops-cpu --example network -- pocket 2 decode 32 256`.
//! Arguments: pocket or small (1.6 B parameters), threads, decode or prefill, rows, tokens of context before.
#![allow(clippy::print_stdout, reason = "the example's output")]

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use cadre_ops::{
    AttentionForm, AttentionShape, Backend, ExpertChunk, ExpertRows, Ffn, GateShape, GroupScore, HostMatrix,
    KvLayout, MatrixData, OpsError, PassLimits, PassRows, RowFormat, RowGroup, Scoring, StepRows,
    StepSegment,
};
use cadre_ops_cpu::{
    Attention, Buffer, CpuBackend, CpuOptions, CpuQueue, DispatchRows, KvCache, KvUp, Vector, Weight,
};
use cadre_types::{NumericsClass, PageId, Position, config::ScaleFormat};

#[derive(Clone, Copy)]
struct Sizes {
    hidden: usize,
    layers: usize,
    dense: usize,
    dense_inner: usize,
    inner: usize,
    experts: usize,
    top_k: usize,
    groups: (usize, usize),
    heads: usize,
    q_lora: usize,
    kv_lora: usize,
    nope: usize,
    rope: usize,
    v: usize,
    vocab: usize,
}

const POCKET: Sizes = Sizes {
    hidden: 256,
    layers: 6,
    dense: 1,
    dense_inner: 768,
    inner: 128,
    experts: 32,
    top_k: 4,
    groups: (4, 2),
    heads: 4,
    q_lora: 128,
    kv_lora: 128,
    nope: 64,
    rope: 32,
    v: 64,
    vocab: 4096,
};

const SMALL: Sizes = Sizes {
    hidden: 1024,
    layers: 16,
    dense: 1,
    dense_inner: 2816,
    inner: 512,
    experts: 64,
    top_k: 6,
    groups: (8, 4),
    heads: 8,
    q_lora: 384,
    kv_lora: 256,
    nope: 64,
    rope: 32,
    v: 64,
    vocab: 32768,
};

type Result<T> = std::result::Result<T, OpsError>;

struct Layer {
    q_a: Weight,
    q_b: Weight,
    kv_a: Weight,
    kv_b: KvUp,
    o: Weight,
    gate: Weight,
    bias: Vector,
    shared: Ffn<Weight>,
    experts: Vec<Arc<Ffn<Weight>>>,
    norm: Vector,
    q_norm: Vector,
    kv_norm: Vector,
}

fn bytes(seed: usize, len: usize) -> impl Iterator<Item = u8> {
    let mut state = seed as u64 | 1;
    (0..len).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
}

fn e4m3<T>(rows: usize, cols: usize, load: impl FnOnce(HostMatrix<'_>) -> Result<T>) -> Result<T> {
    let codes: Vec<u8> = bytes(rows * cols, rows * cols).map(|b| b & 0x9F | 0x20).collect();
    let scales = vec![0.03 / (cols as f32).sqrt() * 8.0; rows.div_ceil(128) * cols.div_ceil(128)];
    let (block, input_scales) = (MatrixData::BLOCK, ScaleFormat::F32);
    let data = MatrixData::E4m3 { codes: &codes, scales: &scales, block, input_scales };
    load(HostMatrix { rows, cols, data })
}

fn bf16(backend: &CpuBackend, rows: usize, cols: usize) -> Result<Weight> {
    let data: Vec<u8> = bytes(rows + cols, rows * cols).flat_map(|b| [b, 0x3C | b & 0x80]).collect();
    backend.load_matrix(HostMatrix { rows, cols, data: MatrixData::Bf16(&data) })
}

fn ffn(backend: &CpuBackend, hidden: usize, inner: usize) -> Result<Ffn<Weight>> {
    e4m3(inner, hidden, |gate| {
        e4m3(inner, hidden, |up| e4m3(hidden, inner, |down| backend.load_ffn(gate, up, down)))
    })
}

fn layer(b: &CpuBackend, s: &Sizes, shape: &AttentionShape, dense: bool) -> Result<Layer> {
    let e = |rows, cols| e4m3(rows, cols, |m| b.load_matrix(m));
    let count = if dense { 0 } else { s.experts };
    let bias: Vec<f32> = bytes(7, s.experts).map(|b| f32::from(b) / 255.0).collect();
    Ok(Layer {
        q_a: e(s.q_lora, s.hidden)?,
        q_b: e(s.heads * (s.nope + s.rope), s.q_lora)?,
        kv_a: e(s.kv_lora + s.rope, s.hidden)?,
        kv_b: e4m3(s.heads * (s.nope + s.v), s.kv_lora, |m| b.load_kv_up(shape, m))?,
        o: e(s.hidden, s.heads * s.v)?,
        gate: bf16(b, s.experts, s.hidden)?,
        bias: b.load_vector(&bias)?,
        shared: ffn(b, s.hidden, if dense { s.dense_inner } else { s.inner })?,
        experts: (0..count).map(|_| ffn(b, s.hidden, s.inner).map(Arc::new)).collect::<Result<_>>()?,
        norm: b.load_vector(&vec![1.0; s.hidden])?,
        q_norm: b.load_vector(&vec![1.0; s.q_lora])?,
        kv_norm: b.load_vector(&vec![1.0; s.kv_lora])?,
    })
}

type Step = <CpuBackend as Backend>::Step;
type Pass = <CpuBackend as Backend>::Pass;
type Routing = <CpuBackend as Backend>::Routing;

struct Buffers {
    x: Buffer,
    normed: Buffer,
    q_a: Buffer,
    q_a_normed: Buffer,
    q: Buffer,
    kv_a: Buffer,
    attended: Buffer,
    delta: Buffer,
    sent: DispatchRows,
    expert_rows: Buffer,
    wanted: Buffer,
    logits: Buffer,
    step: Step,
    pass: Pass,
    routing: Routing,
}

#[derive(Default)]
struct Clock(BTreeMap<&'static str, Duration>);

impl Clock {
    fn time<T>(&mut self, name: &'static str, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = f();
        *self.0.entry(name).or_default() += start.elapsed();
        result
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let get = |i: usize, default: &str| args.get(i).cloned().unwrap_or(default.to_owned());
    let s = if get(0, "pocket") == "pocket" { POCKET } else { SMALL };
    let threads = get(1, "2").parse()?;
    let decode = get(2, "decode") == "decode";
    let (rows, context): (usize, usize) = (get(3, "1").parse()?, get(4, "256").parse()?);
    let options = CpuOptions { threads: Some(threads), ..CpuOptions::new(NumericsClass::Bf16) };
    let b = CpuBackend::new(options)?;
    let shape = AttentionShape {
        heads: s.heads,
        nope: s.nope,
        rope: s.rope,
        v: s.v,
        kv_lora: s.kv_lora,
        softmax_scale: 0.1,
        inv_freq: (0..s.rope / 2).map(|i| 0.6_f32.powi(i as i32)).collect(),
        rope_magnitude: 1.0,
        max_positions: 4096,
    };
    let layers = (0..s.layers).map(|i| layer(&b, &s, &shape, i < s.dense)).collect::<Result<Vec<_>>>()?;
    let (table, head) = (bf16(&b, s.vocab, s.hidden)?, bf16(&b, s.vocab, s.hidden)?);
    let attention = b.load_attention(&shape)?;
    let sequences = if decode { rows } else { 1 };
    let tokens = context + if decode { 1 } else { rows };
    let pages = tokens.div_ceil(64);
    let mut cache = b.kv_cache(KvLayout {
        layers: s.layers,
        pages: pages * sequences,
        page_tokens: 64,
        kv_lora_rank: s.kv_lora,
        qk_rope_head_dim: s.rope,
    })?;
    let table_of = |i: usize| (i * pages..(i + 1) * pages).map(|p| PageId(p as u32)).collect();
    let tables: Vec<Vec<PageId>> = (0..sequences).map(table_of).collect();
    let activations = |cols| b.alloc_activations(rows, cols);
    let pairs = rows * s.top_k;
    let mut buffers = Buffers {
        x: b.alloc_residual(rows, s.hidden)?,
        normed: activations(s.hidden)?,
        q_a: activations(s.q_lora)?,
        q_a_normed: activations(s.q_lora)?,
        q: activations(s.heads * (s.nope + s.rope))?,
        kv_a: activations(s.kv_lora + s.rope)?,
        attended: activations(s.heads * s.v)?,
        delta: activations(s.hidden)?,
        sent: b.alloc_rows(rows, s.hidden)?,
        expert_rows: b.alloc_activations(pairs, s.hidden)?,
        wanted: b.alloc_residual(rows, s.hidden)?,
        logits: b.alloc_logits(rows, s.vocab)?,
        step: b.alloc_step(rows)?,
        pass: b.alloc_pass(PassLimits { rows, pairs })?,
        routing: b.alloc_routing(rows, s.top_k)?,
    };
    let network = Network { s, b: &b, layers, table, head, attention, tables, context, rows, decode };
    let mut queue = b.queue()?;
    // The best time of each operation over many steps: the machine may be shared.
    let mut best: BTreeMap<&'static str, Duration> = BTreeMap::new();
    for _ in 0..if decode { 300 } else { 20 } {
        let mut clock = Clock::default();
        network.step(&mut queue, &mut buffers, &mut cache, &mut clock)?;
        for (name, time) in clock.0 {
            best.entry(name).and_modify(|best| *best = time.min(*best)).or_insert(time);
        }
    }
    let total = best.values().sum::<Duration>().as_secs_f64();
    println!("{}: {:.0} tokens/s", b.describe(), rows as f64 / total);
    for (name, time) in &best {
        let time = time.as_secs_f64();
        println!("{name:20} {:10.1} us {:5.1} %", time * 1e6, time / total * 100.0);
    }
    Ok(())
}

struct Network<'a> {
    s: Sizes,
    b: &'a CpuBackend,
    layers: Vec<Layer>,
    table: Weight,
    head: Weight,
    attention: Attention,
    tables: Vec<Vec<PageId>>,
    context: usize,
    rows: usize,
    decode: bool,
}

impl Network<'_> {
    fn begin(&self, q: &mut CpuQueue, step: &mut Step) -> Result<usize> {
        let (rows, position) = (self.rows, self.context as Position);
        let ids: Vec<u32> = (0..rows).map(|i| (i * 37 % self.s.vocab) as u32).collect();
        let segment =
            |form, rows, table| StepSegment { form, rows, first_position: position, block_table: table };
        let tables = self.tables.iter();
        let segments: Vec<StepSegment<'_>> = match self.decode {
            true => tables.map(|table| segment(AttentionForm::Absorbed, 1, &table[..])).collect(),
            false => vec![segment(AttentionForm::Naive, rows, &self.tables[0][..])],
        };
        let wanted: Vec<u32> = if self.decode { (0..rows as u32).collect() } else { vec![rows as u32 - 1] };
        self.b.begin_step(q, &StepRows { ids: &ids, segments: &segments, wanted: &wanted }, step)?;
        Ok(wanted.len())
    }

    fn step(&self, q: &mut CpuQueue, f: &mut Buffers, cache: &mut KvCache, c: &mut Clock) -> Result<()> {
        let (s, b, rows) = (&self.s, self.b, self.rows);
        let gate = GateShape {
            scoring: Scoring::Sigmoid,
            group_score: GroupScore::TwoLargest,
            experts: s.experts,
            n_group: s.groups.0,
            topk_group: s.groups.1,
            top_k: s.top_k,
            norm_topk_prob: true,
            routed_scaling_factor: 2.5,
        };
        let wanted = c.time("begin", || self.begin(q, &mut f.step))?;
        c.time("embed", || b.embed(q, &f.step, &self.table, &mut f.x))?;
        let a = &self.attention;
        for (index, l) in self.layers.iter().enumerate() {
            c.time("norm", || b.rms_norm_residual(q, &f.x, &l.norm, 1e-6, rows, &mut f.normed))?;
            c.time("q_a", || b.linear(q, &f.normed, &l.q_a, rows, &mut f.q_a))?;
            c.time("norm", || b.rms_norm(q, &f.q_a, &l.q_norm, 1e-6, rows, &mut f.q_a_normed))?;
            c.time("q_b", || b.linear(q, &f.q_a_normed, &l.q_b, rows, &mut f.q))?;
            c.time("kv_a", || b.linear(q, &f.normed, &l.kv_a, rows, &mut f.kv_a))?;
            c.time("rope", || b.rope_query(q, &f.step, a, &mut f.q))?;
            c.time("append", || b.kv_append(q, &f.step, a, &f.kv_a, &l.kv_norm, 1e-6, index, cache))?;
            c.time("attention", || b.attend(q, &f.step, a, &l.kv_b, &f.q, index, cache, &mut f.attended))?;
            c.time("o", || b.linear(q, &f.attended, &l.o, rows, &mut f.delta))?;
            c.time("add", || b.add(q, &mut f.x, &f.delta, rows))?;
            c.time("norm", || b.rms_norm_residual(q, &f.x, &l.norm, 1e-6, rows, &mut f.normed))?;
            c.time("shared", || b.ffn(q, &f.normed, &l.shared, rows, &mut f.delta))?;
            if l.experts.is_empty() {
                c.time("add", || b.add(q, &mut f.x, &f.delta, rows))?;
                continue;
            }
            c.time("gate", || b.gate(q, &f.step, &f.normed, &l.gate, &l.bias, &gate, &mut f.routing))?;
            self.experts(q, f, l, c)?;
        }
        let norm = &self.layers[0].norm;
        c.time("norm", || {
            b.gather_wanted(q, &f.step, &f.x, &mut f.wanted)?;
            b.rms_norm_residual(q, &f.wanted, norm, 1e-6, wanted, &mut f.normed)
        })?;
        c.time("logits", || b.logits(q, &f.normed, &self.head, wanted, &mut f.logits))
    }

    fn experts(&self, q: &mut CpuQueue, f: &mut Buffers, l: &Layer, c: &mut Clock) -> Result<()> {
        let (s, b) = (&self.s, self.b);
        let idx = b.routed(&f.routing)?;
        let mut order: Vec<u32> = (0..idx.len() as u32).collect();
        order.sort_by_key(|pair| idx[*pair as usize]);
        let from: Vec<u32> = order.iter().map(|pair| pair / s.top_k as u32).collect();
        let mut groups = Vec::<RowGroup>::new();
        for pair in &order {
            let expert = usize::from(idx[*pair as usize]);
            match groups.last_mut() {
                Some(group) if group.expert == expert => group.rows += 1,
                _ => groups.push(RowGroup { expert, rows: 1 }),
            }
        }
        let table = b.expert_table(l.experts.clone())?;
        c.time("encode", || b.encode(q, &f.normed, self.rows, ScaleFormat::F32, &mut f.sent))?;
        let pass = PassRows { input: &from, output: &order, groups: &groups };
        c.time("begin", || b.begin_pass(q, &pass, &mut f.pass))?;
        c.time("experts", || b.grouped_ffn(q, &f.pass, &table, &f.sent, &mut f.expert_rows))?;
        let format = RowFormat::Bf16;
        let mut memory = b.staging(idx.len() * format.row_bytes(s.hidden))?;
        c.time("download", || b.download_activations(q, &f.expert_rows, 0..idx.len(), &mut memory, 0))?;
        let targets = (0..idx.len() as u32).collect();
        let chunks = vec![ExpertChunk { rows: bytes::Bytes::from_owner(memory), targets }];
        let rows = ExpertRows { format, pairs: idx.len(), hidden: s.hidden, chunks };
        c.time("combine", || b.combine(q, &rows, &f.routing, Some(&f.delta), &mut f.x))
    }
}
