//! Latent cache and both forms of attention.

use bytes::Bytes;
use cadre_types::{PageId, Position};

use super::{
    Suite, Tolerance, Widths,
    data::{Dtype, Matrix, Stream, activations, attending, read},
};
use crate::{
    backend::Backend,
    host::RowFormat,
    shape::{AttentionShape, KvLayout},
    step::{AttentionForm, StepSegment},
};

/// A model of one layer's attention, its weights, and sequences whose cached rows are given.
pub(super) struct Case {
    pub(super) shape: AttentionShape,
    pub(super) layout: KvLayout,
    pub(super) kv_b: Matrix,
    pub(super) norm: Vec<f32>,
    pub(super) sequences: Vec<Sequence>,
}

/// One sequence: everything before `first` is cached and not computed.
pub(super) struct Sequence {
    pub(super) table: Vec<PageId>,
    pub(super) first: usize,
    pub(super) rows: usize,
    /// `[first + rows, kv_lora + rope]`
    pub(super) kv_a: Vec<f32>,
    /// `[rows, heads * (nope + rope)]`
    pub(super) q: Vec<f32>,
}

impl Case {
    /// `spread`: the standard deviation of scores, in nats. About 2 is a model's; with hundreds every softmax is its largest
    /// key alone, and a rounding of a key decides which.
    pub(super) fn new(seed: u64, dtype: Dtype, w: &Widths, lengths: &[(usize, usize)], spread: f32) -> Self {
        let stream = &mut Stream::new(seed);
        let mut shape = AttentionShape {
            heads: w.heads,
            nope: w.nope,
            rope: w.rope,
            v: w.v,
            kv_lora: w.kv_lora,
            softmax_scale: 1.0,
            inv_freq: (0..w.rope / 2).map(|i| 10_f32.powi(-(i as i32))).collect(),
            rope_magnitude: 1.0,
            max_positions: 1024,
        };
        let pages = 2 + lengths.iter().map(|(f, r)| (f + r).div_ceil(64)).sum::<usize>();
        let layout =
            KvLayout { layers: 2, pages, page_tokens: 64, kv_lora_rank: w.kv_lora, qk_rope_head_dim: w.rope };
        // Pages of all sequences, scattered.
        let mut free: Vec<PageId> = (0..pages as u32).map(PageId).collect();
        let kv_b = Matrix::new(stream, dtype, w.heads * (w.nope + w.v), w.kv_lora);
        let norm = stream.values(w.kv_lora);
        let sequences: Vec<Sequence> = lengths
            .iter()
            .map(|(first, rows)| {
                let take = |_| free.swap_remove(stream.below(free.len()));
                let table = (0..(first + rows).div_ceil(64)).map(take).collect();
                Sequence {
                    table,
                    first: *first,
                    rows: *rows,
                    kv_a: stream.values((first + rows) * (w.kv_lora + w.rope)),
                    q: stream.values(rows * w.heads * (w.nope + w.rope)),
                }
            })
            .collect();
        // The variance of a score: of a query's element times that of a key's, over the elements. A latent element is of
        // unit variance times the norm's weight.
        let rotary = |s: &Sequence| -> Vec<f32> {
            s.kv_a.chunks(w.kv_lora + w.rope).flat_map(|row| row[w.kv_lora..].to_vec()).collect()
        };
        let query = mean_square(sequences.iter().flat_map(|s| s.q.iter().copied()));
        let nope = mean_square(kv_b.values()) * mean_square(norm.iter().copied()) * w.kv_lora as f64;
        let rope = mean_square(sequences.iter().flat_map(rotary));
        let variance = query * (nope * w.nope as f64 + rope * w.rope as f64);
        if variance > 0.0 {
            shape.softmax_scale = (f64::from(spread) / variance.sqrt()) as f32;
        }
        Self { shape, layout, kv_b, norm, sequences }
    }

    /// Appends every cached row, in one step that mixes sequences.
    pub(super) fn fill<B: Backend>(&self, backend: &B, layer: usize) -> (B::Attention, B::KvCache) {
        let queue = &mut backend.queue().unwrap();
        let attention = backend.load_attention(&self.shape).unwrap();
        let norm = backend.load_vector(&self.norm).unwrap();
        let mut cache = backend.kv_cache(self.layout).unwrap();
        let segments: Vec<StepSegment<'_>> = self
            .sequences
            .iter()
            .map(|sequence| StepSegment {
                form: AttentionForm::Naive,
                rows: sequence.first + sequence.rows,
                first_position: 0,
                block_table: &sequence.table,
            })
            .collect();
        let step = attending(backend, queue, &segments);
        let kv_a: Vec<f32> = self.sequences.iter().flat_map(|s| s.kv_a.iter().copied()).collect();
        let kv_a = activations(backend, &kv_a, self.shape.kv_lora + self.shape.rope, 1);
        backend.kv_append(queue, &step, &attention, &kv_a, &norm, 1e-6, layer, &mut cache).unwrap();
        backend.synchronize(queue).unwrap();
        (attention, cache)
    }

    /// The rows of all sequences, in one form.
    pub(super) fn segments(&self, form: AttentionForm) -> Vec<StepSegment<'_>> {
        let segment = |sequence| segment_of(sequence, form);
        self.sequences.iter().map(segment).collect()
    }

    /// Rotates the given queries and attends with them.
    pub(super) fn attend<B: Backend>(
        &self,
        backend: &B,
        filled: &(B::Attention, B::KvCache),
        layer: usize,
        q: &[f32],
        segments: &[StepSegment<'_>],
    ) -> Vec<f32> {
        let kv_up = backend.load_kv_up(&self.shape, self.kv_b.host()).unwrap();
        self.attend_with(backend, filled, &kv_up, layer, q, segments)
    }

    /// The same with another kv_b.
    pub(super) fn attend_with<B: Backend>(
        &self,
        backend: &B,
        (attention, cache): &(B::Attention, B::KvCache),
        kv_up: &B::KvUp,
        layer: usize,
        q: &[f32],
        segments: &[StepSegment<'_>],
    ) -> Vec<f32> {
        let queue = &mut backend.queue().unwrap();
        let step = attending(backend, queue, segments);
        let rows = backend.step_info(&step).rows;
        let mut q = activations(backend, q, self.shape.heads * (self.shape.nope + self.shape.rope), 1);
        backend.rope_query(queue, &step, attention, &mut q).unwrap();
        let mut out = backend.alloc_activations(rows + 1, self.shape.heads * self.shape.v).unwrap();
        backend.attend(queue, &step, attention, kv_up, &q, layer, cache, &mut out).unwrap();
        read(backend, queue, &out, rows + 1)
    }

    pub(super) fn q(&self) -> Vec<f32> {
        self.sequences.iter().flat_map(|s| s.q.iter().copied()).collect()
    }

    /// Everything in naive form, everything in absorbed form, a mixture, and the cached rows.
    fn run<B: Backend>(&self, backend: &B) -> [Vec<f32>; 4] {
        let filled = self.fill(backend, 1);
        let run = |segments: &[StepSegment<'_>]| self.attend(backend, &filled, 1, &self.q(), segments);
        let naive = run(&self.segments(AttentionForm::Naive));
        let absorbed = run(&self.segments(AttentionForm::Absorbed));
        let forms = [AttentionForm::Absorbed, AttentionForm::Naive];
        let mixed: Vec<StepSegment<'_>> =
            self.sequences.iter().enumerate().map(|(i, s)| segment_of(s, forms[i % 2])).collect();
        let mixed = run(&mixed);
        let mut cached = Vec::new();
        for sequence in &self.sequences {
            let bytes = rows_of(
                backend,
                (&filled.1, &self.layout),
                1,
                &sequence.table,
                0,
                sequence.first + sequence.rows,
            );
            let format = RowFormat::combine(backend.class());
            let mut values = vec![0.0; bytes.len() / format.row_bytes(1)];
            crate::check::decode_row(format, &bytes, &[], &mut values);
            cached.extend(values);
        }
        [naive, absorbed, mixed, cached]
    }
}

fn mean_square(values: impl IntoIterator<Item = f32>) -> f64 {
    let (sum, count) =
        values.into_iter().fold((0.0, 0_u32), |(sum, n), v| (sum + f64::from(v) * f64::from(v), n + 1));
    sum / f64::from(count.max(1))
}

pub(super) fn segment_of(sequence: &Sequence, form: AttentionForm) -> StepSegment<'_> {
    StepSegment {
        form,
        rows: sequence.rows,
        first_position: sequence.first as Position,
        block_table: &sequence.table,
    }
}

/// Cached rows of positions `first..first + count`.
pub(super) fn rows_of<B: Backend>(
    backend: &B,
    (cache, layout): (&B::KvCache, &KvLayout),
    layer: usize,
    table: &[PageId],
    first: usize,
    count: usize,
) -> Bytes {
    const SPARE: usize = 5;
    let queue = &mut backend.queue().unwrap();
    let width = RowFormat::combine(backend.class()).row_bytes(layout.kv_lora_rank + layout.qk_rope_head_dim);
    let mut memory = backend.staging(SPARE + count * width).unwrap();
    backend.kv_read(queue, cache, layer, table, first as Position, count, &mut memory, SPARE).unwrap();
    backend.synchronize(queue).unwrap();
    Bytes::from_owner(memory).slice(SPARE..)
}

fn widths<B: Backend>(suite: &Suite<'_, B>, stream: &mut Stream) -> Widths {
    if !suite.attention.is_empty() {
        return suite.attention[stream.below(suite.attention.len())];
    }
    if stream.coin() {
        return Widths {
            heads: 1 + stream.below(4),
            nope: 1 + stream.below(39),
            rope: 2 * stream.below(9),
            v: 1 + stream.below(39),
            kv_lora: 1 + stream.below(159),
        };
    }
    Widths {
        heads: 1 + stream.below(8),
        nope: 16 * (1 + stream.below(4)),
        rope: 16 * (1 + stream.below(2)),
        v: 16 * (1 + stream.below(4)),
        kv_lora: 16 * (1 + stream.below(8)),
    }
}

pub(super) fn compare<B: Backend>(suite: &Suite<'_, B>, case: &Case) {
    let (got, expected) = (case.run(suite.backend), case.run(&suite.reference));
    let cols = case.shape.heads * case.shape.v;
    for (what, i) in [("naive form", 0), ("absorbed form", 1), ("both forms", 2), ("cached rows", 3)] {
        suite.compare(what, &got[i], &expected[i], cols);
    }
}

pub(super) fn forms<B: Backend>(suite: &Suite<'_, B>) {
    suite.each("attention", |stream, rows| {
        let widths = widths(suite, stream);
        let mut left = rows.min(60);
        let mut lengths = Vec::new();
        while lengths.is_empty() || left > 0 {
            let rows = if lengths.len() == 3 { left } else { stream.below(left + 1) };
            lengths.push((stream.below(150), rows));
            left -= rows;
            if lengths.len() == 4 {
                break;
            }
        }
        let dtype = Dtype::any(stream);
        // Flat, as a model's, sharp; and where bits are equal, of one key alone.
        let spreads: &[f32] =
            if suite.tolerance == Tolerance::Bits { &[0.5, 2.0, 4.0, 1000.0] } else { &[0.5, 2.0, 4.0] };
        let spread = spreads[stream.below(spreads.len())];
        compare(suite, &Case::new(stream.bits(), dtype, &widths, &lengths, spread));
    });
}

/// A chunk that crosses several blocks, so that the triangle of a tile is met at every offset.
pub(super) fn long_chunk<B: Backend>(suite: &Suite<'_, B>) {
    let small = Widths { heads: 2, nope: 16, rope: 8, v: 16, kv_lora: 32 };
    let widths = suite.attention.first().unwrap_or(&small);
    compare(suite, &Case::new(3, Dtype::E4m3, widths, &[(37, 230)], 2.0));
}

/// Rows handed over to another cache, at other pages, are the rows that were appended.
pub(super) fn handed_over<B: Backend>(suite: &Suite<'_, B>) {
    let small = Widths { heads: 2, nope: 16, rope: 8, v: 16, kv_lora: 40 };
    let widths = suite.attention.first().unwrap_or(&small);
    let case = Case::new(15, Dtype::E4m3, widths, &[(100, 1)], 2.0);
    let backend = suite.backend;
    let (_, cache) = case.fill(backend, 1);
    let table = &case.sequences[0].table;
    let part = |first, count| rows_of(backend, (&cache, &case.layout), 1, table, first, count);
    let rows = [part(0, 60), part(60, 41)].concat();
    let queue = &mut backend.queue().unwrap();
    let mut other = backend.kv_cache(case.layout).unwrap();
    let elsewhere = [PageId(3), PageId(0)];
    let width = rows.len() / 101;
    // In two parts of any alignment, the bytes dropped at once.
    for (first, count) in [(70, 31), (0, 70)] {
        let part = super::rows::unaligned(&rows[first * width..(first + count) * width]);
        backend.kv_write(queue, &mut other, 0, &elsewhere, first as Position, count, &part).unwrap();
    }
    backend.synchronize(queue).unwrap();
    assert_eq!(rows_of(backend, (&other, &case.layout), 0, &elsewhere, 0, 101), rows);
}
