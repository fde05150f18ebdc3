//! The image in a pod: it starts where nothing is allowed, and its checkpoint is the repository's.

use std::{
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::Stage;
use crate::{command, interrupt};

/// A pod of this cluster needs a second; one that pulls needs what its registry needs.
const LIMIT: Duration = Duration::from_secs(120);

const POLL: Duration = Duration::from_millis(200);

/// Runs both pods in a namespace of their own and removes it; returns the number of checks.
pub(super) fn run(stage: &Stage, cadre: &Path) -> Result<usize> {
    let namespace = format!("cadre-preflight-{}", std::process::id());
    apply(stage, &restricted(&namespace))?;
    let outcome = checks(stage, &namespace, cadre);
    // It goes in the background; on a local cluster the cluster goes as well.
    let mut delete = stage.kubectl();
    delete.args(["delete", "namespace", &namespace, "--wait=false"]).stdout(Stdio::null());
    interrupt::run(&mut delete, LIMIT)?;
    outcome
}

fn checks(stage: &Stage, namespace: &str, cadre: &Path) -> Result<usize> {
    let cases: [(&str, &[&str], &[&str]); 2] = [
        ("version", &["--version"], &["--version"]),
        ("inspect", &["inspect", "/models/pocket"], &["inspect", "models/pocket"]),
    ];
    for (name, args, _) in cases {
        apply(stage, &pod(namespace, name, &stage.image, args))?;
    }
    for (name, _, args) in cases {
        let there = succeeded(stage, namespace, name)?;
        let here = String::from_utf8(command::capture(Command::new(cadre).args(args))?)?;
        // The folder is the only thing that may differ.
        let here = here.replace("models/pocket", "/models/pocket");
        ensure!(there == here, "pod {name} printed\n{there}\nand the test build's cadre\n{here}");
    }
    Ok(cases.len())
}

fn restricted(namespace: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": namespace,
            "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
        },
    })
}

fn pod(namespace: &str, name: &str, image: &str, args: &[&str]) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            // No user is named: the image's own must do.
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "cadre",
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "args": args,
                "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "256Mi"}},
                "securityContext": {
                    "readOnlyRootFilesystem": true,
                    "allowPrivilegeEscalation": false,
                    "capabilities": {"drop": ["ALL"]},
                },
            }],
        },
    })
}

fn apply(stage: &Stage, object: &Value) -> Result<()> {
    let mut command = stage.kubectl();
    command.args(["apply", "--filename=-"]).stdin(Stdio::piped()).stdout(Stdio::null());
    let shown = command::show(&command);
    let mut child = command.spawn().with_context(|| format!("start `{shown}`"))?;
    let input = child.stdin.take().context("a pipe to kubectl")?;
    serde_json::to_writer(input, object)?;
    match interrupt::wait(&mut child, LIMIT)? {
        Some(status) if status.success() => Ok(()),
        _ => bail!("`{shown}` refused {} {}", object["kind"], object["metadata"]["name"]),
    }
}

/// Waits until a pod has run to its end and returns its output.
fn succeeded(stage: &Stage, namespace: &str, name: &str) -> Result<String> {
    let begun = Instant::now();
    loop {
        interrupt::check()?;
        let text =
            command::capture(stage.kubectl().args(["-n", namespace, "get", "pod", name, "-o", "json"]))?;
        let status = serde_json::from_slice::<Value>(&text).context("read a pod")?["status"].take();
        let log = || -> Result<String> {
            Ok(String::from_utf8(command::capture(stage.kubectl().args(["-n", namespace, "logs", name]))?)?)
        };
        match status["phase"].as_str() {
            Some("Succeeded") => return log(),
            Some("Failed") => bail!("pod {name} failed: {status}\nits log:\n{}", log().unwrap_or_default()),
            _ => {}
        }
        let waiting =
            status["containerStatuses"][0]["state"]["waiting"]["reason"].as_str().unwrap_or_default();
        // These do not pass by themselves.
        if matches!(
            waiting,
            "ErrImagePull" | "ImagePullBackOff" | "CreateContainerConfigError" | "RunContainerError"
        ) {
            bail!(
                "pod {name} does not start ({waiting}): do the nodes have the image {}? {status}",
                stage.image
            );
        }
        ensure!(begun.elapsed() < LIMIT, "pod {name} is not done after {} s: {status}", LIMIT.as_secs());
        thread::sleep(POLL);
    }
}
