//! Checkpoints as files: opened, inspected, damaged, invented. Everything here goes through the public
//! API and real directories; the pure parts are tested beside their code.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod damaged;
mod fixture;
mod inspect;
mod open;
mod random;
mod synth;
