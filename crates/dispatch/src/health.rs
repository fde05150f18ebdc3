//! What a dispatcher believes of each shard, and how it chooses among copies.
//!
//! Choice: the usable copy with the earliest expected finish, which is the shard's latency as far as it exceeds
//! the common one, plus its load times its service time per token. Load is our own outstanding tokens (counted
//! the moment a run is chosen) and what the shard last said of its queue, if that is not stale. Latency is the
//! round trip without what the shard says of queue and computation, so it has the network and every moment in
//! which the process does not run. Both times are decayed averages, and what is known of a shard fades when
//! nothing new is heard, so that one bad moment does not keep it without work for ever. Choice never changes
//! a bit of a result, only who computes it.
//!
//! Avoidance: a frame that takes many times what its peers' frames take, by work and latency, makes its shard
//! *avoided*: it gets only what no other usable copy can compute, until several probes in a row are answered
//! as fast as peers answer. So slowness never makes an expert unavailable, and a shard that runs by fits and
//! starts costs one such frame per return; returns become rarer while it goes on.
//!
//! Ejection: a failure of any retryable kind takes the shard out at once, because the pairs at hand must
//! go elsewhere now. It comes back through a probe, an empty frame that passes the shard's real queue and
//! costs no request anything. The first probe follows soon (later after a hang); a passed probe admits the
//! shard on probation: until it has computed a real frame, each further failure doubles the delay.
//! Time is passed in, so all of this is tested without waiting.

use std::time::{Duration, Instant};

mod choice;
mod speed;

pub use choice::{ChoiceRng, choose};
pub use speed::{Peers, Sample};

use speed::Speed;

/// Timing of ejection and trust in signals.
#[derive(Clone, Copy, Debug)]
pub struct HealthPolicy {
    /// Delay of the first probe after a refusal or a broken link.
    pub first_probe: Duration,
    /// Delay of the first probe after a time-out: a hung process rarely recovers in milliseconds.
    pub first_probe_after_hang: Duration,
    /// No probe is delayed longer.
    pub max_probe: Duration,
    /// A probe without an answer for this long has failed.
    pub probe_timeout: Duration,
    /// Age at which a shard's queue signal is ignored: older than a decode step it describes a queue
    /// that has since been worked off.
    pub signal_staleness: Duration,
    /// Time constant of the averages of latency and service time, and of their fading when nothing is heard.
    pub latency_decay: Duration,
    /// A frame is slow after this many times what its peers need for as much work.
    pub slow_factor: u32,
    /// Nothing is slow before this, on a machine with idle cores; see `slow_hiccups` for others.
    pub slow_floor: Duration,
    /// Nor before this many times the worst that is usual among the shards: where all cores are busy, every process
    /// waits for its time slice now and then, and a shard is slow against its peers, not against a clock.
    pub slow_hiccups: u32,
    /// How long the worst of a shard is remembered: many steps, so that it has one.
    pub hiccup_decay: Duration,
    /// Delay of the first probe of a shard that is avoided, doubled each time that it is avoided again.
    pub slow_probe: Duration,
    /// That delay is never longer: the cost of trying a shard that goes on and off is one slow frame per delay.
    pub max_slow_probe: Duration,
    /// Probes in a row that must be answered in time before a slow shard is like others again: what runs a
    /// fifth of the time passes this many by luck once in some hundreds of tries.
    pub slow_passes: u32,
    /// Between the probes of such a row, so that they meet different moments of whatever stops the shard.
    pub slow_probe_gap: Duration,
}

impl Default for HealthPolicy {
    fn default() -> Self {
        Self {
            first_probe: Duration::from_millis(5),
            first_probe_after_hang: Duration::from_millis(100),
            max_probe: Duration::from_secs(1),
            probe_timeout: Duration::from_secs(5),
            signal_staleness: Duration::from_millis(50),
            latency_decay: Duration::from_secs(1),
            slow_factor: 8,
            slow_floor: Duration::from_millis(10),
            slow_hiccups: 2,
            hiccup_decay: Duration::from_secs(10),
            slow_probe: Duration::from_millis(50),
            max_slow_probe: Duration::from_secs(5),
            slow_passes: 4,
            slow_probe_gap: Duration::from_millis(20),
        }
    }
}

/// Why a frame failed, as far as the shard's standing is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// The link broke or is down.
    Unreachable,
    /// No answer within the bound.
    TimedOut,
    /// A typed, retryable refusal.
    Refused,
    /// The answer does not fit the request.
    BadAnswer,
    /// The coordinator no longer lists the shard.
    Expired,
    /// Many times slower than its peers.
    Slow,
    /// Rows that are not finite, of a finite row.
    NotFinite,
}

impl Failure {
    /// Every kind, in the order of [`Failure::index`].
    pub const ALL: [Self; 7] = [
        Self::Unreachable,
        Self::TimedOut,
        Self::Refused,
        Self::BadAnswer,
        Self::Expired,
        Self::Slow,
        Self::NotFinite,
    ];

    /// Position in [`Failure::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// Name for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::TimedOut => "timed_out",
            Self::Refused => "refused",
            Self::BadAnswer => "bad_answer",
            Self::Expired => "expired",
            Self::Slow => "slow",
            Self::NotFinite => "not_finite",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Standing {
    Admitted,
    /// Slow: asked only for what nobody else has. `passed` probes in a row were answered in time.
    Avoided {
        next_probe: Instant,
        probing: bool,
        passed: u32,
    },
    Ejected {
        next_probe: Instant,
        probing: bool,
    },
}

/// One shard's standing with this dispatcher.
#[derive(Clone, Debug)]
pub struct ShardHealth {
    standing: Standing,
    /// Ejections since the last computed frame.
    streak: u32,
    /// Times that it was avoided without having been good for long in between.
    slow_streak: u32,
    /// When it was last like others again after it had been avoided.
    forgiven: Option<Instant>,
    /// Tokens (pairs) sent and not yet answered or given up.
    outstanding: u64,
    /// Tokens waiting at the shard, by its own word, and when it said so.
    queued: Option<(u32, Instant)>,
    speed: Option<Speed>,
}

impl Default for ShardHealth {
    fn default() -> Self {
        Self {
            standing: Standing::Admitted,
            streak: 0,
            slow_streak: 0,
            forgiven: None,
            outstanding: 0,
            queued: None,
            speed: None,
        }
    }
}

impl ShardHealth {
    /// Whether frames may go to it.
    pub fn admitted(&self) -> bool {
        !matches!(self.standing, Standing::Ejected { .. })
    }

    /// Whether frames go to it although others have the same experts.
    pub fn preferred(&self) -> bool {
        self.standing == Standing::Admitted
    }

    /// Tokens were sent.
    pub fn sent(&mut self, tokens: usize) {
        self.outstanding += tokens as u64;
    }

    /// Sent tokens were answered or given up.
    pub fn settled(&mut self, tokens: usize) {
        self.outstanding = self.outstanding.saturating_sub(tokens as u64);
    }

    /// Tokens sent and not settled.
    pub fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// A frame with pairs came back computed. That ends an ejection, but not slowness: only probes do.
    pub fn computed(&mut self, policy: &HealthPolicy, now: Instant, sample: Sample) {
        if !self.admitted() {
            self.standing = Standing::Admitted;
        }
        self.streak = 0;
        self.queued = Some((sample.queued, now));
        self.speed = Some(Speed::with(self.speed, sample, policy, now));
    }

    /// A frame failed. True if that ejected the shard, or made it avoided (it may have been so already).
    pub fn failed(&mut self, policy: &HealthPolicy, now: Instant, failure: Failure) -> bool {
        let first = match failure {
            Failure::Slow => return self.slow(policy, now),
            Failure::TimedOut => policy.first_probe_after_hang,
            // Link-up events bring the probe forward; a listed-no-more shard may well be alive.
            Failure::Unreachable
            | Failure::Refused
            | Failure::BadAnswer
            | Failure::Expired
            | Failure::NotFinite => policy.first_probe,
        };
        let was_admitted = self.admitted();
        if was_admitted {
            let delay = first.saturating_mul(1 << self.streak.min(16)).min(policy.max_probe);
            self.streak = self.streak.saturating_add(1);
            self.standing = Standing::Ejected { next_probe: now + delay, probing: false };
        }
        was_admitted
    }

    fn slow(&mut self, policy: &HealthPolicy, now: Instant) -> bool {
        if !self.preferred() {
            return false;
        }
        // Four of the longest delays without trouble: whatever it was is over.
        let good_for = self.forgiven.map(|since| now.saturating_duration_since(since));
        if good_for.is_none_or(|good_for| good_for >= policy.max_slow_probe * 4) {
            self.slow_streak = 0;
        }
        let next_probe = now + self.slow_delay(policy);
        self.slow_streak = self.slow_streak.saturating_add(1);
        self.standing = Standing::Avoided { next_probe, probing: false, passed: 0 };
        true
    }

    fn slow_delay(&self, policy: &HealthPolicy) -> Duration {
        policy.slow_probe.saturating_mul(1 << self.slow_streak.min(16)).min(policy.max_slow_probe)
    }

    /// It was taken out for nothing it did.
    pub fn absolve(&mut self) {
        if !self.admitted() {
            self.standing = Standing::Admitted;
        }
    }

    /// The link came up: probe now.
    pub fn link_up(&mut self, now: Instant) {
        if let Standing::Ejected { .. } = self.standing {
            self.standing = Standing::Ejected { next_probe: now, probing: false };
        }
    }

    /// When the next probe is due (or the one that is out is given up).
    pub fn next_probe(&self) -> Option<Instant> {
        match self.standing {
            Standing::Admitted => None,
            Standing::Avoided { next_probe, .. } | Standing::Ejected { next_probe, .. } => Some(next_probe),
        }
    }

    /// Takes the probe that is due, if one is.
    pub fn take_due_probe(&mut self, policy: &HealthPolicy, now: Instant) -> bool {
        match &mut self.standing {
            Standing::Ejected { next_probe, probing } if *next_probe <= now => {
                *next_probe = now + policy.probe_timeout;
                *probing = true;
                true
            }
            Standing::Avoided { next_probe, probing, passed } if *next_probe <= now => {
                // One that is given up has failed.
                *passed = if *probing { 0 } else { *passed };
                *next_probe = now + policy.probe_timeout;
                *probing = true;
                true
            }
            Standing::Ejected { .. } | Standing::Avoided { .. } | Standing::Admitted => false,
        }
    }

    /// A probe came back; `in_time` if as fast as peers answer. True if that made the shard like others again.
    pub fn probed(&mut self, policy: &HealthPolicy, now: Instant, passed: bool, in_time: bool) -> bool {
        match self.standing {
            Standing::Ejected { probing: true, .. } if passed => {
                self.standing = Standing::Admitted;
                true
            }
            Standing::Ejected { probing: true, .. } => {
                let delay = policy.first_probe.saturating_mul(1 << self.streak.min(16)).min(policy.max_probe);
                self.streak = self.streak.saturating_add(1);
                self.standing = Standing::Ejected { next_probe: now + delay, probing: false };
                false
            }
            Standing::Avoided { probing: true, passed: row, .. } if passed && in_time => {
                let row = row + 1;
                let back = row >= policy.slow_passes;
                self.standing = if back {
                    self.forgiven = Some(now);
                    // What it was like does not say what it is like.
                    self.speed = None;
                    Standing::Admitted
                } else {
                    let next_probe = now + policy.slow_probe_gap;
                    Standing::Avoided { next_probe, probing: false, passed: row }
                };
                back
            }
            Standing::Avoided { probing: true, .. } => {
                // `slow` has counted this time already.
                let delay = (self.slow_delay(policy) / 2).max(policy.slow_probe);
                self.standing = Standing::Avoided { next_probe: now + delay, probing: false, passed: 0 };
                false
            }
            Standing::Ejected { .. } | Standing::Avoided { .. } | Standing::Admitted => false,
        }
    }

    /// Tokens ahead of a new one: ours, and those of all workers as the shard last said.
    pub fn load(&self, policy: &HealthPolicy, now: Instant) -> u64 {
        let queued = match self.queued {
            Some((tokens, at)) if now.saturating_duration_since(at) <= policy.signal_staleness => {
                u64::from(tokens)
            }
            _ => 0,
        };
        self.outstanding + queued
    }
}

#[cfg(test)]
mod tests;
