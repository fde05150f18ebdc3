//! Shards in this process: a link is the service itself. With an inline shard the frame is computed on
//! the dispatching thread, so an in-process engine needs no thread hop.
//!
//! A process that holds a worker and shards uses [`LocalConnector`] for the addresses of its own shards, and the
//! connector given as [`LocalConnector::or`] for all others.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Weak},
};

use cadre_types::ShardIndex;
use parking_lot::Mutex;

use super::{Connect, DispatchTransport, Drive, Reply, ShardService};
use crate::frame::{DispatchFrame, LinkError};

/// A link to a shard in this process.
struct LocalTransport {
    services: Services,
    address: String,
    /// Keeps the entry of [`Place::watchers`] alive.
    _changed: Arc<dyn Fn() + Send + Sync>,
}

/// What is known of an address of this process.
#[derive(Default)]
struct Place {
    /// `None` while the shard is gone: its address stays one of this process.
    service: Option<Arc<dyn ShardService>>,
    /// Links' callbacks.
    watchers: Vec<Weak<dyn Fn() + Send + Sync>>,
}

/// Places by address, shared by a connector and its links.
type Services = Arc<Mutex<HashMap<String, Place>>>;

/// Connects to services registered in this process. Addresses are plain names.
#[derive(Clone, Default)]
pub struct LocalConnector {
    services: Services,
    others: Option<Arc<dyn Connect>>,
}

impl LocalConnector {
    /// Makes a service reachable under a name; replaces a former one.
    pub fn register(&self, address: impl Into<String>, service: Arc<dyn ShardService>) {
        self.put(address.into(), Some(service));
    }

    /// Makes a name unreachable until something is registered under it again.
    pub fn unregister(&self, address: &str) {
        self.put(address.to_owned(), None);
    }

    /// The same, with addresses that were never registered left to another connector.
    #[must_use]
    pub fn or(&self, others: Arc<dyn Connect>) -> Self {
        Self { services: Arc::clone(&self.services), others: Some(others) }
    }

    fn put(&self, address: String, service: Option<Arc<dyn ShardService>>) {
        let mut places = self.services.lock();
        let place = places.entry(address).or_default();
        let before = std::mem::replace(&mut place.service, service);
        let watchers: Vec<_> = place.watchers.iter().filter_map(Weak::upgrade).collect();
        place.watchers.retain(|watcher| watcher.strong_count() > 0);
        drop(places);
        // Outside the lock: the last owner of a shard ends its thread, and a callback may do anything.
        drop(before);
        watchers.iter().for_each(|changed| changed());
    }
}

impl fmt::Debug for LocalConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.services.lock().keys()).finish()
    }
}

impl Connect for LocalConnector {
    /// A link to a service of this process goes up and down as that is registered and unregistered.
    fn connect(
        &self,
        shard: ShardIndex,
        address: &str,
        changed: Arc<dyn Fn() + Send + Sync>,
    ) -> Arc<dyn DispatchTransport> {
        let mut places = self.services.lock();
        if let Some(others) = &self.others
            && !places.contains_key(address)
        {
            drop(places);
            return others.connect(shard, address, changed);
        }
        let place = places.entry(address.to_owned()).or_default();
        place.watchers.retain(|watcher| watcher.strong_count() > 0);
        place.watchers.push(Arc::downgrade(&changed));
        let services = Arc::clone(&self.services);
        Arc::new(LocalTransport { services, address: address.to_owned(), _changed: changed })
    }

    fn driver(&self) -> Option<Arc<dyn Drive>> {
        self.others.as_ref().and_then(|others| others.driver())
    }
}

impl LocalTransport {
    fn service(&self) -> Option<Arc<dyn ShardService>> {
        self.services.lock().get(&self.address).and_then(|place| place.service.clone())
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
        self.service().is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    struct Nothing;

    impl ShardService for Nothing {
        fn submit(&self, _frame: DispatchFrame, _reply: Reply) {}
    }

    /// Knows every address and is never up.
    struct Far;

    impl DispatchTransport for Far {
        fn send(&self, _frame: DispatchFrame, _reply: Reply) {}

        fn is_up(&self) -> bool {
            false
        }
    }

    #[derive(Default)]
    struct Elsewhere(AtomicUsize);

    impl Connect for Elsewhere {
        fn connect(
            &self,
            _shard: ShardIndex,
            _address: &str,
            _changed: Arc<dyn Fn() + Send + Sync>,
        ) -> Arc<dyn DispatchTransport> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Arc::new(Far)
        }
    }

    #[test]
    fn own_addresses_are_links_of_this_process_and_tell_when_they_come_and_go() {
        let elsewhere = Arc::new(Elsewhere::default());
        let local = LocalConnector::default();
        let connector = local.or(elsewhere.clone());
        local.register("ours", Arc::new(Nothing));
        let told = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&told);
        let changed: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let ours = connector.connect(ShardIndex(0), "ours", Arc::clone(&changed));
        assert!(ours.is_up());
        assert!(!connector.connect(ShardIndex(1), "theirs", changed).is_up());
        assert_eq!(elsewhere.0.load(Ordering::Relaxed), 1);

        local.unregister("ours");
        assert!(!ours.is_up());
        assert_eq!(told.load(Ordering::Relaxed), 1);
        // A link that is made while the shard is away is one of this process too.
        let later = connector.connect(ShardIndex(0), "ours", Arc::new(|| {}));
        assert_eq!(elsewhere.0.load(Ordering::Relaxed), 1);
        local.register("ours", Arc::new(Nothing));
        assert!(ours.is_up() && later.is_up());
        assert_eq!(told.load(Ordering::Relaxed), 2);
        drop(ours);
        local.unregister("ours");
        assert_eq!(told.load(Ordering::Relaxed), 2, "a link that is gone is told nothing");
    }
}
