//! The operator: one `MoEModel` becomes router, workers and expert shards.
//!
//! [`plan`] is pure: what is observed → what is to be done. [`mod@run`] watches every kind that it owns, gathers
//! [`observed::Observed`], talks to each model's coordinator and carries plans out. `cadre operator plan -f
//! FILE` prints a plan without a cluster.

pub mod allowed;
pub mod kinds;
pub mod observed;
pub mod plan;
pub mod rbac;
pub mod run;

pub use allowed::Allowed;
pub use run::{CoordinatorAddress, LeaseOptions, OperatorError, OperatorOptions, metrics, run};
