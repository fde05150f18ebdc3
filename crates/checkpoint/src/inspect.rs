//! A checkpoint described: totals, bytes by tier, what each expert shard of a layout would hold, and
//! everything that is missing or wrong.
//!
//! Works from headers: no weight is read unless [`Options::hash`] or [`Options::verify`] asks. A
//! damaged checkpoint still gives a report with as much as could be told.

use std::{num::NonZeroUsize, path::Path};

use cadre_types::{ModelConfig, ModelHash};
use serde::{Deserialize, Serialize};

use crate::{
    Checkpoint, CheckpointError,
    checkpoint::Survey,
    config::DefaultedField,
    header::Dtype,
    problem::{About, ProblemKind, Problems},
    table::SCALE_SUFFIX,
    weights::WeightsOptions,
};

mod render;
mod totals;

pub use totals::{KvBytes, Layout, LayoutError, LayoutTotals, ShardTotals, TierTotals, Totals};

/// What to find out.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where weights come from, and what is changed of the configuration.
    pub weights: WeightsOptions,
    /// The layout for which bytes per shard are told.
    pub layout: Layout,
    /// Compute the model hash (reads 64 KiB of each shard).
    pub hash: bool,
    /// Judge every number (reads everything) with this many threads.
    pub verify: Option<NonZeroUsize>,
}

/// The description.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The directory.
    pub dir: String,
    /// Where its weights come from, and what was overridden: `files`, `random:1 with n_routed_experts=16`.
    pub weights: String,
    /// The configuration in force, if it could be parsed.
    pub config: Option<ModelConfig>,
    /// Fields that took their published default.
    pub defaults: Vec<DefaultedField>,
    /// What the headers hold.
    pub found: Found,
    /// What the architecture amounts to, with the element types that were found.
    pub totals: Option<Totals>,
    /// Bytes per expert shard.
    pub layout: Option<LayoutTotals>,
    /// The checkpoint's identity, if asked for and usable.
    pub model_hash: Option<ModelHash>,
    /// Whether every number was judged.
    pub verified: bool,
    /// What prevents use.
    pub problems: Problems,
    /// What does not.
    pub warnings: Problems,
}

/// Sums over the headers that could be read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Shard files that the index names.
    pub shard_files: usize,
    /// Shard files whose header could be read.
    pub shard_files_read: usize,
    /// Tensors.
    pub tensors: usize,
    /// Elements, scales included.
    pub elements: u64,
    /// F32 elements that are scales.
    pub scale_elements: u64,
    /// Bytes of tensors.
    pub bytes: u64,
}

/// Describes the checkpoint in `dir`. `progress(done, total)` is told bytes while verifying.
pub fn inspect(dir: &Path, options: &Options, progress: &(dyn Fn(u64, u64) + Sync)) -> Report {
    let survey = Survey::new(dir, &options.weights);
    let found = found(&survey);
    let catalog = &survey.listing.catalog;
    let bytes_of = |name: &str| catalog.get(name).map(|tensor| tensor.range().len() as u64);
    let parsed = survey.parsed.as_ref().map(|(_, parsed)| parsed.clone());
    let totals = parsed.as_ref().map(|parsed| Totals::of(&parsed.config, bytes_of));
    let (mut problems, warnings) = (survey.problems, survey.warnings);
    // Dropped before the directory is opened again, so that its mappings exist once.
    drop(survey.listing);
    let mut layout = None;
    if let (Some(parsed), Some(totals)) = (&parsed, &totals) {
        match LayoutTotals::of(&parsed.config, totals, &options.layout) {
            Ok(result) => layout = Some(result),
            Err(error) => problems.push(About::new(dir).field(
                ProblemKind::BadValue,
                "layout",
                error.expected,
                error.found,
                error.fix,
            )),
        }
    }
    let mut report = Report {
        dir: dir.display().to_string(),
        weights: options.weights.to_string(),
        defaults: parsed.as_ref().map(|parsed| parsed.defaults.clone()).unwrap_or_default(),
        config: parsed.map(|parsed| parsed.config),
        found,
        totals,
        layout,
        model_hash: None,
        verified: false,
        problems,
        warnings,
    };
    read_weights(dir, options, progress, &mut report);
    report
}

/// The parts that read more than headers. A checkpoint that does not open has no identity and no
/// numbers to judge; its problems are in the report already.
fn read_weights(dir: &Path, options: &Options, progress: &(dyn Fn(u64, u64) + Sync), report: &mut Report) {
    if !report.problems.is_empty() || !(options.hash || options.verify.is_some()) {
        return;
    }
    match Checkpoint::open_with(dir, &options.weights) {
        Ok(checkpoint) => {
            report.model_hash = options.hash.then(|| checkpoint.model_hash());
            if let Some(threads) = options.verify {
                report.problems.extend(checkpoint.verify(threads, progress));
                report.verified = true;
            }
        }
        // It changed under our hands.
        Err(CheckpointError::Invalid { problems, .. } | CheckpointError::Overridden { problems, .. }) => {
            report.problems.extend(problems)
        }
        Err(other) => report.problems.push(About::new(dir).file(
            ProblemKind::Unreadable,
            "a checkpoint that opens",
            other.to_string(),
            "run the command again",
        )),
    }
}

fn found(survey: &Survey) -> Found {
    let listing = &survey.listing;
    let mut found = Found {
        shard_files: listing.shard_files,
        shard_files_read: listing.catalog.shards().len(),
        tensors: listing.catalog.iter().len(),
        ..Found::default()
    };
    for tensor in listing.catalog.iter() {
        let bytes = tensor.range().len() as u64;
        let elements = bytes / tensor.dtype.bytes() as u64;
        found.bytes += bytes;
        found.elements += elements;
        if tensor.dtype == Dtype::F32 && tensor.name.ends_with(SCALE_SUFFIX) {
            found.scale_elements += elements;
        }
    }
    found
}
