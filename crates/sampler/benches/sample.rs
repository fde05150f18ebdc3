//! Time of one sample from a row of DeepSeek-V3's vocabulary.
//!
//! `cargo bench -p cadre-sampler`. Gated on nothing: two shared cores make wall time a trend, not a test.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::hint::black_box;

use cadre_sampler::{History, Sampler};
use cadre_types::SamplingParams;
use criterion::{Criterion, criterion_group, criterion_main};

const VOCABULARY: u32 = 129_280;

/// Logits spread like a trained model's: roughly normal, with a few far above.
fn row() -> Vec<f32> {
    let uniform = |x: u32| {
        let hash = (x.wrapping_mul(0x9E37_79B9) ^ 0x5bd1_e995).wrapping_mul(0x85eb_ca6b);
        (hash >> 8) as f32 / (1 << 24) as f32
    };
    let mut row: Vec<f32> = (0..VOCABULARY)
        .map(|token| (0..4).map(|i| uniform(4 * token + i)).sum::<f32>() * 4.0 - 8.0)
        .collect();
    for i in 0..40 {
        row[(i * 3001 + 77) as usize] = 14.0 - 0.3 * i as f32;
    }
    row
}

fn bench(c: &mut Criterion) {
    let row = row();
    let plain = SamplingParams { seed: 1, ..Default::default() };
    let prompt: Vec<u32> = (0..4000).collect();
    let output: Vec<u32> = (0..500).map(|i| i * 7 % 300).collect();
    let requests = [
        ("greedy", SamplingParams { temperature: 0.0, ..plain.clone() }),
        ("temperature", plain.clone()),
        ("top_p", SamplingParams { temperature: 0.6, top_p: 0.95, ..plain.clone() }),
        ("top_k", SamplingParams { top_k: Some(50), ..plain.clone() }),
        ("min_p", SamplingParams { min_p: 0.05, ..plain.clone() }),
        ("logprobs", SamplingParams { temperature: 0.0, logprobs: Some(5), ..plain.clone() }),
        (
            "penalties",
            SamplingParams { temperature: 0.0, repetition_penalty: 1.1, presence_penalty: 0.5, ..plain },
        ),
    ];
    let mut group = c.benchmark_group("sample_129280");
    for (name, params) in requests {
        let mut sampler = Sampler::new();
        let mut logits = row.clone();
        let mut position = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                position += 1;
                let history = History { prompt: &prompt, output: &output, ..History::default() };
                // Penalties change the row; what they change does not change the time.
                black_box(sampler.sample(black_box(&mut logits), &params, history, position))
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = bench
}
criterion_main!(benches);
