//! A checkpoint of the test's own behind a claim: a copy of the bundled one, damaged or not.
//!
//! Every node of a cluster of ours sees the machine's file system, so a folder of it is a volume for all of them. The
//! volume's type is `hostPath`, which only administrators may make; pods see a claim, which the restricted standard
//! allows.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use cadre_e2e::checkpoints;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    kubectl::Kubectl,
    namespace::{LABEL, Namespace},
    wait::{self, LIMIT},
};

/// A claim bound to a folder of ours.
#[derive(Debug)]
pub struct Claim {
    volume: String,
    claim: String,
    _folder: TempDir,
}

impl Claim {
    /// Copies the bundled checkpoint, does `harm` to it, and binds a claim to it; waits until it is bound.
    #[track_caller]
    pub fn of_copy(namespace: &Namespace, claim: &str, harm: impl FnOnce(&Path)) -> Self {
        let folder = checkpoints::copy();
        harm(folder.path());
        readable(folder.path());
        let volume = format!("{}-{claim}", namespace.name());
        Kubectl::cluster_wide().apply(&json!({
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": volume, "labels": {LABEL: "true"}},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadOnlyMany"],
                "persistentVolumeReclaimPolicy": "Retain",
                "storageClassName": "",
                "hostPath": {"path": folder.path(), "type": "Directory"},
                "claimRef": {"namespace": namespace.name(), "name": claim},
            },
        }));
        namespace.kubectl().apply(&pending(claim, &json!({"volumeName": volume, "storageClassName": ""})));
        // The scheduler looks again at a pod with an unbound claim after up to 10 s, and says so until then.
        wait::until(&format!("claim {claim} is bound"), LIMIT, || {
            let bound: Value = namespace.kubectl().get(&["persistentvolumeclaim", claim])?;
            wait::holds(bound["status"]["phase"] == "Bound", || bound["status"].to_string())
        });
        Self { volume, claim: claim.to_owned(), _folder: folder }
    }

    /// The change of a model that takes its checkpoint from it.
    pub fn source(&self) -> Value {
        of_claim(&self.claim)
    }
}

/// A claim; without a volume or a class that makes one it stays unbound.
pub fn pending(name: &str, how: &Value) -> Value {
    let spec = json!({"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "1Gi"}}});
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": crate::sample::patched(spec, how),
    })
}

/// The change of a model that takes its checkpoint from a claim.
pub fn of_claim(name: &str) -> Value {
    json!({"spec": {"model": {"source": {"image": null, "persistentVolumeClaim": {"claimName": name}}}}})
}

/// Temporary folders are private; the pods' user is another one.
fn readable(folder: &Path) {
    let set = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("our own file")
    };
    set(folder, 0o755);
    for entry in fs::read_dir(folder).expect("our own folder") {
        set(&entry.expect("an entry").path(), 0o644);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // It goes once the claim has gone with its namespace.
        let volume = format!("persistentvolume/{}", self.volume);
        if let Err(error) = Kubectl::cluster_wide().run(&["delete", &volume, "--wait=false"]) {
            eprintln!("{error}");
        }
    }
}
