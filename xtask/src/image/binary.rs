//! The release binary of the image: static, or for GPUs dynamic.
//!
//! `crt-static` on the gnu target links glibc in, and glibc has the `files` and `dns` sources of host names
//! built in since 2.34, so nothing is looked for in the image at run time. The target is named on the command
//! line although it is the host's own: only then do the flags spare build scripts and procedural macros,
//! which must stay dynamic. The target folder is one of its own, because other flags would throw away what
//! the tests have built.
//!
//! Paths of this machine would make the bytes differ from one checkout to the next; they are mapped to fixed
//! names, and a binary that has one in it all the same is refused.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use super::Variant;
use crate::command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Separates the words in `CARGO_ENCODED_RUSTFLAGS`, so that a path may have blanks.
const UNIT_SEPARATOR: &str = "\u{1f}";

/// Builds it under `target` and returns its path.
pub(super) fn build(target: &Path, variant: Variant) -> Result<PathBuf> {
    ensure!(
        cfg!(all(target_os = "linux", target_arch = "x86_64")),
        "the image's binary is built on x86-64 Linux; elsewhere use deploy/Containerfile"
    );
    let folder = target.join(match variant {
        Variant::Cpu => "image",
        Variant::Cuda => "image-cuda",
    });
    let root = command::root()?;
    let cargo_home = cargo_home()?;
    let flags = flags(variant, &root, &folder, &cargo_home, &registries(&cargo_home)?)?;
    command::run(
        command::cargo()
            .args(["build", "--release", "--locked", "--package", "cadre", "--bin", "cadre"])
            .args(command::FEATURES)
            .args(["--target", TARGET, "--target-dir"])
            .arg(&folder)
            .env("CARGO_ENCODED_RUSTFLAGS", flags),
    )?;
    let binary = folder.join(TARGET).join("release").join("cadre");
    let bytes = fs::read(&binary).with_context(|| format!("read {}", binary.display()))?;
    for path in [&root, &folder, &cargo_home] {
        let text = path.to_string_lossy();
        ensure!(
            !contains(&bytes, text.as_bytes()),
            "the binary has the path {text} of this machine in it, so another checkout would make other bytes"
        );
    }
    Ok(binary)
}

fn cargo_home() -> Result<PathBuf> {
    match std::env::var_os("CARGO_HOME") {
        Some(path) => Ok(PathBuf::from(path)),
        None => Ok(PathBuf::from(std::env::var_os("HOME").context("neither CARGO_HOME nor HOME is set")?)
            .join(".cargo")),
    }
}

/// The unpacked registries: their folder's name depends on how the registry is reached.
fn registries(cargo_home: &Path) -> Result<Vec<PathBuf>> {
    let folder = cargo_home.join("registry/src");
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
        found.push(entry?.path());
    }
    found.sort();
    Ok(found)
}

/// Where two mappings match, rustc takes the later one: the deeper folders come last.
fn flags(
    variant: Variant,
    root: &Path,
    target: &Path,
    cargo_home: &Path,
    registries: &[PathBuf],
) -> Result<OsString> {
    let mut words = match variant {
        Variant::Cpu => vec!["-Ctarget-feature=+crt-static".to_owned()],
        Variant::Cuda => Vec::new(),
    };
    let fixed = [(root, "/cadre"), (target, "/target"), (cargo_home, "/cargo")];
    for (from, to) in fixed.into_iter().chain(registries.iter().map(|path| (path.as_path(), "/crates"))) {
        let from = from.to_str().with_context(|| format!("{} is not UTF-8", from.display()))?;
        words.push(format!("--remap-path-prefix={from}={to}"));
    }
    Ok(words.join(UNIT_SEPARATOR).into())
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    !needle.is_empty() && haystack.windows(needle.len()).any(|window| window == needle)
}

/// Refuses an executable that asks for an interpreter (the dynamic loader): the image has none.
pub(super) fn check_static(elf: &[u8]) -> Result<()> {
    /// `PT_INTERP` of the ELF specification.
    const INTERPRETER: u32 = 3;
    // 64-bit, little-endian, `EM_X86_64`.
    let is_ours = elf.starts_with(b"\x7fELF\x02\x01") && elf.get(18..20) == Some(&[62, 0]);
    ensure!(is_ours, "not an x86-64 executable");
    let number = |at: usize, size: usize| -> Option<usize> {
        let bytes = elf.get(at..at.checked_add(size)?)?;
        Some(bytes.iter().rev().fold(0usize, |value, byte| value << 8 | usize::from(*byte)))
    };
    let table = number(32, 8).zip(number(54, 2)).zip(number(56, 2));
    let ((offset, size), count) = table.context("the ELF header is cut off")?;
    for index in 0..count {
        let at = size.checked_mul(index).and_then(|skipped| offset.checked_add(skipped));
        let kind = at.and_then(|at| number(at, 4)).context("the table of segments is cut off")?;
        if kind == INTERPRETER as usize {
            bail!("it is linked dynamically");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header and one program header of the given type.
    fn elf(kind: u8) -> Vec<u8> {
        let mut bytes = vec![0u8; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64] = kind;
        bytes
    }

    #[test]
    fn a_dynamic_binary_is_refused() {
        check_static(&elf(1)).expect("only a loadable segment");
        let error = check_static(&elf(3)).expect_err("an interpreter is asked for");
        assert_eq!(error.to_string(), "it is linked dynamically");
        // This test is itself linked dynamically.
        let me = fs::read(std::env::current_exe().expect("a path")).expect("our executable");
        check_static(&me).expect_err("the test executable has an interpreter");
    }

    #[test]
    fn what_is_no_whole_executable_is_refused() {
        check_static(b"#!/bin/sh\n").expect_err("a script");
        let whole = elf(1);
        for length in 0..whole.len() - 56 + 4 {
            check_static(&whole[..length]).expect_err("cut off");
        }
    }

    #[test]
    fn deeper_folders_are_mapped_last() {
        let registries = [PathBuf::from("/home/a b/.cargo/registry/src/index-1")];
        let flags = |variant| {
            let cargo_home = Path::new("/home/a b/.cargo");
            let flags = flags(variant, Path::new("/w"), Path::new("/w/t"), cargo_home, &registries);
            flags.expect("paths are text").into_string().expect("text")
        };
        assert!(!flags(Variant::Cuda).contains("crt-static"));
        let flags = flags(Variant::Cpu);
        let words: Vec<&str> = flags.split(UNIT_SEPARATOR).collect();
        assert_eq!(
            words,
            [
                "-Ctarget-feature=+crt-static",
                "--remap-path-prefix=/w=/cadre",
                "--remap-path-prefix=/w/t=/target",
                "--remap-path-prefix=/home/a b/.cargo=/cargo",
                "--remap-path-prefix=/home/a b/.cargo/registry/src/index-1=/crates",
            ]
        );
    }
}
