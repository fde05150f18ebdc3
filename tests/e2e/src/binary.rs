//! The binary under test.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

/// The repository root.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).expect("tests/e2e lies two folders below the root").to_path_buf()
}

/// The bundled checkpoint.
pub fn pocket() -> PathBuf {
    root().join("models/pocket")
}

/// `cadre`, as `cargo xtask test` built it (`CADRE_BIN`), or else built now in the same profile.
pub fn cadre() -> &'static Path {
    static BINARY: LazyLock<PathBuf> = LazyLock::new(|| match std::env::var_os("CADRE_BIN") {
        Some(path) => path.into(),
        None => build(),
    });
    &BINARY
}

fn build() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "build",
            "--package",
            "cadre",
            "--bin",
            "cadre",
            "--features",
            "operator",
            "--message-format=json",
        ])
        .current_dir(root())
        .output()
        .expect("cargo starts");
    assert!(output.status.success(), "cargo build: {}", String::from_utf8_lossy(&output.stderr));
    let executable = output
        .stdout
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from));
    executable.expect("cargo build names the executable")
}
