//! The worker role: an engine behind gRPC, with KV hand-off between prefill and decode.
//!
//! Owns: the process around one engine ([`run()`]), the one around an engine and expert shards of its device
//! ([`run_with_experts()`]), the service `cadre.v1.Worker` ([`service`]), metrics, and
//! [`inprocess`], which builds a complete engine with its experts in one process for tests and benches.
//! Refuses to know text, clients and placement decisions: it follows the coordinator's view.
//!
//! Read [`options::WorkerOptions`] first, then [`service::WorkerService`], then `docs/life-of-a-request.md`.

pub mod dispatch_metrics;
pub mod inprocess;
pub mod metrics;
pub mod options;
mod run;
pub mod service;
mod status;
mod wire;
pub mod with_experts;

pub use options::{WorkerOptions, WorkerRole, WorkerTimeouts};
pub use run::run;
pub use with_experts::run_with_experts;
