#!/usr/bin/env bash
# cudarc with dynamic loading: `CudaContext::new` returns a `Result`, but on a machine without NVIDIA's driver it panics
# while it looks for libcuda, so `match` and `?` never see an error, and under `panic = "abort"` the process is gone.
# `driver::sys::is_culib_present()` answers without a panic and has to be asked first.
#
# Seen with cudarc 0.19.10 (crates.io; features driver, dynamic-loading, cuda-13000), 2026-11-28:
#   is_culib_present: false
#   CudaContext::new: panicked
# On a machine with a driver there is nothing to see: the script says so and ends. Needs cargo; no GPU.
set -euo pipefail
if ldconfig -p | grep -q 'libcuda\.so'; then
    echo "there is a driver here: nothing to show"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir src
cat > Cargo.toml <<'TOML'
[package]
name = "probe"
version = "0.1.0"
edition = "2021"
[dependencies]
cudarc = { version = "=0.19.10", default-features = false, features = ["std", "driver", "dynamic-loading", "cuda-13000"] }
TOML
cat > src/main.rs <<'RUST'
fn main() {
    println!("is_culib_present: {}", unsafe { cudarc::driver::sys::is_culib_present() });
    std::panic::set_hook(Box::new(|_| {}));
    match std::panic::catch_unwind(|| cudarc::driver::CudaContext::new(0).map(|_| ())) {
        Ok(Ok(())) => println!("CudaContext::new: a context"),
        Ok(Err(error)) => println!("CudaContext::new: error {error}"),
        Err(_) => println!("CudaContext::new: panicked"),
    }
}
RUST
cargo run -q > seen
cat seen
diff - seen <<'WANTED'
is_culib_present: false
CudaContext::new: panicked
WANTED
