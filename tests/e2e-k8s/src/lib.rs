//! What the tests on a real Kubernetes share: the cluster, namespaces, the operator, models, load, figures.
//!
//! `cargo xtask e2e` sets the cluster up and runs the tests; what it hands over by the environment is listed in
//! `xtask/src/e2e.rs`. A test makes a [`Namespace`] that enforces the restricted standard, a [`Model`] in it, does
//! something to it, under a [`Soak`] where requests must not notice, and waits for what must follow.
//!
//! Nothing sleeps to synchronise: [`wait::until`] looks at a condition until it holds or its bound has passed, and
//! then says what it saw last. A namespace whose test fails tells conditions, pods and events before it goes, and
//! writes everything else to `target/xtask/logs/k8s`.
//!
//! What only a cluster of ours can do (stop a kubelet or the API server, kill a process, share a folder among nodes)
//! goes through [`Scripts`]; on a foreign cluster such a test prints a line `NOTICE:` and ends.

#![allow(
    clippy::disallowed_methods,
    reason = "tests take the cluster from their runner through the environment"
)]

pub mod bad_checkpoint;
pub mod cluster;
pub mod command;
pub mod diagnosis;
pub mod figures;
pub mod forward;
pub mod front;
pub mod kubectl;
pub mod metrics;
pub mod model;
pub mod namespace;
pub mod operator;
pub mod pod;
pub mod process;
pub mod sample;
pub mod scripts;
pub mod soak;
pub mod wait;

pub use bad_checkpoint::Claim;
pub use cluster::{Cluster, cluster};
pub use figures::Figures;
pub use forward::PortForward;
pub use front::Front;
pub use kubectl::Kubectl;
pub use metrics::Metrics;
pub use model::Model;
pub use namespace::Namespace;
pub use operator::Operator;
pub use pod::PodView;
pub use scripts::Scripts;
pub use soak::Soak;
