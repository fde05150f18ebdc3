//! Random checkpoints: activations stay sane at any depth, and what cannot be served is refused by name.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;

use cadre_checkpoint::{
    Checkpoint, WeightsOptions, WeightsSource,
    synth::{self, SynthSpec, WeightFormat},
};
use cadre_model::{ExpertLoader, LoadError, LoadOptions, Model, SegmentKind, Workspace};
use cadre_ops_cpu::{CpuBackend, CpuOptions};
use cadre_types::NumericsClass;
use support::{InPlaceExperts, Pocket, relative_distance, table};

fn open(spec: &SynthSpec, class: NumericsClass) -> Result<Pocket, LoadError> {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("model");
    synth::write(&dir, spec, &|_, _| ()).unwrap();
    loaded(Arc::new(Checkpoint::open(&dir).unwrap()), class)
}

fn loaded(checkpoint: Arc<Checkpoint>, class: NumericsClass) -> Result<Pocket, LoadError> {
    let backend = Arc::new(CpuBackend::new(CpuOptions::new(class)).unwrap());
    let model = Model::load(backend.clone(), &checkpoint, &LoadOptions { mtp: false }, &mut |_| {})?;
    let experts = InPlaceExperts::load(&ExpertLoader::new(backend, checkpoint));
    let ws = Workspace::new(&model, 64, 64).unwrap();
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

/// Drawn weights are right in scale at the depth of V3, in both formats of scales, and the same for everybody.
#[test]
fn drawn_weights_stay_sane_through_61_layers() {
    for changes in [vec![], vec!["quantization_config.scale_fmt=ue8m0"]] {
        let changes =
            [vec!["num_hidden_layers=61", "n_routed_experts=8", "vocab_size=1024"], changes].concat();
        let options = WeightsOptions {
            source: WeightsSource::Random { seed: 3 },
            overrides: changes.iter().map(|text| text.parse().unwrap()).collect(),
        };
        let tokens: Vec<u32> = (0..64).map(|i| (i * 37 + 5) % 1024).collect();
        let logits = |class| {
            let checkpoint = Checkpoint::open_with(support::repo("models/pocket"), &options).unwrap();
            let mut model = loaded(Arc::new(checkpoint), class).unwrap();
            let digest = model.model.weights_digest();
            let out = model.step(SegmentKind::Prefill, &tokens, 0, &table(tokens.len()), &mut ());
            (out.logits, digest)
        };
        let (first, digest) = logits(NumericsClass::Bf16);
        assert!(first.iter().all(|logit| logit.is_finite()));
        let rms = (first.iter().map(|l| f64::from(*l).powi(2)).sum::<f64>() / first.len() as f64).sqrt();
        assert!((0.3..3.0).contains(&rms), "{changes:?}: RMS of the logits is {rms}");
        // Tokens are told apart to the end.
        assert!(relative_distance(&first[..1024], &first[63 * 1024..]) > 0.3);
        let (again, same) = logits(NumericsClass::Bf16);
        assert_eq!((again, same), (first, digest));
    }
}

/// Scales that are powers of two are another quantiser, and it is used where the class quantises.
#[test]
fn ue8m0_activations_are_served() {
    let mut spec = SynthSpec::tiny(WeightFormat::Fp8, 7);
    spec.config.num_hidden_layers = 2;
    let tokens: Vec<u32> = (0..64).map(|i| (i * 37 + 5) % spec.config.vocab_size as u32).collect();
    let logits = |spec: &SynthSpec, class| {
        let mut model = open(spec, class).unwrap();
        model.step(SegmentKind::Prefill, &tokens, 0, &table(tokens.len()), &mut ()).logits
    };
    let plain = [NumericsClass::Bf16, NumericsClass::Fp8].map(|class| logits(&spec, class));
    spec.config.quantization.as_mut().unwrap().scale_fmt = cadre_types::config::ScaleFormat::Ue8m0;
    let powers = [NumericsClass::Bf16, NumericsClass::Fp8].map(|class| logits(&spec, class));
    assert_eq!(powers[0], plain[0], "bf16 quantises nothing");
    assert_ne!(powers[1], plain[1]);
    // A rounding may send a token to another expert: the median is the arithmetic.
    let vocab = spec.config.vocab_size;
    let pairs = powers[1].chunks(vocab).zip(plain[0].chunks(vocab));
    let mut distances: Vec<f32> = pairs.map(|(powers, exact)| relative_distance(powers, exact)).collect();
    distances.sort_by(f32::total_cmp);
    assert!(distances[distances.len() / 2] < 0.3, "median {}", distances[distances.len() / 2]);
}
