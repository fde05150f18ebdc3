//! kubectl, in a namespace or in none.

use std::{process::Command, time::Duration};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    cluster::cluster,
    command::{self, CommandError},
};

/// Longer than any single request; waits of kubectl's own are bounded by their callers.
const LIMIT: Duration = Duration::from_secs(150);

/// A request that the API server has not answered by then never will be.
const REQUEST_TIMEOUT: &str = "--request-timeout=30s";

/// A list as kubectl prints it: of kind `List`, whatever it is a list of.
#[derive(Deserialize)]
struct Items<T> {
    items: Vec<T>,
}

/// Runs kubectl.
#[derive(Clone, Debug)]
pub struct Kubectl {
    namespace: Option<String>,
}

impl Kubectl {
    /// For what belongs to no namespace.
    pub fn cluster_wide() -> Self {
        Self { namespace: None }
    }

    /// In this namespace.
    pub fn of(namespace: &str) -> Self {
        Self { namespace: Some(namespace.to_owned()) }
    }

    /// The command line so far.
    pub(crate) fn command(&self) -> Command {
        let mut command = cluster().kubectl();
        if let Some(namespace) = &self.namespace {
            command.args(["--namespace", namespace]);
        }
        command
    }

    /// Runs to the end and returns standard output.
    pub fn run(&self, args: &[&str]) -> Result<String, CommandError> {
        self.bounded(args, None)
    }

    /// Runs to the end, which must be a good one.
    #[track_caller]
    pub fn must(&self, args: &[&str]) -> String {
        self.run(args).unwrap_or_else(|error| panic!("{error}"))
    }

    /// As [`run`](Self::run), with an object on standard input: `args` end in `-f -`.
    pub fn with_object(&self, args: &[&str], object: &Value) -> Result<String, CommandError> {
        self.bounded(args, Some(&object.to_string()))
    }

    fn bounded(&self, args: &[&str], input: Option<&str>) -> Result<String, CommandError> {
        let mut command = self.command();
        // Those that stream or wait have bounds of their own.
        if !args.iter().any(|arg| arg.starts_with("--timeout")) {
            command.arg(REQUEST_TIMEOUT);
        }
        command::run(command.args(args), input, LIMIT)
    }

    /// Applies an object (client-side, as users do), which must be accepted.
    #[track_caller]
    pub fn apply(&self, object: &Value) {
        if let Err(error) = self.with_object(&["apply", "-f", "-"], object) {
            panic!("{error}\n{object:#}");
        }
    }

    /// An object, read from JSON.
    pub fn get<T: DeserializeOwned>(&self, what: &[&str]) -> Result<T, String> {
        let args = [&["get", "--output=json"], what].concat();
        let text = self.run(&args).map_err(|error| error.to_string())?;
        serde_json::from_str(&text)
            .map_err(|error| format!("kubectl get {what:?} gave no such object: {error}"))
    }

    /// The objects that a `get` of several finds.
    pub fn list<T: DeserializeOwned>(&self, what: &[&str]) -> Result<Vec<T>, String> {
        self.get::<Items<T>>(what).map(|list| list.items)
    }

    /// A merge patch, which must be accepted.
    #[track_caller]
    pub fn patch(&self, what: &str, patch: &Value) {
        self.must(&["patch", what, "--type=merge", "--patch", &patch.to_string()]);
    }

    /// A path of the API server.
    pub fn raw(&self, path: &str) -> Result<String, String> {
        self.run(&["get", "--raw", path]).map_err(|error| error.to_string())
    }
}
