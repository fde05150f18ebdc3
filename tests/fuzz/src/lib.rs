//! Fuzz targets: each takes any bytes, makes of them what a peer, a client or a file could say, hands it to the code
//! that reads it in production, and fails by panicking where a promise is broken.
//!
//! [`TARGETS`] is the table. `tests/short.rs` runs each over its committed seeds (`seeds/NAME/`) and a fixed number
//! of changed ones, in seconds; `cargo xtask fuzz NAME --seconds 600` runs the same functions under libFuzzer, guided
//! by coverage. What either finds is committed as a seed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a target fails by panicking")]

pub mod change;
pub mod draw;
mod target;

/// A function that must stand any bytes.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and its seeds' folder.
    pub name: &'static str,
    /// What it reads.
    pub about: &'static str,
    /// Runs it.
    pub run: fn(&[u8]),
    /// Longest input that is worth while.
    pub longest: usize,
    /// Changed seeds of a short run: as many as a few seconds of an unoptimised build take.
    pub short: usize,
}

/// Every target.
pub const TARGETS: [Target; 8] = [
    Target {
        name: "frames",
        about: "frames of the dispatch wire, to a shard and back",
        run: target::frames::run,
        longest: 4096,
        short: 10_000,
    },
    Target {
        name: "kv",
        about: "the messages of a KV hand-off, to a decode worker's service",
        run: target::kv::run,
        longest: 4096,
        short: 2000,
    },
    Target {
        name: "reports",
        about: "reports of members and views of operators, to the coordinator",
        run: target::reports::run,
        longest: 4096,
        short: 20_000,
    },
    Target {
        name: "header",
        about: "the header of a safetensors file",
        run: target::header::run,
        longest: 8192,
        short: 20_000,
    },
    Target {
        name: "checkpoint",
        about: "the files of a checkpoint: configuration, index, tokenizer, headers",
        run: target::checkpoint::run,
        longest: 16_384,
        short: 300,
    },
    Target {
        name: "http",
        about: "bodies of the OpenAI-compatible API",
        run: target::http::run,
        longest: 8192,
        short: 2000,
    },
    Target {
        name: "templates",
        about: "chat templates, compiled and rendered",
        run: target::templates::run,
        longest: 2048,
        short: 10_000,
    },
    Target {
        name: "specs",
        about: "manifests of models, through the rules of the API to the plan",
        run: target::specs::run,
        longest: 4096,
        short: 300,
    },
];

/// The bundled checkpoint.
fn pocket() -> std::path::PathBuf {
    let manifest = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).expect("tests/fuzz lies two folders below the root").join("models/pocket")
}

/// The target of a name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
