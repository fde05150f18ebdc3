//! `cargo xtask e2e`: the tests of `tests/e2e-k8s` against a real Kubernetes.
//!
//! [`Stage`] sets up what they need and takes it down again: the image, a cluster of three nodes (or the one that
//! `KUBECONFIG` names), the image in its nodes. Before the tests proper it runs the image as a pod of a namespace
//! that enforces the restricted standard, because everything else would fail obscurely if that did. A machine
//! that cannot do this fails, with the reason; nothing is skipped.
//!
//! What the tests read:
//!
//! | variable | |
//! |---|---|
//! | `KUBECONFIG` | the cluster |
//! | `CADRE_KUBECTL`, `CADRE_HELM` | the programs |
//! | `CADRE_IMAGE` | the image's reference |
//! | `CADRE_KEDA_CRD` | KEDA's definition of ScaledObject, to create where the cluster has none; absent for a foreign cluster |
//! | `CADRE_CLUSTER_DIR` | the scripts that stop kubelets, nodes and the API server; absent for a foreign cluster |
//! | `CADRE_BIN` | the `cadre` of the test build, as client |
//!
//! What we read: `KUBECONFIG`; `CADRE_IMAGE_TAR` (do not build the image, take this one) and `CADRE_IMAGE` (the reference under
//! which nodes find it, if that is another than the default); for a foreign cluster `CADRE_E2E_LOAD` (a command that is given
//! the tar's path and brings it to the nodes) and `CADRE_CLUSTER_DIR`; `CADRE_HELM`, `CADRE_KUBECTL`.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    cluster::{Background, Cluster, Running},
    command, image, interrupt,
};

mod leftovers;
mod preflight;

/// The package of the tests.
pub(crate) const PACKAGE: &str = "cadre-e2e-k8s";

/// The file of KEDA's that a sample needs.
const KEDA: &str = "keda.sh_scaledobjects.yaml";

/// Three, so that copies can be apart and one node can go.
const NODES: u8 = 3;

/// A user's hook may push over a slow line.
const LOAD_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Which cluster the tests get.
enum Place {
    /// Ours, started and ended here. Not under the name of `cargo xtask cluster`, whose cluster is a developer's.
    Local(Running),
    /// The one of `KUBECONFIG`.
    Foreign(PathBuf),
}

/// Everything that the tests need, up and running.
pub(crate) struct Stage {
    place: Place,
    kubectl: PathBuf,
    helm: PathBuf,
    /// Exists for a local cluster.
    keda: PathBuf,
    image: String,
}

/// The kubeconfig of a cluster that is there already.
fn foreign() -> Option<PathBuf> {
    std::env::var_os("KUBECONFIG").filter(|path| !path.is_empty()).map(PathBuf::from)
}

fn local() -> Result<Cluster> {
    Cluster::named("cadre-e2e", 16543)
}

/// Starts building the cluster's programs beside other work, where a local cluster will be needed.
pub(crate) fn build_beside(logs: &Path) -> Result<Option<Background>> {
    // Where there is no root there is no cluster either; the stage will say so.
    if foreign().is_some() || !is_root()? {
        return Ok(None);
    }
    fs::create_dir_all(logs).with_context(|| format!("create {}", logs.display()))?;
    Background::start(&local()?, &logs.join("cluster-build.log")).map(Some)
}

/// Waits for what [`build_beside`] started, and fails as it failed.
pub(crate) fn wait_for_build() -> Result<()> {
    phase("cluster programs", || local()?.build())
}

fn is_root() -> Result<bool> {
    Ok(command::capture(Command::new("id").arg("-u"))?.trim_ascii() == b"0")
}

impl Stage {
    /// Sets everything up, printing how long each step took.
    pub(crate) fn prepare(keep: bool) -> Result<Self> {
        match foreign() {
            Some(kubeconfig) => Self::join(kubeconfig),
            None => Self::start(keep),
        }
    }

    fn start(keep: bool) -> Result<Self> {
        ensure!(
            is_root()?,
            "a cluster of its own needs root (namespaces, mounts, cgroups): run as root, or set KUBECONFIG to a \
             cluster that is there already"
        );
        let cluster = local()?;
        let tar = phase("image", tar)?;
        phase("cluster programs", || cluster.build())?;
        let running = phase("cluster up", || Running::start(cluster, NODES, keep))?;
        phase("image into the nodes", || running.cluster().load(&tar))?;
        Ok(Self {
            place: Place::Local(running),
            kubectl: Cluster::program("kubectl")?,
            helm: Cluster::program("helm")?,
            keda: Cluster::definition(KEDA)?,
            image: std::env::var("CADRE_IMAGE").unwrap_or_else(|_| image::REFERENCE.into()),
        })
    }

    fn join(kubeconfig: PathBuf) -> Result<Self> {
        ensure!(kubeconfig.is_file(), "KUBECONFIG={} is no file", kubeconfig.display());
        let kubeconfig = std::path::absolute(kubeconfig)?;
        if let Some(hook) = std::env::var_os("CADRE_E2E_LOAD") {
            let tar = phase("image", tar)?;
            let mut load = Command::new("sh");
            // `$0` and `$1`: the hook may be a program or a line of shell that uses the path.
            let mut line = hook;
            line.push(" \"$1\"");
            load.arg("-c").arg(line).arg("CADRE_E2E_LOAD").arg(&tar);
            phase("image into the nodes", || interrupt::run(&mut load, LOAD_LIMIT))?;
        }
        Ok(Self {
            kubectl: program("kubectl", "CADRE_KUBECTL", "tools")?,
            helm: program("helm", "CADRE_HELM", "helm")?,
            keda: Cluster::definition(KEDA)?,
            image: std::env::var("CADRE_IMAGE").unwrap_or_else(|_| image::REFERENCE.into()),
            place: Place::Foreign(kubeconfig),
        })
    }

    fn kubeconfig(&self) -> &Path {
        match &self.place {
            Place::Local(running) => running.kubeconfig(),
            Place::Foreign(path) => path,
        }
    }

    /// What the tests read.
    pub(crate) fn environment(&self) -> Vec<(OsString, OsString)> {
        let mut variables: Vec<(OsString, OsString)> = vec![
            ("KUBECONFIG".into(), self.kubeconfig().into()),
            ("CADRE_KUBECTL".into(), self.kubectl.clone().into()),
            ("CADRE_HELM".into(), self.helm.clone().into()),
            ("CADRE_IMAGE".into(), self.image.clone().into()),
        ];
        if let Place::Local(running) = &self.place {
            variables.push(("CADRE_CLUSTER_DIR".into(), running.cluster().scripts().into()));
            variables.push(("CADRE_KEDA_CRD".into(), self.keda.clone().into()));
            let of_scripts = running.cluster().environment();
            variables.extend(of_scripts.map(|(name, value)| (name.into(), value.into())));
        }
        variables
    }

    fn kubectl(&self) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.env("KUBECONFIG", self.kubeconfig());
        command
    }

    /// Runs the image as a restricted pod; `cadre` is the same program of the test build, to compare with.
    /// Returns how many checks passed.
    pub(crate) fn preflight(&self, cadre: &Path) -> Result<usize> {
        phase("the image as a restricted pod", || preflight::run(self, cadre))
    }

    /// Keeps what explains a failure: every object, event and log, and the logs of the cluster's own processes.
    pub(crate) fn dump(&self, folder: &Path) {
        let outcome = (|| -> Result<()> {
            if folder.exists() {
                fs::remove_dir_all(folder)?;
            }
            fs::create_dir_all(folder)?;
            let mut dump = self.kubectl();
            dump.args(["cluster-info", "dump", "--all-namespaces", "--output-directory"]).arg(folder);
            interrupt::run(dump.stdout(std::process::Stdio::null()), Duration::from_secs(120))?;
            if let Place::Local(running) = &self.place
                && let Some(logs) = running.logs()
            {
                let mut copy = Command::new("cp");
                copy.arg("-r").arg(logs).arg(folder.join("processes"));
                interrupt::run(&mut copy, Duration::from_secs(120))?;
            }
            Ok(())
        })();
        match outcome {
            Ok(()) => println!("k8s: the cluster as it was: {}", folder.display()),
            // The failure that led here counts, not this one.
            Err(error) => eprintln!("k8s: no dump of the cluster: {error:#}"),
        }
    }

    /// Takes a local cluster down, unless it is to be kept, and the operator out of a foreign one.
    pub(crate) fn finish(self) -> Result<()> {
        if matches!(self.place, Place::Foreign(_)) {
            return phase("the tests' operator removed", || leftovers::remove(&self));
        }
        match self.place {
            Place::Local(running) => {
                let name = running.cluster().name().to_owned();
                phase("cluster down", || running.finish()).with_context(|| format!("cluster {name}"))
            }
            Place::Foreign(_) => Ok(()),
        }
    }
}

/// The image's tar: the given one, or a fresh one.
fn tar() -> Result<PathBuf> {
    match std::env::var_os("CADRE_IMAGE_TAR").filter(|path| !path.is_empty()) {
        Some(path) => {
            let path = PathBuf::from(path);
            ensure!(path.is_file(), "CADRE_IMAGE_TAR={} is no file", path.display());
            Ok(std::path::absolute(path)?)
        }
        None => image::write(image::Variant::Cpu, None, None),
    }
}

/// A program for a foreign cluster: the given one, ours if it is built, the machine's; else ours is built.
fn program(name: &str, variable: &str, module: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable).filter(|path| !path.is_empty()) {
        return Ok(PathBuf::from(path));
    }
    let ours = Cluster::program(name)?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let of_machine = std::env::split_paths(&path).map(|folder| folder.join(name));
    if let Some(found) = std::iter::once(ours.clone()).chain(of_machine).find(|path| path.is_file()) {
        return Ok(found);
    }
    local()?.build_only(module)?;
    if !ours.is_file() {
        bail!("no {name} in PATH and none built: set {variable}");
    }
    Ok(ours)
}

/// Runs one step and prints how long it took, failed or not.
fn phase<T>(name: &str, step: impl FnOnce() -> Result<T>) -> Result<T> {
    interrupt::check()?;
    let begun = Instant::now();
    let outcome = step();
    let verdict = if outcome.is_ok() { "" } else { "  FAILED" };
    println!("k8s: {name:<38} {:>6.1} s{verdict}", begun.elapsed().as_secs_f64());
    outcome.with_context(|| name.to_owned())
}
