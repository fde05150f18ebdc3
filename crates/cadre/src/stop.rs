//! When a role process is asked to stop: SIGTERM, SIGINT, or the end of its standard input.
//!
//! The pipe on standard input is the life line of a child of `cadre up` (docs/adr/0007): it ends when the
//! parent closes it, and also when the parent is killed in any way, so no role outlives its cluster.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::{
    io::AsyncReadExt,
    signal::unix::{SignalKind, signal},
};

/// Completes at the first request to stop, with its name for the log. Signals are caught from the moment
/// of the call, not of the first poll.
pub(crate) fn requested(on_stdin_close: bool) -> Result<impl Future<Output = &'static str> + Send + 'static> {
    let mut term = signal(SignalKind::terminate()).context("catch SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("catch SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => "SIGTERM",
            _ = int.recv() => "SIGINT",
            () = stdin_closed(on_stdin_close) => "end of standard input",
        }
    })
}

/// Signals within this time are one request: `timeout` and process managers send one to the process and the same one
/// to its group. A person needs longer to mean it twice.
const ONE_REQUEST: Duration = Duration::from_millis(250);

/// Completes at the next request after the one that has just been taken.
pub(crate) async fn requested_again() -> Result<&'static str> {
    // What comes meanwhile is caught, by the handlers of the first request, and forgotten.
    tokio::time::sleep(ONE_REQUEST).await;
    Ok(requested(false)?.await)
}

/// Completes when standard input ends; never if it is not watched.
async fn stdin_closed(watched: bool) {
    if !watched {
        return std::future::pending().await;
    }
    let mut stdin = tokio::io::stdin();
    let mut sink = [0_u8; 256];
    // Bytes mean nothing here; an error is an end as well.
    while stdin.read(&mut sink).await.is_ok_and(|read| read > 0) {}
}
