//! How fast shards are, as decayed averages of what their frames said, and what is usual among them.

use std::time::{Duration, Instant};

use super::{HealthPolicy, ShardHealth};

/// What a computed frame says of its shard.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// From sending (or from when its answer was waited for, if that was later) to the answer.
    pub round_trip: Duration,
    /// Of it, what the shard measured: waiting for its computation.
    pub queue: Duration,
    /// And the computation.
    pub compute: Duration,
    /// Tokens (pairs) of the frame.
    pub tokens: usize,
    /// Tokens waiting at the shard when it answered.
    pub queued: u32,
}

/// Decayed averages of a shard's frames.
#[derive(Clone, Copy, Debug)]
pub(super) struct Speed {
    /// Seconds of the round trip that are neither queue nor computation.
    pub(super) latency: f64,
    /// Seconds of computation and tokens, both decayed: their ratio is the service time of a token.
    compute: f64,
    tokens: f64,
    /// Seconds that a frame took longer than its tokens need: the worst one, fading.
    worst: f64,
    at: Instant,
}

impl Speed {
    /// Takes a sample into the averages.
    pub(super) fn with(before: Option<Self>, sample: Sample, policy: &HealthPolicy, now: Instant) -> Self {
        let at_shard = sample.queue + sample.compute;
        let latency = sample.round_trip.saturating_sub(at_shard).as_secs_f64();
        let (compute, tokens) = (sample.compute.as_secs_f64(), sample.tokens as f64);
        let Some(before) = before else { return Self { latency, compute, tokens, worst: latency, at: now } };
        let delay = sample.round_trip.as_secs_f64() - before.service() * tokens;
        let age = now.saturating_duration_since(before.at).as_secs_f64();
        let remembered = (-age / policy.hiccup_decay.as_secs_f64()).exp();
        // A sample weighs a tenth at least, however quickly they come.
        let keep = before.fresh(policy, now).min(0.9);
        Self {
            latency: before.latency * keep + latency * (1.0 - keep),
            compute: before.compute * keep + compute,
            tokens: before.tokens * keep + tokens,
            worst: delay.max(before.worst * remembered),
            at: now,
        }
    }

    pub(super) fn service(&self) -> f64 {
        self.compute / self.tokens.max(f64::MIN_POSITIVE)
    }

    /// How much of what is known still holds.
    pub(super) fn fresh(&self, policy: &HealthPolicy, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.at).as_secs_f64();
        (-age / policy.latency_decay.as_secs_f64()).exp()
    }
}

/// What the shards of a cluster are like: the lower median over those that have computed something.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peers {
    /// Seconds of latency.
    latency: f64,
    /// Seconds per token.
    service: f64,
    /// Seconds that a frame is late at worst.
    worst: f64,
}

impl Peers {
    /// `None` while fewer than two shards have answered: there is nothing to compare.
    pub fn of(health: &[ShardHealth]) -> Option<Self> {
        let known: Vec<Speed> = health.iter().filter_map(|shard| shard.speed).collect();
        if known.len() < 2 {
            return None;
        }
        let lower_median = |of: fn(&Speed) -> f64| {
            let mut values: Vec<f64> = known.iter().map(of).collect();
            values.sort_unstable_by(f64::total_cmp);
            values[(values.len() - 1) / 2]
        };
        Some(Self {
            latency: lower_median(|speed| speed.latency),
            service: lower_median(Speed::service),
            worst: lower_median(|speed| speed.worst),
        })
    }

    /// After how long an answer is slow that waits for so many tokens.
    pub fn slow_after(&self, policy: &HealthPolicy, tokens: u64) -> Duration {
        // An hour is beyond every bound on a frame and far from overflow.
        let seconds = |seconds: f64| Duration::from_secs_f64(seconds.clamp(0.0, 3600.0));
        let work = self.service * tokens as f64;
        let usual = seconds(self.latency + work).saturating_mul(policy.slow_factor);
        let hiccups = seconds(self.worst).saturating_mul(policy.slow_hiccups) + seconds(work);
        usual.max(hiccups).max(policy.slow_floor)
    }
}
