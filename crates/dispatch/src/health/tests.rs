#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_types::{ShardIndex, SlotIndex};

use super::*;

fn replicas(count: u16) -> Vec<Replica> {
    (0..count).map(|shard| Replica { shard: ShardIndex(shard), slot: SlotIndex(0) }).collect()
}

fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

struct Bench {
    policy: HealthPolicy,
    now: Instant,
    rng: ChoiceRng,
    health: Vec<ShardHealth>,
}

impl Bench {
    fn new(shards: usize) -> Self {
        Self {
            policy: HealthPolicy::default(),
            now: Instant::now(),
            rng: ChoiceRng::new(1),
            health: vec![ShardHealth::default(); shards],
        }
    }

    fn choose(&mut self) -> Option<usize> {
        let health = &self.health;
        choose(
            &replicas(health.len() as u16),
            health,
            |shard| health[shard].admitted(),
            &self.policy,
            self.now,
            &mut self.rng,
        )
    }

    fn computed(&mut self, shard: usize, round_trip: Duration, queued: u32) {
        self.health[shard].computed(&self.policy, self.now, round_trip, queued);
    }
}

#[test]
fn two_copies_share_tokens_evenly() {
    let mut bench = Bench::new(2);
    for _ in 0..100 {
        let chosen = bench.choose().unwrap();
        bench.health[chosen].sent(8);
    }
    assert_eq!(bench.health[0].outstanding(), 400);
    assert_eq!(bench.health[1].outstanding(), 400);
}

#[test]
fn of_many_copies_the_fullest_is_never_much_fuller_than_the_mean() {
    let mut bench = Bench::new(8);
    for _ in 0..8000 {
        let chosen = bench.choose().unwrap();
        bench.health[chosen].sent(1);
    }
    let fullest = bench.health.iter().map(ShardHealth::outstanding).max().unwrap();
    assert!(fullest < 1010, "two choices keep 8000 tokens on 8 copies within 1 %: {fullest}");
}

#[test]
fn equal_load_goes_to_the_faster_and_a_fresh_queue_signal_counts() {
    let mut bench = Bench::new(2);
    bench.computed(0, millis(9), 0);
    bench.computed(1, millis(2), 0);
    assert_eq!(bench.choose(), Some(1));
    bench.computed(1, millis(2), 50);
    assert_eq!(bench.choose(), Some(0), "50 tokens wait at the faster one");
    bench.now += bench.policy.signal_staleness + millis(1);
    assert_eq!(bench.choose(), Some(1), "the signal is stale");
}

#[test]
fn latency_follows_recent_samples() {
    let mut bench = Bench::new(2);
    bench.computed(0, millis(1), 0);
    bench.computed(1, millis(2), 0);
    bench.now += millis(10_000);
    bench.computed(0, millis(10), 0);
    bench.now += millis(100);
    assert_eq!(bench.choose(), Some(1));
}

#[test]
fn a_failure_ejects_and_only_a_probe_readmits() {
    let mut bench = Bench::new(2);
    let policy = bench.policy;
    assert!(bench.health[0].failed(&policy, bench.now, Failure::Refused));
    assert!(!bench.health[0].failed(&policy, bench.now, Failure::Refused), "is out already");
    for _ in 0..10 {
        assert_eq!(bench.choose(), Some(1));
    }
    assert!(!bench.health[0].take_due_probe(&policy, bench.now));
    bench.now += policy.first_probe;
    assert!(bench.health[0].take_due_probe(&policy, bench.now));
    assert!(!bench.health[0].take_due_probe(&policy, bench.now), "one probe at a time");
    assert!(bench.health[0].probed(&policy, bench.now, true));
    assert!(bench.health[0].admitted());
}

#[test]
fn failures_on_probation_double_the_delay_up_to_the_bound() {
    let policy = HealthPolicy::default();
    let (mut now, mut health) = (Instant::now(), ShardHealth::default());
    let mut delays = Vec::new();
    for _ in 0..12 {
        assert!(health.failed(&policy, now, Failure::Refused));
        let due = health.next_probe().unwrap();
        delays.push(due - now);
        now = due;
        assert!(health.take_due_probe(&policy, now));
        assert!(health.probed(&policy, now, true));
    }
    assert_eq!(&delays[..3], &[millis(5), millis(10), millis(20)]);
    assert_eq!(delays[11], policy.max_probe);
    health.computed(&policy, now, millis(1), 0);
    health.failed(&policy, now, Failure::Refused);
    assert_eq!(health.next_probe().unwrap() - now, policy.first_probe, "a computed frame forgives");
}

#[test]
fn an_unanswered_or_failed_probe_is_followed_by_another() {
    let policy = HealthPolicy::default();
    let (mut now, mut health) = (Instant::now(), ShardHealth::default());
    health.failed(&policy, now, Failure::TimedOut);
    assert_eq!(health.next_probe().unwrap() - now, policy.first_probe_after_hang);
    now += policy.first_probe_after_hang;
    assert!(health.take_due_probe(&policy, now));
    now += policy.probe_timeout;
    assert!(health.take_due_probe(&policy, now), "the first is given up");
    assert!(!health.probed(&policy, now, false));
    assert!(!health.probed(&policy, now, true), "a late answer of the first does not count");
    assert!(!health.admitted());
    health.link_up(now);
    assert!(health.take_due_probe(&policy, now), "a new link is probed at once");
}

#[test]
fn with_no_usable_copy_there_is_no_choice() {
    let mut bench = Bench::new(2);
    for shard in 0..2 {
        let (policy, now) = (bench.policy, bench.now);
        bench.health[shard].failed(&policy, now, Failure::Unreachable);
    }
    assert_eq!(bench.choose(), None);
}
