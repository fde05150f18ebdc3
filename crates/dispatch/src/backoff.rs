//! Bounded exponential back-off for reconnects.
//!
//! Deterministic: the jitter is derived from a salt (the member's or link's name), so that processes
//! which lose the same peer at the same moment do not return in step, and tests see fixed delays.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

/// First and largest delay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackoffPolicy {
    /// Delay after the first failure.
    pub first: Duration,
    /// No delay is longer (before jitter of at most a quarter).
    pub max: Duration,
}

impl Default for BackoffPolicy {
    /// 50 ms to 2 s: a restarted local process listens again after tens of milliseconds, and a peer that
    /// stays away costs one connection attempt in two seconds.
    fn default() -> Self {
        Self { first: Duration::from_millis(50), max: Duration::from_secs(2) }
    }
}

/// The state of one retry loop.
#[derive(Debug)]
pub struct Backoff {
    policy: BackoffPolicy,
    salt: u64,
    failures: u32,
}

impl Backoff {
    /// A loop that has not failed yet.
    pub fn new(policy: BackoffPolicy, salt: &impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        salt.hash(&mut hasher);
        Self { policy, salt: hasher.finish(), failures: 0 }
    }

    /// Forgets past failures.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// The delay after one more failure.
    pub fn next_delay(&mut self) -> Duration {
        let doublings = self.failures.min(16);
        self.failures = self.failures.saturating_add(1);
        let base = self.policy.first.saturating_mul(1 << doublings).min(self.policy.max);
        let mut hasher = DefaultHasher::new();
        (self.salt, self.failures).hash(&mut hasher);
        let quarter = base / 4;
        base + quarter.mul_f64((hasher.finish() >> 11) as f64 / (1_u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_bound_and_reset() {
        let policy = BackoffPolicy { first: Duration::from_millis(100), max: Duration::from_secs(1) };
        let mut backoff = Backoff::new(policy, &"a");
        let delays: Vec<_> = (0..40).map(|_| backoff.next_delay()).collect();
        for (i, delay) in delays.iter().enumerate() {
            let base = Duration::from_millis(100 << i.min(20)).min(policy.max);
            assert!(*delay >= base && *delay <= base + base / 4, "delay {i} is {delay:?}");
        }
        backoff.reset();
        assert!(backoff.next_delay() <= Duration::from_millis(125));
    }

    #[test]
    fn two_names_do_not_retry_in_step() {
        let mut a = Backoff::new(BackoffPolicy::default(), &"worker-a");
        let mut b = Backoff::new(BackoffPolicy::default(), &"worker-b");
        assert_ne!(a.next_delay(), b.next_delay());
    }
}
