//! Project tasks: `cargo xtask help`.
//!
//! What CI runs and what a developer runs are the same commands; each task is one module.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a developer's tool: it reads cargo's environment and its output is its purpose"
)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod ci;
mod command;
mod generate;
mod layers;
mod links;
mod metadata;
mod modules;
mod suites;
mod tools;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Project tasks")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Checks the crate graph against the layers of ARCHITECTURE.md, that every source file is declared, and
    /// that every page referred to exists.
    Layers,
    /// Writes the generated files (proto code, docs/cli.md, docs/metrics.md); --check only compares them.
    Generate {
        /// Fail instead of writing if a file would change.
        #[arg(long)]
        check: bool,
    },
    /// Runs every test of the workspace, end-to-end ones included, and installs what they need.
    Test {
        /// Run only the suites whose name contains this (`cadre-e2e`, `cadre-types`).
        #[arg(long)]
        only: Option<String>,
    },
    /// Runs everything that must hold before a change is merged.
    Ci,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().task {
        Task::Layers => layers::run(),
        Task::Generate { check } => generate::run(check),
        Task::Test { only } => suites::run(only.as_deref()),
        Task::Ci => ci::run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not the debug form: a backtrace of this tool says nothing about the task that failed.
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
