//! An OCI image layout in a tar, byte for byte a function of its contents.
//!
//! Layers are plain tars: their digest is then the one that the configuration names, no compressor's version
//! enters the bytes, and a node unpacks them faster (registries compress on push). The tar holds docker's
//! `manifest.json` beside the OCI index, on the same blobs, so that `ctr images import`, `podman load`,
//! `skopeo copy oci-archive:` and `docker load` of any age all take it.

use std::{collections::BTreeMap, io::Write};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// An image for linux/amd64.
pub(crate) struct Image {
    /// Registry, repository and tag in full: nothing is put before it.
    pub(crate) reference: String,
    pub(crate) user: String,
    pub(crate) entrypoint: Vec<String>,
    pub(crate) labels: Vec<(&'static str, &'static str)>,
    /// Environment beside `PATH`, as `NAME=value`.
    pub(crate) env: Vec<&'static str>,
    /// From the bottom.
    pub(crate) layers: Vec<Layer>,
}

/// One layer's files, by path without a leading slash.
pub(crate) struct Layer {
    about: &'static str,
    entries: BTreeMap<String, Entry>,
}

enum Entry {
    Folder { mode: u32 },
    File { mode: u32, bytes: Vec<u8> },
}

impl Layer {
    /// An empty layer; `about` becomes its line in the image's history.
    pub(crate) fn new(about: &'static str) -> Self {
        Self { about, entries: BTreeMap::new() }
    }

    /// Adds a folder, and those above it.
    pub(crate) fn folder(&mut self, path: &str, mode: u32) {
        self.above(path);
        self.entries.insert(path.into(), Entry::Folder { mode });
    }

    /// Adds a file, and the folders above it.
    pub(crate) fn file(&mut self, path: &str, mode: u32, bytes: Vec<u8>) {
        self.above(path);
        self.entries.insert(path.into(), Entry::File { mode, bytes });
    }

    /// Paths of its folders and files, sorted.
    #[cfg(test)]
    pub(super) fn paths(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Writes its files as a container has them.
    #[cfg(test)]
    pub(super) fn unpack(&self, root: &std::path::Path) -> std::io::Result<()> {
        use std::{fs, os::unix::fs::PermissionsExt};
        for (path, entry) in &self.entries {
            let path = root.join(path);
            let mode = match entry {
                Entry::Folder { mode } => fs::create_dir_all(&path).map(|()| mode),
                Entry::File { mode, bytes } => fs::write(&path, bytes).map(|()| mode),
            }?;
            fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
        }
        Ok(())
    }

    fn above(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            self.entries.entry(path[..at].into()).or_insert(Entry::Folder { mode: 0o755 });
        }
    }

    /// Sorted by path, so a folder stands before what is in it.
    fn tar(&self) -> Result<Vec<u8>> {
        let mut tar = Tar::new(Vec::new());
        for (path, entry) in &self.entries {
            match entry {
                Entry::Folder { mode } => tar.folder(path, *mode)?,
                Entry::File { mode, bytes } => tar.file(path, *mode, bytes)?,
            }
        }
        tar.finish()
    }
}

impl Image {
    /// Writes the whole archive.
    pub(crate) fn write(&self, out: impl Write) -> Result<()> {
        let mut blobs: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut put = |media: &str, bytes: Vec<u8>| -> Value {
            let digest = hex(&Sha256::digest(&bytes));
            let size = bytes.len();
            blobs.insert(digest.clone(), bytes);
            json!({"mediaType": media, "digest": format!("sha256:{digest}"), "size": size})
        };
        let mut layers = Vec::new();
        for layer in &self.layers {
            layers.push(put(LAYER, layer.tar()?));
        }
        // A plain layer's digest is also the identity of its contents.
        let diff_ids: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
        let history: Vec<Value> = self
            .layers
            .iter()
            .map(|layer| json!({"created_by": "cargo xtask image", "comment": layer.about}))
            .collect();
        let env: Vec<&str> = std::iter::once("PATH=/").chain(self.env.iter().copied()).collect();
        let labels: BTreeMap<&str, &str> = self.labels.iter().copied().collect();
        let config = put(
            CONFIG,
            serde_json::to_vec(&json!({
                "architecture": "amd64",
                "os": "linux",
                "config": {
                    "User": self.user,
                    "Env": env,
                    "Entrypoint": self.entrypoint,
                    "WorkingDir": "/",
                    "Labels": labels,
                },
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
                "history": history,
            }))?,
        );
        let manifest = serde_json::to_vec(
            &json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}),
        )?;
        let mut described = put(MANIFEST, manifest);
        described["platform"] = json!({"architecture": "amd64", "os": "linux"});
        described["annotations"] = json!({
            // containerd reads the first, podman and skopeo the second
            "io.containerd.image.name": self.reference,
            "org.opencontainers.image.ref.name": self.reference,
        });
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [described]});
        let docker = json!([{
            "Config": blob_path(&config)?,
            "RepoTags": [self.reference],
            "Layers": layers.iter().map(blob_path).collect::<Result<Vec<_>>>()?,
        }]);

        let mut tar = Tar::new(out);
        tar.folder("blobs", 0o755)?;
        tar.folder("blobs/sha256", 0o755)?;
        for (digest, bytes) in &blobs {
            tar.file(&format!("blobs/sha256/{digest}"), 0o644, bytes)?;
        }
        tar.file("index.json", 0o644, &serde_json::to_vec(&index)?)?;
        tar.file("manifest.json", 0o644, &serde_json::to_vec(&docker)?)?;
        tar.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        tar.finish()?.flush().context("flush")
    }
}

/// `blobs/sha256/…` of a descriptor.
fn blob_path(descriptor: &Value) -> Result<String> {
    let digest = descriptor["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:"));
    Ok(format!("blobs/sha256/{}", digest.context("a descriptor has a digest")?))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Entries with nothing of this machine in them: no time, no owner, no name of one.
struct Tar<W: Write>(tar::Builder<W>);

impl<W: Write> Tar<W> {
    fn new(out: W) -> Self {
        Self(tar::Builder::new(out))
    }

    fn folder(&mut self, path: &str, mode: u32) -> Result<()> {
        self.entry(&format!("{path}/"), tar::EntryType::Directory, mode, &[])
    }

    fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.entry(path, tar::EntryType::Regular, mode, bytes)
    }

    fn entry(&mut self, path: &str, kind: tar::EntryType, mode: u32, bytes: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_path(path).with_context(|| format!("{path} is too long for a tar"))?;
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(bytes.len() as u64);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_cksum();
        self.0.append(&header, bytes).with_context(|| format!("write {path}"))
    }

    fn finish(self) -> Result<W> {
        self.0.into_inner().context("close the tar")
    }
}
