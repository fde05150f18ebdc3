//! What the executor remembers of a model between two reconciles. None of it is needed to converge: a process that
//! starts anew begins without and learns it again.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

use super::{
    backoff::Backoff, queue::ModelKey, secrets::REMAKE, store::Version, stores::Stores, strangers::Strangers,
};
use crate::{observed::Observed, plan::ObjectKind};

/// How long a plan waits for the stores to show what was written. A watch that is up shows it within milliseconds;
/// one that is down longer must not stop the work, and a write that is done twice is the same write.
const SHOWS_WITHIN: Duration = Duration::from_secs(5);

/// After a write met a newer object: the store has it in a moment.
const STALE_FIRST: Duration = Duration::from_millis(50);
const STALE_MAX: Duration = Duration::from_secs(2);

/// Of one model.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Which model: one made again under the same name is another.
    pub(crate) uid: String,
    /// When this process began to observe it.
    pub(crate) since: Timestamp,
    /// After refusals.
    pub(crate) refusals: Backoff,
    /// While the API server is away or in trouble: once it is back, nobody should wait long.
    pub(crate) outages: Backoff,
    /// After conflicts.
    pub(crate) conflicts: Backoff,
    /// Children that the API server refused at the last execution, with its words.
    pub(crate) refused: BTreeMap<String, String>,
    /// Objects of our names that are not ours.
    pub(crate) strangers: Strangers,
    /// Our writes that the stores have not shown yet.
    pub(crate) written: Written,
    /// When the cluster secret was last made, or found to be there.
    pub(crate) secret_made: Option<Instant>,
}

impl Memory {
    /// Of a model that is seen for the first time.
    pub(crate) fn new(uid: String, now: Timestamp) -> Self {
        Self {
            uid,
            since: now,
            refusals: Backoff::of_reconcile(),
            outages: Backoff::of_watch(),
            conflicts: Backoff::new(STALE_FIRST, STALE_MAX),
            refused: BTreeMap::new(),
            strangers: Strangers::default(),
            written: Written::default(),
            secret_made: None,
        }
    }
}

impl Memory {
    /// The Secret is to be made: it never was, a while ago, or a pod does not find it.
    pub(crate) fn is_secret_due(&self, observed: &Observed, name: &str) -> bool {
        let is_missed = || observed.failed_mounts.values().any(|message| message.contains(name));
        self.secret_made.is_none_or(|made| made.elapsed() >= REMAKE) || is_missed()
    }
}

/// The memories of all models that are reconciled. A model is reconciled once at a time, so nobody ever waits for a
/// memory; the lock keeps it across a reconcile that is abandoned.
#[derive(Debug, Default)]
pub(crate) struct Memories(Mutex<HashMap<ModelKey, Arc<tokio::sync::Mutex<Memory>>>>);

impl Memories {
    /// The memory of this very model, if there is one.
    pub(crate) fn recall(&self, key: &ModelKey, uid: &str) -> Option<Arc<tokio::sync::Mutex<Memory>>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = all.get(key)?;
        memory.try_lock().is_ok_and(|memory| memory.uid == uid).then(|| memory.clone())
    }

    /// A new memory, in place of one of a former model of the name.
    pub(crate) fn begin(&self, key: &ModelKey, uid: &str, now: Timestamp) -> Arc<tokio::sync::Mutex<Memory>> {
        let memory = Arc::new(tokio::sync::Mutex::new(Memory::new(uid.to_owned(), now)));
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), memory.clone());
        memory
    }

    /// The model is gone.
    pub(crate) fn forget(&self, key: &ModelKey) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

/// What was written: the model itself, or a child or pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Target {
    /// The model (its status).
    Model,
    /// An object of a kind.
    Object(ObjectKind, String),
}

/// What a store will show once it is no longer behind.
#[derive(Clone, Debug)]
enum Shows {
    /// This version or a later one.
    Version(String),
    /// That the object of this uid is gone or on its way out.
    Leaving(String),
}

/// Writes that the stores have yet to show.
#[derive(Debug, Default)]
pub(crate) struct Written(HashMap<Target, (Shows, Instant)>);

impl Written {
    /// The object has this version now.
    pub(crate) fn version(&mut self, target: Target, resource_version: String) {
        self.0.insert(target, (Shows::Version(resource_version), Instant::now() + SHOWS_WITHIN));
    }

    /// The object's deletion was asked for.
    pub(crate) fn leaving(&mut self, target: Target, uid: String) {
        self.0.insert(target, (Shows::Leaving(uid), Instant::now() + SHOWS_WITHIN));
    }

    /// How long the stores may still be behind; `None` if they show everything, or had time enough.
    pub(crate) fn behind(&mut self, stores: &Stores, key: &ModelKey) -> Option<Duration> {
        let now = Instant::now();
        self.0.retain(|target, (shows, until)| {
            let version = match target {
                Target::Model => stores.models.version(&key.namespace, &key.name),
                Target::Object(kind, name) => stores.version(*kind, &key.namespace, name),
            };
            let shown = shows.is_shown_by(version.as_ref());
            if !shown && *until <= now {
                tracing::warn!(model = %key, ?target, ?shows, "A watch has not shown our own write; going on without");
            }
            !shown && *until > now
        });
        self.0.values().map(|(_, until)| *until - now).min()
    }
}

impl Shows {
    fn is_shown_by(&self, version: Option<&Version>) -> bool {
        match (self, version) {
            (Self::Version(written), Some(seen)) => !is_older(&seen.resource_version, written),
            (Self::Version(_), None) => false,
            (Self::Leaving(uid), Some(seen)) => seen.uid != *uid || seen.deleting,
            (Self::Leaving(_), None) => true,
        }
    }
}

/// Resource versions are numbers that grow (Kubernetes 1.35 says so, etcd always did it). One that is no number is taken
/// for older until it is equal.
fn is_older(seen: &str, written: &str) -> bool {
    match (seen.parse::<u64>(), written.parse::<u64>()) {
        (Ok(seen), Ok(written)) => seen < written,
        _ => seen != written,
    }
}

#[cfg(test)]
mod tests;
