//! From chosen experts to shards and back: grouping, choice among copies, transports, retry.
//!
//! Read [`Dispatcher`] first: it implements [`cadre_ops::ExpertExchange`] for a worker. [`plan`] is the
//! pure grouping, [`health`] the pure choice among copies, [`transport`] the seams (in-process and gRPC, client
//! and server), [`frame`] and [`wire`] the nouns. [`membership`] is the connection to the coordinator that
//! workers and shards share. docs/wire.md has the limits, errors and time bounds in one table.
//!
//! This crate knows no weights, no kernels and no metrics library, and it never decides a bit of a result.

pub mod backoff;
pub mod bench;
pub mod dispatcher;
pub mod frame;
pub mod health;
pub mod membership;
pub mod plan;
pub mod stats;
pub mod transport;
pub mod tuning;
pub mod wire;

pub use dispatcher::{DispatchConfig, DispatchHandle, Dispatcher};
pub use frame::{
    Answer, CombineFrame, DispatchFrame, LinkError, Refusal, RefusalCode, ShardContract, ShardSignals,
};
pub use membership::{GenerationRefused, LoadReport, Membership, MembershipOptions};
pub use stats::{DispatchStats, ExpertLoadWindow};
pub use transport::{
    AnswerSink, Connect, DispatchTransport, Drive, Reply, ShardService,
    grpc::GrpcConnector,
    io::{Driver, IoHandle, IoThread},
    local::LocalConnector,
    server::{ExpertServer, Limits},
};
