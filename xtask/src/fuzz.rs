//! `cargo xtask fuzz NAME --seconds N`: a target of tests/fuzz under libFuzzer, guided by coverage.
//!
//! Stable Rust suffices: the counters come from LLVM's own pass, and what a sanitizer would find in safe code the
//! checks of the profile find (overflows, assertions, indices). The build has a folder of its own, because every
//! crate is compiled with counters. New inputs are kept beside it and go on being used; a finding is written to
//! `findings/` there and belongs, cut down (`--minimize FILE`), into tests/fuzz/seeds/NAME with its fix.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::{command, metadata::Metadata};

/// Counters at every edge, what they stand for, and the operands of comparisons.
const COVERAGE: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=16 --cfg fuzzing";

/// An input that takes longer than this, in seconds, is a finding.
const SLOW_S: u32 = 60;

/// A process that takes more than this, in MiB, is a finding.
const MEMORY_MIB: u32 = 4096;

/// What to run, and how.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The target: a folder of tests/fuzz/seeds.
    name: String,
    /// How long.
    #[arg(long, default_value_t = 600)]
    seconds: u32,
    /// Cut this finding down to a smaller one instead.
    #[arg(long, value_name = "FILE")]
    minimize: Option<PathBuf>,
}

/// Builds and runs one target.
pub(crate) fn run(options: &Options) -> Result<()> {
    let root = command::root()?;
    let seeds = root.join("tests/fuzz/seeds").join(&options.name);
    ensure!(
        seeds.is_dir(),
        "there is no target {:?}: targets are the folders of tests/fuzz/seeds",
        options.name
    );
    let folder = Metadata::load()?.target_directory.join("fuzz");
    let (corpus, findings) = (folder.join("corpus").join(&options.name), folder.join("findings"));
    for folder in [&corpus, &findings] {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let binary = build(&folder)?;
    let mut fuzz = Command::new(binary);
    fuzz.env("CADRE_FUZZ_TARGET", &options.name)
        .arg(format!("-max_total_time={}", options.seconds))
        .arg(format!("-timeout={SLOW_S}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-artifact_prefix={}/{}-", findings.display(), options.name))
        .arg("-print_final_stats=1");
    match &options.minimize {
        Some(file) => fuzz.arg("-minimize_crash=1").arg(std::path::absolute(file)?),
        None => fuzz.arg("-max_len=16384").arg(&corpus).arg(&seeds),
    };
    command::run(&mut fuzz)
}

#[derive(Deserialize)]
struct Message {
    reason: String,
    executable: Option<PathBuf>,
}

fn build(folder: &Path) -> Result<PathBuf> {
    let text = command::capture(
        command::cargo()
            .args(["build", "--package", "cadre-fuzz", "--bin", "fuzz", "--features", "guided", "--locked"])
            // Counters are for what runs, not for build scripts and macros.
            .args(["--target", HOST, "--message-format=json-render-diagnostics"])
            .env("CARGO_TARGET_DIR", folder)
            .env("RUSTFLAGS", COVERAGE),
    )?;
    let messages = text.split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"{"));
    for line in messages {
        let message: Message = serde_json::from_slice(line).context("read a message of cargo build")?;
        if message.reason == "compiler-artifact"
            && let Some(executable) = message.executable
        {
            return Ok(executable);
        }
    }
    anyhow::bail!("the build made no executable")
}

/// The platform that cadre runs on.
const HOST: &str = "x86_64-unknown-linux-gnu";
