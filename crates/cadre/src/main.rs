//! The cadre binary: every role, `up`, `chat`, `inspect`, `synth`, `bench`.
//!
//! Configuration enters here, as flags, and nowhere else: nothing below reads the environment.

use std::process::ExitCode;

use clap::Parser;

mod bench;
mod chat;
mod cli;
mod client;
mod http;
mod inspect;
mod output;
mod progress;
mod reference;
mod roles;
mod runtime;
mod stop;
mod synth;
mod up;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(&format!("cadre: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
