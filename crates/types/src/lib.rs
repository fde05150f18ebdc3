//! The nouns of cadre: ids, model configuration, placement, generation stamp, sampling parameters.
//!
//! This crate knows no framework: no async, no gRPC, no Kubernetes, no kernels. Everything that two
//! crates must agree on by name lives here, and nothing that only one of them needs.
//!
//! Read [`config::ModelConfig`] first, then [`placement::Placement`].

pub mod address;
pub mod cluster;
pub mod config;
pub mod generation;
pub mod ids;
pub mod placement;
pub mod sampling;

pub use address::{AddressError, AdvertiseError, HostPort, advertised};
pub use cluster::{
    ClusterView, CoordinatorStatus, Coverage, CoverageExample, Layout, LoadProgress, Member, MemberDevice,
    MemberId, MemberState, MemberStatus, NextLayout, OperatorView, PodRef, PodView, Role,
};
pub use config::ModelConfig;
pub use generation::{Generation, ModelHash, NumericsClass};
pub use ids::{
    LayerId, LogicalExpert, PageId, PlacementEpoch, Position, SequenceId, ShardIndex, SlotIndex, TokenId,
};
pub use placement::{LayerPlacement, Placement, PlacementError};
pub use sampling::{FinishReason, MAX_LOGPROBS, SamplingParams, SamplingParamsError, StopConditions};
