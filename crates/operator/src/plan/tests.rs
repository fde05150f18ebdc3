//! Scenarios of the plan, each named by the behaviour that it shows.

mod beside;
mod change;
mod children;
mod cluster;
mod conditions;
mod faults;
mod fields;
mod network;
mod ownership;
mod property;
pub(super) mod samples;
