//! How scripted shards are reached: in this process, or each behind a gRPC server with its own runtime,
//! which dies as a process dies.

use std::{net::TcpListener, sync::Arc};

use cadre_dispatch::{Connect, ExpertServer, GrpcConnector, IoThread, LocalConnector, ShardService, tuning};
use cadre_types::ShardIndex;
use tokio::runtime::Runtime;

use super::scripted::{Scripted, shard_name};

/// A way to reach shards.
pub(crate) trait Rig: Send + Sync + 'static {
    /// Whether the dispatcher learns only from a view that a shard is reachable again.
    const TOLD_BY_VIEWS: bool;
    fn new() -> Self;
    fn connector(&self) -> Arc<dyn Connect>;
    /// Makes a shard reachable and returns where; at `address`, if given.
    fn start(&mut self, shard: ShardIndex, service: Arc<Scripted>, address: Option<String>) -> String;
    /// Cuts it off; frames inside are lost.
    fn stop(&mut self, shard: ShardIndex);
}

pub(crate) struct LocalRig {
    connector: LocalConnector,
    started: Vec<(ShardIndex, String, Arc<Scripted>)>,
}

impl Rig for LocalRig {
    const TOLD_BY_VIEWS: bool = true;

    fn new() -> Self {
        Self { connector: LocalConnector::default(), started: Vec::new() }
    }

    fn connector(&self) -> Arc<dyn Connect> {
        Arc::new(self.connector.clone())
    }

    fn start(&mut self, shard: ShardIndex, service: Arc<Scripted>, address: Option<String>) -> String {
        let address = address.unwrap_or_else(|| format!("{}-{}", shard_name(shard), self.started.len()));
        self.connector.register(address.clone(), service.clone() as Arc<dyn ShardService>);
        self.started.push((shard, address.clone(), service));
        address
    }

    fn stop(&mut self, shard: ShardIndex) {
        for (_, address, service) in self.started.iter().filter(|(other, ..)| *other == shard) {
            self.connector.unregister(address);
            service.lose();
        }
    }
}

pub(crate) struct GrpcRig {
    io: IoThread,
    servers: Vec<(ShardIndex, Runtime)>,
}

impl Rig for GrpcRig {
    const TOLD_BY_VIEWS: bool = false;

    fn new() -> Self {
        Self { io: IoThread::start("test-io").unwrap(), servers: Vec::new() }
    }

    fn connector(&self) -> Arc<dyn Connect> {
        Arc::new(GrpcConnector::new(self.io.handle()))
    }

    fn start(&mut self, shard: ShardIndex, service: Arc<Scripted>, address: Option<String>) -> String {
        let listener = TcpListener::bind(address.as_deref().unwrap_or("127.0.0.1:0")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let serving = tuning::server().add_service(ExpertServer::new(service).into_service());
            serving.serve_with_incoming(tuning::incoming(listener)).await.unwrap();
        });
        self.servers.push((shard, runtime));
        address
    }

    fn stop(&mut self, shard: ShardIndex) {
        while let Some(at) = self.servers.iter().position(|(other, _)| *other == shard) {
            self.servers.swap_remove(at).1.shutdown_timeout(std::time::Duration::from_secs(10));
        }
    }
}

impl Drop for GrpcRig {
    fn drop(&mut self) {
        for (_, runtime) in self.servers.drain(..) {
            runtime.shutdown_background();
        }
    }
}
