//! Readiness as a set of named conditions: ready only when all hold, and each that does not says why.
//!
//! The set is fixed at start, so that a condition nobody reports on keeps the process unready instead
//! of being forgotten. Clones share the state; any holder may report, readers watch.

use std::{collections::BTreeMap, sync::Arc};

use serde::Serialize;
use tokio::sync::watch;

type Conditions = BTreeMap<&'static str, Option<String>>;

/// The conditions of one process. Clones share them.
#[derive(Clone, Debug)]
pub struct Readiness {
    /// `None` is met; `Some` is the reason why not.
    conditions: Arc<watch::Sender<Conditions>>,
    /// Every condition has held at one time.
    was_ready: Arc<watch::Sender<bool>>,
    /// What a start takes is done: files are read, servers listen.
    has_started: Arc<watch::Sender<bool>>,
}

/// A condition that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unmet {
    /// Its name.
    pub condition: &'static str,
    /// Why it does not hold.
    pub reason: String,
}

impl Readiness {
    /// A set of conditions, none met yet; each comes with the reason shown until it is.
    pub fn new(conditions: &[(&'static str, &str)]) -> Self {
        let initial: Conditions =
            conditions.iter().map(|&(name, reason)| (name, Some(reason.to_owned()))).collect();
        let was_ready = Arc::new(watch::Sender::new(initial.is_empty()));
        let has_started = Arc::new(watch::Sender::new(false));
        Self { conditions: Arc::new(watch::Sender::new(initial)), was_ready, has_started }
    }

    /// The condition holds now. A name outside the set joins it.
    pub fn met(&self, condition: &'static str) {
        self.update(condition, None);
    }

    /// The condition does not hold, for this reason. A name outside the set joins it.
    pub fn unmet(&self, condition: &'static str, reason: impl Into<String>) {
        self.update(condition, Some(reason.into()));
    }

    /// Reports a condition from a result: `Err` carries the reason.
    pub fn set(&self, condition: &'static str, result: Result<(), String>) {
        self.update(condition, result.err());
    }

    /// Whether every condition holds.
    pub fn is_ready(&self) -> bool {
        self.conditions.borrow().values().all(Option::is_none)
    }

    /// The conditions that do not hold, by name.
    pub fn missing(&self) -> Vec<Unmet> {
        self.conditions
            .borrow()
            .iter()
            .filter_map(|(&condition, reason)| {
                reason.as_ref().map(|reason| Unmet { condition, reason: reason.clone() })
            })
            .collect()
    }

    /// Waits until every condition holds. The caller bounds the wait.
    pub async fn wait_ready(&self) {
        self.wait(true).await;
    }

    /// Waits until readiness is as given. The caller bounds the wait.
    pub async fn wait(&self, ready: bool) {
        let mut changes = self.conditions.subscribe();
        // The sender lives as long as `self`, so the channel cannot close under us.
        let _ = changes.wait_for(|set| set.values().all(Option::is_none) == ready).await;
    }

    /// Waits until every condition has held for the first time; at once if that is past. The caller bounds the wait.
    pub async fn first(&self) {
        // As above.
        let _ = self.was_ready.subscribe().wait_for(|was| *was).await;
    }

    /// The process has started: its files are read and its servers listen. What it waits for from now on (weights,
    /// peers) is a condition.
    pub fn started(&self) {
        self.has_started.send_replace(true);
    }

    /// Whether it [has started](Self::started).
    pub fn has_started(&self) -> bool {
        *self.has_started.borrow()
    }

    /// Waits for [`started`](Self::started). The caller bounds the wait.
    pub async fn wait_started(&self) {
        // As above.
        let _ = self.has_started.subscribe().wait_for(|has| *has).await;
    }

    fn update(&self, condition: &'static str, reason: Option<String>) {
        self.conditions.send_if_modified(|set| {
            let changed = set.get(condition) != Some(&reason);
            if changed {
                set.insert(condition, reason);
            }
            changed
        });
        if self.is_ready() {
            self.was_ready.send_if_modified(|was| !std::mem::replace(was, true));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_only_when_every_condition_holds() {
        let readiness = Readiness::new(&[("weights", "loading"), ("peers", "none connected")]);
        assert!(!readiness.is_ready());
        readiness.met("weights");
        assert_eq!(readiness.missing(), [Unmet { condition: "peers", reason: "none connected".into() }]);
        readiness.set("peers", Ok(()));
        assert!(readiness.is_ready());
        readiness.clone().unmet("peers", "shard 2 is gone");
        assert_eq!(readiness.missing()[0].reason, "shard 2 is gone");
    }

    #[tokio::test]
    async fn waiters_wake_on_the_change() {
        let readiness = Readiness::new(&[("step", "no step yet")]);
        let waiter = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.wait_ready().await }
        });
        readiness.met("step");
        waiter.await.expect("the waiter ends");
        readiness.unmet("step", "draining");
        readiness.wait(false).await;
        readiness.first().await;
    }
}
