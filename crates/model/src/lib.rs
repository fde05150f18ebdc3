//! The DeepSeek-V3 network over a backend: MLA, gate, dense and MoE layers, MTP, and its loader.
//!
//! [`Model`] holds what an attention worker needs (everything but the routed experts), resident on the
//! backend; routed experts are reached through [`cadre_ops::ExpertExchange`]. [`experts`] loads routed
//! experts for a shard. The order of operations is docs/numerics.md and spec §3–§8; this crate adds no
//! arithmetic of its own.

pub mod batch;
pub mod experts;
pub mod forward;
pub mod loader;
pub mod plan;
pub mod rope;

pub use batch::{LogitRows, Segment, SegmentKind, StepBatch, StepOutput};
pub use experts::{ExpertKey, ExpertLoader};
pub use forward::{LayerTicket, ModelError, Observed, Site, StepObserver, Workspace};
pub use loader::{LoadError, LoadOptions, LoadProgress, Model};
pub use plan::{MemoryPlan, MemoryShort, WorkerSizes, element_type, shard_plan, worker_plan};
