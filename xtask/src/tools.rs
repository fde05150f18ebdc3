//! Tools that the tasks need and a bare toolchain lacks, installed once under the user's cache.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::command;

/// Checked against Cargo.lock by nobody but us: raise it by hand.
const CARGO_DENY: &str = "0.20.2";

/// The folder of everything that outlives `target`.
pub(crate) fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(path) if Path::new(&path).is_absolute() => PathBuf::from(path),
        _ => PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    Ok(base.join("cadre"))
}

/// clippy and rustfmt, through rustup where they are missing.
pub(crate) fn components() -> Result<()> {
    for (component, subcommand) in [("clippy", "clippy"), ("rustfmt", "fmt")] {
        if !answers(command::cargo().args([subcommand, "--version"])) {
            command::run(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    Ok(())
}

/// The path of cargo-deny in our version, built on first use. A debug build: it takes a third of the time,
/// and checking a few hundred manifests is no work.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    let root = cache()?.join("tools").join(format!("cargo-deny-{CARGO_DENY}"));
    let binary = root.join("bin").join("cargo-deny");
    if !answers(Command::new(&binary).arg("--version")) {
        println!("installing cargo-deny {CARGO_DENY} into {} (once, some minutes)", root.display());
        command::run(
            command::cargo()
                .args([
                    "install",
                    "--quiet",
                    "--locked",
                    "--debug",
                    "cargo-deny",
                    "--version",
                    CARGO_DENY,
                    "--root",
                ])
                .arg(&root)
                .env("CARGO_TARGET_DIR", cache()?.join("tools").join("target")),
        )?;
    }
    ensure!(binary.is_file(), "cargo install left no {}", binary.display());
    Ok(binary)
}

fn answers(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
