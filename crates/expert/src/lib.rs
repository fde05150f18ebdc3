//! The expert role: a shard behind gRPC.
//!
//! [`run()`] is the whole process but for flags and logging: it opens the checkpoint, registers with the
//! coordinator, loads what the placement gives it, proves itself by a real step, serves workers, and on
//! shutdown finishes what it has within a bound. It refuses to know how experts compute ([`cadre_shard`])
//! or how placements come about (the coordinator).

pub mod metrics;
pub mod options;
pub mod run;
mod shared;

pub use options::{BoundAddresses, ExpertOptions, OptionsError};
pub use run::{part_name, run};
pub use shared::SharedProcess;
