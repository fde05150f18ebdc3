//! Readiness as a set of named conditions: ready only when all hold, and each that does not says why.
//!
//! The set is fixed at start, so that a condition nobody reports on keeps the process unready instead
//! of being forgotten. Clones share the state; any holder may report, readers watch.

use std::{collections::BTreeMap, sync::Arc};

use serde::Serialize;
use tokio::sync::watch;

type Conditions = BTreeMap<String, Option<String>>;

/// The conditions of one process, or of one role in it ([`Self::part`]). Clones share them.
#[derive(Clone, Debug)]
pub struct Readiness {
    /// `None` is met; `Some` is the reason why not.
    conditions: Arc<watch::Sender<Conditions>>,
    /// Every condition that we see has held at one time.
    was_ready: Arc<watch::Sender<bool>>,
    /// What a start takes is done: files are read, servers listen.
    has_started: Arc<watch::Sender<bool>>,
    /// The same of the whole process; `None` if that is us.
    whole_was_ready: Option<Arc<watch::Sender<bool>>>,
    /// What the names that we see begin with.
    prefix: String,
}

/// A condition that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unmet {
    /// Its name.
    pub condition: String,
    /// Why it does not hold.
    pub reason: String,
}

impl Readiness {
    /// A set of conditions, none met yet; each comes with the reason shown until it is.
    pub fn new(conditions: &[(&str, &str)]) -> Self {
        let initial: Conditions =
            conditions.iter().map(|&(name, reason)| (name.to_owned(), Some(reason.to_owned()))).collect();
        let was_ready = Arc::new(watch::Sender::new(initial.is_empty()));
        Self {
            conditions: Arc::new(watch::Sender::new(initial)),
            was_ready,
            has_started: Arc::new(watch::Sender::new(false)),
            whole_was_ready: None,
            prefix: String::new(),
        }
    }

    /// One role of several in a process: it reports and sees the conditions whose names begin with `role: `, without
    /// that. Those that it begins with are joined to the set, none met; called before the process can be ready.
    #[must_use]
    pub fn part(&self, role: &str, conditions: &[(&str, &str)]) -> Self {
        let part = Self {
            conditions: Arc::clone(&self.conditions),
            was_ready: Arc::new(watch::Sender::new(false)),
            has_started: Arc::new(watch::Sender::new(false)),
            whole_was_ready: Some(Arc::clone(self.whole_was_ready.as_ref().unwrap_or(&self.was_ready))),
            prefix: format!("{}{role}: ", self.prefix),
        };
        for (name, reason) in conditions {
            part.unmet(name, *reason);
        }
        part
    }

    /// The condition holds now. A name outside the set joins it.
    pub fn met(&self, condition: &str) {
        self.update(condition, None);
    }

    /// The condition does not hold, for this reason. A name outside the set joins it.
    pub fn unmet(&self, condition: &str, reason: impl Into<String>) {
        self.update(condition, Some(reason.into()));
    }

    /// Reports a condition from a result: `Err` carries the reason.
    pub fn set(&self, condition: &str, result: Result<(), String>) {
        self.update(condition, result.err());
    }

    /// Whether every condition holds.
    pub fn is_ready(&self) -> bool {
        self.holds(&self.conditions.borrow())
    }

    /// Whether every condition has held at one time.
    pub fn was_ready(&self) -> bool {
        *self.was_ready.borrow()
    }

    fn holds(&self, conditions: &Conditions) -> bool {
        let mut ours = conditions.iter().filter(|(name, _)| name.starts_with(&self.prefix));
        ours.all(|(_, reason)| reason.is_none())
    }

    /// The conditions that do not hold, by name.
    pub fn missing(&self) -> Vec<Unmet> {
        self.conditions
            .borrow()
            .iter()
            .filter_map(|(name, reason)| {
                let condition = name.strip_prefix(&self.prefix)?.to_owned();
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
        let _ = changes.wait_for(|set| self.holds(set) == ready).await;
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

    fn update(&self, condition: &str, reason: Option<String>) {
        let name = format!("{}{condition}", self.prefix);
        self.conditions.send_if_modified(|set| {
            let changed = set.get(&name) != Some(&reason);
            if changed {
                set.insert(name, reason);
            }
            changed
        });
        let note = |was_ready: &watch::Sender<bool>| {
            was_ready.send_if_modified(|was| !std::mem::replace(was, true));
        };
        if self.is_ready() {
            note(&self.was_ready);
            if let Some(whole) = &self.whole_was_ready
                && self.conditions.borrow().values().all(Option::is_none)
            {
                note(whole);
            }
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
        assert_eq!(
            readiness.missing(),
            [Unmet { condition: "peers".into(), reason: "none connected".into() }]
        );
        readiness.set("peers", Ok(()));
        assert!(readiness.is_ready());
        readiness.clone().unmet("peers", "shard 2 is gone");
        assert_eq!(readiness.missing()[0].reason, "shard 2 is gone");
    }

    #[test]
    fn a_role_sees_its_own_conditions_and_the_process_those_of_all() {
        let process = Readiness::new(&[("roles", "starting")]);
        let worker = process.part("worker", &[("step", "no step yet")]);
        let shard = process.part("expert 3", &[("step", "no step yet"), ("weights", "loading")]);
        process.met("roles");
        worker.met("step");
        assert!(worker.is_ready() && worker.was_ready());
        assert!(!shard.is_ready() && !process.is_ready() && !process.was_ready());
        shard.met("weights");
        assert_eq!(shard.missing(), [Unmet { condition: "step".into(), reason: "no step yet".into() }]);
        assert_eq!(process.missing()[0].condition, "expert 3: step");
        shard.met("step");
        assert!(process.is_ready() && process.was_ready());
        shard.unmet("weights", "its compute thread is gone");
        assert!(worker.is_ready() && !process.is_ready() && process.was_ready());
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
