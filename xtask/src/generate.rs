//! Generated files: written by `cargo xtask generate`, checked in, compared by `--check`.
//!
//! The Rust of `proto/`; reference pages, parts of pages, chart files and samples, which come out of the binary itself (`cadre
//! reference`), so that they cannot tell of a flag, field, reason or right that does not exist; and the version where it
//! stands in files that nothing can compute.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use prost::Message;

use crate::{command, metadata::Metadata};

mod parts;
mod versions;

/// The proto files, relative to `proto/`.
const PROTOS: [&str; 5] = [
    "cadre/v1/common.proto",
    "cadre/v1/inference.proto",
    "cadre/v1/worker.proto",
    "cadre/v1/expert.proto",
    "cadre/v1/coordinator.proto",
];

/// Files that `cadre reference` prints.
const FILES: [(&str, &str); 5] = [
    ("cli", "docs/cli.md"),
    ("metrics", "docs/metrics.md"),
    ("api", "docs/api.md"),
    ("crds", "charts/cadre-crds/templates/crds.yaml"),
    ("chart-rules", "charts/cadre/templates/_rules.tpl"),
];

/// Parts of pages that `cadre reference` prints, between marks of their names.
const PARTS: [(&str, &str); 2] = [("conditions", "docs/operations.md"), ("rights", "docs/operations.md")];

/// The folder of the samples, all of which `cadre reference samples` prints.
const SAMPLES: &str = "deploy/samples";

/// Writes or compares every generated file. `cadre` prints the pages: the given one, or the one of a build of it alone, which
/// has other features among its dependencies than the tests' build and so compiles many of them once more.
pub(crate) fn run(check: bool, cadre: Option<&Path>) -> Result<()> {
    let scratch = Metadata::load()?.target_directory.join("xtask").join("generate");
    fs::create_dir_all(&scratch).with_context(|| format!("create {}", scratch.display()))?;
    proto(&scratch, check)?;
    versions::run(check)?;
    let cadre = Reference(cadre);
    reference(&cadre, check)?;
    samples(&cadre, check)
}

fn samples(cadre: &Reference<'_>, check: bool) -> Result<()> {
    let texts: BTreeMap<String, String> =
        serde_json::from_slice(&cadre.printed("samples")?).context("cadre reference samples")?;
    let folder = command::root()?.join(SAMPLES);
    for (file, text) in &texts {
        publish(text.as_bytes(), &folder.join(file), check)?;
    }
    for entry in fs::read_dir(&folder).with_context(|| format!("list {SAMPLES}"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        ensure!(texts.contains_key(&name), "{SAMPLES}/{name} is no sample of crates/k8s-api/src/samples");
    }
    Ok(())
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
        let from = scratch.join(name);
        let new = fs::read(&from).with_context(|| format!("read {}", from.display()))?;
        publish(&new, &target.join(name), check)?;
    }
    Ok(())
}

fn reference(cadre: &Reference<'_>, check: bool) -> Result<()> {
    let root = command::root()?;
    for (name, file) in FILES {
        publish(&cadre.printed(name)?, &root.join(file), check)?;
    }
    for (name, file) in PARTS {
        let part =
            String::from_utf8(cadre.printed(name)?).with_context(|| format!("cadre reference {name}"))?;
        let path = root.join(file);
        let page = fs::read_to_string(&path).with_context(|| format!("read {file}"))?;
        let page = parts::replace(&page, name, &part).with_context(|| file.to_owned())?;
        publish(page.as_bytes(), &path, check)?;
    }
    Ok(())
}

/// What knows the reference pages.
struct Reference<'a>(Option<&'a Path>);

impl Reference<'_> {
    /// What `cadre reference NAME` prints.
    fn printed(&self, name: &str) -> Result<Vec<u8>> {
        let mut cadre = match self.0 {
            Some(path) => Command::new(path),
            None => {
                let mut cargo = command::cargo();
                cargo.args(["run", "--quiet", "--package", "cadre", "--bin", "cadre"]);
                cargo.args(command::FEATURES).arg("--");
                cargo
            }
        };
        command::capture(cadre.args(["reference", name]))
    }
}

/// Writes a file if it changes, or fails if it would.
fn publish(new: &[u8], to: &Path, check: bool) -> Result<()> {
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    ensure!(!check, "{} is out of date: run `cargo xtask generate` and commit it", to.display());
    fs::write(to, new).with_context(|| format!("write {}", to.display()))
}
