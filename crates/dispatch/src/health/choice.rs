//! Which copy computes a run of tokens.

use std::time::Instant;

use cadre_types::placement::Replica;

use super::{HealthPolicy, ShardHealth, speed::Speed};

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

/// Service time of a token where nobody has measured one: load alone then decides.
const UNKNOWN_SERVICE: f64 = 1e-6;

/// Latencies up to so many times the lowest are the same: what the jitter of a healthy cluster looks like.
const LATENCY_JITTER: f64 = 2.0;

/// Picks the usable copy with the earliest expected finish for so many tokens, avoided ones only if there is no
/// other; `None` if no copy is usable.
pub fn choose(
    replicas: &[Replica],
    health: &[ShardHealth],
    usable: impl Fn(usize) -> bool,
    tokens: usize,
    policy: &HealthPolicy,
    now: Instant,
    rng: &mut ChoiceRng,
) -> Option<usize> {
    let shard_of = |at: usize| replicas[at].shard.index();
    let usable = |at: &usize| usable(shard_of(*at));
    let anyone_preferred = (0..replicas.len()).filter(usable).any(|at| health[shard_of(at)].preferred());
    let candidate = |at: &usize| usable(at) && (!anyone_preferred || health[shard_of(*at)].preferred());
    let candidates = || (0..replicas.len()).filter(candidate);
    let count = candidates().count();
    if count < 2 {
        return candidates().next();
    }
    let speeds = || candidates().filter_map(|at| health[shard_of(at)].speed);
    let least = |of: fn(&Speed) -> f64| speeds().map(|speed| of(&speed)).min_by(f64::total_cmp);
    let latency = least(|speed| speed.latency).unwrap_or(0.0);
    let service = least(Speed::service).filter(|service| *service > 0.0).unwrap_or(UNKNOWN_SERVICE);
    let finish = |at: usize| {
        let shard = &health[shard_of(at)];
        let work = (shard.load(policy, now) + tokens as u64) as f64;
        match shard.speed {
            None => work * service,
            Some(speed) => {
                let fresh = speed.fresh(policy, now);
                let late = (speed.latency - LATENCY_JITTER * latency).max(0.0) * fresh;
                late + work * (service + (speed.service() - service).max(0.0) * fresh)
            }
        }
    };
    // Equal ones take turns.
    let first = rng.below(count);
    let turn = candidates().skip(first).chain(candidates().take(first));
    turn.min_by(|a, b| finish(*a).total_cmp(&finish(*b)))
}
