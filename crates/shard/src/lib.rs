//! An expert shard without a process around it: slots, their weights, and the computing of frames.
//!
//! Read [`Shard`] first. It implements [`cadre_dispatch::ShardService`], so the same shard stands behind a
//! gRPC server (`cadre-expert`) or inside an engine's own process. Frames of all workers that wait for the
//! same layer are merged into one grouped feed-forward; every frame gets the rows that it would get alone,
//! because each row's result depends on nothing but that row and its expert.
//!
//! Memory is the experts' weights, plus buffers for a pass (as large as the backend says), plus
//! [`queue::QUEUE_BYTES`] of waiting frames.

pub mod any;
pub mod compute;
pub mod queue;
pub mod self_test;
pub mod shard;
pub mod source;
pub mod stats;
pub mod workspace;

pub use any::AnyShard;
pub use self_test::SelfTestError;
pub use shard::{ApplyError, Progress, Shard, ShardOptions};
pub use source::{CheckpointSource, ExpertSource, Loaded, SourceError};
pub use stats::ShardStats;
