//! Distances of the numerics classes from f32 on the golden sequences: the table of docs/numerics.md.
//! `cargo run --release -p cadre-model --example distances`
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program: prints and fails loudly")]

#[path = "../tests/support/mod.rs"]
mod support;

use cadre_model::SegmentKind;
use cadre_types::NumericsClass;
use support::{Golden, Pocket, argmax, relative_distance, table};

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

struct Run {
    class: NumericsClass,
    logits: Vec<Vec<f32>>,
}

fn main() {
    // Every golden sequence with at least two tokens.
    let sequences: Vec<Vec<u32>> =
        [0, 1, 2, 3, 4, 5, 6, 8, 9].into_iter().map(|case| Golden::case(case).u32("input_ids")).collect();
    let runs: Vec<Run> = NumericsClass::ALL
        .into_iter()
        .map(|class| {
            let mut pocket = Pocket::open(class, 3000);
            let logits = sequences
                .iter()
                .map(|ids| pocket.step(SegmentKind::Prefill, ids, 0, &table(ids.len()), &mut ()).logits)
                .collect();
            Run { class, logits }
        })
        .collect();
    let vocab = Pocket::open(NumericsClass::F32, 1).model.config().vocab_size;
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    println!("{} sequences, {tokens} tokens", sequences.len());
    println!("| class | cross-entropy (nats) | largest logit distance | median | largest logit differs |");
    println!("|---|---|---|---|---|");
    for run in &runs {
        let mut distances = Vec::new();
        let mut flips = 0usize;
        let mut weighted = 0.0;
        for ((found, expected), ids) in run.logits.iter().zip(&runs[0].logits).zip(&sequences) {
            weighted += cross_entropy(found, vocab, ids) * (ids.len() - 1) as f64;
            for (found, expected) in found.chunks(vocab).zip(expected.chunks(vocab)) {
                distances.push(relative_distance(found, expected));
                flips += usize::from(argmax(found) != argmax(expected));
            }
        }
        distances.sort_by(f32::total_cmp);
        println!(
            "| {} | {:.4} | {:.2e} | {:.2e} | {flips} of {} |",
            run.class,
            weighted / (tokens - sequences.len()) as f64,
            distances[distances.len() - 1],
            distances[distances.len() / 2],
            distances.len(),
        );
    }
}
