//! The router against scripted workers: real sockets, real gRPC and HTTP, no engine.
//!
//! A test sets a worker's script, asks through a front door, and looks at what the client and the worker
//! saw. Nothing sleeps: tests wait for health, for counters (`watch` channels) and for gates that they
//! open themselves.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unreachable_pub, reason = "a test binary exports nothing; pub marks what other modules of it use")]

mod admission;
mod cluster;
mod coordinator;
mod fake_worker;
mod faults;
mod grpc;
mod http_api;
mod http_client;
mod http_errors;
mod intake;
