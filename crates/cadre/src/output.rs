//! The result of a command on standard output. A reader that went away (a closed pipe) is no error.

use std::io::{self, Write};

use anyhow::{Context, Result};
use serde::Serialize;

/// One line, or several.
pub(crate) fn line(text: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// A value as JSON, for programs, in one line per value.
pub(crate) fn json(value: &impl Serialize) -> Result<()> {
    line(&serde_json::to_string(value).context("write JSON")?);
    Ok(())
}
