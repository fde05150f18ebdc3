//! Where the time of a step goes: the operations of a whole network in order, with generated weights, timed
//! one by one: `cargo run --release -p cadre-ops-cpu --example network -- pocket 2 decode 32 256`.
//! Arguments: pocket or small (1.6 B parameters), threads, decode or prefill, rows, tokens of context before.
#![allow(clippy::print_stdout, reason = "the example's output")]

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use cadre_ops::{
    AttentionShape, Backend, DecodeRow, Ffn, GateShape, HostMatrix, HostRows, KvLayout, MatrixData, OpsError,
    PrefillSegment, RowFormat, RowGroup,
};
use cadre_ops_cpu::{Attention, Buffer, CpuBackend, CpuOptions, CpuQueue, KvUp, Vector, Weight};
use cadre_types::{NumericsClass, PageId, Position};

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
    experts: Vec<Ffn<Weight>>,
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
    load(HostMatrix { rows, cols, data: MatrixData::E4m3 { codes: &codes, scales: &scales } })
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
        experts: (0..count).map(|_| ffn(b, s.hidden, s.inner)).collect::<Result<_>>()?,
        norm: b.load_vector(&vec![1.0; s.hidden])?,
        q_norm: b.load_vector(&vec![1.0; s.q_lora])?,
        kv_norm: b.load_vector(&vec![1.0; s.kv_lora])?,
    })
}

struct Buffers {
    x: Buffer,
    normed: Buffer,
    q_a: Buffer,
    q_a_normed: Buffer,
    q: Buffer,
    kv_a: Buffer,
    attended: Buffer,
    delta: Buffer,
    sent: Buffer,
    expert_rows: Buffer,
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
    let mut buffers = Buffers {
        x: b.alloc(rows, s.hidden)?,
        normed: b.alloc(rows, s.hidden)?,
        q_a: b.alloc(rows, s.q_lora)?,
        q_a_normed: b.alloc(rows, s.q_lora)?,
        q: b.alloc(rows, s.heads * (s.nope + s.rope))?,
        kv_a: b.alloc(rows, s.kv_lora + s.rope)?,
        attended: b.alloc(rows, s.heads * s.v)?,
        delta: b.alloc(rows, s.hidden)?,
        sent: b.alloc(rows * s.top_k, s.hidden)?,
        expert_rows: b.alloc(rows * s.top_k, s.hidden)?,
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
    fn step(
        &self,
        q: &mut CpuQueue,
        f: &mut Buffers,
        cache: &mut cadre_ops_cpu::KvCache,
        c: &mut Clock,
    ) -> Result<()> {
        let (s, b, rows) = (&self.s, self.b, self.rows);
        let ids: Vec<u32> = (0..rows).map(|i| (i * 37 % s.vocab) as u32).collect();
        let position = |i: usize| (self.context + if self.decode { 0 } else { i }) as Position;
        let positions: Vec<Position> = (0..rows).map(position).collect();
        let table = |i: usize| &self.tables[if self.decode { i } else { 0 }][..];
        let tables: Vec<&[PageId]> = (0..rows).map(table).collect();
        let gate = GateShape {
            experts: s.experts,
            n_group: s.groups.0,
            topk_group: s.groups.1,
            top_k: s.top_k,
            norm_topk_prob: true,
            routed_scaling_factor: 2.5,
        };
        c.time("embed", || b.embed(q, &self.table, &ids, &mut f.x))?;
        for (index, l) in self.layers.iter().enumerate() {
            c.time("norm", || b.rms_norm(q, &f.x, &l.norm, 1e-6, rows, &mut f.normed))?;
            c.time("q_a", || b.linear(q, &f.normed, &l.q_a, rows, &mut f.q_a))?;
            c.time("norm", || b.rms_norm(q, &f.q_a, &l.q_norm, 1e-6, rows, &mut f.q_a_normed))?;
            c.time("q_b", || b.linear(q, &f.q_a_normed, &l.q_b, rows, &mut f.q))?;
            c.time("kv_a", || b.linear(q, &f.normed, &l.kv_a, rows, &mut f.kv_a))?;
            c.time("rope", || b.rope_query(q, &self.attention, &positions, &mut f.q))?;
            c.time("append", || {
                let (a, norm) = (&self.attention, &l.kv_norm);
                b.kv_append(q, a, &f.kv_a, norm, 1e-6, &positions, &tables, index, cache)
            })?;
            c.time("attention", || self.attend(q, f, cache, index, &l.kv_b))?;
            c.time("o", || b.linear(q, &f.attended, &l.o, rows, &mut f.delta))?;
            c.time("add", || b.add(q, &mut f.x, &f.delta, rows))?;
            c.time("norm", || b.rms_norm(q, &f.x, &l.norm, 1e-6, rows, &mut f.normed))?;
            c.time("shared", || b.ffn(q, &f.normed, &l.shared, rows, &mut f.delta))?;
            if l.experts.is_empty() {
                c.time("add", || b.add(q, &mut f.x, &f.delta, rows))?;
                continue;
            }
            let (mut idx, mut weights) = (Vec::new(), Vec::new());
            c.time("gate", || b.gate(q, &f.normed, &l.gate, &l.bias, &gate, rows, &mut idx, &mut weights))?;
            self.experts(q, f, l, &idx, &weights, c)?;
        }
        c.time("norm", || b.rms_norm(q, &f.x, &self.layers[0].norm, 1e-6, rows, &mut f.normed))?;
        let wanted: Vec<usize> = if self.decode { (0..rows).collect() } else { vec![rows - 1] };
        let mut logits = Vec::new();
        c.time("logits", || b.logits(q, &f.normed, &wanted, &self.head, &mut logits))
    }

    fn attend(
        &self,
        q: &mut CpuQueue,
        f: &mut Buffers,
        cache: &cadre_ops_cpu::KvCache,
        layer: usize,
        kv_b: &KvUp,
    ) -> Result<()> {
        let (a, out) = (&self.attention, &mut f.attended);
        let position = self.context as Position;
        if self.decode {
            let row = |row| DecodeRow { row, position, block_table: &self.tables[row] };
            let rows: Vec<DecodeRow<'_>> = (0..self.rows).map(row).collect();
            return self.b.attention_decode(q, a, kv_b, &f.q, &rows, layer, cache, out);
        }
        let segment = PrefillSegment {
            first_row: 0,
            rows: self.rows,
            first_position: position,
            block_table: &self.tables[0],
        };
        self.b.attention_prefill(q, a, kv_b, &f.q, &[segment], layer, cache, out)
    }

    fn experts(
        &self,
        q: &mut CpuQueue,
        f: &mut Buffers,
        l: &Layer,
        idx: &[u16],
        weights: &[f32],
        c: &mut Clock,
    ) -> Result<()> {
        let (s, b) = (&self.s, self.b);
        let mut order: Vec<usize> = (0..idx.len()).collect();
        order.sort_by_key(|pair| idx[*pair]);
        let from: Vec<usize> = order.iter().map(|pair| pair / s.top_k).collect();
        c.time("gather", || b.gather_rows(q, &f.normed, &from, &mut f.sent))?;
        let (mut experts, mut groups) = (Vec::new(), Vec::<RowGroup>::new());
        for (row, pair) in order.iter().enumerate() {
            if row == 0 || idx[order[row - 1]] != idx[*pair] {
                groups.push(RowGroup { expert: experts.len(), first_row: row, rows: 0 });
                experts.push(&l.experts[usize::from(idx[*pair])]);
            }
            if let Some(group) = groups.last_mut() {
                group.rows += 1;
            }
        }
        c.time("experts", || b.grouped_ffn(q, &f.sent, &experts, &groups, &mut f.expert_rows))?;
        let (mut data, mut scales) = (Vec::new(), Vec::new());
        let format = RowFormat::Bf16;
        c.time("download", || b.download_rows(q, &f.expert_rows, idx.len(), format, &mut data, &mut scales))?;
        let mut sorted = vec![0; data.len()];
        let bytes = s.hidden * 2;
        for (row, pair) in order.iter().enumerate() {
            sorted[pair * bytes..(pair + 1) * bytes].copy_from_slice(&data[row * bytes..(row + 1) * bytes]);
        }
        let host = HostRows { format, rows: idx.len(), cols: s.hidden, data: &sorted, scales: &scales };
        c.time("combine", || b.combine(q, host, weights, s.top_k, Some(&f.delta), self.rows, &mut f.x))
    }
}
