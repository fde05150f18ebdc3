//! A cluster of real processes behind `cadre up --output json`.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use cadre_proto::secret::{ClusterSecret, Present};
use serde_json::Value;
use tempfile::NamedTempFile;

use crate::{
    binary::{cadre, pocket},
    process,
    wait::{self, LIMIT},
};

/// Pause between two looks at a process that ends.
const LOOK: Duration = Duration::from_millis(20);

/// A running `cadre up` and what it has told so far.
pub struct Cluster {
    up: Child,
    secret: ClusterSecret,
    /// `up` reads it once more when it restarts a process.
    _secret_file: NamedTempFile,
    /// Its standard input: closing it stops the cluster, and so does the end of the test process.
    _life_line: Option<ChildStdin>,
    told: Arc<Told>,
    readers: Vec<JoinHandle<()>>,
}

/// Events and log, filled by the reader threads.
#[derive(Default)]
struct Told {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    events: Vec<Value>,
    log: String,
    /// Standard output has ended.
    ended: bool,
}

/// One life of one process of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Process id.
    pub pid: u32,
    /// gRPC address.
    pub grpc: String,
    /// Admin address.
    pub admin: String,
}

impl Cluster {
    /// Starts a cluster of the bundled checkpoint on free ports and waits until it is ready.
    pub fn start(args: &[&str]) -> Self {
        Self::start_over(&pocket(), args)
    }

    /// The same over another checkpoint.
    pub fn start_over(model: &Path, args: &[&str]) -> Self {
        let model = model.to_str().expect("the repository's path is UTF-8");
        let cluster = Self::spawn(&[&["--model", model], args].concat());
        cluster.event("ready", "the cluster is ready", |event| event["event"] == "ready");
        cluster
    }

    /// Starts `cadre up` and waits for nothing.
    pub fn spawn(args: &[&str]) -> Self {
        let secret = ClusterSecret::draw().expect("random bytes");
        let secret_file = NamedTempFile::new().expect("a temporary file");
        std::fs::write(secret_file.path(), secret.expose()).expect("the secret is written");
        let mut up = Command::new(cadre())
            .args(["up", "--output", "json", "--exit-on-stdin-close"])
            .arg("--cluster-secret-file")
            .arg(secret_file.path())
            .args(["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("cadre up starts");
        let told = Arc::new(Told::default());
        let (stdout, stderr) = (up.stdout.take().expect("piped"), up.stderr.take().expect("piped"));
        let readers = vec![
            thread::spawn({
                let told = Arc::clone(&told);
                move || told.read_events(stdout)
            }),
            thread::spawn({
                let told = Arc::clone(&told);
                move || told.read_log(stderr)
            }),
        ];
        Self { _life_line: up.stdin.take(), up, secret, _secret_file: secret_file, told, readers }
    }

    /// Waits for an event and returns it.
    fn event(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut state = self.told.lock();
        loop {
            if let Some(event) = state.events.iter().find(|event| wanted(event)) {
                return event.clone();
            }
            assert!(!state.ended, "`cadre up` ended before {name:?}: {what}\n{}", state.log);
            let (next, waited) =
                self.told.changed.wait_timeout(state, LIMIT).unwrap_or_else(PoisonError::into_inner);
            state = next;
            assert!(!waited.timed_out(), "waited in vain: {what}\n{}\n{:?}", state.log, state.events);
        }
    }

    /// The router's gRPC address.
    pub fn grpc(&self) -> String {
        self.ready_field("grpc")
    }

    /// The router's HTTP address.
    pub fn http(&self) -> String {
        self.ready_field("http")
    }

    /// The coordinator's address.
    pub fn coordinator(&self) -> String {
        self.ready_field("coordinator")
    }

    fn ready_field(&self, field: &str) -> String {
        let ready = self.event("ready", "the cluster is ready", |event| event["event"] == "ready");
        ready[field].as_str().expect("an address").to_owned()
    }

    /// The current life of a process (`decode 0`), as soon as it listens.
    pub fn member(&self, name: &str) -> Member {
        wait::until(&format!("{name} listens"), || self.lives(name).into_iter().next_back())
    }

    /// Every life of a process so far.
    pub fn lives(&self, name: &str) -> Vec<Member> {
        let state = self.told.lock();
        let listening =
            state.events.iter().filter(|event| event["event"] == "listening" && event["process"] == name);
        listening.map(member).collect()
    }

    /// The life that follows `before`.
    pub fn restarted(&self, name: &str, before: &Member) -> Member {
        wait::until(&format!("{name} is restarted"), || {
            self.lives(name).into_iter().next_back().filter(|now| now.pid != before.pid)
        })
    }

    /// The event that names the end of a process.
    pub fn ended(&self, name: &str) -> Value {
        self.event("ended", &format!("the end of {name} is named"), |event| {
            event["event"] == "ended" && event["process"] == name
        })
    }

    /// Process ids of every life of every process, `up` itself included.
    pub fn pids(&self) -> HashMap<u32, String> {
        let state = self.told.lock();
        let listening = state.events.iter().filter(|event| event["event"] == "listening");
        let members = listening.map(|event| (member(event).pid, event["process"].to_string()));
        members.chain([(self.up.id(), "up".to_owned())]).collect()
    }

    /// Shows the cluster's secret, as its own processes do.
    pub fn present(&self) -> Present {
        Present::new(Some(&self.secret))
    }

    /// Process id of `up`.
    pub fn up_pid(&self) -> u32 {
        self.up.id()
    }

    /// What `up` and the roles have logged.
    pub fn log(&self) -> String {
        self.told.lock().log.clone()
    }

    /// Sends a signal to a process of the cluster.
    pub fn signal(&self, name: &str, signal: &str) -> Member {
        let member = self.member(name);
        process::signal(member.pid, signal);
        member
    }

    /// Waits for `up` to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        wait::until("`cadre up` ends", || self.up.try_wait().expect("our child"))
    }

    /// Ctrl-C, then waits; returns how `up` ended.
    pub fn interrupt(&mut self) -> ExitStatus {
        process::signal(self.up.id(), "INT");
        self.wait()
    }

    /// Waits until no process of the cluster runs.
    pub fn all_gone(&self) {
        let pids = self.pids();
        wait::until(&format!("none of {pids:?} runs"), || {
            pids.keys().all(|pid| !process::runs(*pid)).then_some(())
        });
    }
}

fn member(event: &Value) -> Member {
    let text = |field: &str| event[field].as_str().unwrap_or_else(|| panic!("{field} of {event}")).to_owned();
    let pid = event["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("a process id");
    Member { pid, grpc: text("grpc"), admin: text("admin") }
}

impl Told {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_events(&self, stdout: impl Read) {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            // Lines that are no JSON would be a fault; they end in the log, where a failing test shows them.
            let mut state = self.lock();
            match serde_json::from_str(&line) {
                Ok(event) => state.events.push(event),
                Err(_) => state.log.push_str(&format!("stdout: {line}\n")),
            }
            self.changed.notify_all();
        }
        self.lock().ended = true;
        self.changed.notify_all();
    }

    fn read_log(&self, stderr: impl Read) {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            let mut state = self.lock();
            state.log.push_str(&line);
            state.log.push('\n');
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Whatever the test did, nothing may outlive it. A stopped process must go on to be able to end.
        for (pid, _) in self.pids().into_iter().filter(|(pid, _)| process::runs(*pid)) {
            let _ =
                Command::new("sh").args(["-c", &format!("kill -s CONT {pid}; kill -s TERM {pid}")]).output();
        }
        // No panic in here, where one may be on its way.
        let begun = Instant::now();
        while matches!(self.up.try_wait(), Ok(None)) && begun.elapsed() < LIMIT {
            thread::sleep(LOOK);
        }
        let _ = self.up.kill();
        let _ = self.up.wait();
        self.readers.drain(..).for_each(|reader| drop(reader.join()));
        if thread::panicking() {
            eprintln!("log of the cluster:\n{}", self.log());
        }
    }
}
