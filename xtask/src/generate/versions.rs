//! The version where it stands in files that are read without a build: charts and the Containerfile.
//!
//! One source, the workspace's version: a chart that installs another image than `cargo xtask image` makes would be
//! noticed by users only.

use std::fs;

use anyhow::{Context, Result, ensure};

use super::publish;
use crate::command;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// File, how the line begins, what follows.
const LINES: [(&str, &str, &str); 5] = [
    ("charts/cadre-crds/Chart.yaml", "version: ", VERSION),
    ("charts/cadre-crds/Chart.yaml", "appVersion: ", VERSION),
    ("charts/cadre/Chart.yaml", "version: ", VERSION),
    ("charts/cadre/Chart.yaml", "appVersion: ", VERSION),
    ("deploy/Containerfile", "ARG VERSION=", VERSION),
];

/// Writes or compares every line.
pub(super) fn run(check: bool) -> Result<()> {
    let root = command::root()?;
    for (file, begin, value) in LINES {
        let path = root.join(file);
        let old = fs::read_to_string(&path).with_context(|| format!("read {file}"))?;
        let new = with_line(&old, begin, value).with_context(|| file.to_owned())?;
        publish(new.as_bytes(), &path, check)?;
    }
    Ok(())
}

/// The text with the line that begins so ending in `value`. There is exactly one.
fn with_line(text: &str, begin: &str, value: &str) -> Result<String> {
    let count = text.lines().filter(|line| line.starts_with(begin)).count();
    ensure!(count == 1, "{count} lines begin with {begin:?}, not one");
    let line = |line: &str| {
        let new = if line.starts_with(begin) { format!("{begin}{value}") } else { line.to_owned() };
        new + "\n"
    };
    Ok(text.lines().map(line).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_gets_the_value() {
        let text = "version: 1\nappVersion: 1\n";
        assert_eq!(with_line(text, "version: ", "2").expect("a line"), "version: 2\nappVersion: 1\n");
        with_line(text, "image: ", "2").expect_err("no such line");
        with_line("a: 1\na: 2\n", "a: ", "3").expect_err("two lines");
    }
}
