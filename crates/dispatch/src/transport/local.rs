//! Shards in this process: a link is the service itself. With an inline shard the frame is computed on
//! the dispatching thread, so an in-process engine needs no thread hop.

use std::{collections::HashMap, fmt, sync::Arc};

use cadre_types::ShardIndex;
use parking_lot::Mutex;

use super::{Connect, DispatchTransport, Reply, ShardService};
use crate::frame::{DispatchFrame, LinkError};

/// A link to a shard in this process.
struct LocalTransport {
    services: Services,
    address: String,
}

/// Services by address, shared by a connector and its links.
type Services = Arc<Mutex<HashMap<String, Arc<dyn ShardService>>>>;

/// Connects to services registered in this process. Addresses are plain names.
#[derive(Clone, Default)]
pub struct LocalConnector {
    services: Services,
}

impl LocalConnector {
    /// Makes a service reachable under a name; replaces a former one.
    pub fn register(&self, address: impl Into<String>, service: Arc<dyn ShardService>) {
        self.services.lock().insert(address.into(), service);
    }

    /// Makes a name unreachable.
    pub fn unregister(&self, address: &str) {
        self.services.lock().remove(address);
    }
}

impl fmt::Debug for LocalConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.services.lock().keys()).finish()
    }
}

impl Connect for LocalConnector {
    /// Local links do not break by themselves, so `changed` is never called; whoever (un)registers
    /// a service tells the dispatcher by a view.
    fn connect(
        &self,
        _shard: ShardIndex,
        address: &str,
        _changed: Arc<dyn Fn() + Send + Sync>,
    ) -> Arc<dyn DispatchTransport> {
        Arc::new(LocalTransport { services: self.services.clone(), address: address.to_owned() })
    }
}

impl LocalTransport {
    fn service(&self) -> Option<Arc<dyn ShardService>> {
        self.services.lock().get(&self.address).cloned()
    }
}

impl DispatchTransport for LocalTransport {
    fn send(&self, frame: DispatchFrame, reply: Reply) {
        // The lock is not held while an inline shard computes.
        match self.service() {
            Some(service) => service.submit(frame, reply),
            None => reply.send(Err(LinkError::Disconnected(format!(
                "nothing is registered as {:?} in this process",
                self.address
            )))),
        }
    }

    fn is_up(&self) -> bool {
        self.services.lock().contains_key(&self.address)
    }
}
