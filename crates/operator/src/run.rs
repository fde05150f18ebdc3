//! The executor: watches, queue, reconciles, coordinator streams, leader election and the admin port, put together.
//!
//! Start: the watches fill the stores; readiness waits for the first lists, standby replicas are ready too. Then the
//! lease is sought. **Only the leader** reconciles and holds streams to coordinators; one that lost its lease stops in
//! the middle of whatever it does and ends with an error, to be started again as a standby. Asked to stop, it finishes
//! the reconciles in hand (bounded) and releases the lease, so that a successor takes over within seconds.
//!
//! Nothing here decides anything about a model; that is [`crate::plan`].

use std::{future::Future, net::SocketAddr, num::NonZeroUsize, sync::Arc, time::Duration};

use cadre_telemetry::{Metrics, Readiness, admin, axum};
use futures::FutureExt;
use serde::Serialize;
use tokio::sync::oneshot;

use self::{
    client::{ApiLayer, Pressure},
    coordinator::Coordinators,
    events::Events,
    gather::Settings,
    lease::{Candidate, Lease, Renewals},
    memory::Memories,
    metrics::OperatorMetrics,
    queue::Queue,
    reconcile::Reconciler,
    secrets::Secrets,
    stores::Stores,
    watch::{CACHES, Synced, Watches},
};
use crate::{allowed::Allowed, observed::Observed, plan::Plan};

mod backoff;
mod client;
mod coordinator;
mod error;
mod events;
mod execute;
mod gather;
mod kinds;
mod lease;
mod memory;
pub mod metrics;
mod queue;
mod reconcile;
mod secrets;
mod store;
mod stores;
mod strangers;
#[cfg(test)]
mod testing;
mod verdict;
mod watch;

pub use coordinator::CoordinatorAddress;
pub use error::OperatorError;

/// What decides. A value, so that the executor is tested without the plan.
pub(crate) type Planner = Arc<dyn Fn(&Observed) -> Plan + Send + Sync>;

/// Longest wait for the reconciles in hand when asked to stop.
const DRAIN: Duration = Duration::from_secs(10);

/// How an operator is set up.
#[derive(Debug)]
pub struct OperatorOptions {
    /// Namespaces whose models it serves; empty is all.
    pub namespaces: Vec<String>,
    /// Its name among its replicas: the pod's.
    pub identity: String,
    /// The lease of the leader; `None` works without election.
    pub lease: Option<LeaseOptions>,
    /// Image of pods whose model names none: its own.
    pub default_image: String,
    /// Namespace of its own pod, if it runs in one.
    pub pod_namespace: Option<String>,
    /// What models may ask for beyond their own pods.
    pub allowed: Allowed,
    /// Secret with the key from which the models' cluster secrets are derived, in the namespace of the lease.
    pub key: String,
    /// Where to serve metrics, health and readiness.
    pub admin: SocketAddr,
    /// Models reconciled at one time.
    pub concurrency: NonZeroUsize,
    /// Where coordinators are.
    pub coordinator: CoordinatorAddress,
    /// Receives the real address once the port is bound.
    pub bound: Option<oneshot::Sender<BoundAddresses>>,
}

/// Which lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseOptions {
    /// Its namespace; absent is that of the pod, or of the kubeconfig.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

/// Where the operator listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BoundAddresses {
    /// Admin.
    pub admin: SocketAddr,
}

/// Runs an operator until `shutdown` resolves, or it lost its lease.
pub async fn run(
    mut options: OperatorOptions,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), OperatorError> {
    let address = options.admin;
    let bind = |source| OperatorError::Bind { address, source };
    let listener = cadre_net::bind(address).await.map_err(bind)?;
    let admin = listener.local_addr().map_err(bind)?;
    tracing::info!(%admin, "listening");
    if let Some(bound) = options.bound.take() {
        // Whoever wanted to know may have gone.
        let _ = bound.send(BoundAddresses { admin });
    }
    let metrics = Metrics::new();
    let readiness = Readiness::new(&[(CACHES, "nothing is listed yet")]);
    let handles = OperatorMetrics::register(&metrics)?;
    readiness.started();
    let clients = Clients::infer(&handles).await?;
    let operator = Operator::new(options, Arc::new(crate::plan::plan), clients, handles, readiness.clone());
    tokio::select! {
        result = operator.run(shutdown) => result,
        () = admin::serve(listener, metrics, readiness, axum::Router::new()) => {
            Err(OperatorError::Stopped { what: "the admin server", problem: "it ended".to_owned() })
        }
    }
}

/// The ways to the API server.
struct Clients {
    api: kube::Client,
    lease: kube::Client,
    renewals: Renewals,
    pressure: Pressure,
    /// The pod's namespace, or the kubeconfig's.
    namespace: String,
}

impl Clients {
    async fn infer(metrics: &OperatorMetrics) -> Result<Self, OperatorError> {
        let (pressure, renewals) = (Pressure::default(), Renewals::default());
        let layer = ApiLayer::new(metrics.api_requests.clone(), pressure.clone());
        let config = client::infer().await?;
        Ok(Self {
            lease: client::lease_client(config.clone(), &layer, &renewals)?,
            namespace: config.default_namespace.clone(),
            api: client::client(config, &layer)?,
            renewals,
            pressure,
        })
    }
}

/// An operator before it runs.
struct Operator {
    watches: Watches,
    candidate: Option<Candidate>,
    reconciler: Arc<Reconciler>,
    concurrency: usize,
}

impl Operator {
    fn new(
        options: OperatorOptions,
        planner: Planner,
        clients: Clients,
        metrics: OperatorMetrics,
        readiness: Readiness,
    ) -> Self {
        let namespace = options.lease.as_ref().and_then(|lease| lease.namespace.clone());
        let namespace = namespace.unwrap_or(clients.namespace);
        let secrets = Secrets::new(clients.api.clone(), namespace.clone(), options.key);
        let candidate = options.lease.map(|lease| Candidate {
            client: clients.lease,
            renewals: clients.renewals,
            namespace,
            name: lease.name,
            identity: options.identity.clone(),
        });
        let (stores, queue) = (Stores::new(), Arc::new(Queue::new(metrics.due.clone())));
        let reconciler = Reconciler {
            client: clients.api.clone(),
            stores: stores.clone(),
            coordinators: Coordinators::new(options.coordinator, queue.clone(), metrics.streams.clone()),
            events: Events::new(clients.api.clone(), &options.identity),
            pressure: clients.pressure,
            metrics: metrics.clone(),
            memories: Memories::default(),
            planner,
            secrets: Some(secrets),
            settings: Settings {
                default_image: options.default_image,
                operator_namespace: options.pod_namespace,
                allowed: options.allowed,
            },
        };
        let (client, namespaces, synced) = (clients.api, options.namespaces, Synced::new(readiness));
        let watches = Watches { client, namespaces, stores, queue, metrics, synced };
        Self { watches, candidate, reconciler: Arc::new(reconciler), concurrency: options.concurrency.get() }
    }

    async fn run(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), OperatorError> {
        let Self { watches, candidate, reconciler, concurrency } = self;
        let (queue, synced) = (watches.queue.clone(), watches.synced.clone());
        let mut watching = watches.start();
        let lead = async {
            let shutdown = shutdown.shared();
            let begin = async {
                // A standby has full caches; one that cannot fill them leaves the lease to others.
                synced.wait().await;
                match &candidate {
                    Some(candidate) => Some(candidate.acquire().await),
                    None => None,
                }
            };
            let lease = tokio::select! {
                lease = begin => lease,
                () = shutdown.clone() => return Ok(()),
            };
            lead(lease, reconciler, queue, concurrency, shutdown).await
        };
        tokio::select! {
            result = lead => result,
            Some(ended) = watching.join_next() => {
                let problem = ended.err().map_or_else(|| "it ended".to_owned(), |error| error.to_string());
                Err(OperatorError::Stopped { what: "a watch", problem })
            }
        }
    }
}

/// Reconciles until asked to stop, then releases the lease; or until the lease is lost.
async fn lead(
    lease: Option<Lease>,
    reconciler: Arc<Reconciler>,
    queue: Arc<Queue>,
    concurrency: usize,
    shutdown: impl Future<Output = ()> + Clone,
) -> Result<(), OperatorError> {
    reconciler.metrics.leader.set(1.0);
    reconciler.stores.keys().into_iter().for_each(|key| queue.trigger(key));
    let work = queue.run(concurrency, shutdown.clone(), |key| reconciler.clone().reconcile(key));
    let overdue = async {
        shutdown.await;
        tokio::time::sleep(DRAIN).await;
    };
    let lost = async {
        match &lease {
            Some(lease) => lease.lost().await,
            None => std::future::pending().await,
        }
    };
    let result = tokio::select! {
        // On loss nothing more is written: dropping `work` abandons what is in hand.
        biased;
        reason = lost => Err(OperatorError::LeaseLost { reason }),
        () = work => Ok(()),
        () = overdue => {
            tracing::warn!(after = ?DRAIN, "Reconciles in hand were abandoned");
            Ok(())
        }
    };
    reconciler.metrics.leader.set(0.0);
    if result.is_ok()
        && let Some(lease) = lease
    {
        lease.release().await;
    }
    result
}

#[cfg(test)]
mod tests;
