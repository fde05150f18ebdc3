//! What tests/fuzz reaches that the crate keeps to itself.

use std::path::Path;

use crate::{
    header::{self, Header},
    problem::{About, Problem},
};

/// The header at the start of a file.
pub fn header(bytes: &[u8]) -> Result<Header, Box<Problem>> {
    header::parse(&About::new(Path::new("fuzzed.safetensors")), bytes)
}
