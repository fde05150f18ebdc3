//! What the machine can do, and what the kernels do of it, measured in one run.
//!
//! Read bandwidth and FMA peak are the two roofs: a decode step reads every weight it uses once per step, a
//! prefill step uses a weight for many rows. [`kernels`] times the backend's own operations, through the
//! public trait, on shapes of V3 and of the pocket checkpoint and puts each beside its roof. Every figure is
//! the best of several repetitions: the machine may be shared, and what is asked is what the code can do.

use std::{
    hint::black_box,
    sync::{Arc, Barrier},
    time::{Duration, Instant},
};

use cadre_ops::{
    AttentionForm, AttentionShape, Backend, Ffn, HostMatrix, KvLayout, MatrixData, OpsError, PassLimits,
    PassRows, RowGroup, StepRows, StepSegment,
};
use cadre_types::{NumericsClass, PageId, Position, config::ScaleFormat};

use crate::{
    Buffer, CpuBackend, CpuOptions, CpuQueue, Isa, Weight, kernels::probe, memory::Aligned, table::Kernels,
};

/// Bytes each thread reads per pass: twice the largest L3 that a core complex of today shares.
const READ_BYTES: usize = 128 << 20;
/// Repetitions of which the best counts.
const REPETITIONS: usize = 7;

/// What bounds an operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rate {
    /// Weight bytes read per second.
    BytesPerSecond(f64),
    /// Multiplications and additions per second.
    FlopPerSecond(f64),
}

/// One measured operation.
#[derive(Clone, Debug)]
pub struct Measurement {
    /// The operation.
    pub name: &'static str,
    /// Its shape, in words.
    pub shape: String,
    /// Threads of the backend.
    pub threads: usize,
    /// Time of one call.
    pub seconds: f64,
    /// What it achieved.
    pub rate: Rate,
    /// `rate` over the roof of its kind, measured in the same run with the same number of threads.
    pub fraction: f64,
}

/// The two roofs.
#[derive(Clone, Copy, Debug)]
pub struct Roof {
    /// Bytes per second.
    pub read: f64,
    /// Operations per second.
    pub flop: f64,
}

/// Bytes per second that `threads` threads together read from memory (arrays larger than the caches).
pub fn read_bandwidth(threads: usize) -> Result<f64, OpsError> {
    let kernels = best_kernels()?;
    let mut arrays = Vec::new();
    for _ in 0..threads {
        let mut array = Aligned::<f32>::zeroed("read_bandwidth", READ_BYTES / 4)?;
        // Pages that were never written all map to the one page of zeros, which is always cached.
        array.fill(1.0);
        arrays.push(array);
    }
    let seconds = together(threads, |thread| {
        let array = &arrays[thread];
        // SAFETY: the table matches the machine; the array holds `len` values.
        black_box(unsafe { (kernels.read)(array.as_ptr(), array.len()) });
    });
    Ok((threads * READ_BYTES) as f64 / seconds)
}

/// Floating-point operations per second of FMA in registers on `threads` threads.
pub fn fma_peak(threads: usize) -> Result<f64, OpsError> {
    const ROUNDS: usize = 4_000_000;
    let kernels = best_kernels()?;
    let seconds = together(threads, |thread| {
        // SAFETY: the table matches the machine.
        black_box(unsafe { (kernels.multiply_add)(ROUNDS, thread as f32 * 1e-3) });
    });
    Ok((threads * ROUNDS * probe::FLOP_PER_ROUND) as f64 / seconds)
}

fn best_kernels() -> Result<&'static Kernels, OpsError> {
    Kernels::of(Isa::best()).map_err(|error| OpsError::Device { op: "measure", message: error.to_string() })
}

/// Best time in which all threads, started together, finish `f`.
fn together(threads: usize, f: impl Fn(usize) + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let once = || {
        let elapsed = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..threads)
                .map(|thread| {
                    let (barrier, f) = (&barrier, &f);
                    scope.spawn(move || {
                        barrier.wait();
                        let start = Instant::now();
                        f(thread);
                        start.elapsed()
                    })
                })
                .collect();
            handles.into_iter().filter_map(|h| h.join().ok()).max()
        });
        elapsed.unwrap_or(Duration::MAX).as_secs_f64()
    };
    (0..REPETITIONS).map(|_| once()).fold(f64::INFINITY, f64::min)
}

/// Roofs and kernels for a class on a number of threads.
pub fn kernels(class: NumericsClass, threads: usize) -> Result<(Roof, Vec<Measurement>), OpsError> {
    let roof = Roof { read: read_bandwidth(threads)?, flop: fma_peak(threads)? };
    let options = CpuOptions { threads: Some(threads), ..CpuOptions::new(class) };
    let mut bench = Bench { backend: CpuBackend::new(options)?, threads, roof, rows: Vec::new() };
    // V3: o_proj as the longest product of a layer; larger than the L3 of most machines.
    bench.linear("linear, decode", Dtype::E4m3, 1, 7168, 16384)?;
    bench.linear("linear, decode", Dtype::E4m3, 4, 7168, 16384)?;
    bench.linear("linear, decode", Dtype::Bf16, 1, 7168, 8192)?;
    bench.linear("linear, prefill", Dtype::E4m3, 96, 2048, 7168)?;
    bench.linear("linear, prefill", Dtype::Bf16, 96, 2048, 7168)?;
    bench.experts("experts, decode", 7168, 2048, &[1; 8])?;
    bench.experts("experts, prefill", 7168, 2048, &[48; 4])?;
    // The pocket checkpoint: everything is in cache and a call is microseconds.
    bench.linear("linear, decode", Dtype::E4m3, 1, 256, 256)?;
    bench.linear("linear, decode", Dtype::E4m3, 32, 256, 256)?;
    bench.experts("experts, decode", 256, 128, &[1; 4])?;
    bench.experts("experts, decode", 256, 128, &[4; 32])?;
    bench.experts("experts, prefill", 256, 128, &[64; 32])?;
    let v3 = shape(128, 128, 64, 128, 512);
    let pocket = shape(4, 64, 32, 64, 128);
    bench.decode_attention("attention, decode", &v3, 1, 1024)?;
    bench.decode_attention("attention, decode", &pocket, 32, 256)?;
    bench.prefill_attention("attention, prefill", &pocket, 512)?;
    bench.norm("rms_norm", 1, 256)?;
    bench.norm("rms_norm", 64, 7168)?;
    Ok((roof, bench.rows))
}

/// A step of the backend.
type Step = <CpuBackend as Backend>::Step;

/// Element type of generated weights.
#[derive(Clone, Copy, Debug)]
enum Dtype {
    E4m3,
    Bf16,
}

struct Bench {
    backend: CpuBackend,
    threads: usize,
    roof: Roof,
    rows: Vec<Measurement>,
}

/// Work of one call.
enum Work {
    Bytes(usize),
    Flop(usize),
}

impl Bench {
    /// Times `f`: windows of at least 2 ms, for half a second in all; the best window counts.
    fn time(&self, mut f: impl FnMut() -> Result<(), OpsError>) -> Result<f64, OpsError> {
        f()?;
        let start = Instant::now();
        f()?;
        let once = start.elapsed().as_secs_f64().max(1e-7);
        let calls = (0.002 / once).clamp(1.0, 1e5) as usize;
        let windows = (0.5 / (once * calls as f64)).clamp(REPETITIONS as f64, 100.0) as usize;
        let mut best = f64::INFINITY;
        for _ in 0..windows {
            let start = Instant::now();
            for _ in 0..calls {
                f()?;
            }
            best = best.min(start.elapsed().as_secs_f64() / calls as f64);
        }
        Ok(best)
    }

    fn record(&mut self, name: &'static str, shape: String, seconds: f64, work: Work) {
        let (rate, fraction) = match work {
            Work::Bytes(bytes) => {
                let rate = bytes as f64 / seconds;
                (Rate::BytesPerSecond(rate), rate / self.roof.read)
            }
            Work::Flop(flop) => {
                let rate = flop as f64 / seconds;
                (Rate::FlopPerSecond(rate), rate / self.roof.flop)
            }
        };
        let threads = self.threads;
        self.rows.push(Measurement { name, shape, threads, seconds, rate, fraction });
    }

    fn buffer(&self, rows: usize, cols: usize) -> Result<Buffer, OpsError> {
        let mut buffer = self.backend.alloc_activations(rows, cols)?;
        let value = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 1000.0 - 0.5;
        let values: Vec<f32> = (0..rows * cols).map(value).collect();
        self.backend.write_activations(&mut self.backend.queue()?, &values, &mut buffer)?;
        Ok(buffer)
    }

    /// A step of the given segments.
    fn step(&self, queue: &mut CpuQueue, segments: &[StepSegment<'_>]) -> Result<Step, OpsError> {
        let rows = segments.iter().map(|segment| segment.rows).sum();
        let mut step = self.backend.alloc_step(rows)?;
        let ids = vec![0; rows];
        self.backend.begin_step(queue, &StepRows { ids: &ids, segments, wanted: &[] }, &mut step)?;
        Ok(step)
    }

    fn linear(
        &mut self,
        name: &'static str,
        dtype: Dtype,
        m: usize,
        n: usize,
        k: usize,
    ) -> Result<(), OpsError> {
        let weight = matrix(dtype, n, k, |host| self.backend.load_matrix(host))?;
        let (x, mut y) = (self.buffer(m, k)?, self.backend.alloc_activations(m, n)?);
        let mut queue = self.backend.queue()?;
        let seconds = self.time(|| self.backend.linear(&mut queue, &x, &weight, m, &mut y))?;
        let work = match m {
            0..=4 => Work::Bytes(self.backend.weight_bytes(&weight)),
            _ => Work::Flop(2 * m * n * k),
        };
        self.record(name, format!("{dtype:?} {m} x {n} x {k}"), seconds, work);
        Ok(())
    }

    fn experts(
        &mut self,
        name: &'static str,
        hidden: usize,
        inner: usize,
        group_rows: &[usize],
    ) -> Result<(), OpsError> {
        let load = |_: &usize| ffn(&self.backend, hidden, inner).map(Arc::new);
        let experts = group_rows.iter().map(load).collect::<Result<Vec<_>, _>>()?;
        let bytes = |ffn: &Arc<Ffn<Weight>>| {
            self.backend.weight_bytes(&ffn.gate_up) + self.backend.weight_bytes(&ffn.down)
        };
        let expert_bytes = experts.iter().map(bytes).sum();
        let table = self.backend.expert_table(experts)?;
        let groups: Vec<RowGroup> =
            group_rows.iter().enumerate().map(|(expert, &rows)| RowGroup { expert, rows }).collect();
        let rows: usize = group_rows.iter().sum();
        let mut queue = self.backend.queue()?;
        let x = self.buffer(rows, hidden)?;
        let mut sent = self.backend.alloc_rows(rows, hidden)?;
        self.backend.encode(&mut queue, &x, rows, ScaleFormat::F32, &mut sent)?;
        let pairs: Vec<u32> = (0..rows as u32).collect();
        let mut pass = self.backend.alloc_pass(PassLimits { rows, pairs: rows })?;
        let described = PassRows { input: &pairs, output: &pairs, groups: &groups };
        self.backend.begin_pass(&mut queue, &described, &mut pass)?;
        let mut y = self.backend.alloc_activations(rows, hidden)?;
        let seconds = self.time(|| self.backend.grouped_ffn(&mut queue, &pass, &table, &sent, &mut y))?;
        let work = match group_rows[0] {
            0..=4 => Work::Bytes(expert_bytes),
            _ => Work::Flop(6 * rows * hidden * inner),
        };
        let shape = format!("{} experts of {hidden} x {inner}, {} rows each", groups.len(), group_rows[0]);
        self.record(name, shape, seconds, work);
        Ok(())
    }

    fn norm(&mut self, name: &'static str, rows: usize, cols: usize) -> Result<(), OpsError> {
        let (x, mut y) = (self.buffer(rows, cols)?, self.backend.alloc_activations(rows, cols)?);
        let weight = self.backend.load_vector(&vec![1.0; cols])?;
        let mut queue = self.backend.queue()?;
        let seconds = self.time(|| self.backend.rms_norm(&mut queue, &x, &weight, 1e-6, rows, &mut y))?;
        self.record(name, format!("{rows} x {cols}"), seconds, Work::Bytes(rows * cols * 4));
        Ok(())
    }

    /// Cached rows of `sequences` sequences of `tokens` tokens each, and their block tables.
    fn cached(
        &self,
        queue: &mut CpuQueue,
        shape: &AttentionShape,
        sequences: usize,
        tokens: usize,
    ) -> Result<(crate::Attention, crate::KvCache, Vec<Vec<PageId>>), OpsError> {
        let pages = tokens.div_ceil(KvLayout::PAGE_TOKENS);
        let layout = KvLayout {
            layers: 1,
            pages: pages * sequences,
            page_tokens: KvLayout::PAGE_TOKENS,
            kv_lora_rank: shape.kv_lora,
            qk_rope_head_dim: shape.rope,
        };
        let attention = self.backend.load_attention(shape)?;
        let mut cache = self.backend.kv_cache(layout)?;
        let norm = self.backend.load_vector(&vec![1.0; shape.kv_lora])?;
        let kv_a = self.buffer(tokens, shape.kv_lora + shape.rope)?;
        let table = |s: usize| (s * pages..(s + 1) * pages).map(|p| PageId(p as u32)).collect();
        let tables: Vec<Vec<PageId>> = (0..sequences).map(table).collect();
        for table in &tables {
            let segment = StepSegment {
                form: AttentionForm::Naive,
                rows: tokens,
                first_position: 0,
                block_table: table,
            };
            let step = self.step(queue, &[segment])?;
            self.backend.kv_append(queue, &step, &attention, &kv_a, &norm, 1e-6, 0, &mut cache)?;
        }
        Ok((attention, cache, tables))
    }

    fn decode_attention(
        &mut self,
        name: &'static str,
        shape: &AttentionShape,
        sequences: usize,
        tokens: usize,
    ) -> Result<(), OpsError> {
        let mut queue = self.backend.queue()?;
        let (attention, cache, tables) = self.cached(&mut queue, shape, sequences, tokens)?;
        let kv_up = self.kv_up(shape)?;
        let q = self.buffer(sequences, shape.heads * (shape.nope + shape.rope))?;
        let mut out = self.backend.alloc_activations(sequences, shape.heads * shape.v)?;
        let segment = |table| StepSegment {
            form: AttentionForm::Absorbed,
            rows: 1,
            first_position: tokens as Position - 1,
            block_table: table,
        };
        let segments: Vec<StepSegment<'_>> = tables.iter().map(|table| segment(&table[..])).collect();
        let step = self.step(&mut queue, &segments)?;
        let seconds = self
            .time(|| self.backend.attend(&mut queue, &step, &attention, &kv_up, &q, 0, &cache, &mut out))?;
        let core = tokens * (2 * shape.kv_lora + shape.rope);
        let absorb = shape.kv_lora * (shape.nope + shape.v);
        let work = Work::Flop(2 * sequences * shape.heads * (core + absorb));
        let shape = format!("{sequences} rows, {} heads, {tokens} keys", shape.heads);
        self.record(name, shape, seconds, work);
        Ok(())
    }

    fn prefill_attention(
        &mut self,
        name: &'static str,
        shape: &AttentionShape,
        tokens: usize,
    ) -> Result<(), OpsError> {
        let mut queue = self.backend.queue()?;
        let (attention, cache, tables) = self.cached(&mut queue, shape, 1, tokens)?;
        let kv_up = self.kv_up(shape)?;
        let q = self.buffer(tokens, shape.heads * (shape.nope + shape.rope))?;
        let mut out = self.backend.alloc_activations(tokens, shape.heads * shape.v)?;
        let segment = StepSegment {
            form: AttentionForm::Naive,
            rows: tokens,
            first_position: 0,
            block_table: &tables[0],
        };
        let step = self.step(&mut queue, &[segment])?;
        let seconds = self
            .time(|| self.backend.attend(&mut queue, &step, &attention, &kv_up, &q, 0, &cache, &mut out))?;
        let pairs = tokens * (tokens + 1) / 2 * (shape.nope + shape.rope + shape.v);
        let expand = tokens * shape.kv_lora * (shape.nope + shape.v);
        let work = Work::Flop(2 * shape.heads * (pairs + expand));
        self.record(name, format!("{} heads, {tokens} tokens", shape.heads), seconds, work);
        Ok(())
    }

    fn kv_up(&self, shape: &AttentionShape) -> Result<crate::KvUp, OpsError> {
        let rows = shape.heads * (shape.nope + shape.v);
        matrix(Dtype::E4m3, rows, shape.kv_lora, |host| self.backend.load_kv_up(shape, host))
    }
}

fn shape(heads: usize, nope: usize, rope: usize, v: usize, kv_lora: usize) -> AttentionShape {
    AttentionShape {
        heads,
        nope,
        rope,
        v,
        kv_lora,
        softmax_scale: 0.1,
        inv_freq: (0..rope / 2).map(|i| 0.75_f32.powi(i as i32)).collect(),
        rope_magnitude: 1.0,
        max_positions: 4096,
    }
}

/// A generated matrix, given to `load`.
fn matrix<T>(
    dtype: Dtype,
    rows: usize,
    cols: usize,
    load: impl FnOnce(HostMatrix<'_>) -> Result<T, OpsError>,
) -> Result<T, OpsError> {
    let byte = |i: usize| (i.wrapping_mul(2_654_435_761) >> 13) as u8;
    match dtype {
        // Exponents around 1: magnitudes from 2^-3 to 2, both signs.
        Dtype::E4m3 => {
            let codes: Vec<u8> = (0..rows * cols).map(|i| byte(i) & 0x9F | 0x20).collect();
            let scales = vec![0.01; rows.div_ceil(128) * cols.div_ceil(128)];
            load(HostMatrix {
                rows,
                cols,
                data: MatrixData::E4m3 {
                    codes: &codes,
                    scales: &scales,
                    block: MatrixData::BLOCK,
                    input_scales: ScaleFormat::F32,
                },
            })
        }
        Dtype::Bf16 => {
            let code = |i: usize| [byte(i), 0x3C | byte(i + 1) & 0x80];
            let bytes: Vec<u8> = (0..rows * cols).flat_map(code).collect();
            load(HostMatrix { rows, cols, data: MatrixData::Bf16(&bytes) })
        }
    }
}

fn ffn(backend: &CpuBackend, hidden: usize, inner: usize) -> Result<Ffn<Weight>, OpsError> {
    let d = Dtype::E4m3;
    matrix(d, inner, hidden, |gate| {
        matrix(d, inner, hidden, |up| matrix(d, hidden, inner, |down| backend.load_ffn(gate, up, down)))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn roofs_are_finite_and_positive() {
        for rate in [read_bandwidth(1).unwrap(), fma_peak(1).unwrap()] {
            assert!(rate.is_finite() && rate > 0.0, "{rate}");
        }
    }
}
