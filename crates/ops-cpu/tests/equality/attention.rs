//! Latent cache and both forms of attention: equality with the reference.

use cadre_ops::{AttentionShape, Backend, DecodeRow, KvLayout, PrefillSegment, ReferenceBackend};
use cadre_types::{NumericsClass, PageId, Position};
use proptest::prelude::*;

use crate::{
    backends,
    data::{DTYPES, Dtype, Matrix, Stream, assert_bits, bits, buffer},
};

/// A model of one layer's attention, its weights, and sequences whose cached rows are given.
pub(crate) struct Case {
    pub(crate) shape: AttentionShape,
    pub(crate) layout: KvLayout,
    pub(crate) kv_b: Matrix,
    pub(crate) norm: Vec<f32>,
    pub(crate) sequences: Vec<Sequence>,
}

/// One sequence: everything before `first` is cached and not computed.
pub(crate) struct Sequence {
    pub(crate) table: Vec<PageId>,
    pub(crate) first: usize,
    pub(crate) rows: usize,
    /// `[first + rows, kv_lora + rope]`
    pub(crate) kv_a: Vec<f32>,
    /// `[rows, heads * (nope + rope)]`
    pub(crate) q: Vec<f32>,
}

#[derive(Debug)]
pub(crate) struct Widths {
    pub(crate) heads: usize,
    pub(crate) nope: usize,
    pub(crate) rope: usize,
    pub(crate) v: usize,
    pub(crate) kv_lora: usize,
}

impl Case {
    pub(crate) fn new(seed: u64, dtype: Dtype, w: &Widths, lengths: &[(usize, usize)]) -> Self {
        let stream = &mut Stream::new(seed);
        let shape = AttentionShape {
            heads: w.heads,
            nope: w.nope,
            rope: w.rope,
            v: w.v,
            kv_lora: w.kv_lora,
            softmax_scale: 0.3,
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
        let sequences = lengths
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
        Self { shape, layout, kv_b, norm, sequences }
    }

    /// Appends every cached row, in batches that mix sequences.
    pub(crate) fn fill<B: Backend>(&self, backend: &B, layer: usize) -> (B::Attention, B::KvCache) {
        let mut queue = backend.queue().unwrap();
        let attention = backend.load_attention(&self.shape).unwrap();
        let norm = backend.load_vector(&self.norm).unwrap();
        let mut cache = backend.kv_cache(self.layout).unwrap();
        let width = self.shape.kv_lora + self.shape.rope;
        let (mut kv_a, mut positions, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        for sequence in &self.sequences {
            kv_a.extend_from_slice(&sequence.kv_a);
            positions.extend(0..(sequence.first + sequence.rows) as Position);
            tables.resize(positions.len(), &sequence.table[..]);
        }
        let kv_a = buffer(backend, &kv_a, width, 1);
        backend
            .kv_append(&mut queue, &attention, &kv_a, &norm, 1e-6, &positions, &tables, layer, &mut cache)
            .unwrap();
        (attention, cache)
    }

    /// Rotated queries of all rows of all sequences.
    pub(crate) fn queries<B: Backend>(&self, backend: &B, attention: &B::Attention) -> B::Buffer {
        let q: Vec<f32> = self.sequences.iter().flat_map(|s| s.q.iter().copied()).collect();
        let width = self.shape.heads * (self.shape.nope + self.shape.rope);
        let mut q = buffer(backend, &q, width, 1);
        let positions: Vec<Position> =
            self.sequences.iter().flat_map(|s| (s.first..s.first + s.rows).map(|p| p as Position)).collect();
        backend.rope_query(&mut backend.queue().unwrap(), attention, &positions, &mut q).unwrap();
        q
    }

    pub(crate) fn rows(&self) -> usize {
        self.sequences.iter().map(|s| s.rows).sum()
    }

    /// Everything in naive form, then everything in absorbed form, then the cached bytes.
    pub(crate) fn run<B: Backend>(&self, backend: &B) -> (Vec<u32>, Vec<u32>, Vec<u8>) {
        let mut queue = backend.queue().unwrap();
        let (attention, cache) = self.fill(backend, 1);
        let q = self.queries(backend, &attention);
        let kv_up = backend.load_kv_up(&self.shape, self.kv_b.host()).unwrap();
        let width = self.shape.heads * self.shape.v;
        let rows = self.rows();
        let (mut segments, mut decode, mut first_row) = (Vec::new(), Vec::new(), 0);
        for s in &self.sequences {
            segments.push(PrefillSegment {
                first_row,
                rows: s.rows,
                first_position: s.first as Position,
                block_table: &s.table,
            });
            decode.extend((0..s.rows).map(|i| DecodeRow {
                row: first_row + i,
                position: (s.first + i) as Position,
                block_table: &s.table,
            }));
            first_row += s.rows;
        }
        let mut naive = backend.alloc(rows + 1, width).unwrap();
        backend
            .attention_prefill(&mut queue, &attention, &kv_up, &q, &segments, 1, &cache, &mut naive)
            .unwrap();
        // Rows in another order than they lie.
        decode.reverse();
        let mut absorbed = backend.alloc(rows + 1, width).unwrap();
        backend
            .attention_decode(&mut queue, &attention, &kv_up, &q, &decode, 1, &cache, &mut absorbed)
            .unwrap();
        let mut bytes = Vec::new();
        for s in &self.sequences {
            let count = s.first + s.rows;
            backend.kv_read(&mut queue, &cache, 1, &s.table, 0, count, &mut bytes).unwrap();
        }
        (bits(backend, &naive, rows + 1), bits(backend, &absorbed, rows + 1), bytes)
    }
}

fn widths() -> impl Strategy<Value = Widths> {
    let odd = (1..5_usize, 0..40_usize, 0..9_usize, 1..40_usize, 1..160_usize)
        .prop_map(|(heads, nope, rope, v, kv_lora)| (heads, nope.max(1), 2 * rope, v, kv_lora));
    let even = (1..9_usize, 1..5_usize, 1..3_usize, 1..5_usize, 1..9_usize)
        .prop_map(|(heads, nope, rope, v, kv_lora)| (heads, 16 * nope, 16 * rope, 16 * v, 16 * kv_lora));
    prop_oneof![odd, even].prop_map(|(heads, nope, rope, v, kv_lora)| Widths {
        heads,
        nope,
        rope,
        v,
        kv_lora,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn attention_equals_the_reference(
        class in 0..3_usize, dtype in 0..3_usize, widths in widths(),
        lengths in prop::collection::vec((0..150_usize, 0..20_usize), 1..4), seed in any::<u64>(),
    ) {
        let class = NumericsClass::ALL[class];
        let case = Case::new(seed, DTYPES[dtype], &widths, &lengths);
        let expected = case.run(&ReferenceBackend::new(class));
        let cols = widths.heads * widths.v;
        for backend in backends(class) {
            let got = case.run(backend);
            assert_eq!(got.2, expected.2, "cached rows, {}", backend.describe());
            assert_bits(&format!("naive, {}", backend.describe()), &got.0, &expected.0, cols);
            assert_bits(&format!("absorbed, {}", backend.describe()), &got.1, &expected.1, cols);
        }
    }
}

/// Long chunks that cross several blocks, so that the triangle of a tile is met at every offset.
#[test]
fn a_long_chunk_equals_the_reference() {
    let widths = Widths { heads: 2, nope: 16, rope: 8, v: 16, kv_lora: 32 };
    let case = Case::new(3, Dtype::E4m3, &widths, &[(37, 230)]);
    let expected = case.run(&ReferenceBackend::new(NumericsClass::Bf16));
    for backend in backends(NumericsClass::Bf16) {
        let got = case.run(backend);
        assert_bits(&backend.describe(), &got.0, &expected.0, 32);
        assert_bits(&backend.describe(), &got.1, &expected.1, 32);
    }
}

/// The two forms are the same function: they differ by rounding only.
#[test]
fn naive_and_absorbed_agree() {
    let widths = Widths { heads: 4, nope: 64, rope: 32, v: 64, kv_lora: 128 };
    let case = Case::new(4, Dtype::E4m3, &widths, &[(100, 50), (0, 20)]);
    for backend in backends(NumericsClass::F32) {
        let (naive, absorbed, _) = case.run(backend);
        let values = |bits: &[u32]| bits.iter().map(|b| f32::from_bits(*b)).collect::<Vec<_>>();
        let (naive, absorbed) = (values(&naive), values(&absorbed));
        let largest = naive.iter().fold(0.0_f32, |max, v| max.max(v.abs()));
        for (a, b) in naive.iter().zip(&absorbed) {
            assert!((a - b).abs() < 2e-5 * largest, "{}: {a} {b}", backend.describe());
        }
    }
}
