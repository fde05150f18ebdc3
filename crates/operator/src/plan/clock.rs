//! Time in a plan: ages of what is observed, and when to look again.
//!
//! A plan has no clock; it has the time of observation. Whoever asks whether something is old enough and hears
//! no has asked, by that, to be called again when it will be: [`Clock::next`].

use std::{cell::Cell, time::Duration};

use k8s_openapi::jiff::Timestamp;

/// The time of observation.
#[derive(Debug)]
pub(super) struct Clock {
    now: Timestamp,
    next: Cell<Option<Duration>>,
}

impl Clock {
    pub(super) fn new(now: Timestamp) -> Self {
        Self { now, next: Cell::new(None) }
    }

    pub(super) fn now(&self) -> Timestamp {
        self.now
    }

    /// Whether so much time has passed since then. A time in the future is taken for the present: clocks of
    /// machines differ.
    pub(super) fn passed(&self, since: Timestamp, bound: Duration) -> bool {
        let age = u64::try_from(self.now.duration_since(since).as_millis()).unwrap_or(0);
        let left = bound.saturating_sub(Duration::from_millis(age));
        if left.is_zero() {
            return true;
        }
        self.next.set(Some(self.next.get().map_or(left, |next| next.min(left))));
        false
    }

    /// When the first of the things asked for will be old enough.
    pub(super) fn next(&self) -> Option<Duration> {
        self.next.get()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn what_is_too_young_asks_for_another_look() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let clock = Clock::new(at(100));
        assert!(clock.passed(at(90), Duration::from_secs(10)));
        assert_eq!(clock.next(), None);
        assert!(!clock.passed(at(95), Duration::from_secs(15)));
        assert!(!clock.passed(at(99), Duration::from_secs(3)));
        assert!(!clock.passed(at(500), Duration::from_secs(60)), "a clock that runs ahead");
        assert_eq!(clock.next(), Some(Duration::from_secs(2)));
    }
}
