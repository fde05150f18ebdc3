//! The Kubernetes API of cadre, group `cadre.dev/v1alpha1`: what users write and what they read back.
//!
//! The Rust types are the only source: CRD YAML (`charts/cadre-crds`), the API reference (docs/api.md), the samples
//! (`deploy/samples`) and the table of reasons (docs/operations.md) are generated from them by `cargo xtask generate` and diffed by a
//! test. Every rule that spans fields is CEL on the types, evaluated by the API server and, without a
//! cluster, by the unit tests here.
//!
//! Nothing is accepted and ignored: a field that no controller reads does not exist.
//!
//! Read [`model::MoEModelSpec`] first, then [`tier::MoETierSpec`], then [`condition`]. [`crd`] has the
//! definitions as they are installed, [`manifest`] reads files as strictly as the API server does.

pub mod condition;
pub mod crd;
mod image;
pub mod manifest;
pub mod model;
pub mod names;
pub mod quantity;
pub mod reference;
mod rules;
pub mod samples;
mod schema;
pub mod status;
pub mod tier;

pub use condition::{ConditionType, Reason};
pub use image::{IMAGE, IMAGE_CUDA, IMAGE_REPOSITORY};
pub use model::{MoEModel, MoEModelSpec};
pub use names::Tier;
pub use status::MoEModelStatus;
pub use tier::{MoETier, MoETierSpec, MoETierStatus};

/// The API group.
pub const GROUP: &str = "cadre.dev";
/// The API version.
pub const VERSION: &str = "v1alpha1";
