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
