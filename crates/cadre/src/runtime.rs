//! The async runtime of the commands that serve or talk; the others (inspect, synth, kernels) run without.

use std::{future::Future, time::Duration};

use anyhow::{Context, Result};

/// A thread that still reads standard input must not keep the process.
const LEFTOVERS: Duration = Duration::from_millis(100);

/// Runs a command's future to its end.
pub(crate) fn block_on(command: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("start the async runtime")?;
    let outcome = runtime.block_on(command);
    runtime.shutdown_timeout(LEFTOVERS);
    outcome
}
