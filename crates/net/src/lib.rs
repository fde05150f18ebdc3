//! The server under every port of every role: HTTP and gRPC front doors, coordinator, workers, shards, admin.
//!
//! Owns: the accept loop, the life of a connection and the intake of requests. Refuses to know: what is
//! served (an [`axum::Router`]; a gRPC service becomes one through `tonic::service::Routes`).
//!
//! What a peer can hold without asking anything of us is bounded, on every port alike:
//! - connections: [`ServerOptions::max_connections`], less where the process has few file descriptors
//!   ([`descriptors`]); what comes beyond waits in the kernel's queue;
//! - a connection that asks nothing: [`ServerOptions::first_request`], then [`ServerOptions::idle`]; while
//!   the port is full only [`ServerOptions::idle_when_full`], so that silence makes room for those who ask;
//! - what has come of a request that is not complete: a budget of bytes per port and a time ([`intake`]);
//! - an accept that fails for want of descriptors is tried again after a pause that grows ([`server`]).
//!
//! Read [`serve`] first. [`bind`] makes its listener.

mod connection;
pub mod descriptors;
pub mod intake;
mod listen;
mod options;
mod own_errors;
pub mod server;

pub use intake::{IntakeError, IntakeFault, IntakeOptions};
pub use listen::bind;
pub use options::{Http2Options, OwnError, Protocol, ServerOptions};
pub use server::serve;
