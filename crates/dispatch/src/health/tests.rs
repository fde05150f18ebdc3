#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_types::{ShardIndex, SlotIndex, placement::Replica};

use super::*;

fn replicas(count: u16) -> Vec<Replica> {
    (0..count).map(|shard| Replica { shard: ShardIndex(shard), slot: SlotIndex(0) }).collect()
}

fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn sample(latency: Duration, queued: u32) -> Sample {
    let compute = Duration::from_micros(800);
    Sample { round_trip: latency + compute, compute, tokens: 8, queued, ..Sample::default() }
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
            8,
            &self.policy,
            self.now,
            &mut self.rng,
        )
    }

    /// A frame of 8 tokens at 100 us each came back after `latency` more than that.
    fn computed(&mut self, shard: usize, latency: Duration, queued: u32) {
        self.health[shard].computed(&self.policy, self.now, sample(latency, queued));
    }

    /// Sends runs of 8 tokens, one after the other, and says how many went to each shard.
    fn spread(&mut self, runs: usize) -> Vec<usize> {
        let mut counts = vec![0; self.health.len()];
        for _ in 0..runs {
            let chosen = self.choose().unwrap();
            self.health[chosen].sent(8);
            counts[chosen] += 1;
        }
        counts
    }

    fn slow(&mut self, shard: usize) -> bool {
        self.health[shard].failed(&self.policy, self.now, Failure::Slow)
    }

    /// Waits for the next probe and answers it. True if the shard is like others again.
    fn probe(&mut self, shard: usize, in_time: bool) -> bool {
        self.now = self.health[shard].next_probe().unwrap();
        assert!(self.health[shard].take_due_probe(&self.policy, self.now));
        self.health[shard].probed(&self.policy, self.now, true, in_time)
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
    bench.computed(1, millis(2), 90);
    assert_eq!(bench.choose(), Some(0), "90 tokens, 9 ms, wait at the faster one");
    bench.now += bench.policy.signal_staleness + millis(1);
    assert_eq!(bench.choose(), Some(1), "the signal is stale");
}

#[test]
fn load_goes_by_expected_finish_and_not_by_tokens() {
    // 20 ms more latency are 200 tokens of 100 us: 25 runs go to the other one first, and then they share.
    let mut bench = Bench::new(2);
    bench.computed(0, millis(20), 0);
    bench.computed(1, Duration::ZERO, 0);
    assert_eq!(bench.spread(25), [0, 25]);
    assert_eq!(bench.spread(20), [10, 10]);

    // Four times the service time is a fourth of the work.
    let mut bench = Bench::new(2);
    let compute = Duration::from_micros(3200);
    let slow = Sample { round_trip: compute, compute, tokens: 8, ..Sample::default() };
    bench.health[0].computed(&bench.policy, bench.now, slow);
    bench.computed(1, Duration::ZERO, 0);
    assert_eq!(bench.spread(100), [20, 80]);
}

#[test]
fn the_jitter_of_a_healthy_cluster_decides_nothing() {
    let mut bench = Bench::new(2);
    bench.computed(0, Duration::from_micros(190), 0);
    bench.computed(1, Duration::from_micros(100), 0);
    assert_eq!(bench.spread(100), [50, 50]);
}

#[test]
fn what_is_known_fades_so_that_one_bad_moment_is_not_for_ever() {
    let mut bench = Bench::new(2);
    bench.computed(0, millis(500), 0);
    bench.computed(1, millis(1), 0);
    assert_eq!(bench.spread(10), [0, 10]);
    bench.now += bench.policy.latency_decay * 20;
    assert_eq!(bench.choose(), Some(0));
}

#[test]
fn slow_is_many_times_what_peers_take_for_as_much_work() {
    let mut bench = Bench::new(3);
    bench.computed(0, millis(2), 0);
    assert_eq!(Peers::of(&bench.health), None, "nobody to compare with");
    bench.computed(1, millis(4), 0);
    bench.computed(2, millis(600), 0);
    let peers = Peers::of(&bench.health).unwrap();
    let policy = HealthPolicy::default();
    assert_eq!(peers.slow_after(&policy, 0), millis(32), "8 x the median latency");
    assert_eq!(peers.slow_after(&policy, 1000), millis(832), "and 8 x 1000 tokens of 100 us");
    let mut quick = Bench::new(2);
    (0..2).for_each(|shard| quick.computed(shard, Duration::ZERO, 0));
    assert_eq!(Peers::of(&quick.health).unwrap().slow_after(&policy, 1), policy.slow_floor);
}

/// Steps of 20 ms in which every shard answers a frame, each one late now and then.
fn busy(shards: usize, late: Duration) -> Bench {
    let mut bench = Bench::new(shards);
    for step in 0..60 {
        for shard in 0..shards {
            let held_up = (step + 3 * shard) % 12 == 0;
            bench.computed(shard, if held_up { late } else { Duration::from_micros(300) }, 0);
        }
        bench.now += millis(20);
    }
    bench
}

#[test]
fn on_a_machine_whose_cores_are_all_busy_a_late_frame_is_not_slow() {
    let policy = HealthPolicy::default();
    let bound = |bench: &Bench| Peers::of(&bench.health).unwrap().slow_after(&policy, 8);
    let idle = busy(4, Duration::from_micros(500));
    assert_eq!(bound(&idle), policy.slow_floor, "where nobody is late, a time slice or two is slow");
    for late in [millis(8), millis(15), millis(40)] {
        let busy = busy(4, late);
        assert!(bound(&busy) > late + late / 2, "{late:?} is usual here, slow is {:?}", bound(&busy));
    }
    // What stops for 60 ms of 75 among shards that are late by 15 ms is many times slower than they are.
    let mut bench = busy(4, millis(15));
    for _ in 0..60 {
        bench.computed(0, millis(60), 0);
        bench.now += millis(1);
    }
    assert!(bound(&bench) < millis(60), "{:?}", bound(&bench));
    // All of them are: then it is the machine.
    let all = busy(4, millis(60));
    assert!(bound(&all) > millis(60));
    // And it is forgotten.
    let mut calm = busy(4, millis(40));
    calm.now += policy.hiccup_decay * 5;
    (0..4).for_each(|shard| calm.computed(shard, Duration::from_micros(300), 0));
    assert_eq!(bound(&calm), policy.slow_floor);
}

#[test]
fn a_slow_shard_gets_only_what_nobody_else_has_until_it_proves_itself() {
    let mut bench = Bench::new(2);
    (0..2).for_each(|shard| bench.computed(shard, millis(1), 0));
    assert!(bench.slow(0));
    assert!(!bench.slow(0), "it is avoided already");
    assert_eq!(bench.spread(100), [0, 100]);
    assert!(bench.health[0].admitted(), "frames may go to it");
    assert_eq!(
        choose(&replicas(1), &bench.health, |_| true, 8, &bench.policy, bench.now, &mut bench.rng),
        Some(0)
    );
    bench.slow(1);
    assert!(bench.spread(100)[0] > 0, "nobody is better");
    // A late answer says nothing good.
    bench.computed(0, millis(500), 0);
    assert!(!bench.health[0].preferred());
    // Three in time, one late: from the start.
    for in_time in [true, true, true, false, true, true, true] {
        assert!(!bench.probe(0, in_time));
    }
    assert!(bench.probe(0, true));
    assert!(bench.health[0].preferred());
}

#[test]
fn a_shard_that_is_slow_again_and_again_is_tried_less_and_less() {
    let mut bench = Bench::new(2);
    let mut delays = Vec::new();
    for _ in 0..12 {
        assert!(bench.slow(0));
        delays.push(bench.health[0].next_probe().unwrap() - bench.now);
        while !bench.probe(0, true) {}
    }
    assert_eq!(&delays[..3], &[millis(50), millis(100), millis(200)]);
    assert_eq!(delays[11], bench.policy.max_slow_probe);
    bench.now += bench.policy.max_slow_probe * 4;
    bench.slow(0);
    assert_eq!(bench.health[0].next_probe().unwrap() - bench.now, millis(50), "it was good for long");
}

#[test]
fn a_slow_shard_that_fails_is_taken_out() {
    let mut bench = Bench::new(2);
    bench.slow(0);
    assert!(bench.health[0].failed(&bench.policy, bench.now, Failure::Unreachable));
    assert!(!bench.health[0].admitted());
    assert!(!bench.slow(0), "slower than out there is nothing");
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
    assert!(bench.health[0].probed(&policy, bench.now, true, true));
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
        assert!(health.probed(&policy, now, true, true));
    }
    assert_eq!(&delays[..3], &[millis(5), millis(10), millis(20)]);
    assert_eq!(delays[11], policy.max_probe);
    health.computed(&policy, now, sample(millis(1), 0));
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
    assert!(!health.probed(&policy, now, false, true));
    assert!(!health.probed(&policy, now, true, true), "a late answer of the first does not count");
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
