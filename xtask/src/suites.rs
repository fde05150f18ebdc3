//! `cargo xtask test`: builds once, runs every test target, and counts.
//!
//! A suite is one test executable (a crate's unit tests, or one file of its `tests/`). The list of suites
//! comes from `cargo metadata`, the executables from the build, and the two must agree: a test file that
//! was declared and did not run is a failure, and so is a suite that ran nothing. A crate without unit tests
//! says so in its manifest (`test = false`).
//!
//! The suites of `tests/e2e-k8s` need a cluster, which [`crate::e2e`] sets up for them; they run last. What a fresh
//! machine lacks for a cluster is built beside the build of the tests and waited for before the first test runs, so
//! that no test shares its cores with a compiler.
//!
//! Why not cargo-nextest: building it takes longer on two cores than our own tests, and what it adds here
//! (a process per test, retries) we do not want.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File},
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::{
    command, e2e, interrupt,
    metadata::{Metadata, Package, Target},
};

/// A suite that runs longer hangs: the slowest one takes a few minutes on two cores.
const SUITE_LIMIT: Duration = Duration::from_secs(30 * 60);

/// End-to-end tests run clusters of several processes each: one at a time.
const SERIAL: [&str; 2] = ["cadre-e2e", e2e::PACKAGE];

/// Of those, suites whose tests mostly wait, each in a namespace of its own: so many at a time.
const ABREAST: [(&str, usize); 1] = [("cadre-e2e-k8s/tests/bad_input", 3)];

/// Name of the outcome that says whether the cluster's side of things is in order.
const CLUSTER: &str = "cluster";

/// What a test prints, at the start of a line, when the machine cannot show something that it checks
/// (a missing instruction set, say). Repeated at the end, so that nobody takes the run for more than it was.
const NOTICE: &str = "NOTICE:";

/// Runs every suite, or those whose name contains `only`.
pub(crate) fn run(only: Option<&str>) -> Result<()> {
    let metadata = Metadata::load()?;
    let wants_cluster =
        only.is_none_or(|part| cluster_suite_names(&metadata).any(|name| name.contains(part)));
    let Prepared { mut suites, logs, cadre } = prepare(&metadata, wants_cluster)?;
    if let Some(part) = only {
        suites.retain(|suite| suite.name.contains(part));
        ensure!(!suites.is_empty(), "no suite has {part:?} in its name");
    }
    let (on_cluster, plain): (Vec<Suite>, Vec<Suite>) =
        suites.into_iter().partition(|suite| suite.on_cluster);
    let mut outcomes: Vec<(String, Outcome)> = Vec::new();
    for suite in &plain {
        let outcome = suite.run(&logs, &cadre, &[])?;
        report(&suite.name, &outcome);
        outcomes.push((suite.name.clone(), outcome));
    }
    if only.is_none() {
        let outcome = documentation(&logs)?;
        report("documentation examples", &outcome);
        outcomes.push(("documentation examples".into(), outcome));
    }
    if wants_cluster {
        outcomes.extend(run_on_cluster(&on_cluster, &logs, &cadre, false)?);
    }
    close(&outcomes)
}

/// `cargo xtask e2e`: only the suites that need a cluster.
pub(crate) fn run_e2e(only: Option<&str>, keep: bool) -> Result<()> {
    let metadata = Metadata::load()?;
    let Prepared { mut suites, logs, cadre } = prepare(&metadata, true)?;
    suites.retain(|suite| suite.on_cluster);
    if let Some(part) = only {
        suites.retain(|suite| suite.name.contains(part));
        ensure!(!suites.is_empty(), "no suite of {} has {part:?} in its name", e2e::PACKAGE);
    }
    close(&run_on_cluster(&suites, &logs, &cadre, keep)?)
}

struct Prepared {
    suites: Vec<Suite>,
    logs: PathBuf,
    cadre: PathBuf,
}

/// Builds the tests and, beside them, what a cluster needs.
fn prepare(metadata: &Metadata, wants_cluster: bool) -> Result<Prepared> {
    interrupt::watch()?;
    let logs = logs(metadata);
    fs::create_dir_all(&logs).with_context(|| format!("create {}", logs.display()))?;
    let beside = if wants_cluster { e2e::build_beside(&logs)? } else { None };
    let built = build()?;
    if beside.is_some()
        && let Err(error) = e2e::wait_for_build()
    {
        // The other suites need no cluster; the cluster's will fail with this.
        interrupt::check()?;
        eprintln!("k8s: {error:#}");
    }
    let mut suites = declared(metadata, &built)?;
    suites.sort_by_key(|suite| (suite.serial, suite.name.clone()));
    let cadre = built.binary("cadre").context("the build made no binary `cadre`")?.to_path_buf();
    Ok(Prepared { suites, logs, cadre })
}

/// Where outputs are kept.
pub(crate) fn logs(metadata: &Metadata) -> PathBuf {
    metadata.target_directory.join("xtask").join("logs")
}

/// Sets a cluster up, runs the suites, takes it down. Whatever keeps them from running makes each of them fail.
fn run_on_cluster(suites: &[Suite], logs: &Path, cadre: &Path, keep: bool) -> Result<Vec<(String, Outcome)>> {
    let mut outcomes: Vec<(String, Outcome)> = Vec::new();
    let mut add = |name: &str, outcome: Outcome| {
        report(name, &outcome);
        outcomes.push((name.into(), outcome));
    };
    let begun = Instant::now();
    let broken = |error: &anyhow::Error, took| Outcome {
        fault: Some(format!("{error:#}")),
        took,
        ..Outcome::default()
    };
    let stage = match e2e::Stage::prepare(keep) {
        Ok(stage) => stage,
        Err(error) => {
            interrupt::check()?;
            add(CLUSTER, broken(&error, begun.elapsed()));
            return Ok(outcomes);
        }
    };
    let mut is_good = true;
    match stage.preflight(cadre) {
        Ok(passed) => {
            add(CLUSTER, Outcome { passed, took: begun.elapsed(), ..Outcome::default() });
            let environment = stage.environment();
            for suite in suites {
                let outcome = suite.run(logs, cadre, &environment)?;
                is_good &= outcome.is_good();
                add(&suite.name, outcome);
            }
            if suites.is_empty() {
                let error = anyhow::anyhow!("the workspace has no suite of {}", e2e::PACKAGE);
                add(e2e::PACKAGE, broken(&error, Duration::ZERO));
            }
        }
        Err(error) => {
            interrupt::check()?;
            is_good = false;
            add(CLUSTER, broken(&error, begun.elapsed()));
        }
    }
    if !is_good {
        stage.dump(&logs.join("cluster"));
    }
    if let Err(error) = stage.finish() {
        add("cluster removed", broken(&error, Duration::ZERO));
    }
    Ok(outcomes)
}

/// Names of the suites that need a cluster; they are known before anything is built.
fn cluster_suite_names(metadata: &Metadata) -> impl Iterator<Item = String> {
    metadata.members().filter(|package| package.name == e2e::PACKAGE).flat_map(|package| {
        package.targets.iter().filter(|target| is_suite(target)).map(|target| suite_name(package, target))
    })
}

/// The `cadre` of the tests' build.
pub(crate) fn cadre() -> Result<PathBuf> {
    Ok(build()?.binary("cadre").context("the build made no binary `cadre`")?.to_path_buf())
}

/// What the build left behind.
struct Built {
    tests: BTreeMap<PathBuf, PathBuf>,
    binaries: BTreeMap<String, PathBuf>,
}

impl Built {
    fn binary(&self, name: &str) -> Option<&Path> {
        self.binaries.get(name).map(PathBuf::as_path)
    }
}

#[derive(Deserialize)]
struct Message {
    reason: String,
    target: Option<Target>,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// One build of everything that runs: test executables and the binaries that they start.
fn build() -> Result<Built> {
    let text = command::capture(
        command::cargo()
            .args(["build", "--workspace", "--lib", "--bins", "--tests", "--locked"])
            .args(command::FEATURES)
            .arg("--message-format=json-render-diagnostics"),
    )?;
    let mut built = Built { tests: BTreeMap::new(), binaries: BTreeMap::new() };
    for line in text.split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"{")) {
        let message: Message = serde_json::from_slice(line).context("read a message of cargo build")?;
        if message.reason != "compiler-artifact" {
            continue;
        }
        if let (Some(target), Some(profile), Some(executable)) =
            (message.target, message.profile, message.executable)
        {
            if profile.test {
                built.tests.insert(target.src_path, executable);
            } else if target.kind.iter().any(|kind| kind == "bin") {
                built.binaries.insert(target.name, executable);
            }
        }
    }
    Ok(built)
}

struct Suite {
    name: String,
    executable: PathBuf,
    folder: PathBuf,
    serial: bool,
    /// Needs what [`e2e::Stage`] sets up.
    on_cluster: bool,
}

/// Every test target of the workspace with its executable.
fn declared(metadata: &Metadata, built: &Built) -> Result<Vec<Suite>> {
    let mut suites = Vec::new();
    for package in metadata.members() {
        let folder = package.manifest_path.parent().context("a manifest has a folder")?;
        all_files_are_targets(package, folder)?;
        for target in package.targets.iter().filter(|target| is_suite(target)) {
            let name = suite_name(package, target);
            let executable = built.tests.get(&target.src_path).with_context(|| {
                format!("{name}: declared in the manifest, but the build made no executable")
            })?;
            suites.push(Suite {
                name,
                executable: executable.clone(),
                folder: folder.to_path_buf(),
                serial: SERIAL.contains(&package.name.as_str()),
                on_cluster: package.name == e2e::PACKAGE,
            });
        }
    }
    for (name, _) in ABREAST {
        ensure!(suites.iter().any(|suite| suite.name == name), "ABREAST names {name:?}, which is no suite");
    }
    Ok(suites)
}

fn is_suite(target: &Target) -> bool {
    target.test
        && target.kind.iter().any(|kind| matches!(kind.as_str(), "lib" | "bin" | "test" | "proc-macro"))
}

fn suite_name(package: &Package, target: &Target) -> String {
    match target.kind.first().map(String::as_str) {
        Some("test") => format!("{}/tests/{}", package.name, target.name),
        Some("bin") => format!("{} (binary)", package.name),
        _ => package.name.clone(),
    }
}

/// A file in `tests/` that is no target would be compiled by nobody (autotests off, or a stray name).
fn all_files_are_targets(package: &Package, folder: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(folder.join("tests")) else { return Ok(()) };
    for entry in entries {
        let path = entry?.path();
        let is_file = path.extension() == Some("rs".as_ref());
        ensure!(
            !is_file || package.targets.iter().any(|target| target.src_path == path && target.test),
            "{} is no test target of {}: it would never run",
            path.display(),
            package.name
        );
    }
    Ok(())
}

/// What a suite did.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    passed: usize,
    failed: usize,
    ignored: usize,
    notices: Vec<String>,
    /// Why the suite counts as failed, beside failing tests.
    fault: Option<String>,
    took: Duration,
    log: PathBuf,
}

impl Outcome {
    fn is_good(&self) -> bool {
        self.failed == 0 && self.fault.is_none()
    }
}

impl Suite {
    fn run(&self, logs: &Path, cadre: &Path, environment: &[(OsString, OsString)]) -> Result<Outcome> {
        let mut command = Command::new(&self.executable);
        command.current_dir(&self.folder).env("CADRE_BIN", cadre).env("CARGO_MANIFEST_DIR", &self.folder);
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        command.arg("--show-output");
        if self.serial {
            let abreast =
                ABREAST.iter().find(|(name, _)| *name == self.name).map_or(1, |(_, abreast)| *abreast);
            command.arg(format!("--test-threads={abreast}"));
        }
        let mut outcome = execute(&self.name, &mut command, logs)?;
        if outcome.fault.is_none() && outcome.passed + outcome.failed == 0 {
            outcome.fault = Some("ran no test; set `test = false` in the manifest if it has none".into());
        }
        Ok(outcome)
    }
}

/// The examples in doc comments. A crate may have none, so none is no fault.
fn documentation(logs: &Path) -> Result<Outcome> {
    let mut command = command::cargo();
    command
        .args(["test", "--workspace", "--doc", "--locked"])
        .args(command::FEATURES)
        .current_dir(command::root()?);
    execute("documentation examples", &mut command, logs)
}

/// Runs one command with its output in a log file, bounded in time.
fn execute(name: &str, command: &mut Command, logs: &Path) -> Result<Outcome> {
    let log = logs.join(format!("{}.log", name.replace(['/', ' ', '(', ')'], "-")));
    let file = File::create(&log).with_context(|| format!("create {}", log.display()))?;
    if std::io::stdout().is_terminal() {
        print!("{name:<44} …\r");
        std::io::stdout().flush()?;
    }
    let begun = Instant::now();
    interrupt::check()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("start {}", command::show(command)))?;
    let status = interrupt::wait(&mut child, SUITE_LIMIT)?;
    let mut outcome = parse(&String::from_utf8_lossy(&fs::read(&log)?));
    outcome.took = begun.elapsed();
    outcome.log = log;
    outcome.fault = match status {
        None => Some(format!("still running after {} s, killed", SUITE_LIMIT.as_secs())),
        Some(status) if !status.success() && outcome.failed == 0 => Some(format!("ended with {status}")),
        Some(_) => None,
    };
    Ok(outcome)
}

/// Adds up the `test result:` lines of libtest and collects the notices.
fn parse(text: &str) -> Outcome {
    let mut outcome = Outcome::default();
    for line in text.lines() {
        if let Some(counts) = line.strip_prefix("test result:") {
            for part in counts.split([';', '.']).map(str::trim) {
                let mut words = part.split(' ');
                let count = words.next().and_then(|word| word.parse::<usize>().ok()).unwrap_or(0);
                match words.next() {
                    Some("passed") => outcome.passed += count,
                    Some("failed") => outcome.failed += count,
                    Some("ignored") => outcome.ignored += count,
                    _ => {}
                }
            }
        } else if line.trim_start().starts_with(NOTICE) {
            outcome.notices.push(line.trim().to_owned());
        }
    }
    outcome
}

fn report(name: &str, outcome: &Outcome) {
    let ignored = if outcome.ignored == 0 { String::new() } else { format!(", {} ignored", outcome.ignored) };
    println!(
        "{name:<44} {:>5} passed, {} failed{ignored}  {:>6.1} s",
        outcome.passed,
        outcome.failed,
        outcome.took.as_secs_f64()
    );
    if !outcome.is_good() && outcome.log.as_os_str().is_empty() {
        println!("{name}: {}", outcome.fault.as_deref().unwrap_or_default());
    } else if !outcome.is_good() {
        let text = fs::read_to_string(&outcome.log).unwrap_or_default();
        let from = text
            .find("\nfailures:\n")
            .unwrap_or_else(|| text.char_indices().rev().nth(8000).map_or(0, |(at, _)| at));
        println!("{}\n{name}: whole output in {}", &text[from..], outcome.log.display());
        if let Some(fault) = &outcome.fault {
            println!("{name}: {fault}");
        }
    }
}

fn close(outcomes: &[(String, Outcome)]) -> Result<()> {
    let mut notices: Vec<&String> = outcomes.iter().flat_map(|(_, outcome)| &outcome.notices).collect();
    notices.sort();
    notices.dedup();
    notices.iter().for_each(|notice| println!("{notice}"));
    let bad: Vec<&str> =
        outcomes.iter().filter(|(_, outcome)| !outcome.is_good()).map(|(name, _)| name.as_str()).collect();
    if !bad.is_empty() {
        println!("failed suites: {}", bad.join(", "));
    }
    let passed: usize = outcomes.iter().map(|(_, outcome)| outcome.passed).sum();
    // A suite that broke without a failing test (a crash, a hang, no test at all) counts as one failure.
    let failed: usize = outcomes
        .iter()
        .map(|(_, outcome)| outcome.failed + usize::from(outcome.failed == 0 && outcome.fault.is_some()))
        .sum();
    println!("{passed} passed, {failed} failed");
    if failed > 0 {
        bail!("{failed} failed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_up_the_results_of_libtest() {
        let text = "\nNOTICE: no AVX-512 on this machine\n\
            test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.02s\n\
            test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.50s\n";
        let outcome = parse(text);
        assert_eq!((outcome.passed, outcome.failed, outcome.ignored), (14, 3, 1));
        assert_eq!(outcome.notices, ["NOTICE: no AVX-512 on this machine"]);
    }

    #[test]
    fn a_suite_that_crashed_fails_the_run() {
        let crashed = Outcome { passed: 3, fault: Some("ended with signal 11".into()), ..Outcome::default() };
        let error = close(&[("crashed".into(), crashed)]).expect_err("a crash is a failure");
        assert_eq!(error.to_string(), "1 failed");
    }

    #[test]
    fn a_good_run_passes() {
        let good = Outcome { passed: 3, ..Outcome::default() };
        close(&[("good".into(), good)]).expect("nothing failed");
    }
}
