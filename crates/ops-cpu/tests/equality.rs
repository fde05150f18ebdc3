#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! The CPU backend equals the scalar reference bit for bit, on every instruction set that the machine has,
//! and its results do not depend on the batch, the threads or the places of pages: `cadre_ops::conformance`,
//! and what only this backend can be asked.

use std::{io::Write, sync::OnceLock, time::Duration};

use cadre_ops::{
    Backend,
    conformance::{Dtype, Matrix, Stream, Suite, parts, run},
};
use cadre_ops_cpu::{CpuBackend, CpuOptions, Isa};
use cadre_types::NumericsClass;

/// Backends of a class: every available instruction set, with one and with three threads.
fn backends(class: NumericsClass) -> &'static [CpuBackend] {
    static BACKENDS: OnceLock<Vec<Vec<CpuBackend>>> = OnceLock::new();
    let all = BACKENDS.get_or_init(|| {
        NumericsClass::ALL.map(|class| available().flat_map(|isa| of_isa(class, isa)).collect()).into()
    });
    let index = NumericsClass::ALL.iter().position(|c| *c == class).unwrap();
    &all[index]
}

fn available() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| {
        if !isa.available() {
            // Past the test harness's capture: a suite that could not run must not look like one that did.
            let mut stderr = std::io::stderr();
            let _ = writeln!(stderr, "\n*** NOT RUN on {isa}: this machine does not have it ***\n");
        }
        isa.available()
    })
}

fn of_isa(class: NumericsClass, isa: Isa) -> impl Iterator<Item = CpuBackend> {
    [1, 3].into_iter().map(move |threads| {
        CpuBackend::new(CpuOptions {
            class,
            threads: Some(threads),
            isa: Some(isa),
            // Short, so that suites running side by side on few cores do not spin at each other.
            spin: Duration::from_micros(1),
        })
        .unwrap()
    })
}

fn conforms(class: NumericsClass) {
    for (index, backend) in backends(class).iter().enumerate() {
        // Every backend meets cases of its own.
        run(&Suite { seed: 1 + 1000 * index as u64, ..Suite::exact(backend, 6) });
    }
}

#[test]
fn class_f32_conforms() {
    conforms(NumericsClass::F32);
}

#[test]
fn class_bf16_conforms() {
    conforms(NumericsClass::Bf16);
}

#[test]
fn class_fp8_conforms() {
    conforms(NumericsClass::Fp8);
}

/// The same seeds on all instruction sets and thread counts, through the reference: one part is enough, it
/// proves that the backends agree among themselves and not only with cases of their own.
#[test]
fn instruction_sets_agree() {
    let (_, linear) = parts().into_iter().find(|(name, _)| *name == "linear and logits").unwrap();
    for backend in backends(NumericsClass::Bf16) {
        linear(&Suite { seed: 99, ..Suite::exact(backend, 8) });
    }
}

/// Products with matrixmultiply as oracle: an implementation that shares nothing with ours.
#[test]
fn linear_agrees_with_an_independent_gemm() {
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::E4m3] {
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
                let got = product(backend, &weight, &x);
                // Rounding of k products of magnitude up to the row's: a few units of F32 per 2^-24 k.
                let bound = 1e-5 * k as f32;
                for (got, expected) in got.iter().zip(&expected) {
                    assert!((got - expected).abs() < bound, "{dtype:?} {got} {expected}");
                }
            }
        }
    }
}

fn product(backend: &CpuBackend, weight: &Matrix, x: &[f32]) -> Vec<f32> {
    let rows = x.len() / weight.cols;
    let queue = &mut backend.queue().unwrap();
    let loaded = backend.load_matrix(weight.host()).unwrap();
    let mut input = backend.alloc_activations(rows, weight.cols).unwrap();
    backend.write_activations(queue, x, &mut input).unwrap();
    let mut y = backend.alloc_activations(rows, weight.rows).unwrap();
    backend.linear(queue, &input, &loaded, rows, &mut y).unwrap();
    let mut out = Vec::new();
    backend.read_activations(queue, &y, 0..rows, &mut out).unwrap();
    out
}

/// Two threads on one backend, each with its own queue.
#[test]
fn two_threads_share_a_backend() {
    let stream = &mut Stream::new(16);
    let weight = Matrix::new(stream, Dtype::E4m3, 256, 256);
    let x = stream.values(40 * 256);
    for backend in backends(NumericsClass::Bf16) {
        let expected = product(backend, &weight, &x);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        assert_eq!(product(backend, &weight, &x), expected);
                    }
                });
            }
        });
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

/// What a plan adds up is what is taken.
#[test]
fn planned_bytes_are_the_bytes_of_weights() {
    use cadre_ops::{Allocation, ElementType};

    let backend = &backends(NumericsClass::Fp8)[0];
    let stream = &mut Stream::new(17);
    for (dtype, elements) in
        [(Dtype::F32, ElementType::F32), (Dtype::Bf16, ElementType::Bf16), (Dtype::E4m3, ElementType::E4m3)]
    {
        for (rows, cols) in [(1, 1), (16, 128), (130, 300), (256, 512)] {
            let loaded = backend.load_matrix(Matrix::new(stream, dtype, rows, cols).host()).unwrap();
            let planned = backend.bytes_of(&Allocation::Matrix { rows, cols, elements }).unwrap();
            assert_eq!(planned, backend.weight_bytes(&loaded) as u64, "{dtype:?} {rows} x {cols}");
        }
        let (hidden, inner) = (150, 200);
        let [gate, up] = [(); 2].map(|()| Matrix::new(stream, dtype, inner, hidden));
        let down = Matrix::new(stream, dtype, hidden, inner);
        let ffn = backend.load_ffn(gate.host(), up.host(), down.host()).unwrap();
        let planned = backend.bytes_of(&Allocation::Ffn { hidden, inner, elements }).unwrap();
        let taken = backend.weight_bytes(&ffn.gate_up) + backend.weight_bytes(&ffn.down);
        assert_eq!(planned, taken as u64, "{dtype:?}");
    }
    assert!(backend.bytes_of(&Allocation::Residual { rows: usize::MAX, cols: 2 }).is_err());
}
