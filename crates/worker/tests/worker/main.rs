//! Workers over the bundled checkpoint: the same text whatever the layout, hand-off over loopback gRPC,
//! and the whole role against a coordinator that the test plays.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod determinism;
mod process;
mod service;
mod shared;
mod support;
