//! The operator, installed by helm as users install it, in a restricted namespace of its own.
//!
//! It stays from test to test and from suite to suite; whoever set the cluster up takes it away.

use std::{
    collections::BTreeSet,
    sync::OnceLock,
    time::{Duration, Instant},
};

use cadre_e2e::binary::root;
use cadre_k8s_api::{IMAGE, names::port};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};

use crate::{
    cluster::cluster,
    figures::{self, Figures},
    kubectl::Kubectl,
    metrics::Metrics,
    namespace::make_restricted,
    pod::{self, PodView},
    wait::{self, LIMIT, holds},
};

/// Where it is.
pub const NAMESPACE: &str = "cadre-e2e-system";
/// The release of the definitions.
pub const CRDS: &str = "cadre-crds";
/// The release of the operator.
pub const RELEASE: &str = "cadre";
/// Its pods, and not those of `helm test`.
pub const SELECTOR: &str = "app.kubernetes.io/instance=cadre,app.kubernetes.io/component=operator";

/// What models of the tests may ask for: they show how a cluster refuses what the operator allows.
const ALLOWED_FOLDER: &str = "models.allow.hostPaths={/models}";
const ALLOWED_CLASS: &str = "models.allow.priorityClasses={example-none}";

/// The installed operator.
#[derive(Debug)]
pub struct Operator {
    kubectl: Kubectl,
}

impl Operator {
    /// The operator of this run, installed at the first call.
    pub fn installed() -> &'static Self {
        static OPERATOR: OnceLock<Operator> = OnceLock::new();
        OPERATOR.get_or_init(|| {
            let was_there = cluster().helm(&["status", RELEASE, "--namespace", NAMESPACE]).is_ok();
            let took = install(&[]);
            // Another suite of this run may have installed it.
            if !was_there {
                Figures::new("install", &["step", "seconds"])
                    .row("helm install until the operator is ready", &[figures::seconds(took)]);
            }
            figures::describe_run();
            let operator = Self { kubectl: Kubectl::of(NAMESPACE) };
            operator.until_leading();
            operator
        })
    }

    /// Its pods.
    pub fn pods(&self) -> Result<Vec<PodView>, String> {
        let pods: Vec<Pod> = self.kubectl.list(&["pods", "--selector", SELECTOR])?;
        Ok(pods.iter().map(PodView::from).collect())
    }

    /// Waits until one of its pods holds the lease, and returns it with its metrics.
    pub fn until_leading(&self) -> (PodView, Metrics) {
        wait::until("an operator leads", LIMIT, || {
            let pods = self.pods()?;
            let ready = pods.iter().filter(|pod| pod.ready && !pod.terminating);
            for pod in ready {
                let metrics = self.metrics_of(&pod.name)?;
                if metrics.sum("cadre_operator_leader", &[]) == 1.0 {
                    return Ok((pod.clone(), metrics));
                }
            }
            Err(pod::names(&pods))
        })
    }

    /// Metrics of the leader.
    pub fn metrics(&self) -> Metrics {
        self.until_leading().1
    }

    fn metrics_of(&self, pod: &str) -> Result<Metrics, String> {
        metrics_of(&self.kubectl, NAMESPACE, pod)
    }

    /// Kills every pod of it at once, as a lost node does.
    pub fn kill(&self) {
        let names: Vec<String> = self.pods().unwrap_or_default().into_iter().map(|pod| pod.name).collect();
        assert!(!names.is_empty(), "there is no operator to kill");
        let mut args = vec!["delete", "pod", "--force", "--grace-period=0"];
        args.extend(names.iter().map(String::as_str));
        self.kubectl.must(&args);
    }

    /// Uids and restarts of its pods, without those that are on their way out: what must not change while it works.
    pub fn lives(&self) -> BTreeSet<(String, i32)> {
        let pods = wait::until("the operator's pods", LIMIT, || self.pods());
        pods.into_iter().filter(|pod| !pod.terminating).map(|pod| (pod.uid, pod.restarts)).collect()
    }

    /// Takes its pods away until the guard is dropped.
    pub fn paused(&self) -> Paused<'_> {
        let deployments: Vec<Deployment> = wait::until("the operator's Deployment", LIMIT, || {
            self.kubectl.list(&["deployments", "--selector", SELECTOR])
        });
        let deployment = deployments.into_iter().next().expect("the chart makes a Deployment");
        let replicas = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
        let paused = Paused { operator: self, name: deployment.metadata.name.unwrap_or_default(), replicas };
        paused.scale(0);
        wait::until("the operator is gone", LIMIT, || {
            let pods = self.pods()?;
            holds(pods.is_empty(), || pod::names(&pods))
        });
        paused
    }
}

/// An operator without pods.
#[derive(Debug)]
#[must_use = "the operator returns when this is dropped"]
pub struct Paused<'a> {
    operator: &'a Operator,
    name: String,
    replicas: i32,
}

impl Paused<'_> {
    fn scale(&self, replicas: i32) {
        let (what, replicas) = (format!("deployment/{}", self.name), format!("--replicas={replicas}"));
        self.operator.kubectl.must(&["scale", &what, &replicas]);
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.scale(self.replicas);
        if !std::thread::panicking() {
            self.operator.until_leading();
        }
    }
}

/// Installs or upgrades both charts; `more` are further arguments for the operator's. Returns how long it took.
#[track_caller]
pub fn install(more: &[&str]) -> Duration {
    let begun = Instant::now();
    make_restricted(NAMESPACE);
    let chart = |name: &str| root().join("charts").join(name).display().to_string();
    let common = ["--namespace", NAMESPACE, "--wait", "--timeout", "180s"];
    let crds = chart("cadre-crds");
    // A cluster that was used before keeps the definitions, of whichever release they were.
    cluster().must_helm(&[&["upgrade", "--install", CRDS, &crds, "--take-ownership"], &common[..]].concat());
    let operator = chart("cadre");
    let image = image_values();
    let image: Vec<&str> = image.iter().map(String::as_str).collect();
    let allow = ["--set", ALLOWED_FOLDER, "--set", ALLOWED_CLASS];
    cluster().must_helm(
        &[&["upgrade", "--install", RELEASE, &operator], &common[..], &image, &allow, more].concat(),
    );
    begun.elapsed()
}

/// Values for an image that is not the chart's default.
fn image_values() -> Vec<String> {
    let image = cluster().image();
    if image == IMAGE { Vec::new() } else { vec!["--set-string".into(), values_of(image)] }
}

/// `REPOSITORY[:TAG][@DIGEST]` as values of the chart.
fn values_of(image: &str) -> String {
    let (name, digest) = image.split_once('@').map_or((image, ""), |(name, digest)| (name, digest));
    // A colon before the last slash belongs to the registry's port.
    let (repository, tag) = match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (name, if digest.is_empty() { "latest" } else { "" }),
    };
    format!("image.repository={repository},image.tag={tag},image.digest={digest}")
}

/// The metrics of a pod, through the API server.
pub(crate) fn metrics_of(kubectl: &Kubectl, namespace: &str, pod: &str) -> Result<Metrics, String> {
    let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}:{}/proxy/metrics", port::ADMIN);
    kubectl.raw(&path).map(Metrics::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_as_values() {
        for (image, values) in [
            ("a.b/c:1", "image.repository=a.b/c,image.tag=1,image.digest="),
            ("localhost:5000/c", "image.repository=localhost:5000/c,image.tag=latest,image.digest="),
            (
                "localhost:5000/c@sha256:ff",
                "image.repository=localhost:5000/c,image.tag=,image.digest=sha256:ff",
            ),
            ("c:1@sha256:ff", "image.repository=c,image.tag=1,image.digest=sha256:ff"),
        ] {
            assert_eq!(values_of(image), values);
        }
    }
}
