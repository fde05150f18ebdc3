//! `cargo xtask cluster`: a real Kubernetes on this machine, by the scripts of `tests/cluster`.
//!
//! The scripts do the work, because it is mounts, namespaces and processes; this module owns the arguments, the
//! environment that names a cluster, and [`Running`], the guard that takes one down whatever happens.
//! `tests/cluster/README.md` says how the cluster is made.

use std::{
    fs::File,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Subcommand;

use crate::{command, interrupt, tools};

/// A cold build takes 14 minutes of two cores; the slowest machine that we care for is three times slower.
const BUILD_LIMIT: Duration = Duration::from_secs(45 * 60);

/// `up` waits for its parts within bounds of its own (90 s each); this one is for a script that hangs.
const UP_LIMIT: Duration = Duration::from_secs(10 * 60);

/// Longer than any other script's own waits.
const SCRIPT_LIMIT: Duration = Duration::from_secs(5 * 60);

/// What a cluster runs on.
const TO_RUN: [&str; 2] = ["podtool", "tools"];

/// What tests need of it; `kwok` only serves simulated nodes.
const FOR_TESTS: [&str; 4] = ["podtool", "tools", "helm", "keda"];

/// The tasks.
#[derive(Subcommand)]
pub(crate) enum Task {
    /// Builds everything that a cluster needs from the package registries, once; 10 to 14 minutes.
    Build {
        /// Only these: podtool, tools, helm, kwok, keda.
        modules: Vec<String>,
        /// Build although the same sources are built already.
        #[arg(long)]
        force: bool,
    },
    /// Starts a cluster of N real nodes (0: control plane only), or adds nodes; prints the kubeconfig's path last.
    Up {
        /// How many nodes.
        #[arg(default_value_t = 3)]
        nodes: u8,
    },
    /// Ends the cluster and removes everything of it but the cached binaries.
    Down,
    /// Imports image tars into every node.
    LoadImage {
        /// What `cargo xtask image` wrote, or any OCI or docker archive.
        #[arg(required = true)]
        tars: Vec<PathBuf>,
    },
    /// Says what runs.
    Status,
    /// Adds simulated nodes until there are N; 0 removes them.
    FakeNodes {
        /// How many.
        nodes: u32,
    },
}

/// Runs one task on the cluster that the environment names.
pub(crate) fn run(task: &Task) -> Result<()> {
    let cluster = Cluster::named("cadre", 16443)?;
    match task {
        Task::Build { modules, force } => {
            let mut build = cluster.script("build");
            build.args(force.then_some("--force")).args(modules);
            interrupt::run(&mut build, BUILD_LIMIT)
        }
        Task::Up { nodes } => {
            cluster.build_to_run()?;
            let kubeconfig = cluster.up(*nodes)?;
            cluster.explain(&kubeconfig)?;
            println!("{}", kubeconfig.display());
            Ok(())
        }
        Task::Down => interrupt::run(&mut cluster.script("down"), SCRIPT_LIMIT),
        Task::LoadImage { tars } => {
            for tar in tars {
                cluster.load(tar)?;
            }
            Ok(())
        }
        Task::Status => interrupt::run(&mut cluster.script("status"), SCRIPT_LIMIT),
        Task::FakeNodes { nodes } => cluster.fake_nodes(*nodes),
    }
}

/// A cluster by its name; whether it runs is another matter.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    name: String,
    port: u16,
    scripts: PathBuf,
}

impl Cluster {
    /// The cluster of this name and port, unless `CADRE_CLUSTER_NAME` and `CADRE_CLUSTER_PORT` choose others.
    pub(crate) fn named(name: &str, port: u16) -> Result<Self> {
        let port = match std::env::var("CADRE_CLUSTER_PORT") {
            Ok(text) => {
                text.parse().with_context(|| format!("CADRE_CLUSTER_PORT={text} is not a port number"))?
            }
            Err(_) => port,
        };
        let name = std::env::var("CADRE_CLUSTER_NAME").unwrap_or_else(|_| name.into());
        Ok(Self { name, port, scripts: command::root()?.join("tests/cluster") })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The folder of the scripts, for tests that stop a kubelet or the API server.
    pub(crate) fn scripts(&self) -> &Path {
        &self.scripts
    }

    /// The environment that makes the scripts mean this cluster.
    pub(crate) fn environment(&self) -> [(&'static str, String); 2] {
        [("CADRE_CLUSTER_NAME", self.name.clone()), ("CADRE_CLUSTER_PORT", self.port.to_string())]
    }

    fn script(&self, name: &str) -> Command {
        let mut command = Command::new(self.scripts.join(name));
        command.envs(self.environment());
        command
    }

    /// Builds what a cluster runs on; a second when nothing is missing.
    fn build_to_run(&self) -> Result<()> {
        eprintln!(
            "xtask: building what is missing of a Kubernetes: 10 minutes the first time, then a second"
        );
        interrupt::run(self.script("build").args(TO_RUN), BUILD_LIMIT)
    }

    /// What a first user needs next, on standard error: standard output is the kubeconfig's path alone.
    fn explain(&self, kubeconfig: &Path) -> Result<()> {
        let programs = Self::cache()?.join("bin");
        eprintln!(
            "xtask: cluster {:?} runs. kubectl is {}; helm, once: cargo xtask cluster build helm\n\
             xtask: export KUBECONFIG={} PATH=$PATH:{}\n\
             xtask: images: cargo xtask cluster load-image TAR; the end: cargo xtask cluster down",
            self.name,
            programs.join("kubectl").display(),
            kubeconfig.display(),
            programs.display()
        );
        Ok(())
    }

    /// Builds what is missing for tests; a second when nothing is.
    pub(crate) fn build(&self) -> Result<()> {
        interrupt::run(self.script("build").args(FOR_TESTS), BUILD_LIMIT)
    }

    /// The path of a program that `build` makes.
    pub(crate) fn program(name: &str) -> Result<PathBuf> {
        Ok(Self::cache()?.join("bin").join(name))
    }

    /// The path of a definition of somebody else's that `build` fetches.
    pub(crate) fn definition(name: &str) -> Result<PathBuf> {
        Ok(Self::cache()?.join("crds").join(name))
    }

    fn cache() -> Result<PathBuf> {
        match std::env::var_os("CADRE_CLUSTER_CACHE") {
            Some(path) => Ok(PathBuf::from(path)),
            None => Ok(tools::cache()?.join("cluster")),
        }
    }

    /// Builds one module.
    pub(crate) fn build_only(&self, module: &str) -> Result<()> {
        interrupt::run(self.script("build").arg(module), BUILD_LIMIT)
    }

    /// Makes it have so many simulated nodes.
    pub(crate) fn fake_nodes(&self, nodes: u32) -> Result<()> {
        if nodes > 0 {
            self.build_only("kwok")?;
        }
        interrupt::run(self.script("fake-nodes").arg(nodes.to_string()), SCRIPT_LIMIT)
    }

    /// Starts it and returns the kubeconfig's path.
    fn up(&self, nodes: u8) -> Result<PathBuf> {
        interrupt::check()?;
        let mut command = self.script("up");
        let mut child = command
            .arg(nodes.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .context("start tests/cluster/up")?;
        // Read after the end: it is one line, far below what a pipe holds.
        let status = interrupt::wait(&mut child, UP_LIMIT)?;
        let text = std::io::read_to_string(child.stdout.take().context("the script's output")?)?;
        match status {
            Some(status) if status.success() => {}
            Some(status) => {
                bail!("the cluster did not come up: `{}` ended with {status}", command::show(&command))
            }
            None => bail!("the cluster did not come up within {} s", UP_LIMIT.as_secs()),
        }
        let path = text.lines().last().context("tests/cluster/up printed no kubeconfig")?;
        Ok(PathBuf::from(path))
    }

    /// Imports an image tar into every node.
    pub(crate) fn load(&self, tar: &Path) -> Result<()> {
        let tar = std::path::absolute(tar).with_context(|| format!("find {}", tar.display()))?;
        interrupt::run(self.script("load-image").arg(tar), SCRIPT_LIMIT)
    }
}

/// A cluster that is taken down when this is dropped, on failure and Ctrl-C as well.
#[derive(Debug)]
pub(crate) struct Running {
    cluster: Cluster,
    kubeconfig: PathBuf,
    keep: bool,
    /// `None` once it is down.
    lock: Option<File>,
}

impl Running {
    /// Starts a fresh one; what a killed run left under the same name goes first.
    pub(crate) fn start(cluster: Cluster, nodes: u8, keep: bool) -> Result<Self> {
        // Two runs under one name would take down each other's cluster.
        let path = std::env::temp_dir().join(format!("cadre-cluster-{}.lock", cluster.name));
        let lock = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        if let Err(error) = lock.try_lock() {
            bail!(
                "another run has the cluster {:?} ({}: {error}); CADRE_CLUSTER_NAME and CADRE_CLUSTER_PORT choose \
                 another one",
                cluster.name,
                path.display()
            );
        }
        let mut running = Self { cluster, kubeconfig: PathBuf::new(), keep: false, lock: Some(lock) };
        take_down(&running.cluster)?;
        running.kubeconfig = running.cluster.up(nodes)?;
        running.keep = keep;
        Ok(running)
    }

    pub(crate) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    pub(crate) fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The logs of every process of the cluster.
    pub(crate) fn logs(&self) -> Option<PathBuf> {
        Some(self.kubeconfig.parent()?.join("logs"))
    }

    /// Takes it down, unless it is to be kept, and says if something of it stays behind.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(lock) = self.lock.take() else { return Ok(()) };
        let outcome = if self.keep {
            let [(_, name), (_, port)] = self.cluster.environment();
            println!(
                "cluster {name:?} is kept: export KUBECONFIG={}; it ends with CADRE_CLUSTER_NAME={name} \
                 CADRE_CLUSTER_PORT={port} cargo xtask cluster down",
                self.kubeconfig.display()
            );
            Ok(())
        } else {
            take_down(&self.cluster)
        };
        drop(lock);
        outcome
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("xtask: {error:#}");
        }
    }
}

/// In a process group of its own and without a look at interrupts: a second Ctrl-C must not leave half a cluster.
fn take_down(cluster: &Cluster) -> Result<()> {
    let status = cluster.script("down").process_group(0).status().context("start tests/cluster/down")?;
    ensure!(status.success(), "tests/cluster/down ended with {status}");
    Ok(())
}

/// The build of the cluster's programs beside other work, at the lowest priority.
///
/// Whoever needs them calls [`Cluster::build`] later, which waits for this one (a file lock) and fails as it
/// failed. Dropped while it runs, it is ended.
#[derive(Debug)]
pub(crate) struct Background(Child);

impl Background {
    /// Starts it, its output in `log`.
    pub(crate) fn start(cluster: &Cluster, log: &Path) -> Result<Self> {
        // Appended to, because one that waits for another one's lock shares its log.
        let file = File::options().create(true).append(true).open(log);
        let file = file.with_context(|| format!("open {}", log.display()))?;
        let child = Command::new("nice")
            .args(["-n", "19"])
            .arg(cluster.scripts.join("build"))
            .args(FOR_TESTS)
            .envs(cluster.environment())
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .context("start tests/cluster/build")?;
        Ok(Self(child))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            // The group: compilers are its grandchildren.
            let group = format!("-{}", self.0.id());
            let told = Command::new("kill").args(["-TERM", "--", &group]).status();
            if told.is_ok_and(|status| status.success()) {
                drop(self.0.wait());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scripts() -> Vec<PathBuf> {
        let folder = command::root().expect("the repository").join("tests/cluster");
        let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
            .expect("tests/cluster")
            .map(|entry| entry.expect("an entry").path())
            .filter(|path| {
                path.is_file() && (path.extension().is_none() || path.extension() == Some("sh".as_ref()))
            })
            .collect();
        found.sort();
        found
    }

    #[test]
    fn every_script_is_bash() {
        let scripts = scripts();
        assert!(scripts.len() >= 12, "{scripts:?}");
        for script in scripts {
            let output = Command::new("bash").arg("-n").arg(&script).output().expect("bash");
            assert!(
                output.status.success(),
                "{}: {}",
                script.display(),
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }

    /// A name enters paths that `down` removes, so none may lead elsewhere.
    #[test]
    fn a_name_with_a_path_in_it_is_refused() {
        for name in ["../x", "a/b", "A", "-a", "a b", "0123456789abcdefg"] {
            let output = Command::new(command::root().expect("the repository").join("tests/cluster/down"))
                .env("CADRE_CLUSTER_NAME", name)
                .env("CADRE_CLUSTER_STATE", "/nonexistent/cadre")
                .output()
                .expect("the script");
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && text.contains("CADRE_CLUSTER_NAME"), "{name:?}: {output:?}");
        }
    }

    #[test]
    fn a_script_without_a_cluster_says_how_to_get_one() {
        for script in ["apiserver", "exec", "node", "load-image", "fake-nodes"] {
            let output =
                Command::new(command::root().expect("the repository").join("tests/cluster").join(script))
                    .args(["1", "1"].iter().take(if script == "fake-nodes" { 1 } else { 2 }))
                    .env("CADRE_CLUSTER_STATE", "/nonexistent/cadre")
                    .output()
                    .expect("the script");
            assert!(!output.status.success(), "{script} succeeded without a cluster");
            let text = String::from_utf8_lossy(&output.stderr);
            // Not as root, it says that instead.
            assert!(text.contains("cargo xtask cluster up") || text.contains("root"), "{script}: {text}");
        }
    }
}
