//! Products, feed-forward, norms, gate, combine, transfers: equality with the reference.

use cadre_numerics::quant;
use cadre_ops::{Backend, GateShape, HostRows, ReferenceBackend, RowFormat, RowGroup};
use cadre_types::NumericsClass;
use proptest::prelude::*;

use crate::{
    backends,
    data::{DTYPES, Dtype, Matrix, Stream, assert_bits, bits, buffer},
};

fn dtype() -> impl Strategy<Value = Dtype> {
    (0..3_usize).prop_map(|i| DTYPES[i])
}

fn class() -> impl Strategy<Value = NumericsClass> {
    (0..3_usize).prop_map(|i| NumericsClass::ALL[i])
}

/// Rows of a batch: mostly few, sometimes beyond a register tile, sometimes beyond a pass.
fn rows() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0..8_usize, 3 => 8..40_usize, 1 => Just(195_usize)]
}

/// Runs the same steps on the reference and on every backend of the class and compares bits.
fn compare<F>(class: NumericsClass, cols: usize, steps: F)
where
    F: Steps,
{
    let expected = steps.run(&ReferenceBackend::new(class));
    for backend in backends(class) {
        assert_bits(&backend.describe(), &steps.run(backend), &expected, cols.max(1));
    }
}

/// Steps that any backend can take; the result as bits.
trait Steps {
    fn run<B: Backend>(&self, backend: &B) -> Vec<u32>;
}

struct Linear {
    x: Vec<f32>,
    rows: usize,
    weight: Matrix,
    /// Send the input as codes first.
    coded: bool,
}

impl Steps for Linear {
    fn run<B: Backend>(&self, backend: &B) -> Vec<u32> {
        let mut queue = backend.queue().unwrap();
        let weight = backend.load_matrix(self.weight.host()).unwrap();
        let mut x = buffer(backend, &self.x, self.weight.cols, 1);
        if self.coded {
            let (mut data, mut scales) = (Vec::new(), Vec::new());
            let format = RowFormat::E4m3;
            backend.download_rows(&mut queue, &x, self.rows, format, &mut data, &mut scales).unwrap();
            let (rows, cols) = (self.rows, self.weight.cols);
            let host = HostRows { format, rows, cols, data: &data, scales: &scales };
            backend.upload_rows(&mut queue, host, &mut x).unwrap();
        }
        let mut y = backend.alloc(self.rows + 2, self.weight.rows).unwrap();
        backend.linear(&mut queue, &x, &weight, self.rows, &mut y).unwrap();
        let mut out = bits(backend, &y, self.rows + 2);
        // Chosen rows in reverse, not rounded.
        let chosen: Vec<usize> = (0..self.rows).rev().step_by(2).collect();
        let mut logits = Vec::new();
        backend.logits(&mut queue, &x, &chosen, &weight, &mut logits).unwrap();
        out.extend(logits.into_iter().map(f32::to_bits));
        out
    }
}

struct Experts {
    x: Vec<f32>,
    hidden: usize,
    capacity: usize,
    experts: Vec<[Matrix; 3]>,
    groups: Vec<RowGroup>,
}

impl Steps for Experts {
    fn run<B: Backend>(&self, backend: &B) -> Vec<u32> {
        let mut queue = backend.queue().unwrap();
        let load = |m: &[Matrix; 3]| backend.load_ffn(m[0].host(), m[1].host(), m[2].host()).unwrap();
        let experts: Vec<_> = self.experts.iter().map(load).collect();
        let experts: Vec<_> = experts.iter().collect();
        let x = buffer(backend, &self.x, self.hidden, 0);
        let mut y = backend.alloc(self.capacity, self.hidden).unwrap();
        backend.grouped_ffn(&mut queue, &x, &experts, &self.groups, &mut y).unwrap();
        let mut out = bits(backend, &y, self.capacity);
        let mut y = backend.alloc(self.capacity, self.hidden).unwrap();
        backend.ffn(&mut queue, &x, experts[0], self.capacity, &mut y).unwrap();
        out.extend(bits(backend, &y, self.capacity));
        out
    }
}

struct RowOps {
    x: Vec<f32>,
    other: Vec<f32>,
    cols: usize,
    rows: usize,
    norm: Vec<f32>,
    picks: Vec<usize>,
}

impl Steps for RowOps {
    fn run<B: Backend>(&self, backend: &B) -> Vec<u32> {
        let mut queue = backend.queue().unwrap();
        let (rows, cols) = (self.rows, self.cols);
        let mut x = buffer(backend, &self.x, cols, 1);
        let other = buffer(backend, &self.other, cols, 1);
        let norm = backend.load_vector(&self.norm).unwrap();
        let mut out = Vec::new();
        let mut y = backend.alloc(rows + 1, cols).unwrap();
        backend.rms_norm(&mut queue, &x, &norm, 1e-6, rows, &mut y).unwrap();
        out.extend(bits(backend, &y, rows + 1));
        backend.add(&mut queue, &mut x, &other, rows).unwrap();
        out.extend(bits(backend, &x, rows + 1));
        let mut wide = backend.alloc(rows + 1, 2 * cols).unwrap();
        backend.concat(&mut queue, &x, &y, rows, &mut wide).unwrap();
        out.extend(bits(backend, &wide, rows + 1));
        let mut picked = backend.alloc(self.picks.len(), cols).unwrap();
        backend.gather_rows(&mut queue, &x, &self.picks, &mut picked).unwrap();
        out.extend(bits(backend, &picked, self.picks.len()));
        // Every wire format, there and back.
        for format in [RowFormat::F32, RowFormat::Bf16, RowFormat::E4m3] {
            let (mut data, mut scales) = (vec![1], vec![1]);
            backend.download_rows(&mut queue, &x, rows, format, &mut data, &mut scales).unwrap();
            out.extend(data.iter().chain(&scales).map(|byte| u32::from(*byte)));
            let host = HostRows { format, rows, cols, data: &data, scales: &scales };
            let mut back = backend.alloc(rows, cols).unwrap();
            backend.upload_rows(&mut queue, host, &mut back).unwrap();
            out.extend(bits(backend, &back, rows));
        }
        out
    }
}

struct Combine {
    x: Vec<f32>,
    shared: Option<Vec<f32>>,
    cols: usize,
    rows: usize,
    top_k: usize,
    format: RowFormat,
    expert_rows: Vec<f32>,
    weights: Vec<f32>,
}

impl Steps for Combine {
    fn run<B: Backend>(&self, backend: &B) -> Vec<u32> {
        let mut queue = backend.queue().unwrap();
        let (rows, cols) = (self.rows * self.top_k, self.cols);
        let sent = buffer(backend, &self.expert_rows, cols, 0);
        let (mut data, mut scales) = (Vec::new(), Vec::new());
        backend.download_rows(&mut queue, &sent, rows, self.format, &mut data, &mut scales).unwrap();
        // One byte in front, so that rows have no alignment.
        data.insert(0, 0);
        let host = HostRows { format: self.format, rows, cols, data: &data[1..], scales: &scales };
        let mut x = buffer(backend, &self.x, cols, 1);
        let shared = self.shared.as_ref().map(|shared| buffer(backend, shared, cols, 0));
        backend
            .combine(&mut queue, host, &self.weights, self.top_k, shared.as_ref(), self.rows, &mut x)
            .unwrap();
        bits(backend, &x, self.rows + 1)
    }
}

struct Gate {
    x: Vec<f32>,
    rows: usize,
    weight: Matrix,
    bias: Vec<f32>,
    shape: GateShape,
}

impl Steps for Gate {
    fn run<B: Backend>(&self, backend: &B) -> Vec<u32> {
        let mut queue = backend.queue().unwrap();
        let weight = backend.load_matrix(self.weight.host()).unwrap();
        let bias = backend.load_vector(&self.bias).unwrap();
        let x = buffer(backend, &self.x, self.weight.cols, 1);
        let (mut idx, mut weights) = (vec![9], vec![9.0]);
        backend.gate(&mut queue, &x, &weight, &bias, &self.shape, self.rows, &mut idx, &mut weights).unwrap();
        assert_eq!(idx.len(), self.rows * self.shape.top_k);
        idx.chunks(self.shape.top_k).for_each(|idx| assert!(idx.is_sorted_by(|a, b| a < b)));
        idx.into_iter().map(u32::from).chain(weights.into_iter().map(f32::to_bits)).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn linear_and_logits(
        class in class(), dtype in dtype(), rows in rows(), n in 1..80_usize, k in 1..400_usize,
        coded in any::<bool>(), seed in any::<u64>(),
    ) {
        let stream = &mut Stream::new(seed);
        let weight = Matrix::new(stream, dtype, n, k);
        let steps = Linear { x: stream.values(rows * k), rows, weight, coded };
        compare(class, n, steps);
    }

    /// Several rows of 128x128 blocks, and more panels than one task takes.
    #[test]
    fn linear_with_many_outputs(
        class in class(), dtype in dtype(), rows in 0..10_usize, n in 120..400_usize,
        k in prop_oneof![Just(128_usize), Just(256), 1..300_usize], seed in any::<u64>(),
    ) {
        let stream = &mut Stream::new(seed);
        let weight = Matrix::new(stream, dtype, n, k);
        let steps = Linear { x: stream.values(rows * k), rows, weight, coded: false };
        compare(class, n, steps);
    }

    #[test]
    fn feed_forward(
        class in class(), dtype in dtype(), hidden in 1..150_usize, inner in 1..300_usize,
        sizes in prop::collection::vec(0..12_usize, 1..6), seed in any::<u64>(),
    ) {
        let stream = &mut Stream::new(seed);
        let experts: Vec<[Matrix; 3]> = (0..3)
            .map(|_| [
                Matrix::new(stream, dtype, inner, hidden),
                Matrix::new(stream, dtype, inner, hidden),
                Matrix::new(stream, DTYPES[stream.clone().below(3)], hidden, inner),
            ])
            .collect();
        // Groups in any order of experts, with a row between them that belongs to none.
        let mut first_row = 0;
        let groups: Vec<RowGroup> = sizes
            .iter()
            .map(|rows| {
                let group = RowGroup { expert: stream.below(3), first_row, rows: *rows };
                first_row += rows + stream.below(2);
                group
            })
            .collect();
        let capacity = first_row + 1;
        let x = stream.values(capacity * hidden);
        compare(class, hidden, Experts { x, hidden, capacity, experts, groups });
    }

    #[test]
    fn row_operations(
        class in class(), rows in 0..20_usize, cols in 1..300_usize, seed in any::<u64>(),
    ) {
        let stream = &mut Stream::new(seed);
        let picks = (0..rows).map(|_| stream.below(rows)).collect();
        let steps = RowOps {
            x: stream.values(rows * cols),
            other: stream.values(rows * cols),
            norm: stream.values(cols),
            rows,
            cols,
            picks,
        };
        compare(class, cols, steps);
    }

    #[test]
    fn combine(
        class in class(), rows in 0..12_usize, cols in 1..200_usize, top_k in 0..9_usize,
        format in 0..3_usize, shared in any::<bool>(), seed in any::<u64>(),
    ) {
        let stream = &mut Stream::new(seed);
        let steps = Combine {
            x: stream.values(rows * cols),
            shared: shared.then(|| stream.values(rows * cols)),
            cols,
            rows,
            top_k,
            format: [RowFormat::F32, RowFormat::Bf16, RowFormat::E4m3][format],
            expert_rows: stream.values(rows * top_k * cols),
            weights: stream.values(rows * top_k),
        };
        compare(class, cols, steps);
    }

    #[test]
    fn gate(
        class in class(), dtype in dtype(), rows in 0..20_usize, groups in 1..6_usize,
        size in 1..9_usize, kept in 1..6_usize, top_k in 1..9_usize, k in 1..200_usize,
        norm_topk_prob in any::<bool>(), seed in any::<u64>(),
    ) {
        let stream = &mut Stream::new(seed);
        let kept = kept.min(groups);
        let shape = GateShape {
            experts: groups * size,
            n_group: groups,
            topk_group: kept,
            top_k: top_k.min(kept * size),
            norm_topk_prob,
            routed_scaling_factor: 2.5,
        };
        let weight = Matrix::new(stream, dtype, shape.experts, k);
        let bias = stream.values(shape.experts);
        compare(class, 1, Gate { x: stream.values(rows * k), rows, weight, bias, shape });
    }

    #[test]
    fn embed(class in class(), dtype in dtype(), n in 1..150_usize, k in 1..200_usize,
        count in 0..9_usize, seed in any::<u64>(),
    ) {
        let stream = &mut Stream::new(seed);
        let table = Matrix::new(stream, dtype, n, k);
        let ids: Vec<u32> = (0..count).map(|_| stream.below(n) as u32).collect();
        let values = table.values();
        let expected: Vec<u32> = ids
            .iter()
            .flat_map(|id| &values[*id as usize * k..(*id as usize + 1) * k])
            .map(|v| v.to_bits())
            .collect();
        for backend in backends(class) {
            let loaded = backend.load_matrix(table.host()).unwrap();
            let mut y = backend.alloc(count, k).unwrap();
            backend.embed(&mut backend.queue().unwrap(), &loaded, &ids, &mut y).unwrap();
            assert_bits(&backend.describe(), &bits(backend, &y, count), &expected, k);
        }
    }
}

/// Products with matrixmultiply as oracle: an implementation that shares nothing with ours.
#[test]
fn linear_agrees_with_an_independent_gemm() {
    for dtype in DTYPES {
        for (m, n, k) in [(1, 300, 512), (7, 64, 300), (100, 130, 260)] {
            let stream = &mut Stream::new(42);
            let weight = Matrix::new(stream, dtype, n, k);
            let (w, x) = (weight.values(), stream.values(m * k));
            let mut expected = vec![0.0_f32; m * n];
            // SAFETY of the oracle: strides describe x [m, k], w^T [k, n] and the result [m, n].
            #[allow(unsafe_code, reason = "matrixmultiply's interface")]
            unsafe {
                matrixmultiply::sgemm(
                    m,
                    k,
                    n,
                    1.0,
                    x.as_ptr(),
                    k as isize,
                    1,
                    w.as_ptr(),
                    1,
                    k as isize,
                    0.0,
                    expected.as_mut_ptr(),
                    n as isize,
                    1,
                );
            }
            for backend in backends(NumericsClass::F32) {
                let loaded = backend.load_matrix(weight.host()).unwrap();
                let mut y = backend.alloc(m, n).unwrap();
                let x = buffer(backend, &x, k, 0);
                backend.linear(&mut backend.queue().unwrap(), &x, &loaded, m, &mut y).unwrap();
                // Rounding of k products of magnitude up to the row's: a few units of F32 per 2^-24 k.
                let bound = 1e-5 * k as f32;
                for (got, expected) in bits(backend, &y, m).iter().zip(&expected) {
                    let got = f32::from_bits(*got);
                    assert!((got - expected).abs() < bound, "{dtype:?} {got} {expected}");
                }
            }
        }
    }
}

/// Inputs beyond what kernels can grow by a power of two, beside ordinary blocks and rows.
#[test]
fn huge_and_tiny_inputs_equal_the_reference() {
    for class in NumericsClass::ALL {
        for dtype in DTYPES {
            for rows in [1, 2, 5, 9] {
                let stream = &mut Stream::new(77);
                let (n, k) = (70, 300);
                let weight = Matrix::new(stream, dtype, n, k);
                let mut x = stream.values(rows * k);
                for (i, x) in x.iter_mut().enumerate() {
                    match (i / k % 2, i % k / 128) {
                        (0, 0) => *x *= 1e6,
                        (0, 1) => *x *= 1e-38,
                        (1, 2) => *x *= 1e25,
                        _ => {}
                    }
                }
                x[0] = 32768.0;
                compare(class, n, Linear { x, rows, weight, coded: false });
            }
        }
    }
}

/// Codes that arrive give the bits that quantising here gives, also after a gather.
#[test]
fn arrived_codes_equal_local_quantisation() {
    let stream = &mut Stream::new(5);
    let (rows, n, k) = (9, 48, 300);
    let weight = Matrix::new(stream, Dtype::E4m3, n, k);
    let x = stream.values(rows * k);
    assert_eq!(quant::blocks(k), 3);
    for backend in backends(NumericsClass::Fp8) {
        let run = |coded| Linear { x: x.clone(), rows, weight: weight.clone(), coded }.run(backend);
        assert_eq!(run(true), run(false), "{}", backend.describe());
    }
}
