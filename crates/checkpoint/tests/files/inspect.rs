//! The description of good checkpoints, above all of the real V3 from its headers.

use std::{fs, num::NonZeroUsize, os::unix::fs::MetadataExt, path::Path};

use cadre_checkpoint::{
    Checkpoint, ProblemKind, WeightsOptions, config,
    inspect::{Layout, Options, Report, Totals, inspect},
    synth::{SynthSpec, WeightFormat},
};

use crate::fixture::{Fixture, pocket};

const NO_LAYOUT: Layout = Layout { shards: 1, redundant_slots: 0 };

fn report(dir: &Path, layout: Layout) -> Report {
    inspect(
        dir,
        &Options { weights: WeightsOptions::default(), layout, hash: false, verify: None },
        &|_, _| {},
    )
}

/// 163 files of headers over holes, 641 GiB long and a few MB on disk.
fn v3_listing() -> Fixture {
    let bytes = include_bytes!("../data/deepseek_v3.json");
    let config = config::parse(Path::new("config.json"), bytes).unwrap().config;
    // The shard size that cuts our order of the table into as many files as were published.
    let max_shard_bytes = 4_250_000_000;
    let template = SynthSpec::tiny(WeightFormat::Fp8, 0);
    Fixture::headers(&SynthSpec { config, max_shard_bytes, ..template })
}

#[test]
fn v3_from_headers_alone() {
    let fixture = v3_listing();
    let on_disk: u64 = fs::read_dir(fixture.path())
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512)
        .sum();
    assert!(on_disk < 64 << 20, "{on_disk} bytes on disk");

    let report = report(fixture.path(), Layout { shards: 32, redundant_slots: 32 });
    assert!(report.problems.is_empty(), "{}", report.problems);
    let found = &report.found;
    assert_eq!((found.tensors, found.shard_files, found.shard_files_read), (91_991, 163, 163));
    assert_eq!((found.elements, found.scale_elements), (684_531_386_000, 41_540_496));
    assert_eq!(format!("{:.3}", found.bytes as f64 / (1u64 << 30) as f64), "641.285");
    let totals = report.totals.as_ref().unwrap();
    assert_eq!(totals.main_params, 671_026_419_200);
    assert_eq!(totals.mtp_params, 11_610_068_224);
    assert_eq!(totals.active_params, 37_552_297_472);
    assert_eq!((totals.kv.bf16, totals.kv.bf16_with_mtp), (70_272, 71_424));
    assert_eq!((totals.kv.f32, totals.kv.f32_with_mtp), (140_544, 142_848));
    assert_eq!(totals.tiers.iter().map(|tier| tier.bytes).sum::<u64>(), found.bytes);
    // 44,040,192 codes and 2,688 scales.
    assert_eq!(totals.bytes_per_expert, 44_040_192 + 4 * 2_688);
    let layout = report.layout.as_ref().unwrap();
    assert_eq!(layout.shards.len(), 32);
    for shard in &layout.shards {
        assert_eq!((shard.slots_per_layer, shard.bytes), (9, 9 * 58 * totals.bytes_per_expert));
    }
    // The MTP layer's 256 experts, 11 GB: nothing drafts with them, so nobody loads them.
    assert_eq!(totals.idle_expert_bytes, 256 * totals.bytes_per_expert);
    let text = report.to_string();
    for part in [
        "91,991 tensors in 163 shards",
        "684,531,386,000 elements (41,540,496",
        "641.285 GiB",
        "671.03 B main",
        "11.61 B only in MTP",
        "37.55 B active",
        "70,272 B",
        "71,424 B",
        "shards 0-31",
        "of the MTP layer are not loaded: nothing drafts with it",
    ] {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }

    // The same holes open as a checkpoint, and have an identity; their zeros are refused where read.
    let checkpoint = Checkpoint::open(fixture.path()).unwrap();
    assert_eq!(checkpoint.model_hash(), Checkpoint::open(fixture.path()).unwrap().model_hash());
    let error = checkpoint.matrix("model.layers.61.mlp.experts.255.down_proj.weight").unwrap_err();
    assert!(error.to_string().contains("finite and positive scales"), "{error}");
    assert_eq!(Totals::published(checkpoint.config()), *totals);
}

#[test]
fn the_bundled_checkpoint_is_described() {
    let options = Options {
        weights: cadre_checkpoint::WeightsOptions::default(),
        layout: Layout { shards: 7, redundant_slots: 5 },
        hash: true,
        verify: Some(NonZeroUsize::new(2).unwrap()),
    };
    let report = inspect(&pocket(), &options, &|_, _| {});
    assert!(report.problems.is_empty() && report.verified, "{}", report.problems);
    assert_eq!(report.model_hash, Some(Checkpoint::open(pocket()).unwrap().model_hash()));
    let totals = report.totals.as_ref().unwrap();
    assert_eq!(report.found.tensors as u64, totals.tensors);
    assert_eq!(totals.tiers.iter().map(|tier| tier.bytes).sum::<u64>(), report.found.bytes);
    // 37 slots over 7 shards: two have six, five have five.
    let slots: Vec<u64> = report.layout.as_ref().unwrap().shards.iter().map(|s| s.slots_per_layer).collect();
    assert_eq!(slots, [6, 6, 5, 5, 5, 5, 5]);
    let text = report.to_string();
    assert!(
        text.contains("shards 0-1") && text.contains("shards 2-6") && text.contains("verified"),
        "{text}"
    );
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
}

#[test]
fn layouts_that_cannot_be_are_problems() {
    for layout in [
        Layout { shards: 0, redundant_slots: 0 },
        Layout { shards: 33, redundant_slots: 0 },
        Layout { shards: 1, redundant_slots: 1 },
        Layout { shards: 2, redundant_slots: 33 },
        Layout { shards: 100_000, redundant_slots: usize::MAX },
    ] {
        let report = report(&pocket(), layout);
        assert_eq!(report.problems.total(), 1, "{layout:?}: {}", report.problems);
        let problem = report.problems.iter().next().unwrap();
        assert_eq!((problem.kind, problem.subject.as_str()), (ProblemKind::BadValue, "field `layout`"));
        assert!(report.layout.is_none());
    }
    for layout in [Layout { shards: 2, redundant_slots: 32 }, Layout { shards: 32, redundant_slots: 0 }] {
        assert!(report(&pocket(), layout).problems.is_empty(), "{layout:?}");
    }
}

#[test]
fn describing_reads_no_weights() {
    let fixture = Fixture::new(WeightFormat::Fp8);
    let scale = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv";
    fixture.poke(scale, 0, &f32::NAN.to_le_bytes());
    let light = report(fixture.path(), NO_LAYOUT);
    assert!(light.problems.is_empty() && !light.verified && light.model_hash.is_none());
    let options = Options {
        weights: cadre_checkpoint::WeightsOptions::default(),
        layout: NO_LAYOUT,
        hash: false,
        verify: Some(NonZeroUsize::MIN),
    };
    let full = inspect(fixture.path(), &options, &|_, _| {});
    assert_eq!(full.problems.total(), 1);
    assert!(full.to_string().contains(scale));
}
