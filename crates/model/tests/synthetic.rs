//! Random checkpoints: activations stay sane at any depth, and what cannot be served is refused by name.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;

use cadre_checkpoint::{
    Checkpoint,
    synth::{self, SynthSpec, WeightFormat},
};
use cadre_model::{ExpertLoader, LoadError, LoadOptions, Model, SegmentKind, Workspace};
use cadre_ops_cpu::{CpuBackend, CpuOptions};
use cadre_types::NumericsClass;
use support::{InPlaceExperts, Pocket, table};

fn open(spec: &SynthSpec, class: NumericsClass) -> Result<Pocket, LoadError> {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("model");
    synth::write(&dir, spec, &|_, _| ()).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&dir).unwrap());
    let backend = Arc::new(CpuBackend::new(CpuOptions::new(class)).unwrap());
    let model = Model::load(backend.clone(), &checkpoint, &LoadOptions { mtp: false }, &mut |_| {})?;
    let experts = InPlaceExperts::load(&ExpertLoader::new(backend, checkpoint));
    let ws = Workspace::new(&model, 64).unwrap();
    let cache = model.new_cache(2).unwrap();
    Ok(Pocket { model, experts, ws, cache })
}

#[test]
fn activations_stay_sane_through_many_layers() {
    for format in [WeightFormat::Fp8, WeightFormat::Bf16] {
        let mut spec = SynthSpec::tiny(format, 7);
        spec.config.num_hidden_layers = 40;
        let mut model = open(&spec, NumericsClass::Bf16).unwrap();
        let tokens: Vec<u32> = (0..64).map(|i| (i * 37 + 5) % spec.config.vocab_size as u32).collect();
        let out = model.step(SegmentKind::Prefill, &tokens, 0, &table(tokens.len()), &mut ());
        assert!(out.logits.iter().all(|logit| logit.is_finite()));
        // Unit-variance rows of the head on a normalised state: logits of order one, neither dead nor huge.
        let count = out.logits.len() as f64;
        let rms = (out.logits.iter().map(|l| f64::from(*l).powi(2)).sum::<f64>() / count).sqrt();
        assert!((0.3..3.0).contains(&rms), "{format:?}: RMS of the logits is {rms}");
    }
}

#[test]
fn ue8m0_activations_are_refused_in_class_fp8_and_served_otherwise() {
    let mut spec = SynthSpec::tiny(WeightFormat::Fp8, 7);
    spec.config.num_hidden_layers = 2;
    spec.config.quantization.as_mut().unwrap().scale_fmt = cadre_types::config::ScaleFormat::Ue8m0;
    assert!(open(&spec, NumericsClass::Bf16).is_ok());
    let refused = open(&spec, NumericsClass::Fp8).err().map(|error| error.to_string());
    assert!(refused.as_ref().is_some_and(|text| text.contains("scale_fmt is ue8m0")), "{refused:?}");
}
