//! What the image for NVIDIA GPUs has more: glibc's shared libraries, the kernels, and the words for a node's runtime.
//!
//! **The driver is the node's.** Its library `libcuda.so.1` belongs to the kernel module that runs there, so no image can
//! bring it: the NVIDIA container runtime (or a CDI device) mounts it into the container. Nothing of NVIDIA's is in here.
//!
//! **Hence a dynamic binary.** A static executable has no loader that could open a library; glibc's own `dlopen` in one
//! wants the very glibc that it was linked with, and gives up without a word that helps. So this variant is linked
//! dynamically, and the image holds the loader and the libraries that the binary and the driver's library name: those
//! of the machine that links it, because a binary runs on the glibc that it was linked with and newer ones.
//!
//! **What is not set**: `NVIDIA_VISIBLE_DEVICES`. The device plugin says which cards a container has; an image that says
//! `all` gives every pod every card of a node whose runtime is NVIDIA's.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs,
    path::Path,
};

use anyhow::{Context, Result, bail, ensure};

use super::oci::Layer;

/// What the driver's libraries may do in a container; the runtime mounts those and no others.
pub(super) const ENV: [&str; 2] = [
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    // Where runtimes put the driver that do not rewrite the loader's cache: GKE's installer, and the NVIDIA runtime in an
    // image that it takes for none of Debian's.
    "LD_LIBRARY_PATH=/usr/local/nvidia/lib64:/usr/lib64",
];

/// The loader's name in every dynamic executable of the platform.
pub(super) const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
/// Where the libraries lie, on Debian and in the image: the folder that its glibc searches by default.
pub(super) const LIBRARIES: &str = "lib/x86_64-linux-gnu";

/// What `libcuda.so.1` is linked with; four of them are empty since glibc 2.34 and asked for all the same.
const DRIVER_NEEDS: [&str; 6] =
    ["libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1"];

/// Licences of what is copied.
const COPYRIGHT: [&str; 2] = ["usr/share/doc/libc6/copyright", "usr/share/doc/libgcc-s1/copyright"];

/// glibc of the machine under `from` (`/`), with what the binary needs beyond it refused by name.
pub(super) fn libraries(from: &Path, binary: &[u8]) -> Result<Layer> {
    let mut layer = Layer::new("glibc's shared libraries");
    let read = |path: &str| {
        let path = from.join(path);
        fs::read(&path).with_context(|| {
            format!("read {}: the image for GPUs is made on Debian with libc6 and libgcc-s1", path.display())
        })
    };
    layer.file(LOADER, 0o755, read(LOADER)?);
    let mut asked: VecDeque<String> = needed(binary)?.into();
    asked.extend(DRIVER_NEEDS.map(str::to_owned));
    let mut taken = BTreeSet::from([LOADER.rsplit('/').next().unwrap_or_default().to_owned()]);
    while let Some(name) = asked.pop_front() {
        if !taken.insert(name.clone()) {
            continue;
        }
        ensure!(
            DRIVER_NEEDS.contains(&name.as_str()),
            "the binary is linked with {name}, which is none of glibc's ({})",
            DRIVER_NEEDS.join(", ")
        );
        let bytes = read(&format!("{LIBRARIES}/{name}"))?;
        asked.extend(needed(&bytes).with_context(|| name.clone())?);
        layer.file(&format!("{LIBRARIES}/{name}"), 0o755, bytes);
    }
    for path in COPYRIGHT {
        layer.file(path, 0o644, read(path)?);
    }
    // By this the NVIDIA runtime knows into which folder to mount.
    layer.file("etc/debian_version", 0o644, read("etc/debian_version")?);
    let folders = "/lib/x86_64-linux-gnu\n/usr/lib/x86_64-linux-gnu\n/usr/lib64\n/usr/local/nvidia/lib64\n";
    layer.file("etc/ld.so.conf", 0o644, folders.into());
    Ok(layer)
}

/// The machine code of a folder, beside the binary, where it looks for it.
pub(super) fn kernels(compiled: &Path) -> Result<Layer> {
    let mut layer = Layer::new("CUDA kernels");
    let name = compiled.file_name().context("the folder of the kernels has a name")?.to_string_lossy();
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(compiled).with_context(|| format!("list {}", compiled.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "cubin") {
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            files.insert(file, fs::read(&path).with_context(|| format!("read {}", path.display()))?);
        }
    }
    ensure!(!files.is_empty(), "no kernels in {}", compiled.display());
    for (file, bytes) in files {
        layer.file(&format!("kernels/{name}/{file}"), 0o644, bytes);
    }
    Ok(layer)
}

/// A little-endian number of an ELF file.
fn number(elf: &[u8], at: usize, size: usize) -> Option<usize> {
    let bytes = elf.get(at..at.checked_add(size)?)?;
    Some(bytes.iter().rev().fold(0usize, |value, byte| value << 8 | usize::from(*byte)))
}

/// One entry of the table of segments: type, offset in the file, address, size in the file.
type Segment = (usize, usize, usize, usize);

fn segments(elf: &[u8]) -> Result<Vec<Segment>> {
    let is_ours = elf.starts_with(b"\x7fELF\x02\x01") && elf.get(18..20) == Some(&[62, 0]);
    ensure!(is_ours, "not an x86-64 executable");
    let table = (number(elf, 32, 8), number(elf, 54, 2), number(elf, 56, 2));
    let (Some(offset), Some(size), Some(count)) = table else { bail!("the ELF header is cut off") };
    let segment = |index: usize| {
        let at = size.checked_mul(index).and_then(|skipped| offset.checked_add(skipped))?;
        let field = |from: usize, size: usize| number(elf, at.checked_add(from)?, size);
        Some((field(0, 4)?, field(8, 8)?, field(16, 8)?, field(32, 8)?))
    };
    (0..count).map(|index| segment(index).context("the table of segments is cut off")).collect()
}

/// The libraries that an executable or a library is linked with (`DT_NEEDED`).
pub(super) fn needed(elf: &[u8]) -> Result<Vec<String>> {
    /// `PT_LOAD`, `PT_DYNAMIC`, `DT_NULL`, `DT_NEEDED` and `DT_STRTAB` of the ELF specification.
    const LOAD: usize = 1;
    const DYNAMIC: usize = 2;
    const END: usize = 0;
    const NEEDED: usize = 1;
    const STRINGS: usize = 5;
    let segments = segments(elf)?;
    let Some((_, offset, _, size)) = segments.iter().find(|(kind, ..)| *kind == DYNAMIC) else {
        bail!("it is linked statically: it could not open the driver's library");
    };
    let entries: Vec<(usize, usize)> = (0..size / 16)
        .map_while(|index| {
            let at = offset.checked_add(index * 16)?;
            Some((number(elf, at, 8)?, number(elf, at.checked_add(8)?, 8)?))
        })
        .take_while(|(tag, _)| *tag != END)
        .collect();
    let address = entries.iter().find(|(tag, _)| *tag == STRINGS).map(|(_, value)| *value);
    let address = address.context("the dynamic section names no strings")?;
    let strings = segments
        .iter()
        .find(|(kind, _, from, size)| *kind == LOAD && (*from..from.saturating_add(*size)).contains(&address))
        .map(|(_, offset, from, _)| offset.saturating_add(address - from))
        .context("the strings of the dynamic section are in no segment")?;
    let name = |at: usize| {
        let text = elf.get(strings.checked_add(at)?..)?;
        let end = text.iter().position(|byte| *byte == 0)?;
        Some(String::from_utf8_lossy(&text[..end]).into_owned())
    };
    entries
        .iter()
        .filter(|(tag, _)| *tag == NEEDED)
        .map(|(_, at)| name(*at).context("the name of a library is cut off"))
        .collect()
}

#[cfg(test)]
mod tests;
