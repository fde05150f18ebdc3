//! Plans and what backends account for; alone in its process, because the account is the process's.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]

mod support;
#[path = "support/memory.rs"]
mod whole;

use std::sync::Arc;

use cadre_checkpoint::{Checkpoint, WeightsOptions, WeightsSource};
use cadre_model::WorkerSizes;
use cadre_ops_cpu::{CpuBackend, CpuOptions, allocated_bytes};
use cadre_types::NumericsClass;
use whole::measure;

#[test]
fn what_is_planned_is_what_is_taken() {
    for (class, changes) in [
        (NumericsClass::F32, vec!["hidden_size=384", "num_hidden_layers=3"]),
        (NumericsClass::Bf16, vec![]),
        (NumericsClass::Fp8, vec!["n_routed_experts=16", "moe_intermediate_size=192"]),
    ] {
        let options = WeightsOptions {
            source: WeightsSource::Random { seed: 5 },
            overrides: changes.iter().map(|text| text.parse().unwrap()).collect(),
        };
        let checkpoint = Arc::new(Checkpoint::open_with(support::repo("models/pocket"), &options).unwrap());
        let backend = CpuBackend::new(CpuOptions { threads: Some(2), ..CpuOptions::new(class) }).unwrap();
        let sizes = WorkerSizes { mtp: true, pages: 40, rows: 64 };
        let measured = measure(Arc::new(backend), &checkpoint, sizes, 4, &|_| allocated_bytes());
        let (planned, ratio) = (measured.worker, measured.ratio());
        // Scratch memory grows with use, and no step here is as large as the plan allows.
        assert!((0.9..1.02).contains(&ratio), "{class}: {} taken of {planned}, {ratio}", measured.taken);
        assert!(measured.worker.kv > 0 && measured.experts.weights > 0 && measured.tokens.len() == 4);
        assert_eq!(measured.seconds.len(), 6, "weights, experts, prompt, three steps");
    }
}
