//! The cadre binary: every role, `up`, `chat`, `inspect`, `synth`, `bench`, `soak`, `probe`.
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
mod probe;
mod progress;
#[cfg(feature = "operator")]
mod reference;
mod roles;
mod runtime;
mod soak;
mod stop;
mod synth;
mod up;
mod weights;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[allow(
    clippy::disallowed_methods,
    reason = "this is main, and a command line that cannot be read has no flags"
)]
fn main() -> ExitCode {
    let cli = cli::Cli::try_parse().unwrap_or_else(|error| {
        // In a pod nobody reads standard error; the variable is that of `--termination-log`.
        if error.use_stderr()
            && let Some(log) = std::env::var_os(roles::TERMINATION_LOG_ENV)
        {
            roles::of_usage(log.as_ref(), &error);
        }
        error.exit()
    });
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(&format!("cadre: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
