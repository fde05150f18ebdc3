//! What a dispatcher believes of each shard, and how it chooses among copies.
//!
//! Choice: power of two choices. Two random usable copies are compared by load (our own outstanding
//! tokens, counted the moment a run is chosen, plus what the shard last said of its queue, if that is not
//! stale), then by decayed latency. Choice never changes a bit of a result, only who computes it.
//!
//! Ejection: a failure of any retryable kind takes the shard out at once, because the pairs at hand must
//! go elsewhere now. It comes back through a probe, an empty frame that passes the shard's real queue and
//! costs no request anything. The first probe follows soon (later after a hang); a passed probe admits the
//! shard on probation: until it has computed a real frame, each further failure doubles the delay.
//! Time is passed in, so all of this is tested without waiting.

use std::time::{Duration, Instant};

use cadre_types::placement::Replica;

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
    /// Time constant of the latency average.
    pub latency_decay: Duration,
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
}

impl Failure {
    /// Every kind, in the order of [`Failure::index`].
    pub const ALL: [Self; 5] =
        [Self::Unreachable, Self::TimedOut, Self::Refused, Self::BadAnswer, Self::Expired];

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
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Standing {
    Admitted,
    Ejected { next_probe: Instant, probing: bool },
}

/// One shard's standing with this dispatcher.
#[derive(Clone, Debug)]
pub struct ShardHealth {
    standing: Standing,
    /// Ejections since the last computed frame.
    streak: u32,
    /// Tokens (pairs) sent and not yet answered or given up.
    outstanding: u64,
    /// Tokens waiting at the shard, by its own word, and when it said so.
    queued: Option<(u32, Instant)>,
    /// Decayed round trip in seconds, and when it was last updated.
    latency: Option<(f64, Instant)>,
}

impl Default for ShardHealth {
    fn default() -> Self {
        Self { standing: Standing::Admitted, streak: 0, outstanding: 0, queued: None, latency: None }
    }
}

impl ShardHealth {
    /// Whether frames may go to it.
    pub fn admitted(&self) -> bool {
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

    /// A frame with pairs came back computed.
    pub fn computed(&mut self, policy: &HealthPolicy, now: Instant, round_trip: Duration, queued: u32) {
        self.standing = Standing::Admitted;
        self.streak = 0;
        self.queued = Some((queued, now));
        let sample = round_trip.as_secs_f64();
        let average = match self.latency {
            None => sample,
            Some((average, at)) => {
                let age = now.saturating_duration_since(at).as_secs_f64();
                let keep = (-age / policy.latency_decay.as_secs_f64()).exp().min(0.9);
                average * keep + sample * (1.0 - keep)
            }
        };
        self.latency = Some((average, now));
    }

    /// A frame failed. True if that ejected the shard (it may have been out already).
    pub fn failed(&mut self, policy: &HealthPolicy, now: Instant, failure: Failure) -> bool {
        let first = match failure {
            Failure::TimedOut => policy.first_probe_after_hang,
            // Link-up events bring the probe forward; a listed-no-more shard may well be alive.
            Failure::Unreachable | Failure::Refused | Failure::BadAnswer | Failure::Expired => {
                policy.first_probe
            }
        };
        let was_admitted = self.admitted();
        if was_admitted {
            let delay = first.saturating_mul(1 << self.streak.min(16)).min(policy.max_probe);
            self.streak = self.streak.saturating_add(1);
            self.standing = Standing::Ejected { next_probe: now + delay, probing: false };
        }
        was_admitted
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
            Standing::Ejected { next_probe, .. } => Some(next_probe),
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
            Standing::Ejected { .. } | Standing::Admitted => false,
        }
    }

    /// A probe came back. True if it admitted the shard.
    pub fn probed(&mut self, policy: &HealthPolicy, now: Instant, passed: bool) -> bool {
        let Standing::Ejected { probing: true, .. } = self.standing else { return false };
        if passed {
            self.standing = Standing::Admitted;
        } else {
            let delay = policy.first_probe.saturating_mul(1 << self.streak.min(16)).min(policy.max_probe);
            self.streak = self.streak.saturating_add(1);
            self.standing = Standing::Ejected { next_probe: now + delay, probing: false };
        }
        passed
    }

    fn load(&self, policy: &HealthPolicy, now: Instant) -> u64 {
        let queued = match self.queued {
            Some((tokens, at)) if now.saturating_duration_since(at) <= policy.signal_staleness => {
                u64::from(tokens)
            }
            _ => 0,
        };
        self.outstanding + queued
    }

    fn latency(&self) -> f64 {
        self.latency.map_or(0.0, |(average, _)| average)
    }
}

/// Random numbers of the chooser (splitmix64). They decide who computes, never what.
#[derive(Clone, Debug)]
pub struct ChoiceRng(u64);

impl ChoiceRng {
    /// A generator; dispatchers use different seeds so that they do not choose alike.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((u128::from(z ^ (z >> 31)) * limit as u128) >> 64) as usize
    }
}

/// Picks one usable copy by power of two choices; `None` if no copy is usable.
pub fn choose(
    replicas: &[Replica],
    health: &[ShardHealth],
    usable: impl Fn(usize) -> bool,
    policy: &HealthPolicy,
    now: Instant,
    rng: &mut ChoiceRng,
) -> Option<usize> {
    let usable = |at: &usize| usable(replicas[*at].shard.index());
    let count = (0..replicas.len()).filter(usable).count();
    let nth = |n: usize| (0..replicas.len()).filter(usable).nth(n);
    if count < 2 {
        return nth(0);
    }
    let first = rng.below(count);
    let second = (first + 1 + rng.below(count - 1)) % count;
    let (first, second) = (nth(first)?, nth(second)?);
    let rank = |at: usize| {
        let shard = &health[replicas[at].shard.index()];
        (shard.load(policy, now), shard.latency())
    };
    let (a, b) = (rank(first), rank(second));
    let second_wins = b.0 < a.0 || (b.0 == a.0 && b.1 < a.1);
    Some(if second_wins { second } else { first })
}

#[cfg(test)]
mod tests;
