//! What the whole-system tests share: a cluster of real processes, clients, the golden texts.
//!
//! A test starts `cadre up` with free ports and talks to it from outside, as a user would. Nothing here
//! sleeps to synchronise: [`wait::until`] looks at a condition until it holds or its bound has passed, and
//! events of `up --output json` are awaited by name.
//!
//! Clusters end with the test that started them in every case: `up` runs with `--exit-on-stdin-close`, so
//! that it drains even when the test process is killed.

#![allow(
    clippy::disallowed_methods,
    reason = "tests take the path of the binary from their runner through the environment"
)]

pub mod binary;
pub mod checkpoints;
pub mod clients;
pub mod cluster;
pub mod document;
pub mod golden;
pub mod grpc;
pub mod http;
pub mod operator;
pub mod process;
pub mod role;
pub mod wait;

pub use cluster::Cluster;
pub use golden::Golden;
