//! Hugging Face checkpoints of the DeepSeek-V3 architecture: strict config, tensor table, byte ranges
//! per expert, inspect, synth.
//!
//! This crate owns everything about the files and nothing about computing with them: [`Checkpoint`]
//! hands out bytes with their shapes, and backends repack those. It refuses early and by name: what is
//! wrong with a checkpoint is a list of [`Problem`]s (file, field or tensor, expected, found, fix), not
//! the first symptom. docs/checkpoint.md is the reference for users.
//!
//! Read [`table`] first: it is the architecture as a list of tensors. Then [`Checkpoint`].

mod catalog;
mod check;
mod checkpoint;
pub mod config;
mod digest;
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod hash;
pub mod header;
pub mod inspect;
mod listing;
mod problem;
mod random;
pub mod synth;
pub mod table;
mod verify;
mod weights;

pub use checkpoint::{Checkpoint, FileRange, MatrixBytes, MatrixSource, MatrixView};
pub use digest::Digest;
pub use error::CheckpointError;
pub use listing::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE};
pub use problem::{Problem, ProblemKind, Problems};
pub use random::{DrawnData, DrawnView};
pub use table::{TensorSpec, Tier};
pub use weights::{NoOverride, Override, UnknownSource, WeightsOptions, WeightsSource};
