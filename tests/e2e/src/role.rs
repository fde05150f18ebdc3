//! One role as a process of its own, started by flags as a pod starts it.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufRead, BufReader},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    binary::{cadre, pocket},
    process, wait,
};

/// A running role. Dropping it kills it.
pub struct RoleProcess {
    name: String,
    child: Child,
    /// The end of the test process is the end of the role.
    _life_line: Option<ChildStdin>,
    addresses: HashMap<String, String>,
    folder: TempDir,
}

impl RoleProcess {
    /// Starts a role over the bundled checkpoint and waits until it listens.
    pub fn start(role: &str, args: &[&str]) -> Self {
        let mut process = Self::spawn(role, args, &[]);
        let stdout = process.child.stdout.take().expect("piped");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).expect("standard output is text");
        let addresses: Value = serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("{role}: {error}: {line:?}\n{}", process.log()));
        let fields = addresses.as_object().expect("an object of addresses");
        // What is no text is a list: the shards of a worker's process.
        let address = |(name, address): (&String, &Value)| Some((name.clone(), address.as_str()?.to_owned()));
        process.addresses = fields.iter().filter_map(address).collect();
        process
    }

    /// Starts a role with variables in its environment and waits for nothing.
    pub fn spawn(role: &str, args: &[&str], env: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = File::create(folder.path().join("log")).expect("a log file");
        let mut command = Command::new(cadre());
        command.args([role, "--exit-on-stdin-close"]).args(args).envs(env.iter().copied());
        if !args.contains(&"--model") {
            command.arg("--model").arg(pocket());
        }
        let termination_log = folder.path().join("termination");
        let mut child = command
            .env("CADRE_TERMINATION_LOG", termination_log)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("cadre starts");
        let life_line = child.stdin.take();
        let name = format!("{role} {}", args.join(" "));
        Self { name, child, _life_line: life_line, addresses: HashMap::new(), folder }
    }

    /// One of its addresses (`grpc`, `http`, `coordinator`, `admin`).
    pub fn address(&self, name: &str) -> &str {
        self.addresses.get(name).unwrap_or_else(|| panic!("{} has no address {name}", self.name))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: &str) {
        process::signal(self.child.id(), signal);
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        wait::until(&format!("{} ends", self.name), || self.child.try_wait().expect("our child"))
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("our child").is_some()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Its termination message, if it has written one.
    pub fn termination_message(&self) -> Option<String> {
        fs::read_to_string(self.folder.path().join("termination")).ok()
    }
}

impl Drop for RoleProcess {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(30).collect();
            eprintln!("--- {}\n{}", self.name, tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
    }
}
