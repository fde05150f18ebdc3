//! Which model is reconciled when.
//!
//! A trigger makes a model due [`DEBOUNCE`] later; more triggers in between change nothing, so a storm of pod
//! events costs one reconcile per debounce and delays none (a debounce that starts again with every event would
//! never end while three hundred pods start). A model is never reconciled twice at once: one that is
//! triggered while it runs is due again after it. Bounded by the number of models: a key is in here at most once.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    future::Future,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cadre_telemetry::Gauge;
use tokio::{sync::Notify, task::JoinSet, time::Instant};

/// From the first trigger to the reconcile.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// When a reconcile that panicked is tried again.
const AFTER_PANIC: Duration = Duration::from_secs(30);

/// A model's namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ModelKey {
    /// Its namespace.
    pub(crate) namespace: String,
    /// Its name.
    pub(crate) name: String,
}

impl ModelKey {
    /// The key of a model.
    pub(crate) fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ModelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The models that are to be reconciled.
#[derive(Debug)]
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Notify,
    due: Gauge,
}

#[derive(Debug, Default)]
struct State {
    due: HashMap<ModelKey, Instant>,
    running: HashSet<ModelKey>,
}

impl State {
    /// The model that is due first among those that do not run.
    fn first(&self) -> Option<(&ModelKey, Instant)> {
        let free = self.due.iter().filter(|(key, _)| !self.running.contains(*key));
        free.map(|(key, at)| (key, *at)).min_by_key(|(key, at)| (*at, *key))
    }
}

impl Queue {
    /// An empty queue that reports its length.
    pub(crate) fn new(due: Gauge) -> Self {
        Self { state: Mutex::default(), changed: Notify::new(), due }
    }

    /// Something about the model changed.
    pub(crate) fn trigger(&self, key: ModelKey) {
        self.at(key, DEBOUNCE);
    }

    /// Reconcile the model after so long at the latest.
    pub(crate) fn at(&self, key: ModelKey, after: Duration) {
        let at = Instant::now() + after;
        let mut state = self.lock();
        let due = state.due.entry(key).or_insert(at);
        *due = (*due).min(at);
        self.due.set(state.due.len() as f64);
        drop(state);
        self.changed.notify_one();
    }

    /// Reconciles what is due, `concurrency` models at one time, until `stop`; then waits for those in hand.
    /// Dropping the future abandons them. `work` says when to look again.
    pub(crate) async fn run<F, W>(&self, concurrency: usize, stop: impl Future<Output = ()>, work: F)
    where
        F: Fn(ModelKey) -> W,
        W: Future<Output = Option<Duration>> + Send + 'static,
    {
        let mut stop = std::pin::pin!(stop);
        let mut tasks = JoinSet::new();
        let mut keys = HashMap::new();
        loop {
            while tasks.len() < concurrency
                && let Some(key) = self.take()
            {
                keys.insert(tasks.spawn(work(key.clone())).id(), key);
            }
            let next = self.lock().first().map(|(_, at)| at).filter(|_| tasks.len() < concurrency);
            tokio::select! {
                biased;
                () = &mut stop => break,
                Some(ended) = tasks.join_next_with_id() => self.ended(ended, &mut keys),
                () = self.changed.notified() => {}
                () = wait_until(next) => {}
            }
        }
        while tasks.join_next().await.is_some() {}
    }

    /// A due model, which then counts as running.
    fn take(&self) -> Option<ModelKey> {
        let mut state = self.lock();
        let key = state.first().filter(|(_, at)| *at <= Instant::now()).map(|(key, _)| key.clone())?;
        state.due.remove(&key);
        state.running.insert(key.clone());
        self.due.set(state.due.len() as f64);
        Some(key)
    }

    fn ended(
        &self,
        ended: Result<(tokio::task::Id, Option<Duration>), tokio::task::JoinError>,
        keys: &mut HashMap<tokio::task::Id, ModelKey>,
    ) {
        let (id, after) = match ended {
            Ok((id, after)) => (id, after),
            Err(error) => {
                tracing::error!(model = ?keys.get(&error.id()), %error, "Reconcile broke off");
                (error.id(), Some(AFTER_PANIC))
            }
        };
        let Some(key) = keys.remove(&id) else { return };
        self.lock().running.remove(&key);
        if let Some(after) = after {
            self.at(key, after);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
