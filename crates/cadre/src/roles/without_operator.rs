//! `cadre operator` in a build without it: says how to get one.

use anyhow::{Result, bail};
use clap::Args;

/// Makes clusters of MoEModel objects and keeps them as specified (not in this build: `--features operator`).
#[derive(Args, Debug)]
#[command(disable_help_flag = true)]
pub(crate) struct OperatorArgs {
    /// Whatever the operator would take.
    #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Refuses.
pub(crate) async fn operator(args: OperatorArgs) -> Result<()> {
    bail!(
        "this cadre was built without the operator: `cargo run --release --features operator -- operator {}`, or the image \
         of `cargo xtask image`",
        args.arguments.join(" ")
    )
}
