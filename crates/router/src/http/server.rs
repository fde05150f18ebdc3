//! The accept loop of the HTTP front door: bounded connections, a bounded wait for a request's head,
//! HTTP/1.1 and HTTP/2 on one port, graceful end. axum's own `serve` has none of the bounds.

use std::{sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::JoinSet,
};

use crate::error::RouterError;

/// Open connections. Beyond it clients wait in the kernel's queue. A connection costs some 20 KiB.
const MAX_CONNECTIONS: usize = 4096;

/// A request's head must arrive within this; it also ends idle connections.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);

/// Pause after a failed accept (out of file descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `stopped` turns true and the connections have finished their requests.
pub(crate) async fn serve(
    listener: TcpListener,
    app: Router,
    mut stopped: watch::Receiver<bool>,
) -> Result<(), RouterError> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(Some(HEAD_TIMEOUT));
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    loop {
        let accept = async {
            let permit = Arc::clone(&room).acquire_owned().await;
            (permit, listener.accept().await)
        };
        tokio::select! {
            // The sender outlives the servers or the process is ending anyway.
            () = async { drop(stopped.wait_for(|stop| *stop).await) } => break,
            Some(_) = connections.join_next() => {}
            (permit, accepted) = accept => match accepted {
                Ok((stream, _peer)) => {
                    // Only latency is lost if this fails.
                    let _ = stream.set_nodelay(true);
                    let service = TowerToHyperService::new(app.clone());
                    let connection = builder.serve_connection(TokioIo::new(stream), service);
                    let connection = graceful.watch(connection.into_owned());
                    connections.spawn(async move {
                        if let Err(error) = connection.await {
                            tracing::debug!(%error, "HTTP connection ended");
                        }
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "HTTP accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}
