//! What is written is a function of the spec, and nothing else is overwritten.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, fs, num::NonZeroUsize, path::Path};

use super::{Fill, SynthError, SynthSpec, WeightFormat, write, write_headers, write_with};

fn small(format: WeightFormat) -> SynthSpec {
    let mut spec = SynthSpec::tiny(format, 11);
    spec.config.vocab_size = 300;
    spec.config.num_hidden_layers = 2;
    spec.config.n_routed_experts = 8;
    spec.max_shard_bytes = 500_000;
    spec
}

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn bytes_do_not_depend_on_threads() {
    let spec = small(WeightFormat::Fp8);
    let written = |threads| {
        let dir = tempfile::tempdir().unwrap();
        let fill = Fill::Random(NonZeroUsize::new(threads).unwrap());
        let written = write_with(dir.path(), &spec, fill, &|_, _| {}).unwrap();
        assert!(written.shards > 2, "{written:?}");
        contents(dir.path())
    };
    assert!(written(1) == written(7));
}

#[test]
fn holes_have_the_headers_of_the_real_thing() {
    let spec = small(WeightFormat::Bf16);
    let (real, holes) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let written = write(real.path(), &spec, &|_, _| {}).unwrap();
    assert_eq!(write_headers(holes.path(), &spec).unwrap(), written);
    let (real, holes) = (contents(real.path()), contents(holes.path()));
    assert!(real.keys().eq(holes.keys()));
    for (name, bytes) in real {
        let hole = &holes[&name];
        assert_eq!(bytes.len(), hole.len(), "{name}");
        let same = if name.ends_with(".json") {
            bytes.len()
        } else {
            8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize
        };
        assert!(bytes[..same] == hole[..same], "{name}");
        assert!(hole[same..].iter().all(|&byte| byte == 0), "{name}");
    }
}

#[test]
fn progress_ends_at_the_total() {
    let dir = tempfile::tempdir().unwrap();
    let most = std::sync::atomic::AtomicU64::new(0);
    let written = write(dir.path(), &small(WeightFormat::Fp8), &|done, total| {
        assert!(done <= total);
        most.fetch_max(done, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(most.into_inner(), written.unwrap().bytes);
}

#[test]
fn unusable_requests_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("new");
    let refused = |spec: &SynthSpec| {
        let error = write(&target, spec, &|_, _| {}).expect_err("refused");
        assert!(!target.join("config.json").exists());
        error
    };
    let mut spec = small(WeightFormat::Fp8);
    spec.config.n_group = 3;
    let error = refused(&spec);
    assert!(matches!(error, SynthError::Config { .. }) && error.to_string().contains("n_group"));
    let error = refused(&SynthSpec { max_shard_bytes: 0, ..small(WeightFormat::Fp8) });
    assert!(matches!(error, SynthError::Spec { field: "max_shard_bytes", .. }));
    let error = refused(&SynthSpec { bias: (1.0, f32::NAN), ..small(WeightFormat::Fp8) });
    assert!(matches!(error, SynthError::Spec { field: "bias", .. }));
    // The bundled tokenizer needs more ids than this model has.
    let pocket = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/pocket");
    let spec = SynthSpec { tokenizer: Some(pocket), ..small(WeightFormat::Fp8) };
    let error = refused(&spec);
    assert!(matches!(error, SynthError::Tokenizer { .. }) && error.to_string().contains("300"));

    fs::write(dir.path().join("precious"), b"x").unwrap();
    let error = write(dir.path(), &small(WeightFormat::Fp8), &|_, _| {}).unwrap_err();
    assert!(matches!(error, SynthError::NotEmpty { .. }), "{error}");
}
