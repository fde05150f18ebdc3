//! Generated files: written by `cargo xtask generate`, checked in, compared by `--check`.
//!
//! The Rust of `proto/` and the two reference pages. The pages come out of the binary itself
//! (`cadre reference`), so that they cannot tell of a flag or a metric that does not exist.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use prost::Message;

use crate::{command, metadata::Metadata};

/// The proto files, relative to `proto/`.
const PROTOS: [&str; 5] = [
    "cadre/v1/common.proto",
    "cadre/v1/inference.proto",
    "cadre/v1/worker.proto",
    "cadre/v1/expert.proto",
    "cadre/v1/coordinator.proto",
];

/// The pages that `cadre reference` prints.
const PAGES: [&str; 2] = ["cli", "metrics"];

/// Writes or compares every generated file.
pub(crate) fn run(check: bool) -> Result<()> {
    let scratch = Metadata::load()?.target_directory.join("xtask").join("generate");
    fs::create_dir_all(&scratch).with_context(|| format!("create {}", scratch.display()))?;
    proto(&scratch, check)?;
    reference(&scratch, check)
}

fn proto(scratch: &Path, check: bool) -> Result<()> {
    let root = command::root()?;
    let descriptors = protox::compile(PROTOS, [root.join("proto")]).context("compile proto/")?;
    fs::write(scratch.join("cadre.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".")
        .emit_rerun_if_changed(false)
        .out_dir(scratch)
        .compile_fds(descriptors)
        .context("generate Rust from proto/")?;
    let target = root.join("crates/proto/src/generated");
    for name in ["cadre.v1.rs", "cadre.v1.bin"] {
        publish(&scratch.join(name), &target.join(name), check)?;
    }
    Ok(())
}

fn reference(scratch: &Path, check: bool) -> Result<()> {
    let root = command::root()?;
    for page in PAGES {
        let mut cadre = command::cargo();
        // The same unit graph as `cargo xtask test` builds, so that nothing is compiled twice.
        cadre.args(["run", "--quiet", "--package", "cadre", "--bin", "cadre", "--", "reference", page]);
        let text = command::capture(&mut cadre)?;
        let file = format!("{page}.md");
        fs::write(scratch.join(&file), text)?;
        publish(&scratch.join(&file), &root.join("docs").join(&file), check)?;
    }
    Ok(())
}

fn publish(from: &Path, to: &Path, check: bool) -> Result<()> {
    let new = fs::read(from).with_context(|| format!("read {}", from.display()))?;
    let unchanged = fs::read(to).is_ok_and(|old| old == new);
    if unchanged {
        return Ok(());
    }
    ensure!(!check, "{} is out of date: run `cargo xtask generate` and commit it", to.display());
    fs::write(to, new).with_context(|| format!("write {}", to.display()))
}
