//! The watches: each feeds a [`Store`] and tells which models a change concerns.
//!
//! kube's `watcher` lists, watches from there, and lists again when the server says 410 Gone. What it does not do is
//! done here: objects of a list are collected and replace the store as a whole (so a DELETE that was lost while no
//! watch was up is repaired), and an error is followed by a back-off which only a success ends. (The start of a list is
//! an item of the stream too; a back-off that it ended would never grow while lists fail.)

use std::{fmt::Debug, sync::Arc, time::Duration};

use cadre_k8s_api::names::label;
use cadre_telemetry::{Counter, Readiness};
use futures::{Stream, StreamExt};
use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{Event as CoreEvent, Node, Pod},
};
use kube::{
    Api, Client, Resource, ResourceExt,
    runtime::watcher::{self, Event, watcher},
};
use serde::de::DeserializeOwned;
use tokio::{sync::watch, task::JoinSet};

use super::{
    backoff::Backoff,
    metrics::OperatorMetrics,
    queue::{ModelKey, Queue},
    store::{Change, Store},
    stores::{Stores, VisitStore},
};
use crate::kinds::ChildObject;

/// The server ends a watch after so long and the client begins another from where it was: a connection that died in
/// silence is noticed after little more.
const WATCH_TIMEOUT: Duration = Duration::from_secs(60);

/// The readiness condition: every kind was listed once.
pub(crate) const CACHES: &str = "caches";

/// What every watch needs.
pub(crate) struct Watches {
    pub(crate) client: Client,
    /// Namespaces to watch; empty is all.
    pub(crate) namespaces: Vec<String>,
    pub(crate) stores: Stores,
    pub(crate) queue: Arc<Queue>,
    pub(crate) metrics: OperatorMetrics,
    pub(crate) synced: Synced,
}

/// Which kinds have not been listed yet. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Synced {
    missing: Arc<watch::Sender<Vec<&'static str>>>,
    readiness: Readiness,
}

/// What is the same for all objects of a kind.
struct Kind<K> {
    /// Its plural, for metrics and logs.
    name: &'static str,
    store: Store<K>,
    config: watcher::Config,
    /// Drops what no plan reads: memory.
    slim: fn(&mut K),
    /// The models that a change concerns.
    concerns: fn(&Stores, &Change<K>) -> Vec<ModelKey>,
}

impl<K> Clone for Kind<K> {
    fn clone(&self) -> Self {
        Self { name: self.name, store: self.store.clone(), config: self.config.clone(), ..*self }
    }
}

impl<K: Resource<DynamicType = ()>> Kind<K> {
    fn all(name: &'static str, store: &Store<K>) -> Self {
        let seconds = u32::try_from(WATCH_TIMEOUT.as_secs()).unwrap_or(u32::MAX);
        let config = watcher::Config::default().timeout(seconds);
        Self { name, store: store.clone(), config, slim: |_| {}, concerns: |_, _| Vec::new() }
    }

    /// A kind of which only objects with a model's label matter.
    fn labelled(name: &'static str, store: &Store<K>) -> Self {
        let mut kind = Self::all(name, store)
            .concerning(|_, change| change.sides().filter_map(super::stores::labelled).collect());
        kind.config = kind.config.labels(label::MODEL);
        kind
    }

    fn fields(mut self, selector: &str) -> Self {
        self.config = self.config.fields(selector);
        self
    }

    fn slimmed(mut self, slim: fn(&mut K)) -> Self {
        self.slim = slim;
        self
    }

    fn concerning(mut self, concerns: fn(&Stores, &Change<K>) -> Vec<ModelKey>) -> Self {
        self.concerns = concerns;
        self
    }
}

/// Starts the watch of each kind of child.
struct Start<'a> {
    watches: &'a Watches,
    tasks: &'a mut JoinSet<()>,
}

impl VisitStore for Start<'_> {
    fn store<K: ChildObject>(&mut self, plural: &'static str, store: &Store<K>) {
        self.watches.namespaced(self.tasks, &Kind::labelled(plural, store));
    }
}

impl Watches {
    /// Starts all of them; they end when the set is dropped.
    pub(crate) fn start(self) -> JoinSet<()> {
        let stores = self.stores.clone();
        let mut tasks = JoinSet::new();
        let models = Kind::all("moemodels", &stores.models)
            .concerning(|_, change| change.sides().map(super::stores::own_key).collect());
        self.namespaced(&mut tasks, &models);
        self.namespaced(&mut tasks, &Kind::all("moetiers", &stores.tiers).concerning(Stores::of_tier));
        stores.children.each(&mut Start { watches: &self, tasks: &mut tasks });
        self.namespaced(&mut tasks, &Kind::labelled("pods", &stores.pods).slimmed(slim_pod));
        let claims = Kind::all("persistentvolumeclaims", &stores.claims).concerning(Stores::of_claim);
        self.namespaced(&mut tasks, &claims);
        for (store, selector) in
            [(&stores.refusals, "reason=FailedCreate"), (&stores.failed_mounts, "reason=FailedMount")]
        {
            let events =
                Kind::<CoreEvent>::all("events", store).fields(selector).concerning(Stores::of_event);
            self.namespaced(&mut tasks, &events);
        }
        let nodes = Kind::all("nodes", &stores.nodes).slimmed(slim_node).concerning(Stores::of_node);
        self.spawn(&mut tasks, Api::all(self.client.clone()), None, nodes);
        tasks
    }

    /// One watch over everything, or one per namespace.
    fn namespaced<K>(&self, tasks: &mut JoinSet<()>, kind: &Kind<K>)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Debug
            + Send
            + Sync
            + 'static,
    {
        if self.namespaces.is_empty() {
            self.spawn(tasks, Api::all(self.client.clone()), None, kind.clone());
        }
        for namespace in &self.namespaces {
            let api = Api::namespaced(self.client.clone(), namespace);
            self.spawn(tasks, api, Some(namespace.clone()), kind.clone());
        }
    }

    fn spawn<K>(&self, tasks: &mut JoinSet<()>, api: Api<K>, namespace: Option<String>, kind: Kind<K>)
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    {
        self.synced.expect(kind.name);
        let stream = watcher(api, kind.config.clone());
        let (stores, queue, metrics) = (self.stores.clone(), self.queue.clone(), self.metrics.clone());
        let (store, slim, concerns) = (kind.store, kind.slim, kind.concerns);
        let feed = Feed {
            kind: kind.name,
            namespace,
            store,
            slim,
            restarts: metrics.watch_restarts(kind.name),
            errors: metrics.watch_errors(kind.name),
            synced: self.synced.clone(),
        };
        tasks.spawn(feed.run(stream, move |change| {
            concerns(&stores, &change).into_iter().for_each(|key| queue.trigger(key));
            metrics.models.set(stores.models.len() as f64);
        }));
    }
}

/// One watch and the store that it feeds.
struct Feed<K> {
    kind: &'static str,
    namespace: Option<String>,
    store: Store<K>,
    slim: fn(&mut K),
    restarts: Counter,
    errors: Counter,
    synced: Synced,
}

impl<K: Resource<DynamicType = ()> + 'static> Feed<K> {
    /// Follows the stream, which does not end by itself.
    async fn run(self, stream: impl Stream<Item = watcher::Result<Event<K>>>, told: impl Fn(Change<K>)) {
        let mut stream = std::pin::pin!(stream);
        let mut backoff = Backoff::of_watch();
        let mut listed: Vec<K> = Vec::new();
        let (mut was_listed, mut first) = (false, true);
        while let Some(item) = stream.next().await {
            match item {
                Ok(Event::Init) => {
                    // A list that broke off begins anew; it was counted when it began first.
                    if std::mem::take(&mut was_listed) {
                        self.restarts.inc();
                    }
                    listed.clear();
                }
                Ok(Event::InitApply(object)) => listed.push(self.slimmed(object)),
                Ok(Event::InitDone) => {
                    let objects = std::mem::take(&mut listed);
                    self.store.replace(self.namespace.as_deref(), objects).into_iter().for_each(&told);
                    was_listed = true;
                    if std::mem::take(&mut first) {
                        self.synced.done(self.kind);
                    }
                    backoff.reset();
                }
                Ok(Event::Apply(object)) => {
                    backoff.reset();
                    told(self.store.apply(self.slimmed(object)));
                }
                Ok(Event::Delete(object)) => {
                    backoff.reset();
                    told(self.store.delete(&object));
                }
                Err(error) => {
                    self.errors.inc();
                    let (error, delay) = (words(&error), backoff.next_delay());
                    tracing::warn!(
                        kind = self.kind,
                        namespace = self.namespace,
                        error,
                        ?delay,
                        "Watch failed"
                    );
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    fn slimmed(&self, mut object: K) -> K {
        object.managed_fields_mut().clear();
        (self.slim)(&mut object);
        object
    }
}

/// An error in few words: an API server's own, without the object around them.
fn words(error: &watcher::Error) -> String {
    use kube::Error::Api;
    match error {
        watcher::Error::InitialListFailed(Api(status)) if status.code == 404 => {
            "the API server does not know the kind: is the chart cadre-crds installed?".to_owned()
        }
        watcher::Error::InitialListFailed(Api(status))
        | watcher::Error::WatchStartFailed(Api(status))
        | watcher::Error::WatchFailed(Api(status))
        | watcher::Error::WatchError(status) => format!("{} ({})", status.message, status.code),
        other => other.to_string(),
    }
}

/// Plans read labels and readiness of nodes.
fn slim_node(node: &mut Node) {
    node.spec = None;
    node.metadata.annotations = None;
    if let Some(status) = &mut node.status {
        *status = k8s_openapi::api::core::v1::NodeStatus {
            conditions: status.conditions.take(),
            ..k8s_openapi::api::core::v1::NodeStatus::default()
        };
    }
}

/// Of a pod's spec plans read where it runs and whether it has a gate; the template is compared by its hash label.
fn slim_pod(pod: &mut Pod) {
    let Some(spec) = &mut pod.spec else { return };
    spec.volumes = None;
    spec.affinity = None;
    spec.topology_spread_constraints = None;
    for container in &mut spec.containers {
        container.env = None;
        container.volume_mounts = None;
        container.liveness_probe = None;
        container.readiness_probe = None;
        container.startup_probe = None;
    }
}

impl Synced {
    /// Nothing is expected yet.
    pub(crate) fn new(readiness: Readiness) -> Self {
        Self { missing: Arc::default(), readiness }
    }

    /// Waits until everything that is expected was listed.
    pub(crate) async fn wait(&self) {
        // The sender lives as long as `self`.
        let _ = self.missing.subscribe().wait_for(Vec::is_empty).await;
    }

    fn expect(&self, kind: &'static str) {
        self.missing.send_modify(|missing| missing.push(kind));
        self.report();
    }

    /// The first list of one of the kind's watches.
    fn done(&self, kind: &'static str) {
        self.missing.send_modify(|missing| {
            if let Some(at) = missing.iter().position(|name| *name == kind) {
                missing.remove(at);
            }
        });
        self.report();
    }

    fn report(&self) {
        let mut missing = self.missing.borrow().clone();
        missing.dedup();
        let reason = || format!("not listed yet: {}", missing.join(", "));
        self.readiness.set(CACHES, if missing.is_empty() { Ok(()) } else { Err(reason()) });
    }
}

#[cfg(test)]
mod tests;
