//! What only a cluster of ours can do: the scripts of `tests/cluster`.
//!
//! Whatever is stopped starts again when its guard is dropped, so that a failing test does not take the next ones
//! with it.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{
    command::{self, CommandError},
    pod::PodView,
};

/// Longer than the scripts' own waits.
const LIMIT: Duration = Duration::from_secs(180);

/// The scripts of the cluster that the environment names.
#[derive(Clone, Debug)]
pub struct Scripts {
    folder: PathBuf,
}

impl Scripts {
    pub(crate) fn in_folder(folder: PathBuf) -> Self {
        Self { folder }
    }

    fn run(&self, script: &str, args: &[&str]) -> Result<String, CommandError> {
        command::run(Command::new(self.folder.join(script)).args(args), None, LIMIT)
    }

    #[track_caller]
    fn must(&self, script: &str, args: &[&str]) -> String {
        self.run(script, args).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Ends the API server as a crash does. etcd, nodes and pods go on.
    #[track_caller]
    pub fn stop_api_server(&self) -> Stopped<'_> {
        self.must("apiserver", &["stop", "KILL"]);
        Stopped { scripts: self, what: What::ApiServer }
    }

    /// Silences a node; its containers run on.
    #[track_caller]
    pub fn stop_kubelet(&self, node: &str) -> Stopped<'_> {
        let number = number(node).to_owned();
        self.must("node", &["stop-kubelet", &number]);
        Stopped { scripts: self, what: What::Kubelet(number) }
    }

    /// Runs a command inside a node.
    pub fn on_node(&self, node: &str, args: &[&str]) -> Result<String, CommandError> {
        self.run("node", &[&["exec", number(node)], args].concat())
    }

    /// GET of a pod's address, past the API server.
    pub fn http_get(&self, url: &str) -> Result<String, String> {
        self.run("exec", &["podtool", "get", url]).map_err(|error| error.to_string())
    }

    /// Sends a signal to the process of a pod, past the kubelet.
    #[track_caller]
    pub fn signal(&self, pod: &PodView, signal: &str) {
        let node = pod.node.as_deref().unwrap_or_else(|| panic!("{} is on no node", pod.name));
        let container = pod.container.as_deref().unwrap_or_else(|| panic!("{} has no container", pod.name));
        let kill = ["ctr", "--namespace", "k8s.io", "tasks", "kill", "--signal", signal, container];
        self.on_node(node, &kill).unwrap_or_else(|error| panic!("{error}"));
    }

    /// Makes the nodes know an image under another name as well.
    #[track_caller]
    pub fn tag_image<'a>(&self, nodes: impl IntoIterator<Item = &'a str>, image: &str, name: &str) {
        for node in nodes {
            let tag = ["ctr", "--namespace", "k8s.io", "images", "tag", "--force", image, name];
            self.on_node(node, &tag).unwrap_or_else(|error| panic!("{error}"));
        }
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// The scripts know nodes by number: `node2` is 2.
fn number(node: &str) -> &str {
    node.strip_prefix("node").unwrap_or_else(|| panic!("{node} is no node of tests/cluster"))
}

#[derive(Debug)]
enum What {
    ApiServer,
    Kubelet(String),
}

/// Something that is away until it is started or dropped.
#[derive(Debug)]
#[must_use = "it starts again when this is dropped"]
pub struct Stopped<'a> {
    scripts: &'a Scripts,
    what: What,
}

impl Stopped<'_> {
    /// Starts it again.
    pub fn start(self) {}
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        let outcome = match &self.what {
            What::ApiServer => self.scripts.run("apiserver", &["start"]),
            What::Kubelet(number) => self.scripts.run("node", &["start-kubelet", number]),
        };
        match outcome {
            Ok(_) => {}
            Err(error) if std::thread::panicking() => eprintln!("{error}"),
            Err(error) => panic!("{error}"),
        }
    }
}
