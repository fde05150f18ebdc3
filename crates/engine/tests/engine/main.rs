//! The engine from outside, over the scalar reference backend and a small random checkpoint whose experts
//! are computed in the test's own exchange, which can fail and wait on command.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod chaos;
mod determinism;
mod failure;
mod handoff;
mod life;
mod support;
