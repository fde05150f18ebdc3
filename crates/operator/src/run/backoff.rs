//! Capped exponential back-off with jitter, for watches, failed reconciles, the lease and coordinator streams.
//!
//! An endless iterator: the caller decides when to give up. The jitter is up to a quarter, drawn once per instance,
//! so that the tasks which lost the same API server at the same moment do not return in step.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

/// The state of one retry loop.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    max: Duration,
    failures: u32,
    /// In 0..1: the part of a quarter that is added to every delay.
    jitter: f64,
}

impl Backoff {
    /// A loop that has not failed yet. No delay is longer than `max` and a quarter.
    pub(crate) fn new(first: Duration, max: Duration) -> Self {
        let jitter = RandomState::new().hash_one(0_u8) as f64 / u64::MAX as f64;
        Self { first, max, failures: 0, jitter }
    }

    /// Whatever needs the API server: one that restarts is found again within seconds.
    pub(crate) fn of_watch() -> Self {
        Self::new(Duration::from_millis(200), Duration::from_secs(5))
    }

    /// Reconciles in which something was refused: it will be again until somebody acts.
    pub(crate) fn of_reconcile() -> Self {
        Self::new(Duration::from_millis(200), Duration::from_secs(30))
    }

    /// Streams to a coordinator: a router that restarts is found again at once.
    pub(crate) fn of_stream() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(2))
    }

    /// The delay after one more failure.
    pub(crate) fn next_delay(&mut self) -> Duration {
        let delay = self.first.saturating_mul(1 << self.failures.min(16)).min(self.max);
        self.failures = self.failures.saturating_add(1);
        delay + (delay / 4).mul_f64(self.jitter)
    }

    /// Forgets past failures.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.next_delay())
    }
}

impl kube::runtime::utils::Backoff for Backoff {
    fn reset(&mut self) {
        Backoff::reset(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_bound_and_start_again_after_a_success() {
        let max = Duration::from_secs(1);
        let mut backoff = Backoff::new(Duration::from_millis(100), max);
        for i in 0..40_u32 {
            let base = Duration::from_millis(100 << i.min(10)).min(max);
            let delay = backoff.next_delay();
            assert!(delay >= base && delay <= base + base / 4, "delay {i} is {delay:?}");
        }
        backoff.reset();
        assert!(backoff.next_delay() <= Duration::from_millis(125));
    }
}
