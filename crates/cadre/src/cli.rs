//! The command line. Every flag has one default and one line of documentation, and both end up in
//! docs/cli.md.

use anyhow::Result;
use clap::{Parser, Subcommand};

#[cfg(feature = "operator")]
use crate::reference::{self, ReferenceArgs};
use crate::{
    bench::{self, BenchArgs},
    chat::{self, ChatArgs},
    inspect::{self, InspectArgs},
    probe::{self, ProbeArgs},
    roles::{self, ExpertArgs, OperatorArgs, RouterArgs, WorkerArgs},
    runtime::block_on,
    soak::{self, SoakArgs},
    synth::{self, SynthArgs},
    up::{self, UpArgs},
};

/// Serves mixture-of-experts models of the DeepSeek-V3 architecture with experts in processes of their own.
#[derive(Debug, Parser)]
#[command(name = "cadre", version, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(Box<UpArgs>),
    Chat(ChatArgs),
    Inspect(InspectArgs),
    Synth(SynthArgs),
    Bench(BenchArgs),
    Soak(SoakArgs),
    Router(Box<RouterArgs>),
    Worker(Box<WorkerArgs>),
    Expert(Box<ExpertArgs>),
    Operator(Box<OperatorArgs>),
    Probe(ProbeArgs),
    #[cfg(feature = "operator")]
    #[command(hide = true)]
    Reference(ReferenceArgs),
}

impl Cli {
    /// Runs what was asked for.
    pub(crate) fn run(self) -> Result<()> {
        match self.command {
            Command::Up(args) => block_on(up::run(*args)),
            Command::Chat(args) => block_on(chat::run(args)),
            Command::Inspect(args) => inspect::run(&args),
            Command::Synth(args) => synth::run(args),
            Command::Bench(args) => bench::run(args),
            Command::Soak(args) => block_on(soak::run(args)),
            Command::Router(args) => block_on(roles::router(*args)),
            Command::Worker(args) => block_on(roles::worker(*args)),
            Command::Expert(args) => block_on(roles::expert(*args)),
            Command::Operator(args) => block_on(roles::operator(*args)),
            Command::Probe(args) => block_on(probe::run(args)),
            #[cfg(feature = "operator")]
            Command::Reference(args) => reference::run(&args),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn clap_finds_no_fault() {
        Cli::command().debug_assert();
    }

    /// Names of everything below a command that lacks documentation.
    fn undocumented(command: &clap::Command, path: &str) -> Vec<String> {
        let path = format!("{path} {}", command.get_name());
        let about = command.get_about().is_none().then(|| path.clone());
        let arguments = command
            .get_arguments()
            .filter(|argument| argument.get_help().is_none())
            .map(|argument| format!("{path} {}", argument.get_id()));
        let below = command.get_subcommands().flat_map(|command| undocumented(command, &path));
        about.into_iter().chain(arguments).chain(below).collect()
    }

    #[test]
    fn every_command_and_flag_is_documented() {
        assert_eq!(undocumented(&Cli::command(), ""), Vec::<String>::new());
    }
}
