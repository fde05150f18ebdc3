#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_placement::{ExpertLoad, LayerLoad};
use cadre_types::{LayerId, LogicalExpert};
use proptest::prelude::*;

use super::*;

const WAIT: Duration = Duration::from_secs(15);

fn planner() -> Planner {
    let layer = |layer| LayerLoad { layer: LayerId(layer), tokens: vec![1; 8] };
    Planner::for_load(ExpertLoad::new(vec![layer(1), layer(2)]).unwrap())
}

fn layout(shards: u16) -> Layout {
    Layout { shards, redundant_slots: 8, min_copies: 2 }
}

/// Shards `0..count`, each holding these placements.
fn holding(count: u16, stamps: &[Stamp]) -> Facts {
    let known = ShardFacts { held: stamps.to_vec(), domain: None, domain_settled: true };
    Facts { shards: (0..count).map(|shard| (shard, known.clone())).collect(), workers: Vec::new() }
}

fn stamp(placement: &Placement) -> Stamp {
    Stamp::of(placement)
}

/// With the layout in force from the start, as under `cadre up`.
fn started(shards: u16, now: Instant) -> Layouts {
    let mut layouts = Layouts::new(planner(), layout(shards), Duration::ZERO);
    assert_eq!(layouts.advance(now, &Facts::default()), [Change::InForce, Change::Settled][..1]);
    layouts
}

fn epochs(layouts: &Layouts) -> (u64, Option<u64>, u64) {
    (layouts.epoch().0, layouts.next().map(|next| next.epoch().0), layouts.oldest().0)
}

#[tokio::test(start_paused = true)]
async fn a_change_of_layout_step_by_step() {
    let now = Instant::now();
    let mut layouts = started(4, now);
    let one = stamp(layouts.in_force().unwrap());
    assert!(layouts.is_settled());
    layouts.want(layout(8));
    assert_eq!(layouts.known_shards(), 8, "new shards may register");
    assert_eq!(layouts.advance(now, &holding(4, &[one])), []);
    let waiting = layouts.waiting_for(now, &holding(4, &[one])).unwrap();
    assert_eq!(waiting, "shards 4, 5, 6, 7 have not registered");

    assert_eq!(layouts.advance(now, &holding(8, &[one])), [Change::Planned]);
    assert_eq!(epochs(&layouts), (1, Some(2), 1));
    let two = stamp(layouts.next().unwrap());
    let mut facts = holding(8, &[one, two]);
    facts.shards.get_mut(&5).unwrap().held = vec![one];
    facts.workers = vec![PlacementEpoch(1), PlacementEpoch(1)];
    assert_eq!(layouts.advance(now, &facts), []);
    assert_eq!(layouts.waiting_for(now, &facts).unwrap(), "shard 5 has not loaded the experts of epoch 2");
    assert_eq!(layouts.prepared(&facts), (7, 8));
    // It dies on the way: waited for, and nothing else changes.
    facts.shards.remove(&5);
    assert_eq!(layouts.advance(now, &facts), []);
    assert_eq!(epochs(&layouts), (1, Some(2), 1));

    facts.shards = holding(8, &[one, two]).shards;
    assert_eq!(layouts.advance(now, &facts), [Change::InForce]);
    assert_eq!(epochs(&layouts), (2, None, 1));
    assert_eq!((layouts.layout(), layouts.is_settled()), (layout(8), false));
    assert_eq!(layouts.waiting_for(now, &facts).unwrap(), "2 workers have not taken up epoch 2");
    facts.workers[0] = PlacementEpoch(2);
    assert_eq!(layouts.advance(now, &facts), []);
    facts.workers[1] = PlacementEpoch(2);
    assert_eq!(layouts.advance(now, &facts), [Change::Settled]);
    assert_eq!(epochs(&layouts), (2, None, 2));
    assert_eq!(layouts.waiting_for(now, &facts), None);
}

/// Shards on these nodes, each holding these placements.
fn on_nodes(nodes: &[&str], stamps: &[Stamp]) -> Facts {
    let mut facts = holding(nodes.len() as u16, stamps);
    for (shard, node) in facts.shards.values_mut().zip(nodes) {
        shard.domain = Some((*node).to_owned());
    }
    facts
}

#[tokio::test(start_paused = true)]
async fn copies_move_apart_when_their_shards_have_moved_together_and_stay() {
    let now = Instant::now();
    let mut layouts = Layouts::new(planner(), layout(4), WAIT);
    layouts.advance(now, &on_nodes(&["a", "b", "c", "a"], &[]));
    let one = stamp(layouts.in_force().unwrap());
    let before = on_nodes(&["a", "b", "c", "a"], &[one]);
    for passed in [Duration::ZERO, CALM, 2 * CALM] {
        assert_eq!(layouts.advance(now + passed, &before), [], "as planned");
    }
    // Shard 3 is replaced and lands beside shard 1. Only when it has been there for a while anything moves.
    let mut away = before.clone();
    away.shards.remove(&3);
    let moved = on_nodes(&["a", "b", "c", "b"], &[one]);
    let begun = now + 3 * CALM;
    assert_eq!(layouts.advance(begun, &away), []);
    assert_eq!(layouts.advance(begun, &moved), []);
    assert_eq!(layouts.wake(begun), Some(begun + CALM));
    assert_eq!(layouts.waiting_for(begun, &moved), None);
    // Away and back again: from the start.
    let again = begun + CALM / 2;
    layouts.advance(again, &away);
    layouts.advance(again, &moved);
    assert_eq!(layouts.advance(begun + CALM, &moved), []);
    assert_eq!(layouts.advance(again + CALM, &moved), [Change::Planned]);
    assert_eq!(epochs(&layouts), (1, Some(2), 1));
    let two = stamp(layouts.next().unwrap());
    let prepared = on_nodes(&["a", "b", "c", "b"], &[one, two]);
    let done = again + 2 * CALM;
    assert_eq!(layouts.advance(done, &prepared), [Change::InForce, Change::Settled]);
    for passed in [Duration::ZERO, CALM, 2 * CALM] {
        assert_eq!(layouts.advance(done + passed, &on_nodes(&["a", "b", "c", "b"], &[two])), []);
    }
    assert!(layouts.is_settled());
}

#[tokio::test(start_paused = true)]
async fn the_newest_layout_wins_and_no_number_is_used_twice() {
    let now = Instant::now();
    let mut layouts = started(4, now);
    let one = stamp(layouts.in_force().unwrap());
    let mut planned = Vec::new();
    for shards in [8, 5, 8] {
        layouts.want(layout(shards));
        layouts.advance(now, &holding(8, &[one]));
        planned.push(stamp(layouts.next().unwrap()));
    }
    assert_eq!(planned.iter().map(|stamp| stamp.epoch.0).collect::<Vec<_>>(), [2, 3, 4]);
    assert_eq!(planned[0].digest, planned[2].digest, "the same plan, and still another number");
    // What was prepared under the first number does not count for the third.
    assert_eq!(layouts.advance(now, &holding(8, &[one, planned[0]])), []);
    // Back to what is in force: nothing to do.
    layouts.want(layout(4));
    assert_eq!(layouts.advance(now, &holding(8, &[one])), [Change::GivenUp]);
    assert_eq!(epochs(&layouts), (1, None, 1));
    assert!(layouts.is_settled());
}

#[tokio::test(start_paused = true)]
async fn a_layout_that_cannot_be_planned_says_why_and_changes_nothing() {
    let now = Instant::now();
    let mut layouts = started(4, now);
    let one = stamp(layouts.in_force().unwrap());
    layouts.want(Layout { shards: 4, redundant_slots: 8, min_copies: 3 });
    let facts = holding(4, &[one]);
    assert_eq!(layouts.advance(now, &facts), []);
    let why = layouts.waiting_for(now, &facts).unwrap();
    assert!(why.contains("3 copies of each of 8 experts need 3 shards and 16 redundant slots"), "{why}");
    assert_eq!(epochs(&layouts), (1, None, 1));
}

#[tokio::test(start_paused = true)]
async fn the_first_plan_waits_for_shards_and_domains_within_a_bound() {
    let start = Instant::now();
    let fresh = || Layouts::new(planner(), layout(4), WAIT);
    let mut layouts = fresh();
    assert_eq!(layouts.advance(start, &Facts::default()), []);
    assert_eq!(layouts.wake(start), None, "alone it waits for ever");
    assert_eq!(layouts.advance(start, &holding(3, &[])), []);
    assert_eq!(layouts.wake(start), Some(start + WAIT));
    // All are there and their domains known: no need to wait.
    let mut facts = holding(4, &[]);
    for (shard, known) in &mut facts.shards {
        known.domain = Some(format!("zone-{}", shard / 2));
    }
    assert_eq!(layouts.advance(start, &facts), [Change::InForce]);
    let placement = layouts.in_force().unwrap();
    for layer in placement.layers() {
        for expert in (0..8).map(LogicalExpert) {
            let zones = placement.replicas(layer.layer, expert).iter().map(|copy| copy.shard.0 / 2);
            assert_eq!(zones.collect::<std::collections::BTreeSet<_>>().len(), 2, "{expert}");
        }
    }
    // One domain stays unknown, or a shard away: planned with what is known after the bound.
    for facts in [holding(3, &[]), {
        let mut facts = holding(4, &[]);
        facts.shards.get_mut(&2).unwrap().domain_settled = false;
        facts
    }] {
        let mut layouts = fresh();
        assert_eq!(layouts.advance(start, &facts), []);
        assert_eq!(layouts.advance(start + WAIT - Duration::from_millis(1), &facts), []);
        assert_eq!(layouts.advance(start + WAIT, &facts), [Change::InForce]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_restart_takes_over_what_members_have_and_moves_nothing() {
    let now = Instant::now();
    let reported = planner().plan(layout(4), &[], PlacementEpoch(7)).unwrap();
    for wait in [Duration::ZERO, WAIT] {
        let mut layouts = Layouts::new(planner(), layout(4), wait);
        layouts.advance(now, &Facts::default());
        assert!(layouts.adopt(now, stamp(&reported), Some(&reported), Holders::default()));
        let taken = layouts.in_force().unwrap().clone();
        assert_eq!(*taken, reported);
        let mut facts = holding(4, &[stamp(&reported)]);
        facts.workers = vec![PlacementEpoch(7)];
        layouts.advance(now, &facts);
        layouts.advance(now + SETTLE, &facts);
        assert!(Arc::ptr_eq(layouts.in_force().unwrap(), &taken));
        assert_eq!((layouts.next(), layouts.is_settled()), (None, true));
    }
}

#[tokio::test(start_paused = true)]
async fn a_restart_with_another_layout_begins_with_the_old_one_and_changes_live() {
    let now = Instant::now();
    let reported = planner().plan(layout(4), &[], PlacementEpoch(7)).unwrap();
    let mut layouts = Layouts::new(planner(), layout(8), WAIT);
    layouts.adopt(now, stamp(&reported), Some(&reported), Holders::default());
    assert_eq!(layouts.layout(), layout(4));
    let facts = holding(8, &[stamp(&reported)]);
    assert_eq!(layouts.advance(now, &facts), [], "members of a later epoch may be on their way");
    assert_eq!(layouts.oldest(), PlacementEpoch(0), "nothing is dropped");
    let later = planner().plan(layout(5), &[], PlacementEpoch(9)).unwrap();
    assert!(layouts.adopt(now, stamp(&later), Some(&later), Holders::default()), "the highest epoch wins");
    assert!(!layouts.adopt(now, stamp(&reported), Some(&reported), Holders::default()));
    assert_eq!(layouts.wake(now), Some(now + SETTLE));
    let facts = holding(8, &[stamp(&later)]);
    let changes = layouts.advance(now + SETTLE, &facts);
    assert_eq!(changes, [Change::Planned, Change::Settled]);
    assert_eq!(epochs(&layouts), (9, Some(10), 9));
}

#[tokio::test(start_paused = true)]
async fn a_placement_of_another_model_is_not_taken_over_and_its_epoch_is_passed() {
    let now = Instant::now();
    let slots = vec![vec![LogicalExpert(0)]];
    let layers = vec![cadre_types::LayerPlacement { layer: LayerId(1), slots }];
    let strange = Placement::new(PlacementEpoch(5), 1, layers).unwrap();
    let mut layouts = started(4, now);
    assert!(layouts.adopt(now, stamp(&strange), Some(&strange), Holders::default()));
    assert_eq!(epochs(&layouts), (6, None, 1));
    let mut waiting = Layouts::new(planner(), layout(4), WAIT);
    assert!(!waiting.adopt(now, stamp(&strange), Some(&strange), Holders::default()));
    waiting.advance(now, &holding(4, &[]));
    assert_eq!(waiting.epoch(), PlacementEpoch(6), "numbers above all that were seen");
}

#[tokio::test(start_paused = true)]
async fn an_old_placement_does_not_come_back_after_a_change() {
    let now = Instant::now();
    let mut layouts = started(4, now);
    let first = layouts.in_force().unwrap().clone();
    layouts.want(layout(8));
    layouts.advance(now, &holding(8, &[stamp(&first)]));
    let two = stamp(layouts.next().unwrap());
    layouts.advance(now, &holding(8, &[stamp(&first), two]));
    assert_eq!(layouts.epoch(), PlacementEpoch(2));
    // A worker that reconnects has still applied the first one.
    assert!(!layouts.adopt(now, stamp(&first), Some(&first), Holders::default()));
    assert_eq!(layouts.epoch(), PlacementEpoch(2));
}

#[tokio::test(start_paused = true)]
async fn what_is_held_gives_way_to_more_shards_only_and_to_nobody_later() {
    let now = Instant::now();
    let held = planner().plan(layout(4), &[], PlacementEpoch(7)).unwrap();
    let other = |epoch| planner().plan(layout(5), &[], PlacementEpoch(epoch)).unwrap();
    let holders = |reported, in_force| Holders { reported, in_force };
    let report = |at: Instant, epoch, holders| {
        let mut layouts = Layouts::new(planner(), layout(4), WAIT);
        layouts.adopt(now, stamp(&held), Some(&held), Holders::default());
        let other = other(epoch);
        layouts.adopt(at, stamp(&other), Some(&other), holders);
        (layouts.in_force().unwrap().num_shards(), layouts.epoch().0)
    };
    assert_eq!(report(now, 9, holders(1, 1)), (5, 9), "the later of two");
    assert_eq!(report(now, 9, holders(0, 1)), (4, 10), "a worker's word against a shard's");
    assert_eq!(report(now, 3, holders(2, 1)), (5, 8), "more shards, and a number that is new");
    assert_eq!(report(now, 3, holders(1, 1)), (4, 7));
    assert_eq!(report(now + SETTLE, 9, holders(4, 0)), (4, 10), "too late for anybody");

    // What has come into force here is confirmed at once.
    let mut layouts = started(4, now);
    let one = stamp(layouts.in_force().unwrap());
    layouts.want(layout(8));
    layouts.advance(now, &holding(8, &[one]));
    let two = stamp(layouts.next().unwrap());
    layouts.advance(now, &holding(8, &[one, two]));
    let other = other(9);
    layouts.adopt(now, stamp(&other), Some(&other), holders(5, 0));
    assert_eq!((layouts.in_force().unwrap().num_shards(), layouts.epoch().0), (8, 10));
}

/// What may happen, in any order.
#[derive(Clone, Debug)]
enum Event {
    Want(u16),
    /// A shard prepares whatever is asked of it.
    Prepare(u16),
    /// A shard's process is replaced: it holds nothing but what it loads for the view.
    Restart(u16),
    /// A worker takes up what is in force.
    Apply(usize),
    Wait,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (1u16..9).prop_map(Event::Want),
        (0u16..8).prop_map(Event::Prepare),
        (0u16..8).prop_map(Event::Restart),
        (0usize..3).prop_map(Event::Apply),
        Just(Event::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    /// Whatever happens in whatever order: an epoch is one placement for ever; what comes into force is
    /// held by all of its shards; what a worker may still use is not dropped; and when everybody does what
    /// is asked, the layout wanted last is in force and nothing else is left.
    #[test]
    fn any_order_of_events_is_safe_and_ends_in_the_layout_wanted_last(
        events in prop::collection::vec(event(), 0..60),
    ) {
        let start = Instant::from_std(std::time::Instant::now());
        let mut layouts = Layouts::new(planner(), layout(4), Duration::ZERO);
        layouts.advance(start, &Facts::default());
        let mut meaning: BTreeMap<u64, u64> = BTreeMap::new();
        let mut facts = holding(8, &[]);
        facts.workers = vec![PlacementEpoch(1); 3];
        let asked = |layouts: &Layouts| -> Vec<Arc<Placement>> {
            [layouts.in_force().cloned(), layouts.next().cloned()].into_iter().flatten().collect()
        };
        let prepare = |layouts: &Layouts, facts: &mut Facts, shard: u16| {
            let held = asked(layouts).iter().filter(|p| usize::from(shard) < p.num_shards()).map(|p| stamp(p)).collect();
            facts.shards.get_mut(&shard).unwrap().held = held;
        };
        (0..8).for_each(|shard| prepare(&layouts, &mut facts, shard));
        let mut now = start;
        let mut last = 4;
        let finish = (0..3).flat_map(|_| {
            (0..8).map(Event::Prepare).chain((0..3).map(Event::Apply))
        });
        let given = events.len();
        for (at, event) in events.into_iter().chain(finish).enumerate() {
            match event {
                // Layouts of more shards than copies only.
                Event::Want(shards) => { last = shards.max(2); layouts.want(layout(last)); }
                Event::Prepare(shard) => prepare(&layouts, &mut facts, shard),
                Event::Restart(shard) => facts.shards.get_mut(&shard).unwrap().held.clear(),
                Event::Apply(worker) => facts.workers[worker] = layouts.epoch(),
                Event::Wait => now += Duration::from_secs(1),
            }
            let before = layouts.epoch();
            layouts.advance(now, &facts);
            prop_assert!(layouts.epoch() >= before, "epochs only grow (event {} of {})", at, given);
            for placement in asked(&layouts) {
                let known = *meaning.entry(placement.epoch().0).or_insert(placement.digest());
                prop_assert_eq!(known, placement.digest(), "{} means two placements", placement.epoch());
            }
            if layouts.epoch() != before {
                let placement = layouts.in_force().unwrap();
                for shard in 0..placement.num_shards() as u16 {
                    prop_assert!(facts.shards[&shard].held.contains(&stamp(placement)));
                }
            }
            let oldest_used = facts.workers.iter().min().unwrap();
            prop_assert!(layouts.oldest() <= *oldest_used, "a worker may still send frames of {}", oldest_used);
        }
        prop_assert_eq!(layouts.layout(), layout(last));
        prop_assert!(layouts.is_settled());
    }
}
