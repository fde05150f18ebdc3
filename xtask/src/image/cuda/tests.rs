use std::path::PathBuf;

use super::{
    super::{Variant, command},
    *,
};

fn me() -> Vec<u8> {
    fs::read(std::env::current_exe().expect("a path")).expect("our executable")
}

#[test]
fn what_an_executable_is_linked_with_is_read_from_it() {
    // This test is linked dynamically itself, with glibc and nothing else.
    let found = needed(&me()).expect("a dynamic executable");
    assert!(found.iter().any(|name| name == "libc.so.6"), "{found:?}");
    let error = needed(b"#!/bin/sh\n").expect_err("a script").to_string();
    assert_eq!(error, "not an x86-64 executable");
    let mut cut = me();
    cut.truncate(200);
    needed(&cut).expect_err("cut off");
}

#[test]
fn a_static_executable_is_refused_because_it_cannot_open_a_driver() {
    let mut elf = vec![0u8; 64 + 56];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    (elf[18], elf[32], elf[54], elf[56], elf[64]) = (62, 64, 56, 1, 1);
    let error = needed(&elf).expect_err("no dynamic section").to_string();
    assert!(error.contains("linked statically"), "{error}");
}

/// The layer on this machine, for the executable of this test.
#[test]
fn the_libraries_are_glibcs_and_those_that_a_driver_asks_for() {
    let layer = libraries(Path::new("/"), &me()).expect("Debian's glibc");
    let paths: Vec<&str> = layer.paths().collect();
    for path in
        [LOADER, "etc/debian_version", "lib/x86_64-linux-gnu/libdl.so.2", "lib/x86_64-linux-gnu/libc.so.6"]
    {
        assert!(paths.contains(&path), "{path} not in {paths:?}");
    }
    assert!(!paths.iter().any(|path| path.contains("cuda") || path.contains("nvidia")), "{paths:?}");
    let empty = tempfile::tempdir().expect("a folder");
    let error = libraries(empty.path(), &me()).map(|_| ()).expect_err("no glibc there");
    assert!(
        format!("{error:#}").contains("ld-linux-x86-64.so.2: the image for GPUs is made on Debian"),
        "{error:#}"
    );
}

#[test]
fn kernels_lie_where_the_binary_looks_for_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let compiled: PathBuf = folder.path().join("sm_90a");
    fs::create_dir(&compiled).expect("a folder");
    kernels(&compiled).map(|_| ()).expect_err("none there");
    for name in ["gemm.cubin", "gemm.hash"] {
        fs::write(compiled.join(name), name).expect("a file");
    }
    let layer = kernels(&compiled).expect("kernels");
    assert_eq!(layer.paths().collect::<Vec<_>>(), ["kernels", "kernels/sm_90a", "kernels/sm_90a/gemm.cubin"]);
}

#[test]
fn the_runtime_is_told_what_of_the_driver_to_mount_and_not_which_cards() {
    assert!(ENV.contains(&"NVIDIA_DRIVER_CAPABILITIES=compute,utility"));
    assert!(!ENV.iter().any(|variable| variable.starts_with("NVIDIA_VISIBLE_DEVICES")));
}

/// The image's files as a container has them, with the program of the test build. `None`, with a notice, where it has not
/// been built: `cargo xtask test` builds it.
fn container() -> Option<tempfile::TempDir> {
    let Some(binary) = std::env::var_os("CADRE_BIN") else {
        println!("\nNOTICE: without CADRE_BIN the image for GPUs is not run");
        return None;
    };
    let compiled = tempfile::tempdir().expect("a folder");
    let compiled = compiled.path().join("sm_90a");
    fs::create_dir_all(&compiled).expect("a folder");
    for source in fs::read_dir(command::root().expect("the repository").join("crates/ops-cuda/kernels"))
        .expect("kernels")
    {
        let source = source.expect("an entry").path();
        if source.extension().is_some_and(|extension| extension == "cu") {
            let name = source.file_stem().expect("a name").to_string_lossy().into_owned();
            fs::write(compiled.join(format!("{name}.cubin")), "not machine code").expect("a file");
        }
    }
    let bytes = fs::read(&binary).expect("the program");
    let layers =
        vec![libraries(Path::new("/"), &bytes).expect("glibc"), kernels(&compiled).expect("kernels")];
    let root = command::root().expect("the repository");
    let image = super::super::contents(&root, Variant::Cuda, layers, bytes).expect("the contents");
    let folder = tempfile::tempdir().expect("a folder");
    for layer in &image.layers {
        layer.unpack(folder.path()).expect("the layer");
    }
    for mount in ["proc", "usr/lib/x86_64-linux-gnu"] {
        fs::create_dir_all(folder.path().join(mount)).expect("a folder");
    }
    Some(folder)
}

/// Mounts a driver's library where the NVIDIA runtime does.
fn mount_driver(container: &Path, version: u32, count: u32, major: u32) {
    let source = command::root().expect("the repository").join("xtask/src/image/cuda/driver.c");
    let status = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", "-Wall", "-Werror"])
        .args([format!("-DVERSION={version}"), format!("-DCOUNT={count}"), format!("-DMAJOR={major}")])
        .arg("-o")
        .arg(container.join("usr/lib/x86_64-linux-gnu/libcuda.so.1"))
        .arg(source)
        .status();
    assert!(status.expect("a C compiler").success());
}

/// What a shard on the first card says when it ends, in a root of its own as a container's process has.
fn last_words(container: &Path) -> String {
    let log = container.join("tmp/end");
    let _ = fs::remove_file(&log);
    let script = "mount --bind /proc \"$0/proc\" && exec chroot \"$0\" /cadre expert --shard 0 --model /models/pocket \
                  --device cuda:0 --termination-log /tmp/end";
    let mut run = std::process::Command::new("unshare");
    // Root here or not: root of the namespace. Variables are those that the image sets.
    run.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).arg(container);
    run.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    run.envs(ENV.iter().filter_map(|variable| variable.split_once('=')));
    let output = run.output().expect("unshare");
    fs::read_to_string(&log).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

/// The driver is found where runtimes mount it, by the loader that is in the image; each thing that is missing is told with
/// its reason, one after the other.
#[test]
fn the_program_of_the_image_opens_the_driver_of_the_node() {
    let Some(container) = container() else { return };
    let container = container.path();
    let told = |reason: &str, words: &str| {
        let said = last_words(container);
        assert!(said.starts_with(&format!("{reason}: ")) && said.contains(words), "{reason}: {said}");
    };
    told("AcceleratorDriverMissing", "libcuda.so.1");
    mount_driver(container, 12_080, 1, 9);
    told("AcceleratorDriverMissing", "is of CUDA 12.8; 13.0 or newer");
    mount_driver(container, 13_000, 0, 9);
    told("AcceleratorNotFound", "no device cuda:0");
    mount_driver(container, 13_000, 1, 8);
    told("AcceleratorUnsupported", "cuda:0 is a Test GPU of compute capability 8.0");
    mount_driver(container, 13_000, 1, 9);
    told("AcceleratorUnsupportedByImage", "/kernels/sm_90a/");
}
