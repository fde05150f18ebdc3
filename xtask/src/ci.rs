//! `cargo xtask ci`: every gate, cheapest first, each with the time it took.
//!
//! All gates run even when one fails: a change that is wrong in two ways is told both. The builds are three
//! (check for clippy, dev for everything that runs, rustdoc); all tests share the dev build, whose kernels are
//! optimised (Cargo.toml, `[profile.dev.package]`). What a Kubernetes of our own needs is built beside them, at the
//! lowest priority: where it is built already that takes a second.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use crate::{command, e2e, generate, interrupt, kernels, layers, metadata::Metadata, suites, tools};

type Gate = (&'static str, fn() -> Result<()>);

const GATES: [Gate; 8] = [
    ("fmt", fmt),
    ("layers", layers::run),
    ("clippy", clippy),
    ("generate --check", || generate::run(true, Some(&suites::cadre()?))),
    ("doc", doc),
    ("deny", deny),
    ("kernels", kernels::run),
    ("test", || suites::run(None)),
];

/// Runs all gates.
pub(crate) fn run() -> Result<()> {
    interrupt::watch()?;
    tools::components()?;
    // Ended with us; the gate `test` waits for it.
    let _beside = e2e::build_beside(&suites::logs(&Metadata::load()?))?;
    let outcomes: Vec<(&str, Result<()>, Duration)> = GATES
        .iter()
        .map(|(name, gate)| {
            println!("\n== {name}");
            let begun = Instant::now();
            let outcome = interrupt::check().and_then(|()| gate());
            if let Err(error) = &outcome {
                eprintln!("{name}: {error:#}");
            }
            (*name, outcome, begun.elapsed())
        })
        .collect();
    println!();
    for (name, outcome, took) in &outcomes {
        let verdict = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("{name:<18} {verdict:<7} {:>6.1} s", took.as_secs_f64());
    }
    let failed: Vec<&str> =
        outcomes.iter().filter(|(_, outcome, _)| outcome.is_err()).map(|(name, ..)| *name).collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn fmt() -> Result<()> {
    command::run(command::cargo().args(["fmt", "--all", "--check"]))
}

fn clippy() -> Result<()> {
    // What users build first is another program than what the tests build: without the operator.
    for features in [&command::FEATURES[..], &[]] {
        command::run(
            command::cargo()
                .args(["clippy", "--workspace", "--all-targets", "--locked"])
                .args(features)
                .args(["--", "-D", "warnings"]),
        )?;
    }
    Ok(())
}

/// With private items, for the people who work here; a link to one is therefore no fault.
fn doc() -> Result<()> {
    command::run(
        command::cargo()
            .args(["doc", "--workspace", "--no-deps", "--document-private-items", "--locked"])
            .args(command::FEATURES)
            .env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links"),
    )
}

fn deny() -> Result<()> {
    let deny = tools::cargo_deny()?;
    command::run(Command::new(&deny).args(["--workspace", "check", "licenses", "bans", "sources"]))?;
    // The database of advisories is on a forge, which a machine behind a package mirror does not reach.
    match command::run(Command::new(&deny).args(["--workspace", "fetch", "db"])) {
        Ok(()) => {
            command::run(Command::new(&deny).args(["--workspace", "check", "--disable-fetch", "advisories"]))
        }
        Err(error) => {
            println!("NOTICE: advisories NOT CHECKED: the RustSec database could not be fetched ({error:#})");
            Ok(())
        }
    }
}
