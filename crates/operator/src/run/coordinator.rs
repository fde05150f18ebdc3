//! The streams to the models' coordinators: one task per model, down goes the newest view, up comes the status.
//!
//! A view waits in a watch channel, so a slow coordinator gets the newest one and never a queue of old ones; views are
//! whole, so nothing is lost by that, and a new stream begins with the newest. HTTP/2 pings find a silent partition in
//! seconds. While a stream is down its last report stays, with the reason: the plan decides what it is still worth.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cadre_k8s_api::names::{coordinator_service, port};
use cadre_proto::{
    MAX_MESSAGE_BYTES,
    secret::{ClusterSecret, InternalChannel, Present},
    v1,
    v1::coordinator_client::CoordinatorClient,
};
use cadre_telemetry::Gauge;
use cadre_types::{CoordinatorStatus, OperatorView};
use futures::StreamExt;
use k8s_openapi::jiff::Timestamp;
use tokio::{sync::watch, task::AbortHandle};
use tokio_stream::wrappers::WatchStream;
use tonic::{Streaming, transport::Endpoint};

use super::{
    backoff::Backoff,
    queue::{ModelKey, Queue},
};
use crate::observed::CoordinatorReport;

/// A router's pod that is there answers within a round trip; one that is not may swallow packets.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// From the connection to the first status.
const FIRST_STATUS: Duration = Duration::from_secs(5);

/// Pings: a coordinator that vanished without a word is noticed after their sum.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);

/// Statuses come up to twice a second while weights load. Progress alone is worth a write of status every so often...
const PROGRESS_EVERY: Duration = Duration::from_secs(2);
/// ...and numbers that always move under traffic (imbalance, sequences) less often still.
const NUMBERS_EVERY: Duration = Duration::from_secs(10);

/// `host:port` of a model's coordinator.
#[derive(Clone)]
pub struct CoordinatorAddress(Arc<AddressOf>);

/// From namespace and name.
type AddressOf = dyn Fn(&str, &str) -> String + Send + Sync;

impl CoordinatorAddress {
    /// Any function of namespace and name.
    pub fn new(address: impl Fn(&str, &str) -> String + Send + Sync + 'static) -> Self {
        Self(Arc::new(address))
    }

    /// A text with `{namespace}` and `{name}` in it, for an operator outside the cluster.
    pub fn template(template: String) -> Self {
        Self::new(move |namespace, name| template.replace("{namespace}", namespace).replace("{name}", name))
    }

    fn of(&self, key: &ModelKey) -> String {
        (self.0)(&key.namespace, &key.name)
    }
}

impl Default for CoordinatorAddress {
    /// The model's Service, from inside the cluster.
    fn default() -> Self {
        Self::new(|namespace, name| {
            format!("{}.{namespace}.svc:{}", coordinator_service(name), port::COORDINATOR)
        })
    }
}

impl fmt::Debug for CoordinatorAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CoordinatorAddress({:?})", (self.0)("{namespace}", "{name}"))
    }
}

/// The streams of all models. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Coordinators {
    address: CoordinatorAddress,
    queue: Arc<Queue>,
    connected: Gauge,
    streams: Mutex<HashMap<ModelKey, Stream>>,
}

/// The two ends of a model's task.
#[derive(Debug)]
struct Stream {
    view: watch::Sender<OperatorView>,
    report: Report,
    secret: Option<String>,
    task: AbortHandle,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Report = Arc<Mutex<Option<CoordinatorReport>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Coordinators {
    /// No streams yet.
    pub(crate) fn new(address: CoordinatorAddress, queue: Arc<Queue>, connected: Gauge) -> Self {
        Self { address, queue, connected, streams: Mutex::default() }
    }

    /// The newest view of a model; the first one starts its stream. With another secret it is another stream.
    pub(crate) fn tell(&self, key: &ModelKey, view: OperatorView, secret: Option<&str>) {
        let mut streams = lock(&self.streams);
        let known = streams.get(key).filter(|stream| stream.secret.as_deref() == secret);
        let Some(stream) = known else {
            let stream = self.start(key.clone(), view, secret.map(str::to_owned));
            streams.insert(key.clone(), stream);
            return;
        };
        stream.view.send_if_modified(|told| {
            let changed = *told != view;
            *told = view;
            changed
        });
    }

    /// What the model's coordinator said last; `None` if it was never reached.
    pub(crate) fn report(&self, key: &ModelKey) -> Option<CoordinatorReport> {
        let streams = lock(&self.streams);
        lock(&streams.get(key)?.report).clone()
    }

    /// The model is gone.
    pub(crate) fn forget(&self, key: &ModelKey) {
        lock(&self.streams).remove(key);
    }

    fn start(&self, key: ModelKey, view: OperatorView, secret: Option<String>) -> Stream {
        let view = watch::Sender::new(view);
        let report = Report::default();
        let follower = Follower {
            address: self.address.of(&key),
            key,
            views: view.subscribe(),
            report: report.clone(),
            // 64 hex digits are a secret.
            secret: Present::new(secret.as_deref().and_then(|text| ClusterSecret::new(text).ok()).as_ref()),
            queue: self.queue.clone(),
            connected: self.connected.clone(),
        };
        Stream { view, report, secret, task: tokio::spawn(follower.run()).abort_handle() }
    }
}

/// The task of one model.
struct Follower {
    key: ModelKey,
    address: String,
    views: watch::Receiver<OperatorView>,
    report: Report,
    secret: Present,
    queue: Arc<Queue>,
    connected: Gauge,
}

/// A stream that is up.
struct Open {
    first: v1::CoordinatorStatus,
    statuses: Streaming<v1::CoordinatorStatus>,
    /// The connection lives as long as the last of its clients.
    _client: CoordinatorClient<InternalChannel>,
}

/// Counts a stream for as long as it is up, however it ends.
struct Up(Gauge);

impl Up {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Follower {
    async fn run(self) {
        let mut backoff = Backoff::of_stream();
        loop {
            let problem = match self.open().await {
                Ok(open) => {
                    backoff.reset();
                    tracing::info!(model = %self.key, address = self.address, "Reached the coordinator");
                    self.follow(open).await
                }
                Err(problem) => problem,
            };
            self.down(problem);
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    /// Connects, looking the name up again, and waits for the first status.
    async fn open(&self) -> Result<Open, String> {
        let address = &self.address;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| format!("{address}: {error}"))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let connecting = tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect()).await;
        let channel = connecting
            .map_err(|_| format!("{address}: no connection within {CONNECT_TIMEOUT:?}"))?
            .map_err(|error| format!("{address}: {}", chain(&error)))?;
        let mut client = CoordinatorClient::with_interceptor(channel, self.secret.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let views = WatchStream::new(self.views.clone()).map(|view| v1::OperatorView::from(&view));
        let first = async {
            let mut statuses = client.operate(views).await?.into_inner();
            let first = statuses.message().await?;
            Ok::<_, tonic::Status>((first, statuses))
        };
        let (first, statuses) = tokio::time::timeout(FIRST_STATUS, first)
            .await
            .map_err(|_| format!("{address}: no status within {FIRST_STATUS:?}"))?
            .map_err(|status| format!("{address}: {status}"))?;
        let first = first.ok_or_else(|| format!("{address}: the stream ended without a status"))?;
        Ok(Open { first, statuses, _client: client })
    }

    /// Takes statuses until the stream ends; returns why it did.
    async fn follow(&self, open: Open) -> String {
        let _up = Up::new(&self.connected);
        let Open { first: mut wire, mut statuses, _client } = open;
        loop {
            match CoordinatorStatus::try_from(&wire) {
                Ok(status) => self.heard(status),
                Err(error) => return format!("{}: the status cannot be read: {error}", self.address),
            }
            wire = match statuses.message().await {
                Ok(Some(wire)) => wire,
                Ok(None) => return format!("{}: the coordinator ended the stream", self.address),
                Err(status) => return format!("{}: {status}", self.address),
            };
        }
    }

    fn heard(&self, status: CoordinatorStatus) {
        let report = CoordinatorReport { status, heard: Timestamp::now(), connected: Ok(()) };
        let before = lock(&self.report).replace(report.clone());
        let due = match before {
            Some(before) if before.connected.is_ok() => worth(&before.status, &report.status),
            _ => Some(Duration::ZERO),
        };
        match due {
            Some(Duration::ZERO) => self.queue.trigger(self.key.clone()),
            Some(after) => self.queue.at(self.key.clone(), after),
            None => {}
        }
    }

    fn down(&self, problem: String) {
        let was_up = match lock(&self.report).as_mut() {
            Some(report) => {
                let was_up = std::mem::replace(&mut report.connected, Err(problem.clone())).is_ok();
                if was_up {
                    report.heard = Timestamp::now();
                }
                was_up
            }
            None => false,
        };
        if was_up {
            tracing::warn!(model = %self.key, problem, "Lost the coordinator");
            self.queue.trigger(self.key.clone());
        } else {
            tracing::debug!(model = %self.key, problem, "The coordinator is not reached");
        }
    }
}

/// How soon a new status is worth a reconcile; `None` if it says nothing new.
fn worth(before: &CoordinatorStatus, now: &CoordinatorStatus) -> Option<Duration> {
    if before == now {
        return None;
    }
    let mut quiet = before.clone();
    quiet.imbalance = now.imbalance;
    if quiet.members.len() != now.members.len() {
        return Some(Duration::ZERO);
    }
    for (member, now) in quiet.members.iter_mut().zip(&now.members) {
        member.sequences = now.sequences;
    }
    if quiet == *now {
        return Some(NUMBERS_EVERY);
    }
    for (member, now) in quiet.members.iter_mut().zip(&now.members) {
        // The end of loading is news.
        if now.loading.is_some_and(|loading| loading.bytes_read < loading.bytes_expected) {
            member.loading = now.loading;
        }
    }
    Some(if quiet == *now { PROGRESS_EVERY } else { Duration::ZERO })
}

/// An error with its causes: the transport's own words say only "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests;
