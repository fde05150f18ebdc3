//! The shard's gRPC server.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use cadre_dispatch::{IoThread, tuning};
use cadre_net::IntakeOptions;
use cadre_shard::AnyShard;
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use tonic::service::Routes;

/// Bound on writing the last answers and closing connections. Workers keep their streams open for ever, so
/// this always runs out while they live.
const CLOSE_BOUND: Duration = Duration::from_millis(300);

/// The gRPC server, on the runtime that the compute thread drives while it waits for frames.
pub(super) struct GrpcServer {
    task: JoinHandle<()>,
    close: Option<oneshot::Sender<()>>,
    shard: Arc<dyn AnyShard>,
    _io: IoThread,
}

impl GrpcServer {
    pub(super) fn start(
        io: IoThread,
        services: Routes,
        listener: TcpListener,
        intake: IntakeOptions,
        shard: Arc<dyn AnyShard>,
    ) -> Result<Self> {
        // A socket belongs to the runtime in which it was made; this one has been bound before.
        let listener = listener.into_std().context("hand the listener over")?;
        let (close, closed) = oneshot::channel::<()>();
        let task = io.handle().runtime().spawn(async move {
            let listener = match TcpListener::from_std(listener) {
                Ok(listener) => listener,
                Err(error) => {
                    tracing::error!(%error, "the listener could not be taken over");
                    return;
                }
            };
            let until = async move {
                // Resolves on the signal and when the shard is dropped.
                let _ = closed.await;
            };
            tuning::serve("shard", listener, services, intake, until).await;
        });
        Ok(Self { task, close: Some(close), shard, _io: io })
    }

    /// Closes it, bounded.
    pub(super) async fn stop(mut self) {
        self.close.take();
        // Workers keep their streams open; what is left then is ended by `drop`.
        let _ = tokio::time::timeout(CLOSE_BOUND, &mut self.task).await;
    }
}

impl Drop for GrpcServer {
    fn drop(&mut self) {
        self.task.abort();
        // Open streams hold the shard, the shard's thread the runtime, and the runtime the streams.
        self.shard.stop();
    }
}
