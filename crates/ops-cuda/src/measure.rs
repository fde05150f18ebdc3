//! What the card can do, and what the kernels do of it, measured in one run.
//!
//! The backend's own operations in class `cuda-fp8`, through the public trait, on V3's shapes: what is measured is what
//! serves. Data are normally distributed (hardware may run faster on zeros), every call comes after 256 MB of other writes
//! (L2 is cold), and a figure is the median of 30 calls between two events on the device. Beside it stand the times of each
//! launch, taken in calls of their own because events between launches cost time. The yardstick is the read bandwidth of the
//! same run.

mod noise;

use std::sync::Arc;

use bytes::Bytes;
use cadre_ops::{
    AttentionForm, AttentionShape, Backend, ElementType, Ffn, KvLayout, OpsError, PassLimits, PassRows,
    RowGroup, StepRows, StepSegment,
};
use cadre_types::{NumericsClass, PageId, Position, config::ScaleFormat};

use self::noise::Noise;
use crate::{
    backend::{Attention, CudaBackend, CudaQueue, ExpertTable, KvCache, KvUp, Plane, Rows, Weight},
    device::{DeviceInfo, Memory},
    kernels::Kernel,
    launch::{Arg, Grid},
};

/// Calls of which the median counts, after some that do not.
const CALLS: usize = 30;
const WARM: usize = 3;

/// Bytes written before each call: five times the L2 of an H200.
const FLUSH: usize = 256 << 20;

/// Bytes that the yardstick reads.
const READ: usize = 2 << 30;

/// One launch of an operation.
#[derive(Clone, Debug)]
pub struct Part {
    /// The entry point.
    pub kernel: &'static str,
    /// Its time.
    pub seconds: f64,
}

/// One measured operation.
#[derive(Clone, Debug)]
pub struct Figure {
    /// The operation.
    pub name: &'static str,
    /// Its shape, in words.
    pub shape: String,
    /// Time of one call.
    pub seconds: f64,
    /// Bytes of weights or cached rows that it has to read.
    pub bytes: f64,
    /// Multiplications and additions that it has to do.
    pub flop: f64,
    /// Its launches in order.
    pub parts: Vec<Part>,
}

/// Everything that was measured.
#[derive(Clone, Debug)]
pub struct Report {
    /// The card.
    pub device: DeviceInfo,
    /// Bytes per second.
    pub read: f64,
    /// The operations.
    pub figures: Vec<Figure>,
}

/// V3's attention.
const HEADS: usize = 128;
const NOPE: usize = 128;
const ROPE: usize = 64;
const KV_LORA: usize = 512;
const HIDDEN: usize = 7168;
const INNER: usize = 2048;
const EXPERTS: usize = 8;

/// What is told while it is measured.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// What comes next.
    Next(&'a str),
    /// A figure.
    Figure(&'a Figure),
}

/// Measures `cuda:ordinal`.
pub fn kernels(ordinal: usize, tell: &mut dyn FnMut(Progress<'_>)) -> Result<Report, OpsError> {
    let backend = CudaBackend::open(ordinal, NumericsClass::CudaFp8, None)?;
    let device = backend.device().info().clone();
    let queue = backend.queue()?;
    let flush = Memory::new(backend.device(), "measure", FLUSH)?;
    let mut bench = Bench { queue, flush, noise: Noise::new(), figures: Vec::new(), backend: &backend, tell };
    (bench.tell)(Progress::Next("read bandwidth"));
    let read = bench.read()?;
    for (name, n, k) in [
        ("q_a", 1536, HIDDEN),
        ("kv_a", KV_LORA + ROPE, HIDDEN),
        ("q_b", HEADS * (NOPE + ROPE), 1536),
        ("o", HIDDEN, HEADS * NOPE),
    ] {
        (bench.tell)(Progress::Next(name));
        bench.dense(name, ElementType::E4m3, n, k, &[1, 32, 64, 128])?;
    }
    (bench.tell)(Progress::Next("large products"));
    bench.dense("square", ElementType::E4m3, 8192, 8192, &[128, 8192])?;
    bench.dense("square, bf16", ElementType::Bf16, 8192, 8192, &[128, 8192])?;
    (bench.tell)(Progress::Next("shared expert"));
    bench.shared_expert(&[1, 32, 64, 128])?;
    (bench.tell)(Progress::Next("routed experts"));
    bench.experts()?;
    (bench.tell)(Progress::Next("attention"));
    bench.attention()?;
    Ok(Report { device, read, figures: bench.figures })
}

struct Bench<'a> {
    backend: &'a CudaBackend,
    queue: CudaQueue,
    flush: Memory,
    noise: Noise,
    figures: Vec<Figure>,
    tell: &'a mut dyn FnMut(Progress<'_>),
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl Bench<'_> {
    /// The median of a call, and of each of its launches.
    fn time(
        &mut self,
        mut call: impl FnMut(&CudaBackend, &mut CudaQueue) -> Result<(), OpsError>,
    ) -> Result<(f64, Vec<Part>), OpsError> {
        let op = "measure";
        let (mut whole, mut parts) = (Vec::new(), Vec::<(Kernel, Vec<f64>)>::new());
        for number in 0..WARM + CALLS {
            self.queue.stream.zero(op, self.flush.address(), FLUSH)?;
            let begun = self.queue.stream.record_timed(op)?;
            call(self.backend, &mut self.queue)?;
            let ended = self.queue.stream.record_timed(op)?;
            self.queue.finish(op)?;
            if number >= WARM {
                whole.push(ended.seconds_since(&begun, op)?);
            }
        }
        for _ in 0..CALLS {
            self.queue.stream.zero(op, self.flush.address(), FLUSH)?;
            self.queue.time_launches(true);
            let called = call(self.backend, &mut self.queue);
            let laps = self.queue.laps(op);
            self.queue.time_launches(false);
            called?;
            for (at, (kernel, seconds)) in laps?.into_iter().enumerate() {
                if parts.len() == at {
                    parts.push((kernel, Vec::new()));
                }
                parts[at].1.push(seconds);
            }
        }
        let part = |(kernel, times): (Kernel, Vec<f64>)| Part {
            kernel: kernel.entry().name,
            seconds: median(times),
        };
        Ok((median(whole), parts.into_iter().map(part).collect()))
    }

    fn record(
        &mut self,
        name: &'static str,
        shape: String,
        (seconds, parts): (f64, Vec<Part>),
        work: (f64, f64),
    ) {
        let (bytes, flop) = work;
        let figure = Figure { name, shape, seconds, bytes, flop, parts };
        (self.tell)(Progress::Figure(&figure));
        self.figures.push(figure);
    }

    fn read(&mut self) -> Result<f64, OpsError> {
        let memory = Memory::zeroed(&self.queue.stream, "measure", READ)?;
        // Not zeros.
        let noise = self.noise.bytes(ElementType::E4m3, 64 << 20);
        self.queue.stream.upload("measure", &noise, memory.address())?;
        self.double(memory.address(), noise.len(), READ)?;
        let blocks = 4 * self.backend.device().info().multiprocessors;
        let (address, sink) = (memory.address(), self.flush.address());
        let (seconds, _) = self.time(|_, queue| {
            let args = [Arg::Pointer(address), Arg::U64(READ as u64 / 16), Arg::Pointer(sink)];
            queue.launch(Kernel::ReadAll, Grid::of(blocks, 512), &args)
        })?;
        Ok(READ as f64 / seconds)
    }

    /// Repeats the first bytes to the end.
    fn double(&mut self, address: u64, mut filled: usize, bytes: usize) -> Result<(), OpsError> {
        while filled < bytes {
            let more = filled.min(bytes - filled);
            self.queue.stream.copy("measure", address, address + filled as u64, more)?;
            filled += more;
        }
        self.queue.finish("measure")
    }

    /// Normally distributed activations.
    fn activations(&mut self, rows: usize, cols: usize) -> Result<Plane, OpsError> {
        let mut plane = self.backend.alloc_activations(rows, cols)?;
        let some = rows.min(64);
        let values = self.noise.values(some * cols);
        self.backend.write_activations(&mut self.queue, &values, &mut plane)?;
        self.double(plane.memory.address(), some * cols * 2, rows * cols * 2)?;
        Ok(plane)
    }

    fn matrix(&mut self, elements: ElementType, n: usize, k: usize) -> Result<Weight, OpsError> {
        self.noise.with_matrix(elements, n, k, |matrix| self.backend.load_matrix(matrix))
    }

    fn expert(&mut self) -> Result<Ffn<Weight>, OpsError> {
        let backend = self.backend;
        self.noise.with_ffn(HIDDEN, INNER, |[gate, up, down]| backend.load_ffn(gate, up, down))
    }

    fn dense(
        &mut self,
        name: &'static str,
        elements: ElementType,
        n: usize,
        k: usize,
        rows: &[usize],
    ) -> Result<(), OpsError> {
        let weight = self.matrix(elements, n, k)?;
        let wide = if elements == ElementType::E4m3 { 1 } else { 2 };
        for &rows in rows {
            let x = self.activations(rows, k)?;
            let mut y = self.backend.alloc_activations(rows, n)?;
            let took = self.time(|backend, queue| backend.linear(queue, &x, &weight, rows, &mut y))?;
            let work = ((n * k * wide) as f64, 2.0 * rows as f64 * (n * k) as f64);
            self.record(name, format!("{n} x {k}, {rows} rows"), took, work);
        }
        Ok(())
    }

    fn shared_expert(&mut self, rows: &[usize]) -> Result<(), OpsError> {
        let ffn = self.expert()?;
        for &rows in rows {
            let x = self.activations(rows, HIDDEN)?;
            let mut y = self.backend.alloc_activations(rows, HIDDEN)?;
            let took = self.time(|backend, queue| backend.ffn(queue, &x, &ffn, rows, &mut y))?;
            let weights = (3 * HIDDEN * INNER) as f64;
            self.record(
                "shared expert",
                format!("{rows} rows"),
                took,
                (weights, 2.0 * rows as f64 * weights),
            );
        }
        Ok(())
    }

    fn experts(&mut self) -> Result<(), OpsError> {
        let experts = (0..EXPERTS).map(|_| self.expert().map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
        let table = self.backend.expert_table(experts)?;
        for rows in [1, 8, 16, 32, 64, 128, 256, 1024, 4096] {
            self.pass("experts", &table, EXPERTS, rows, false)?;
        }
        for rows in [1, 8, 16, 32, 64] {
            self.pass("experts, in products", &table, EXPERTS, rows, true)?;
        }
        for active in [4, 1] {
            self.pass("experts", &table, active, 32, false)?;
        }
        Ok(())
    }

    /// The first `active` experts with `rows` pairs each.
    fn pass(
        &mut self,
        name: &'static str,
        table: &ExpertTable,
        active: usize,
        rows: usize,
        in_products: bool,
    ) -> Result<(), OpsError> {
        let pairs = active * rows;
        let x = self.activations(pairs, HIDDEN)?;
        let mut sent: Rows = self.backend.alloc_rows(pairs, HIDDEN)?;
        self.backend.encode(&mut self.queue, &x, pairs, ScaleFormat::F32, &mut sent)?;
        let mut y = self.backend.alloc_activations(pairs, HIDDEN)?;
        // 29 and any power of two have no common divisor: every row once.
        let input: Vec<u32> = (0..pairs).map(|pair| ((pair * 29 + 5) % pairs) as u32).collect();
        let output: Vec<u32> = (0..pairs as u32).collect();
        let groups: Vec<RowGroup> = (0..active).map(|expert| RowGroup { expert, rows }).collect();
        let mut pass = self.backend.alloc_pass(PassLimits { rows: pairs, pairs })?;
        let described = PassRows { input: &input, output: &output, groups: &groups };
        self.backend.begin_pass(&mut self.queue, &described, &mut pass)?;
        let took = self.time(|backend, queue| match in_products {
            true => backend.experts_in_products("grouped_ffn", queue, &pass, table, &sent, &y),
            false => backend.grouped_ffn(queue, &pass, table, &sent, &mut y),
        })?;
        let weights = (3 * HIDDEN * INNER) as f64;
        let work = (active as f64 * weights, 2.0 * pairs as f64 * weights);
        self.record(name, format!("{active} of {EXPERTS} experts, {rows} rows each"), took, work);
        Ok(())
    }

    fn attention(&mut self) -> Result<(), OpsError> {
        let backend = self.backend;
        let shape = AttentionShape {
            heads: HEADS,
            nope: NOPE,
            rope: ROPE,
            v: NOPE,
            kv_lora: KV_LORA,
            // Scores of normal queries and keys spread by 1.3 nats.
            softmax_scale: 1.3 / ((NOPE + ROPE) as f32).sqrt() / 1.5,
            inv_freq: (0..ROPE / 2).map(|i| 10_000_f32.powf(-(i as f32) / (ROPE / 2) as f32)).collect(),
            rope_magnitude: 1.0,
            max_positions: 16_384,
        };
        let attention = backend.load_attention(&shape)?;
        let rows = HEADS * 2 * NOPE;
        let kv_up =
            self.noise.with_matrix(ElementType::Bf16, rows, KV_LORA, |m| backend.load_kv_up(&shape, m))?;
        let (sequences, longest) = (128, 8192);
        let pages = longest / KvLayout::PAGE_TOKENS;
        let layout = KvLayout {
            layers: 1,
            pages: sequences * pages,
            page_tokens: KvLayout::PAGE_TOKENS,
            kv_lora_rank: KV_LORA,
            qk_rope_head_dim: ROPE,
        };
        let mut cache = backend.kv_cache(layout)?;
        // Scattered as a pool in use is: 8,191 has no divisor in common with the number of pages.
        let page = |i: usize| PageId((i * 8191 % (sequences * pages)) as u32);
        let all: Vec<PageId> = (0..sequences * pages).map(page).collect();
        let cached = Bytes::from(self.noise.bytes(ElementType::Bf16, longest * (KV_LORA + ROPE) * 2));
        for table in all.chunks(pages) {
            backend.kv_write(&mut self.queue, &mut cache, 0, table, 0, longest, &cached)?;
        }
        let given = Given { shape, attention, kv_up, cache, pages: all, stride: pages };
        for (batch, keys, queries) in [
            (1, 4096, 1),
            (16, 4096, 1),
            (32, 4096, 1),
            (64, 4096, 1),
            (128, 4096, 1),
            (128, 4096, 2),
            (128, 8192, 1),
        ] {
            self.decode(&given, batch, keys, queries)?;
        }
        for positions in [4096, 16_384] {
            self.prefill(&given, positions)?;
        }
        Ok(())
    }

    fn decode(&mut self, given: &Given, batch: usize, keys: usize, queries: usize) -> Result<(), OpsError> {
        let table =
            |sequence: usize| &given.pages[sequence * given.stride..][..keys.div_ceil(KvLayout::PAGE_TOKENS)];
        let segments: Vec<StepSegment<'_>> = (0..batch)
            .map(|sequence| StepSegment {
                form: AttentionForm::Absorbed,
                rows: queries,
                first_position: (keys - queries) as Position,
                block_table: table(sequence),
            })
            .collect();
        let took = self.attend(given, &segments)?;
        let (bytes, rows) = (batch * keys * (KV_LORA + ROPE) * 2, batch * queries);
        // Scores over latents and rope, then values: of the attention alone.
        let flop = 2.0 * (rows * HEADS * keys) as f64 * (2 * KV_LORA + ROPE) as f64;
        let shape = format!("{batch} sequences, {keys} keys, {queries} queries");
        self.record("attention, absorbed", shape, took, (bytes as f64, flop));
        Ok(())
    }

    fn prefill(&mut self, given: &Given, positions: usize) -> Result<(), OpsError> {
        let segments = [StepSegment {
            form: AttentionForm::Naive,
            rows: positions,
            first_position: 0,
            block_table: &given.pages[..positions.div_ceil(KvLayout::PAGE_TOKENS)],
        }];
        let took = self.attend(given, &segments)?;
        let causal = positions as f64 * positions as f64 / 2.0;
        let flop = 2.0 * causal * (HEADS * (2 * NOPE + ROPE)) as f64;
        let bytes = (positions * (KV_LORA + ROPE) * 2) as f64;
        self.record("attention, naive", format!("{positions} positions"), took, (bytes, flop));
        Ok(())
    }

    fn attend(&mut self, given: &Given, segments: &[StepSegment<'_>]) -> Result<(f64, Vec<Part>), OpsError> {
        let rows = segments.iter().map(|segment| segment.rows).sum();
        let mut step = self.backend.alloc_step(rows)?;
        let ids = vec![0; rows];
        self.backend.begin_step(
            &mut self.queue,
            &StepRows { ids: &ids, segments, wanted: &[] },
            &mut step,
        )?;
        let q = self.activations(rows, HEADS * (NOPE + ROPE))?;
        let mut out = self.backend.alloc_activations(rows, HEADS * given.shape.v)?;
        let Given { attention, kv_up, cache, .. } = given;
        self.time(|backend, queue| backend.attend(queue, &step, attention, kv_up, &q, 0, cache, &mut out))
    }
}

/// One layer's attention with its cached rows.
struct Given {
    shape: AttentionShape,
    attention: Attention,
    kv_up: KvUp,
    cache: KvCache,
    pages: Vec<PageId>,
    /// Pages of a sequence.
    stride: usize,
}
