//! What the tests leave in a cluster that is not ours: the operator, which stays from suite to suite
//! (`tests/e2e-k8s/src/operator.rs` has the names), and the definitions, which outlive their release.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Result, bail};

use super::Stage;
use crate::{command, interrupt};

/// Namespaces of the tests have this label; there may be none.
const OURS: &str = "cadre.dev/e2e=true";

const NAMESPACE: &str = "cadre-e2e-system";

const LIMIT: Duration = Duration::from_secs(180);

/// Removes all of it; a cluster without it is left alone.
pub(super) fn remove(stage: &Stage) -> Result<()> {
    let printed = |args: &[&str]| -> Result<String> {
        Ok(String::from_utf8(command::capture(stage.kubectl().args(args))?)?.trim().to_owned())
    };
    let namespaces = printed(&["get", "namespaces", "--selector", OURS, "--output=name"])?;
    if !namespaces.lines().any(|name| name == format!("namespace/{NAMESPACE}")) {
        return Ok(());
    }
    let run = |command: &mut Command| interrupt::run(command.stdout(Stdio::null()), LIMIT);
    run(stage
        .kubectl()
        .args(["delete", "namespaces,persistentvolumes", "--selector", OURS, "--field-selector"])
        .arg(format!("metadata.name!={NAMESPACE}")))?;
    for release in ["cadre", "cadre-crds"] {
        let mut helm = Command::new(&stage.helm);
        helm.env("KUBECONFIG", stage.kubeconfig());
        run(helm.args(["uninstall", release, "--namespace", NAMESPACE, "--ignore-not-found"]))?;
    }
    // With the definitions every model goes, and the ones left now are somebody's.
    let models = printed(&["get", "moemodels", "--all-namespaces", "--output=name"])?;
    if !models.is_empty() {
        bail!(
            "the cluster has models that are not the tests': {models}; its definitions and {NAMESPACE} stay"
        );
    }
    run(stage.kubectl().args(["delete", "crd", "moemodels.cadre.dev", "moetiers.cadre.dev"]))?;
    run(stage.kubectl().args(["delete", "namespace", NAMESPACE]))
}
