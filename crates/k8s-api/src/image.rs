//! The name of the image, the one place where it stands.
//!
//! A file of its own because `xtask` includes it by path: the task that writes the image must not wait for
//! the Kubernetes types to compile. Hence nothing but constants here.

/// Repository of the image that `cargo xtask image` writes.
pub const IMAGE_REPOSITORY: &str = "ghcr.io/cadre-dev/cadre";
/// The image that `cargo xtask image` writes and the chart installs.
pub const IMAGE: &str = concat!("ghcr.io/cadre-dev/cadre:", env!("CARGO_PKG_VERSION"));
/// The image for nodes with NVIDIA GPUs, which `cargo xtask image --cuda` writes.
pub const IMAGE_CUDA: &str = concat!("ghcr.io/cadre-dev/cadre:", env!("CARGO_PKG_VERSION"), "-cuda");
