//! The accept loop.

use std::{future::Future, io, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioTimer},
    server::conn::auto,
};
use tokio::{
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};

use crate::{
    connection::{Port, attend},
    descriptors,
    intake::Intake,
    options::{Protocol, ServerOptions},
    own_errors::OwnErrors,
};

/// Pauses after accepts that failed for want of something (descriptors, memory): they double from the first
/// to the last, so that neither the loop spins nor a port that recovers waits long.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Largest head of an HTTP/1.1 request; beyond it the answer is 431.
const HEAD_BYTES: usize = 64 << 10;

/// Serves until `stop` resolves and the connections have finished their requests; dropped, it cuts them.
/// Nothing that a peer does ends it.
pub async fn serve(
    listener: TcpListener,
    routes: Router,
    options: ServerOptions,
    stop: impl Future<Output = ()> + Send,
) {
    let bound = descriptors::share(options.max_connections);
    let room = Arc::new(Semaphore::new(bound));
    let (full, watch_full) = watch::channel(false);
    let (stopping, stopped) = watch::channel(false);
    let port = Port {
        routes,
        builder: Arc::new(builder(&options)),
        intake: Intake::new(options.intake.clone()),
        options: Arc::new(options),
        full: watch_full,
        stopped,
    };
    let mut connections = JoinSet::new();
    let mut pause = Pause::default();
    let mut stop = pin!(stop);
    loop {
        let accept = async {
            let permit = take(&room, &full, port.options.port, bound).await;
            (permit, listener.accept().await)
        };
        tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next() => {}
            (permit, accepted) = accept => match accepted {
                Ok((stream, _)) => {
                    pause = Pause::default();
                    // Only latency is lost if this fails.
                    let _ = stream.set_nodelay(true);
                    let attended = attend(port.clone(), OwnErrors::new(stream, port.options.own_error.clone()));
                    connections.spawn(async move {
                        attended.await;
                        drop(permit);
                    });
                }
                Err(error) if of_the_connection(&error) => {
                    tracing::debug!(port = port.options.port, %error, "a connection ended before it was accepted");
                }
                Err(error) => {
                    let after = pause.next();
                    if pause.is_news() {
                        let open = connections.len();
                        tracing::warn!(port = port.options.port, %error, open, "connections are not accepted");
                    }
                    tokio::select! {
                        () = &mut stop => break,
                        () = tokio::time::sleep(after) => {}
                    }
                }
            }
        }
    }
    drop(listener);
    stopping.send_replace(true);
    while connections.join_next().await.is_some() {}
}

/// Room for one more connection. While there is none, the port counts as full.
async fn take(
    room: &Arc<Semaphore>,
    full: &watch::Sender<bool>,
    port: &'static str,
    bound: usize,
) -> Option<OwnedSemaphorePermit> {
    let set = |now: bool| full.send_if_modified(|full| std::mem::replace(full, now) != now);
    if let Ok(permit) = Arc::clone(room).try_acquire_owned() {
        set(false);
        return Some(permit);
    }
    if set(true) {
        tracing::warn!(
            port,
            connections = bound,
            "the port is full: connections that ask nothing are closed"
        );
    }
    // The semaphore is never closed.
    Arc::clone(room).acquire_owned().await.ok()
}

/// Whether a failed accept concerns the one connection and not the process.
fn of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted, TimedOut};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted | TimedOut)
}

/// Pauses of an accept loop.
#[derive(Debug, Default)]
struct Pause {
    failures: u32,
}

impl Pause {
    fn next(&mut self) -> Duration {
        let doubled = PAUSES.0.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        doubled.min(PAUSES.1)
    }

    /// The first failure of a row, and about every minute of it.
    fn is_news(&self) -> bool {
        self.failures % 64 == 1
    }
}

fn builder(options: &ServerOptions) -> auto::Builder<TokioExecutor> {
    let http2 = &options.http2;
    let mut builder = auto::Builder::new(TokioExecutor::new());
    // The time of a head is bounded with that of silence (`connection`).
    builder.http1().timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(HEAD_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(http2.stream_window_bytes)
        .initial_connection_window_size(http2.connection_window_bytes)
        .max_frame_size(http2.frame_bytes)
        .max_concurrent_streams(http2.max_streams)
        .keep_alive_interval(http2.ping_interval)
        .keep_alive_timeout(http2.ping_timeout);
    match options.protocol {
        Protocol::Http2 => builder.http2_only(),
        Protocol::Any => builder,
    }
}

#[cfg(test)]
mod tests;
