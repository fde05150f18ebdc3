//! The conformance suite on a real device, in every class: a plain program, so that it also runs from a carried
//! executable on a machine that has a GPU and nothing else (tests/gpu/run.sh).
//!
//! Without a driver it says how much was skipped and succeeds, unless `--require-device` is given.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a test program")]

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Instant,
};

use cadre_ops::{
    ReferenceBackend,
    conformance::{Part, Suite, Tolerance, Widths, parts, published_parts},
};
use cadre_ops_cuda::{CudaBackend, CudaError};
use cadre_types::NumericsClass;

/// Distance of class `cuda-fp8` from the rounding points of `fp8` in the order of the CPU: a code that falls on the other
/// side of a rounding is off by up to 6 %.
const DISTANCE: f32 = 2e-2;

/// The same of attention, derived in docs/numerics.md: 6.9e-3 on average; 6.4e-3 is the largest that was seen.
const ATTENTION_DISTANCE: f32 = 1e-2;

/// The bound of a part of the suite.
fn distance(part: &str) -> f32 {
    let attends = ["attention", "chunk", "company", "hand-off"].iter().any(|word| part.contains(word));
    if attends { ATTENTION_DISTANCE } else { DISTANCE }
}

/// Attention that the tensor cores take: V3's widths and `pocket`'s, and a tile of heads and one more.
const WIDTHS: [Widths; 3] = [
    Widths { heads: 4, nope: 64, rope: 32, v: 64, kv_lora: 128 },
    Widths { heads: 3, nope: 128, rope: 64, v: 128, kv_lora: 512 },
    Widths { heads: 65, nope: 64, rope: 32, v: 64, kv_lora: 128 },
];

/// What is run: a name, the class, and whether widths are those of the tensor cores.
const RUNS: [(&str, NumericsClass, bool); 5] = [
    ("f32", NumericsClass::F32, false),
    ("bf16", NumericsClass::Bf16, false),
    ("fp8", NumericsClass::Fp8, false),
    ("cuda-fp8 of any width", NumericsClass::CudaFp8, false),
    ("cuda-fp8", NumericsClass::CudaFp8, true),
];

fn suite<'a>(
    part: &str,
    backend: &'a CudaBackend,
    class: NumericsClass,
    tensor: bool,
    cases: usize,
    seed: u64,
) -> Suite<'a, CudaBackend> {
    let exact = Suite { seed, ..Suite::exact(backend, cases) };
    if !class.needs_cuda() {
        return exact;
    }
    let (granule, attention) = if tensor { (16, WIDTHS.to_vec()) } else { (1, Vec::new()) };
    let reference = ReferenceBackend::new(class);
    Suite { reference, tolerance: Tolerance::Distance(distance(part)), granule, attention, ..exact }
}

/// Published shapes are those of the tensor cores.
fn parts_of<'a>(tensor: bool) -> Vec<(&'static str, Part<'a, CudaBackend>)> {
    let mut all = parts();
    if tensor {
        all.extend(published_parts());
    }
    all
}

/// Random cases of each operation, beside the fixed ones of 0, 1, 31 and 33 rows.
const CASES: usize = 8;

/// As libtest sums up, for who counts the tests of the workspace.
fn summary(passed: usize, failed: usize, ignored: usize) {
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "test result: {verdict}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; 0 filtered out"
    );
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let value = |flag: &str| words.iter().position(|word| word == flag).and_then(|at| words.get(at + 1));
    let cases = value("--cases").map_or(CASES, |text| text.parse().unwrap());
    let only = value("--only");
    // Words, with commas between them.
    let skip: Vec<&str> = value("--skip").map(|words| words.split(',').collect()).unwrap_or_default();
    let seed = value("--seed").map_or(1, |text| text.parse().unwrap());
    let listed = words.iter().any(|word| word == "--list");
    let wanted = |name: &str| {
        only.is_none_or(|only| name.contains(only.as_str())) && !skip.iter().any(|word| name.contains(word))
    };
    let names: Vec<String> = RUNS
        .iter()
        .flat_map(|(run, _, tensor)| {
            parts_of(*tensor).into_iter().map(move |(name, _)| format!("{run}: {name}"))
        })
        .filter(|name| wanted(name))
        .collect();
    if listed {
        names.iter().for_each(|name| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    match cadre_ops_cuda::devices() {
        Ok(_) => {}
        Err(error @ (CudaError::NoDriver { .. } | CudaError::NoDevice { .. }))
            if !words.iter().any(|word| word == "--require-device") =>
        {
            println!("NOTICE: {error}");
            println!("NOTICE: {} parts of the conformance suite skipped: they need a GPU", names.len());
            // What can be held without a device: that opening one is the same error, and no panic.
            let refused =
                CudaBackend::open(0, NumericsClass::Bf16, None).is_err_and(|refusal| refusal == error);
            summary(usize::from(refused), usize::from(!refused), names.len());
            if !refused {
                return ExitCode::FAILURE;
            }
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            println!("{error}");
            return ExitCode::FAILURE;
        }
    }
    let (mut passed, mut failed) = (0, 0);
    for (run, class, tensor) in RUNS {
        if !names.iter().any(|name| name.starts_with(&format!("{run}: "))) {
            continue;
        }
        let backend = match CudaBackend::open(0, class, None) {
            Ok(backend) => backend,
            Err(error) => {
                println!("{error}");
                return ExitCode::FAILURE;
            }
        };
        for (name, part) in parts_of(tensor) {
            let name = format!("{run}: {name}");
            if !wanted(&name) {
                continue;
            }
            let begun = Instant::now();
            let suite = suite(&name, &backend, class, tensor, cases, seed);
            let held = catch_unwind(AssertUnwindSafe(|| part(&suite))).is_ok();
            let verdict = if held { "ok" } else { "FAILED" };
            let largest = match suite.largest.get() {
                0.0 => String::new(),
                largest => format!(", largest distance {largest:.1e}"),
            };
            println!("{name} ... {verdict} ({:.2} s{largest})", begun.elapsed().as_secs_f64());
            *(if held { &mut passed } else { &mut failed }) += 1;
        }
    }
    summary(passed, failed, 0);
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
