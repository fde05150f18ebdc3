//! `cargo xtask image`: the container image as an OCI layout tar, made without a daemon and without a registry.
//!
//! Two layers: the checkpoint with what hardly changes, then the binary, so that a rebuild moves one layer. The variant for
//! NVIDIA GPUs ([`cuda`]) has two more between them: shared libraries and kernels. The
//! same inputs give the same bytes: [`oci`] writes no times and no owners, [`binary`] keeps the machine's paths
//! out of the executable. `deploy/Containerfile` describes the same contents for people with podman or docker; a
//! test holds the two together.

use std::{
    collections::BTreeSet,
    fs,
    io::BufWriter,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::{command, kernels, metadata::Metadata};

mod binary;
mod cuda;
mod oci;

#[path = "../../crates/k8s-api/src/image.rs"]
#[allow(unreachable_pub, dead_code, reason = "the file belongs to cadre-k8s-api, which exports all of it")]
mod name;

/// The reference that charts and samples use.
pub(crate) const REFERENCE: &str = name::IMAGE;

/// Who the processes of the image are: nobody in particular, and by number, because Kubernetes' `runAsNonRoot`
/// cannot judge a name.
const USER: &str = "65532:65532";
const ENTRYPOINT: &str = "/cadre";
/// Where the checkpoint lies in the image, so that a first model needs no volume.
const MODEL: &str = "models/pocket";

const PASSWD: &str = "root:x:0:0:root:/:/none\nnonroot:x:65532:65532:nonroot:/:/none\n";
const GROUP: &str = "root:x:0:\nnonroot:x:65532:\n";
/// A static glibc has these two sources of host names built in; said outright, so that no default decides.
const NSSWITCH: &str = "hosts: files dns\n";

/// The files of a checkpoint beside its tensors.
const CHECKPOINT_FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
];

const LABELS: [(&str, &str); 4] = [
    ("org.opencontainers.image.title", "cadre"),
    (
        "org.opencontainers.image.description",
        "Serves mixture-of-experts language models with the experts apart",
    ),
    ("org.opencontainers.image.licenses", "Apache-2.0"),
    ("org.opencontainers.image.version", env!("CARGO_PKG_VERSION")),
];

/// Which image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variant {
    /// A static binary and nothing that it could need.
    Cpu,
    /// For NVIDIA GPUs: see [`cuda`].
    Cuda,
}

impl Variant {
    fn reference(self) -> &'static str {
        match self {
            Self::Cpu => name::IMAGE,
            Self::Cuda => name::IMAGE_CUDA,
        }
    }

    fn file(self) -> &'static str {
        match self {
            Self::Cpu => concat!("cadre-", env!("CARGO_PKG_VERSION"), ".tar"),
            Self::Cuda => concat!("cadre-", env!("CARGO_PKG_VERSION"), "-cuda.tar"),
        }
    }
}

/// Builds the binary unless one is given, writes the tar and prints its path as the last line.
pub(crate) fn run(variant: Variant, out: Option<&Path>, binary: Option<&Path>) -> Result<()> {
    let path = write(variant, out, binary)?;
    println!("{}", path.display());
    Ok(())
}

/// Like [`run`], and returns the absolute path.
pub(crate) fn write(variant: Variant, out: Option<&Path>, given: Option<&Path>) -> Result<PathBuf> {
    let target = Metadata::load()?.target_directory;
    let binary = match given {
        Some(path) => path.to_path_buf(),
        None => binary::build(&target, variant)?,
    };
    let bytes = fs::read(&binary).with_context(|| format!("read {}", binary.display()))?;
    let fits =
        |result: Result<()>| result.with_context(|| format!("{} does not fit the image", binary.display()));
    let between = match variant {
        Variant::Cpu => {
            fits(binary::check_static(&bytes))?;
            Vec::new()
        }
        Variant::Cuda => {
            fits(cuda::needed(&bytes).map(|_| ()))?;
            vec![cuda::libraries(Path::new("/"), &bytes)?, cuda::kernels(&kernels::compiled()?)?]
        }
    };
    let out = match out {
        Some(path) => path.to_path_buf(),
        None => target.join("image").join(variant.file()),
    };
    if let Some(folder) = out.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let image = contents(&command::root()?, variant, between, bytes)?;
    // Renamed into place: whoever reads the tar meanwhile reads the old one whole.
    let scratch = out.with_extension("tar.new");
    let file = fs::File::create(&scratch).with_context(|| format!("create {}", scratch.display()))?;
    image.write(BufWriter::new(file)).with_context(|| format!("write {}", scratch.display()))?;
    fs::rename(&scratch, &out).with_context(|| format!("rename to {}", out.display()))?;
    let size = fs::metadata(&out)?.len();
    eprintln!("image: {}, {} layers, {:.1} MB", image.reference, image.layers.len(), size as f64 / 1e6);
    out.canonicalize().with_context(|| format!("find {}", out.display()))
}

/// What is in the image, given the repository, the layers below the executable, and the executable.
fn contents(root: &Path, variant: Variant, between: Vec<oci::Layer>, binary: Vec<u8>) -> Result<oci::Image> {
    let mut base = oci::Layer::new("the checkpoint models/pocket, names of users and hosts, the licence");
    base.folder("tmp", 0o1777);
    base.file("etc/passwd", 0o644, PASSWD.into());
    base.file("etc/group", 0o644, GROUP.into());
    base.file("etc/nsswitch.conf", 0o644, NSSWITCH.into());
    base.file("LICENSE", 0o644, fs::read(root.join("LICENSE")).context("read LICENSE")?);
    for name in checkpoint_files(&root.join(MODEL))? {
        let path = root.join(MODEL).join(&name);
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        base.file(&format!("{MODEL}/{name}"), 0o644, bytes);
    }
    let mut program = oci::Layer::new("the cadre binary");
    program.file(ENTRYPOINT.trim_start_matches('/'), 0o755, binary);
    Ok(oci::Image {
        reference: variant.reference().into(),
        user: USER.into(),
        entrypoint: vec![ENTRYPOINT.into()],
        labels: LABELS.to_vec(),
        env: match variant {
            Variant::Cpu => Vec::new(),
            Variant::Cuda => cuda::ENV.to_vec(),
        },
        layers: std::iter::once(base).chain(between).chain([program]).collect(),
    })
}

/// The fixed files and every tensor file that the index names: what a loader opens, and nothing beside it.
fn checkpoint_files(folder: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let index = folder.join("model.safetensors.index.json");
    let text = fs::read(&index).with_context(|| format!("read {}", index.display()))?;
    let index: Index = serde_json::from_slice(&text).with_context(|| format!("read {}", index.display()))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    ensure!(!shards.is_empty(), "the index of {} names no tensor file", folder.display());
    for shard in &shards {
        ensure!(!shard.contains('/'), "the index names {shard:?}, which is not beside it");
    }
    Ok(CHECKPOINT_FILES.into_iter().map(String::from).chain(shards).collect())
}

#[cfg(test)]
mod tests;
