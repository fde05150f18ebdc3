//! An open checkpoint: checked as a whole, read tensor by tensor.
//!
//! Opening reads the configuration, the index and the headers and compares them with the table of the
//! architecture; after that every accessor may rely on names, shapes, dtypes and byte ranges. Numbers
//! are judged where they are read: scales and vectors at access, all of it by [`Checkpoint::verify`].
//! A process that asks only for some experts touches only their byte ranges (and the headers).

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use cadre_types::{LayerId, LogicalExpert, ModelConfig, ModelHash};

use crate::{
    catalog::{Catalog, Tensor},
    check,
    config::{self, DefaultedField},
    digest::Digest,
    error::CheckpointError,
    hash,
    header::Dtype,
    listing::{self, CONFIG_FILE, Listing},
    problem::{About, Problem, ProblemKind, Problems},
    random::{DrawnView, Random},
    table::{BLOCK, SCALE_SUFFIX, expert_names},
    weights::WeightsOptions,
};

/// A matrix, wherever its elements come from.
#[derive(Clone, Debug, PartialEq)]
pub enum MatrixSource<'a> {
    /// In a file.
    Stored(MatrixView<'a>),
    /// Drawn.
    Drawn(DrawnView),
}

/// A matrix in the checkpoint's own bytes: row-major `[rows, cols]`, little-endian, any alignment.
#[derive(Clone, Debug, PartialEq)]
pub struct MatrixView<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The elements.
    pub data: MatrixBytes<'a>,
}

/// Elements of a [`MatrixView`].
#[derive(Clone, Debug, PartialEq)]
pub enum MatrixBytes<'a> {
    /// F32, 4 bytes each.
    F32(&'a [u8]),
    /// BF16, 2 bytes each.
    Bf16(&'a [u8]),
    /// e4m3fn, one byte each, with one multiplier per 128x128 block.
    E4m3 {
        /// Codes.
        codes: &'a [u8],
        /// Multipliers `[rows.div_ceil(128), cols.div_ceil(128)]`, finite and positive.
        scales: Vec<f32>,
    },
}

/// A byte range of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRange {
    /// File name inside the checkpoint directory.
    pub file: String,
    /// Bytes, counted from the start of the file.
    pub range: Range<u64>,
}

/// A checkpoint directory whose configuration and headers are in order.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config_bytes: Vec<u8>,
    config: ModelConfig,
    defaults: Vec<DefaultedField>,
    warnings: Problems,
    weights: WeightsOptions,
    /// Empty if weights are drawn.
    pub(crate) catalog: Catalog,
    random: Option<Random>,
    hash: OnceLock<ModelHash>,
}

impl Checkpoint {
    /// Opens and checks the checkpoint in `dir`. The error lists everything that is wrong.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        Self::open_with(dir, &WeightsOptions::default())
    }

    /// As [`Self::open`], with weights from elsewhere and another configuration. Random weights need no files but
    /// `config.json`.
    pub fn open_with(dir: impl AsRef<Path>, weights: &WeightsOptions) -> Result<Self, CheckpointError> {
        let dir = dir.as_ref();
        let mut survey = Survey::new(dir, weights);
        match (survey.parsed.take(), survey.problems.is_empty()) {
            (Some((config_bytes, parsed)), true) => Ok(Self {
                dir: dir.to_owned(),
                config_bytes,
                random: weights.seed().map(|seed| Random::new(&parsed.config, seed)),
                config: parsed.config,
                defaults: parsed.defaults,
                warnings: survey.warnings,
                weights: weights.clone(),
                catalog: survey.listing.catalog,
                hash: OnceLock::new(),
            }),
            _ if !weights.overrides.is_empty() => Err(CheckpointError::Overridden {
                dir: dir.to_owned(),
                weights: Box::new(weights.clone()),
                problems: survey.problems,
            }),
            _ => Err(CheckpointError::Invalid { dir: dir.to_owned(), problems: survey.problems }),
        }
    }

    /// Where its weights come from, and what was changed of its configuration.
    pub fn weights(&self) -> &WeightsOptions {
        &self.weights
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Fields of `config.json` that were absent and took their published default.
    pub fn defaults(&self) -> &[DefaultedField] {
        &self.defaults
    }

    /// Findings that do not prevent use: tensors that are not loaded, a BF16 correction bias.
    pub fn warnings(&self) -> &Problems {
        &self.warnings
    }

    /// Whether the checkpoint has the tensor (only MTP copies of embedding and head may be absent).
    pub fn contains(&self, name: &str) -> bool {
        self.random.as_ref().map_or_else(|| self.catalog.get_known(name).is_some(), |random| random.has(name))
    }

    /// A matrix by name, to be read or to be drawn.
    pub fn source(&self, name: &str) -> Result<MatrixSource<'_>, CheckpointError> {
        let Some(random) = &self.random else { return self.matrix(name).map(MatrixSource::Stored) };
        let drawn = random.matrix(name).ok_or_else(|| self.no_such(random, name, "matrix"))?;
        Ok(MatrixSource::Drawn(drawn))
    }

    /// A matrix of a file by name. Scales are read, and refused unless finite and positive.
    pub fn matrix(&self, name: &str) -> Result<MatrixView<'_>, CheckpointError> {
        let tensor = self.locate(name)?;
        let &[rows, cols] = tensor.shape else {
            return Err(wrong_rank(&tensor, "matrix"));
        };
        let data = match tensor.dtype {
            Dtype::E4m3 => MatrixBytes::E4m3 { codes: tensor.bytes(), scales: self.scales(name)? },
            Dtype::Bf16 => MatrixBytes::Bf16(tensor.bytes()),
            // The table admits these three dtypes only.
            _ => MatrixBytes::F32(tensor.bytes()),
        };
        Ok(MatrixView { rows, cols, data })
    }

    /// A vector by name, in F32. Values that are not finite are refused.
    pub fn vector_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        if let Some(random) = &self.random {
            return random.vector(name).ok_or_else(|| self.no_such(random, name, "vector"));
        }
        let tensor = self.locate(name)?;
        let &[_] = tensor.shape else {
            return Err(wrong_rank(&tensor, "vector"));
        };
        let values = decode(tensor.dtype, tensor.bytes());
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(at) => Err(not_finite(&tensor, &format!("element {at}"), values[at]).into()),
        }
    }

    /// The gate, up and down matrices of a routed expert.
    pub fn expert(
        &self,
        layer: LayerId,
        expert: LogicalExpert,
    ) -> Result<[MatrixView<'_>; 3], CheckpointError> {
        let [gate, up, down] = self.expert_names(layer, expert)?;
        Ok([self.matrix(&gate)?, self.matrix(&up)?, self.matrix(&down)?])
    }

    /// Bytes of a routed expert, scales included.
    pub fn expert_size(&self, layer: LayerId, expert: LogicalExpert) -> Result<u64, CheckpointError> {
        self.expert_names(layer, expert)?.iter().map(|name| self.tensor_bytes(name)).sum()
    }

    /// The byte ranges of a routed expert: what [`Self::expert`] and its reader touch, scales included. None if
    /// weights are drawn.
    pub fn expert_bytes(
        &self,
        layer: LayerId,
        expert: LogicalExpert,
    ) -> Result<Vec<FileRange>, CheckpointError> {
        let names = self.expert_names(layer, expert)?;
        let range = |tensor: Tensor<'_>| {
            let range = tensor.range();
            let file = tensor.shard.file.clone();
            FileRange { file, range: range.start as u64..range.end as u64 }
        };
        Ok(names.iter().flat_map(|name| self.with_scales(name)).map(range).collect())
    }

    /// Bytes of a tensor in the files, its scales included.
    pub fn tensor_bytes(&self, name: &str) -> Result<u64, CheckpointError> {
        if let Some(random) = &self.random {
            return random.bytes(name).ok_or_else(|| self.unknown(name));
        }
        self.locate(name)?;
        Ok(self.with_scales(name).map(|tensor| tensor.range().len() as u64).sum())
    }

    /// Takes a tensor's bytes, and its scales', into a digest. Cheapest while they are in memory: after packing,
    /// before [`Self::release`].
    ///
    /// Of a drawn tensor it is what the tensor is drawn from.
    pub fn digest(&self, name: &str, into: &mut Digest) -> Result<(), CheckpointError> {
        if let Some(random) = &self.random {
            self.known_to(random, name)?;
            random.digest(name, into);
            return Ok(());
        }
        self.locate(name)?;
        self.with_scales(name).for_each(|tensor| into.part(tensor.bytes()));
        Ok(())
    }

    /// Drops the pages of a tensor, and of its scales, from this process. Call it after repacking.
    pub fn release(&self, name: &str) -> Result<(), CheckpointError> {
        if let Some(random) = &self.random {
            return self.known_to(random, name);
        }
        self.locate(name)?;
        for tensor in self.with_scales(name) {
            tensor.shard.mapping.release(tensor.range())?;
        }
        Ok(())
    }

    /// [`Self::release`] for the three matrices of a routed expert.
    pub fn release_expert(&self, layer: LayerId, expert: LogicalExpert) -> Result<(), CheckpointError> {
        self.expert_names(layer, expert)?.iter().try_for_each(|name| self.release(name))
    }

    /// Asks the kernel to read a tensor, and its scales, ahead.
    pub fn will_need(&self, name: &str) -> Result<(), CheckpointError> {
        if let Some(random) = &self.random {
            return self.known_to(random, name);
        }
        self.locate(name)?;
        for tensor in self.with_scales(name) {
            tensor.shard.mapping.will_need(tensor.range())?;
        }
        Ok(())
    }

    /// Identifies the weights (docs/checkpoint.md says over what). Computed on the first call, which
    /// reads the headers and 64 KiB of each shard.
    pub fn model_hash(&self) -> ModelHash {
        *self.hash.get_or_init(|| match &self.random {
            Some(random) => random.model_hash(&self.config),
            None => hash::model_hash(&self.config_bytes, &self.weights, &self.catalog),
        })
    }

    fn expert_names(&self, layer: LayerId, expert: LogicalExpert) -> Result<[String; 3], CheckpointError> {
        if self.config.is_moe(layer) && expert.index() < self.config.n_routed_experts {
            return Ok(expert_names(layer, expert));
        }
        Err(CheckpointError::UnknownExpert {
            layer,
            expert,
            first_moe: self.config.first_k_dense_replace,
            last_moe: self.config.total_layers().saturating_sub(1),
            experts: self.config.n_routed_experts,
        })
    }

    fn locate(&self, name: &str) -> Result<Tensor<'_>, CheckpointError> {
        if self.random.as_ref().is_some_and(|random| random.has(name)) {
            return Err(CheckpointError::Drawn { dir: self.dir.clone(), name: name.to_owned() });
        }
        self.catalog.get_known(name).ok_or_else(|| self.unknown(name))
    }

    fn unknown(&self, name: &str) -> CheckpointError {
        CheckpointError::UnknownTensor { dir: self.dir.clone(), name: name.to_owned() }
    }

    fn known_to(&self, random: &Random, name: &str) -> Result<(), CheckpointError> {
        if random.has(name) { Ok(()) } else { Err(self.unknown(name)) }
    }

    /// Why a drawn tensor cannot be had as a matrix or a vector.
    fn no_such(&self, random: &Random, name: &str, wanted: &'static str) -> CheckpointError {
        match random.shape(name) {
            None => self.unknown(name),
            Some(shape) => CheckpointError::WrongRank {
                file: self.dir.clone(),
                name: name.to_owned(),
                shape: shape.to_vec(),
                wanted,
            },
        }
    }

    /// The tensor and, if it is quantised, its scales.
    fn with_scales(&self, name: &str) -> impl Iterator<Item = Tensor<'_>> {
        let names = [name.to_owned(), format!("{name}{SCALE_SUFFIX}")];
        names.into_iter().filter_map(|name| self.catalog.get_known(&name))
    }

    /// The scales of a quantised matrix.
    fn scales(&self, weight: &str) -> Result<Vec<f32>, CheckpointError> {
        let tensor = self.locate(&format!("{weight}{SCALE_SUFFIX}"))?;
        let scales = decode(Dtype::F32, tensor.bytes());
        match scales.iter().position(|scale| !(scale.is_finite() && *scale > 0.0)) {
            None => Ok(scales),
            Some(at) => Err(bad_scale(&tensor, at, scales[at]).into()),
        }
    }
}

/// Everything that reading a directory brings to light, usable or not.
pub(crate) struct Survey {
    /// The configuration's bytes and meaning, if it could be parsed.
    pub(crate) parsed: Option<(Vec<u8>, config::ParsedConfig)>,
    pub(crate) listing: Listing,
    pub(crate) problems: Problems,
    pub(crate) warnings: Problems,
}

impl Survey {
    pub(crate) fn new(dir: &Path, weights: &WeightsOptions) -> Self {
        let (mut problems, mut warnings) = (Problems::default(), Problems::default());
        let mut parsed =
            listing::read_config(dir, &mut problems).and_then(|bytes| {
                match config::parse_with(&dir.join(CONFIG_FILE), &bytes, weights) {
                    Ok(parsed) => Some((bytes, parsed)),
                    Err(found) => {
                        problems.extend(found);
                        None
                    }
                }
            });
        if weights.seed().is_some() {
            return Self { parsed, listing: Listing::default(), problems, warnings };
        }
        let mut listing = listing::read(dir, &mut problems, &mut warnings);
        if let Some((_, parsed)) = &mut parsed {
            if check::mtp_is_absent(&parsed.config, &listing, &mut warnings) {
                parsed.config.num_nextn_predict_layers = 0;
            }
            // With no shard at all, the one finding about that says more than one per tensor.
            if listing.shard_files > 0 {
                check::check(&parsed.config, &mut listing, &mut problems, &mut warnings);
            }
        }
        Self { parsed, listing, problems, warnings }
    }
}

impl From<Box<Problem>> for CheckpointError {
    fn from(problem: Box<Problem>) -> Self {
        Self::BadNumber(problem)
    }
}

/// F32 or BF16 elements as F32. The table admits no other dtype where this is called.
pub(crate) fn decode(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    if dtype == Dtype::Bf16 {
        let (pairs, _) = bytes.as_chunks::<2>();
        return pairs.iter().map(|&pair| cadre_numerics::bf16::decode(u16::from_le_bytes(pair))).collect();
    }
    let (quads, _) = bytes.as_chunks::<4>();
    quads.iter().map(|&quad| f32::from_le_bytes(quad)).collect()
}

fn wrong_rank(tensor: &Tensor<'_>, wanted: &'static str) -> CheckpointError {
    CheckpointError::WrongRank {
        file: tensor.shard.mapping.path().to_owned(),
        name: tensor.name.to_owned(),
        shape: tensor.shape.to_vec(),
        wanted,
    }
}

pub(crate) fn bad_scale(tensor: &Tensor<'_>, at: usize, value: f32) -> Box<Problem> {
    let blocks_per_row = tensor.shape.last().map_or(1, |&cols| cols.max(1));
    let (row, col) = (at / blocks_per_row, at % blocks_per_row);
    let found =
        format!("{value} for block ({row}, {col}), rows from {}, columns from {}", row * BLOCK, col * BLOCK);
    About::new(tensor.shard.mapping.path()).tensor(
        ProblemKind::BadScale,
        tensor.name,
        "finite and positive scales",
        found,
        "the file is damaged or was quantised wrongly: fetch this shard again",
    )
}

pub(crate) fn not_finite(tensor: &Tensor<'_>, place: &str, value: f32) -> Box<Problem> {
    About::new(tensor.shard.mapping.path()).tensor(
        ProblemKind::NonFinite,
        tensor.name,
        "finite values",
        format!("{value} at {place}"),
        "the file is damaged or was converted wrongly: fetch this shard again",
    )
}
