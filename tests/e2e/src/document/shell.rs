//! A folder in which a page's commands find what they name.

use std::{
    ffi::OsString,
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::{fs::PermissionsExt, fs::symlink, process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::Block;
use crate::{
    binary::{cadre, pocket, root},
    process, wait,
};

/// What stands for the compiler: everything is built, and compiling it again would show nothing.
const CARGO: &str = r#"#!/bin/sh
if [ "$1 $2 $3" = "run --release --" ]; then shift 3; exec cadre "$@"; fi
echo "cargo $*: the tests have no stand-in for this; say on the page how it is run" >&2
exit 64
"#;

/// kubectl's own waits on our pages are of five minutes.
const LIMIT: Duration = Duration::from_secs(330);

/// Pause between two looks at a command.
const LOOK: Duration = Duration::from_millis(20);

/// Runs commands in a folder that has everything that the repository has, and what our pages call `DIR` (a checkpoint)
/// and `model.yaml` (a model).
pub struct Shell {
    folder: TempDir,
    environment: Vec<(OsString, OsString)>,
    /// Those that go on, each with what it has printed.
    servers: Vec<Server>,
}

struct Server {
    child: Child,
    printed: Arc<Mutex<String>>,
}

impl Shell {
    /// With further programs (name, path) and variables.
    ///
    /// # Panics
    ///
    /// If the folder cannot be made.
    pub fn new(programs: &[(&str, &Path)], variables: &[(&str, &Path)]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let bin = folder.path().join(".bin");
        fs::create_dir(&bin).expect("a folder");
        fs::write(bin.join("cargo"), CARGO).expect("a script");
        fs::set_permissions(bin.join("cargo"), fs::Permissions::from_mode(0o755)).expect("a script");
        for (name, path) in [("cadre", cadre())].iter().chain(programs) {
            let path = std::path::absolute(path).expect("a path");
            // A name without a folder is for PATH to find.
            if path.exists() {
                symlink(path, bin.join(name)).expect("a link");
            }
        }
        let entries = fs::read_dir(root()).expect("the repository").map(|entry| entry.expect("an entry"));
        for entry in entries.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.')) {
            symlink(entry.path(), folder.path().join(entry.file_name())).expect("a link");
        }
        symlink(pocket(), folder.path().join("DIR")).expect("a link");
        symlink(root().join("deploy/samples/pocket.yaml"), folder.path().join("model.yaml")).expect("a link");
        let mut path = bin.into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let mut environment = vec![("PATH".into(), path)];
        environment.extend(variables.iter().map(|(name, value)| ((*name).into(), (*value).into())));
        Self { folder, environment, servers: Vec::new() }
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new("bash");
        // A group of its own, so that what a line starts ends with it.
        command.args(["-euo", "pipefail", "-c", line]).current_dir(self.folder.path()).process_group(0);
        command.envs(self.environment.iter().map(|(name, value)| (name, value))).stdin(Stdio::null());
        command
    }

    /// Runs the commands of a block one after the other and returns what the last one printed. One that ends in `&` is a
    /// port-forward, and goes on.
    ///
    /// # Panics
    ///
    /// If one fails or does not end.
    pub fn run(&mut self, block: &Block) -> String {
        let mut printed = String::new();
        for line in block.commands() {
            match line.trim_end().strip_suffix(" &") {
                Some(line) => self.serve(&block.place, line, "Forwarding from"),
                None => {
                    printed = self.once(&block.place, &line);
                    if line.contains("/v1/chat/completions") {
                        block.assert_answer(&printed);
                    }
                }
            }
        }
        printed
    }

    fn once(&self, place: &str, line: &str) -> String {
        let begun = Instant::now();
        let child = self.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.expect("bash starts");
        let [stdout, stderr] = [read(child.stdout.take()), read(child.stderr.take())];
        let status = loop {
            match child.try_wait().expect("our child") {
                Some(status) => break Some(status),
                None if begun.elapsed() > LIMIT => break None,
                None => thread::sleep(LOOK),
            }
        };
        if status.is_none() {
            stop(&mut child);
        }
        let [stdout, stderr] = [stdout, stderr].map(|reader| reader.join().unwrap_or_default());
        let is_good = status.is_some_and(|status| status.success());
        let how =
            status.map_or(format!("still ran after {} s", LIMIT.as_secs()), |status| status.to_string());
        assert!(is_good, "{place}: `{line}`: {how}\n{stderr}\n{stdout}");
        stdout
    }

    /// Starts a command that goes on, and waits until it has printed `ready`.
    ///
    /// # Panics
    ///
    /// If it ends before, or does not come to it.
    pub fn serve(&mut self, place: &str, line: &str, ready: &str) {
        let child = self.command(&format!("exec {line} 2>&1")).stdout(Stdio::piped()).spawn();
        let mut child = child.expect("bash starts");
        let printed = Arc::new(Mutex::new(String::new()));
        let stdout = child.stdout.take().expect("piped");
        thread::spawn({
            let printed = Arc::clone(&printed);
            move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    let mut printed = printed.lock().unwrap_or_else(PoisonError::into_inner);
                    printed.push_str(&line);
                    printed.push('\n');
                }
            }
        });
        self.servers.push(Server { child, printed });
        let server = self.servers.last_mut().expect("just started");
        let printed = || server.printed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        wait::until(&format!("{place}: `{line}` prints {ready:?}"), || {
            let ended = server.child.try_wait().expect("our child");
            assert!(ended.is_none(), "{place}: `{line}` ended: {ended:?}\n{}", printed());
            printed().contains(ready).then_some(())
        });
    }

    /// Ends the commands that go on.
    pub fn end_servers(&mut self) {
        self.servers.drain(..).for_each(|mut server| stop(&mut server.child));
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        if thread::panicking() {
            for server in &self.servers {
                eprintln!("{}", server.printed.lock().unwrap_or_else(PoisonError::into_inner));
            }
        }
        self.end_servers();
    }
}

/// Asks a command to end; one that does not is killed with its group.
fn stop(child: &mut Child) {
    let begun = Instant::now();
    process::signal(child.id(), "TERM");
    while matches!(child.try_wait(), Ok(None)) {
        if begun.elapsed() > wait::LIMIT {
            let _ = Command::new("sh").args(["-c", &format!("kill -s KILL -- -{}", child.id())]).status();
            let _ = child.kill();
        }
        thread::sleep(LOOK);
    }
}

fn read(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is what there is.
        let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
