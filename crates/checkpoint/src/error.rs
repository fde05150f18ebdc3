//! Why a checkpoint cannot be used.

use std::path::PathBuf;

use cadre_mapping::MappingError;
use cadre_types::{LayerId, LogicalExpert};

use crate::{problem::Problems, weights::WeightsOptions};

/// The errors of [`crate::Checkpoint`].
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The directory does not hold a usable checkpoint.
    #[error("checkpoint {dir} cannot be used ({total} problems):\n{problems}", dir = dir.display(), total = problems.total())]
    Invalid {
        /// The directory.
        dir: PathBuf,
        /// What is wrong.
        problems: Problems,
    },
    /// The directory with these weights and overrides makes no usable model.
    #[error(
        "checkpoint {dir}, {weights}: cannot be used ({total} problems; with files only fields that leave every tensor \
         its shape can be overridden, sizes need --weights random:SEED):\n{problems}",
        dir = dir.display(),
        total = problems.total()
    )]
    Overridden {
        /// The directory.
        dir: PathBuf,
        /// Source and overrides.
        weights: Box<WeightsOptions>,
        /// What is wrong.
        problems: Problems,
    },
    /// Random weights lie in no file.
    #[error("checkpoint {dir}: `{name}` is drawn, there are no bytes of it", dir = dir.display())]
    Drawn {
        /// The directory.
        dir: PathBuf,
        /// The name asked for.
        name: String,
    },
    /// The tensor is not one of the architecture, or this checkpoint leaves it out.
    #[error("checkpoint {dir}: no tensor `{name}` in its table", dir = dir.display())]
    UnknownTensor {
        /// The directory.
        dir: PathBuf,
        /// The name asked for.
        name: String,
    },
    /// A vector was asked for as a matrix or the other way round.
    #[error("{file}: tensor `{name}` has shape {shape:?}, asked for as a {wanted}", file = file.display())]
    WrongRank {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// `matrix` or `vector`.
        wanted: &'static str,
    },
    /// The layer has no such routed expert.
    #[error("{layer} has no {expert}: MoE layers are {first_moe} to {last_moe}, with {experts} experts each")]
    UnknownExpert {
        /// The layer asked for.
        layer: LayerId,
        /// The expert asked for.
        expert: LogicalExpert,
        /// First layer with experts.
        first_moe: usize,
        /// Last layer with experts, MTP included.
        last_moe: usize,
        /// Routed experts per layer.
        experts: usize,
    },
    /// A weight or scale is not a usable number.
    #[error("{0}")]
    BadNumber(Box<crate::Problem>),
    /// A hint about pages was refused.
    #[error(transparent)]
    Mapping(#[from] MappingError),
}
