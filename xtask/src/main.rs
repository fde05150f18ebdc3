//! Project tasks: `cargo xtask help`.
//!
//! What CI runs and what a developer runs are the same commands; each task is one module.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a developer's tool: it reads cargo's environment and its output is its purpose"
)]

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

mod bench_operator;
mod ci;
mod cluster;
mod command;
mod e2e;
mod figures;
mod fuzz;
mod generate;
mod image;
mod interrupt;
mod kernels;
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
    /// Writes the generated files (proto code, reference pages, definitions and rules of the charts, versions); --check
    /// only compares them.
    Generate {
        /// Fail instead of writing if a file would change.
        #[arg(long)]
        check: bool,
    },
    /// Runs every test of the workspace, end-to-end ones included, and installs what they need.
    Test {
        /// Run only the suites whose name contains this (`cadre-types`, `cadre-e2e/`, `cadre-e2e-k8s`).
        #[arg(long)]
        only: Option<String>,
    },
    /// Runs the tests that need a Kubernetes cluster, on one of their own or on the one that KUBECONFIG names.
    E2e {
        /// Run only the suites whose name contains this.
        #[arg(long)]
        only: Option<String>,
        /// Leave the cluster running, to look at it; its name is printed.
        #[arg(long)]
        keep: bool,
    },
    /// Measures the operator with many pods, on a control plane of its own with simulated nodes.
    BenchOperator {
        /// Measure this `cadre` instead of building one in release mode.
        #[arg(long)]
        binary: Option<PathBuf>,
    },
    /// Puts what the last runs of e2e and bench-operator measured into docs/kubernetes-figures.md.
    Figures,
    /// Starts and ends a real Kubernetes on this machine.
    #[command(subcommand)]
    Cluster(cluster::Task),
    /// Writes the container image as an OCI tar and prints its path last.
    Image {
        /// Where to write it (default: image/cadre-VERSION.tar in the target folder, cadre-VERSION-cuda.tar with --cuda).
        #[arg(long)]
        out: Option<PathBuf>,
        /// Take this executable instead of building one: a static one, or with --cuda a dynamic one.
        #[arg(long)]
        binary: Option<PathBuf>,
        /// The image for NVIDIA GPUs: with kernels, for a driver that the node's runtime brings.
        #[arg(long)]
        cuda: bool,
    },
    /// Compiles the CUDA kernels (nvcc is fetched on first use) and judges their registers and memory.
    Kernels {
        /// Also build the kernels' own test programs (tests/gpu/kernels), which run where a card is.
        #[arg(long)]
        tests: bool,
    },
    /// Runs a fuzz target for a while, guided by coverage (CONTRIBUTING.md).
    Fuzz(fuzz::Options),
    /// Runs everything that must hold before a change is merged.
    Ci,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().task {
        Task::Layers => layers::run(),
        Task::Generate { check } => generate::run(check, None),
        Task::Test { only } => suites::run(only.as_deref()),
        Task::E2e { only, keep } => suites::run_e2e(only.as_deref(), keep),
        Task::BenchOperator { binary } => bench_operator::run(binary),
        Task::Figures => figures::run(),
        Task::Cluster(task) => cluster::run(&task),
        Task::Image { out, binary, cuda } => {
            let variant = if cuda { image::Variant::Cuda } else { image::Variant::Cpu };
            image::run(variant, out.as_deref(), binary.as_deref())
        }
        Task::Kernels { tests: false } => kernels::run(),
        Task::Kernels { tests: true } => kernels::run_with_tests(),
        Task::Fuzz(options) => fuzz::run(&options),
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
