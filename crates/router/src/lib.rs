//! The router role: the client APIs (gRPC and OpenAI-compatible HTTP), admission, worker choice, and
//! the coordinator that keeps members and placement.
//!
//! Owns: the admission queue ([`admission`]), one journal per request in flight ([`journal`]), the
//! connections to workers and the work given to them ([`workers`]), and the coordinator's state
//! (`coordinator`, one owner task). Refuses to know: engines, kernels, weights, Kubernetes.
//!
//! The way of a request, one function per stage:
//! 1. [`service::Service::arrive`], [`service::Service::admit`]: once the whole request is there, a place in the
//!    bounded queue, or a refusal with Retry-After;
//! 2. [`service::Service::prepare`]: validate, render, tokenize (on a blocking thread, told to stop with the
//!    client or its deadline);
//! 3. [`admission::Ticket::turn`]: wait first-in first-out until it may run;
//! 4. `generate::start`: choose workers, open `Decode`, wait for `Reserved`; then a task of its own
//!    asks for the prefill, reads tokens, writes the journal, detokenizes and applies stop strings;
//! 5. the front doors ([`grpc`], [`http`]) turn chunks into their own shapes.
//!
//! Every wait has a bound: the request's deadline, and per worker the reservation and stall time-outs of
//! [`options::Limits`]. A client that goes away drops the receiver of its chunks; the task notices, drops
//! the worker streams, and the workers free the pages.
//!
//! **Replay** (the room for it): [`journal::Journal`] holds what a decode worker needs to continue a
//! request elsewhere, the prompt and every token emitted so far; `generate` is the only place that
//! would reopen a stream from it. Today a lost worker ends its requests with an error that names it.
//!
//! Read [`service::Service`] first.

pub mod admission;
mod coordinator;
pub mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod generate;
pub mod grpc;
pub mod http;
pub mod journal;
pub mod metrics;
pub mod model;
pub mod options;
mod output;
mod policy;
mod ready;
pub mod request;
mod run;
pub mod service;
pub mod workers;

pub use error::{RequestError, RouterError};
pub use options::{BoundAddresses, Limits, ListenAddresses, RouterOptions};
pub use run::{Listeners, run, serve};
