//! When a role process is asked to stop: SIGTERM, SIGINT, or the end of its standard input.
//!
//! The pipe on standard input is the life line of a child of `cadre up` (docs/adr/0007): it ends when the
//! parent closes it, and also when the parent is killed in any way, so no role outlives its cluster.

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
