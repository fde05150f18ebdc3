//! Distances of the numerics classes from f32 on the golden sequences: the table of docs/numerics.md.
//! `cargo run --release -p cadre-model --example distances`, and on a machine with a GPU `... -- --cuda`: then the classes
//! that GPUs and processors share have to give the same bits on both, and `cuda-fp8` is in the table and within its
//! bounds. `--root FOLDER` is where models/pocket and tests/golden are. Ends with `N passed, N failed`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program: prints and fails loudly")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::process::ExitCode;

use cadre_model::SegmentKind;
use cadre_ops::Backend;
use cadre_ops_cuda::CudaBackend;
use cadre_types::NumericsClass;
use support::{Golden, Pocket, argmax, relative_distance, table};

/// Most positions of a sequence.
const ROWS: usize = 3000;

/// What a class may differ from f32: medians and shares of whole distributions, never a largest row (a row whose experts
/// changed is another function's). `fp8` rounds as `cuda-fp8` does but for kv_b, the latents of attention and the sums'
/// own precision, so the bounds are its measured figures (4.0e-2, 7.8 %) and a quarter more.
struct Bounds {
    median: f32,
    flips: f64,
    cross_entropy: f64,
}
const CUDA_FP8: Bounds = Bounds { median: 5e-2, flips: 0.10, cross_entropy: 0.01 };

/// Mean negative log-likelihood of each next token, in nats.
fn cross_entropy(logits: &[f32], vocab: usize, ids: &[u32]) -> f64 {
    let rows = logits.chunks(vocab).zip(&ids[1..]);
    let total: f64 = rows
        .map(|(row, &next)| {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
            sum.ln() - f64::from(row[next as usize] - largest)
        })
        .sum();
    total / (ids.len() - 1) as f64
}

/// Logits of every row of every sequence, whole prompts in prefill form.
fn logits<B: Backend>(mut pocket: Pocket<B>, sequences: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let mut step =
        |ids: &Vec<u32>| pocket.step(SegmentKind::Prefill, ids, 0, &table(ids.len()), &mut ()).logits;
    sequences.iter().map(&mut step).collect()
}

/// A class beside f32.
struct Figures {
    cross_entropy: f64,
    largest: f32,
    median: f32,
    flips: usize,
    rows: usize,
}

impl Figures {
    fn of(found: &[Vec<f32>], exact: &[Vec<f32>], sequences: &[Vec<u32>], vocab: usize) -> Self {
        let (mut distances, mut flips, mut weighted, mut tokens) = (Vec::new(), 0, 0.0, 0);
        for ((found, exact), ids) in found.iter().zip(exact).zip(sequences) {
            weighted += cross_entropy(found, vocab, ids) * (ids.len() - 1) as f64;
            tokens += ids.len() - 1;
            for (found, exact) in found.chunks(vocab).zip(exact.chunks(vocab)) {
                distances.push(relative_distance(found, exact));
                flips += usize::from(argmax(found) != argmax(exact));
            }
        }
        distances.sort_by(f32::total_cmp);
        Self {
            cross_entropy: weighted / tokens as f64,
            largest: distances[distances.len() - 1],
            median: distances[distances.len() / 2],
            flips,
            rows: distances.len(),
        }
    }

    fn print(&self, class: NumericsClass) {
        println!(
            "| {class} | {:.4} | {:.2e} | {:.2e} | {} of {} |",
            self.cross_entropy, self.median, self.largest, self.flips, self.rows
        );
    }

    fn within(&self, bounds: &Bounds, exact: &Self) -> bool {
        self.median <= bounds.median
            && self.flips as f64 <= bounds.flips * self.rows as f64
            && (self.cross_entropy - exact.cross_entropy).abs() <= bounds.cross_entropy
    }
}

fn on_cuda(class: NumericsClass, sequences: &[Vec<u32>]) -> Vec<Vec<f32>> {
    logits(Pocket::on(CudaBackend::open(0, class, None).unwrap(), ROWS), sequences)
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let Some(at) = words.iter().position(|word| word == "--root") {
        support::ROOT.set(words[at + 1].clone().into()).unwrap();
    }
    let cuda = words.iter().any(|word| word == "--cuda");
    // Every golden sequence with at least two tokens.
    let sequences: Vec<Vec<u32>> =
        [0, 1, 2, 3, 4, 5, 6, 8, 9].into_iter().map(|case| Golden::case(case).u32("input_ids")).collect();
    let vocab = Pocket::open(NumericsClass::F32, 1).model.config().vocab_size;
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    println!("{} sequences, {tokens} tokens", sequences.len());
    println!(
        "| class | cross-entropy (nats) | median logit distance | largest | argmax differs from `f32` |"
    );
    println!("|---|---|---|---|---|");
    let exact = logits(Pocket::open(NumericsClass::F32, ROWS), &sequences);
    let figures = |found: &[Vec<f32>]| Figures::of(found, &exact, &sequences, vocab);
    let f32_figures = figures(&exact);
    let (mut passed, mut failed) = (0, 0);
    let mut held = |what: &str, holds: bool| {
        if !holds {
            println!("FAILED {what}");
        }
        *(if holds { &mut passed } else { &mut failed }) += 1;
    };
    for class in NumericsClass::ALL {
        let found = match class {
            NumericsClass::F32 => exact.clone(),
            class => logits(Pocket::open(class, ROWS), &sequences),
        };
        figures(&found).print(class);
        if cuda {
            let there = on_cuda(class, &sequences);
            let bits = |runs: &[Vec<f32>]| runs.iter().flatten().map(|v| v.to_bits()).collect::<Vec<_>>();
            held(&format!("{class}: bits of the processor on the GPU"), bits(&there) == bits(&found));
        }
    }
    if cuda {
        let class = NumericsClass::CudaFp8;
        let found = figures(&on_cuda(class, &sequences));
        found.print(class);
        held(&format!("{class}: distances from f32 within bounds"), found.within(&CUDA_FP8, &f32_figures));
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
