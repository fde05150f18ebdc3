//! A model with random weights on a GPU: memory planned and taken, loading, a decode step; twice, and the tokens have to
//! be the same. `memory FOLDER DEVICE CLASS SEED [KEY=VALUE...]`; FOLDER needs config.json only. Ends with
//! `N passed, N failed`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program: prints and fails loudly")]

#[path = "../tests/support/mod.rs"]
mod support;
#[path = "../tests/support/memory.rs"]
mod whole;

use std::{process::ExitCode, sync::Arc, time::Instant};

use cadre_checkpoint::{Checkpoint, WeightsOptions, WeightsSource};
use cadre_model::WorkerSizes;
use cadre_ops::Backend;
use cadre_ops_cuda::CudaBackend;
use cadre_types::NumericsClass;
use whole::measure;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, device, class, seed, changes @ ..] = args.as_slice() else {
        println!("usage: memory FOLDER cuda:N CLASS SEED [KEY=VALUE...]");
        return ExitCode::FAILURE;
    };
    let options = WeightsOptions {
        source: WeightsSource::Random { seed: seed.parse().unwrap() },
        overrides: changes.iter().map(|text| text.parse().unwrap()).collect(),
    };
    let ordinal = device.strip_prefix("cuda:").unwrap().parse().unwrap();
    let class: NumericsClass = class.parse().unwrap();
    let began = Instant::now();
    let checkpoint = Arc::new(Checkpoint::open_with(folder, &options).unwrap());
    println!("{options}: opened in {:.2} s, {}", began.elapsed().as_secs_f64(), checkpoint.model_hash());
    let sizes = WorkerSizes { mtp: false, pages: 1024, rows: 256 };
    let (mut passed, mut failed, mut texts) = (0, 0, Vec::new());
    let mut held = |what: &str, yes: bool| {
        println!("{} {what}", if yes { "ok     " } else { "FAILED " });
        if yes { passed += 1 } else { failed += 1 }
    };
    for nth in ["first", "second"] {
        let backend = Arc::new(CudaBackend::open(ordinal, class, None).unwrap());
        let free = backend.memory().free.unwrap();
        // Few tokens: the experts of the harness make a queue for every layer. Clusters are timed by `cadre bench`.
        let measured = measure(backend, &checkpoint, sizes, 4, &|backend| backend.memory().used);
        println!(
            "{nth}: worker {} ; experts {} ; taken {} of {free} free, ratio {:.4}; seconds of weights, experts, prompt and steps {:.2?}; {:?}",
            measured.worker,
            cadre_model::plan::gib(measured.experts.weights),
            measured.taken,
            measured.ratio(),
            measured.seconds,
            measured.tokens
        );
        let planned = measured.worker.total() + measured.experts.weights;
        // The driver gives memory in pieces of 2 MiB, and the harness has queues of its own. The workspace is that of the
        // largest step, which a prompt of a few tokens does not fill.
        let slack = planned * 3 / 100 + (64 << 20);
        let taken = measured.taken;
        held("memory taken is within the plan", taken <= planned + slack);
        held("memory planned is needed", taken + slack >= planned - measured.worker.workspace);
        texts.push(measured.tokens);
    }
    held("the same tokens twice", texts[0] == texts[1]);
    held("not one token for ever", texts[0].iter().any(|token| *token != texts[0][0]));
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
