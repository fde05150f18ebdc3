//! `cargo xtask bench-operator`: a control plane without real nodes, simulated ones, and the bench of
//! `tests/e2e-k8s/src/bin/operator-scale.rs` on it.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};

use crate::{
    cluster::{Cluster, Running},
    command, interrupt,
    metadata::Metadata,
};

/// 480 accelerators; the largest case wants 384.
const NODES: u32 = 60;

/// Two cases of some minutes each.
const LIMIT: Duration = Duration::from_secs(40 * 60);

/// Runs it. The cluster has a name of its own, so that neither a developer's nor the tests' is disturbed.
pub(crate) fn run(binary: Option<PathBuf>) -> Result<()> {
    interrupt::watch()?;
    let binary = match binary {
        Some(path) => std::path::absolute(path)?,
        None => release()?,
    };
    ensure!(binary.is_file(), "{} is no file", binary.display());
    let cluster = Cluster::named("cadre-bench", 16643)?;
    cluster.build()?;
    let running = Running::start(cluster, 0, false)?;
    running.cluster().fake_nodes(NODES)?;
    let mut bench = command::cargo();
    bench
        .args(["run", "--quiet", "--locked", "--package", "cadre-e2e-k8s", "--bin", "operator-scale"])
        .current_dir(command::root()?)
        .env("KUBECONFIG", running.kubeconfig())
        .env("CADRE_KUBECTL", Cluster::program("kubectl")?)
        .env("CADRE_BIN", binary);
    interrupt::run(&mut bench, LIMIT)?;
    running.finish()
}

/// What users run is a release build.
fn release() -> Result<PathBuf> {
    command::run(command::cargo().args([
        "build",
        "--release",
        "--locked",
        "--package",
        "cadre",
        "--bin",
        "cadre",
        command::FEATURES[0],
        command::FEATURES[1],
    ]))?;
    Ok(Metadata::load().context("find the target folder")?.target_directory.join("release/cadre"))
}
