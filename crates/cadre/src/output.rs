//! The result of a command on standard output, and notes on standard error. A reader that went away (a closed pipe) is no error.

use std::io::{self, Write};

use anyhow::{Context, Result};
use serde::Serialize;

/// One line, or several.
pub(crate) fn line(text: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// One line on standard error, in one write: roles share it with `up`, and `eprintln!` would let their lines
/// come between its pieces.
pub(crate) fn note(text: &str) {
    let _ = io::stderr().lock().write_all(format!("{text}\n").as_bytes());
}

/// A value as JSON, for programs, in one line per value.
pub(crate) fn json(value: &impl Serialize) -> Result<()> {
    line(&serde_json::to_string(value).context("write JSON")?);
    Ok(())
}
