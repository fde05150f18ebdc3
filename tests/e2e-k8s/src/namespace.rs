//! A namespace for one test: restricted, and gone with it.

use std::{thread, time::Instant};

use serde_json::json;

use crate::{diagnosis, kubectl::Kubectl, wait};

/// Label of everything that the tests make in a cluster.
pub const LABEL: &str = "cadre.dev/e2e";

/// A namespace that enforces the restricted pod security standard.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    kubectl: Kubectl,
}

impl Namespace {
    /// A fresh one, named after its test.
    #[track_caller]
    pub fn new(test: &str) -> Self {
        let name = format!("e2e-{test}-{}", std::process::id());
        assert!(name.len() <= 63, "{name:?} is no name of a namespace");
        make_restricted(&name);
        Self { kubectl: Kubectl::of(&name), name }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// kubectl in it.
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// Everything in it that a fresh namespace does not have, as `kind/name`; events are left out.
    pub fn contents(&self) -> Result<Vec<String>, String> {
        let run = |args: &[&str]| self.kubectl.run(args).map_err(|error| error.to_string());
        let kinds = run(&["api-resources", "--namespaced", "--verbs=list", "--output=name"])?;
        let kinds: Vec<&str> = kinds.lines().filter(|kind| !kind.starts_with("events")).collect();
        let found = run(&["get", &kinds.join(","), "--output=name", "--ignore-not-found"])?;
        let own = ["serviceaccount/default", "configmap/kube-root-ca.crt"];
        Ok(found.lines().filter(|object| !own.contains(object)).map(str::to_owned).collect())
    }
}

impl Namespace {
    /// Ends every pod without its grace. How models and pods go by themselves is shown by tests of their own; here it
    /// would cost each test half a minute: a namespace's controller looks again after half of the longest grace.
    fn empty(&self) {
        let delete = |what: &[&str]| {
            let args = ["delete", "--all", "--wait=false", "--ignore-not-found"];
            // Whatever fails is met again by the deletion of the namespace.
            self.kubectl.run(&[&args[..], what].concat())
        };
        drop(delete(&["moemodels"]));
        drop(delete(&["deployments,statefulsets,replicasets,jobs"]));
        let gone = || {
            drop(delete(&["pods", "--force", "--grace-period=0"]));
            let pods =
                self.kubectl.run(&["get", "pods", "--output=name"]).map_err(|error| error.to_string())?;
            wait::holds(pods.is_empty(), || pods)
        };
        if let Err(error) = wait::attempt(wait::LIMIT, gone) {
            eprintln!("pods of {} are still there: {error}", self.name);
        }
    }
}

/// A namespace as users are told to make them, if it is not there yet.
#[track_caller]
pub fn make_restricted(name: &str) {
    Kubectl::cluster_wide().apply(&json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": name,
            "labels": {"pod-security.kubernetes.io/enforce": "restricted", LABEL: "true"},
        },
    }));
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let failed = thread::panicking();
        if failed {
            diagnosis::tell(&self.name);
        }
        let begun = Instant::now();
        let timeout = format!("--timeout={}s", wait::LIMIT.as_secs());
        self.empty();
        let deleted = Kubectl::cluster_wide().run(&["delete", "namespace", &self.name, &timeout]);
        // The next test must not share its nodes with what is left of this one; a namespace that stays is a defect.
        match deleted {
            Ok(_) => {}
            Err(error) if failed => eprintln!("{error}"),
            Err(error) => {
                diagnosis::tell(&self.name);
                panic!("namespace {} is not gone after {:.0?}: {error}", self.name, begun.elapsed());
            }
        }
    }
}
