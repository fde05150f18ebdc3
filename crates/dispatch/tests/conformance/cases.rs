//! The cases. Each runs over every rig.

use std::{
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use cadre_dispatch::{Dispatcher, RefusalCode, health::Failure, stats::DispatchStats};
use cadre_ops::{ExchangeError, ExchangeTicket, ExpertExchange, ExpertRows};
use cadre_types::{MemberState, ModelHash, NumericsClass, PlacementEpoch, ShardIndex};

use super::{
    cluster::{Batch, Cluster, LAYER, SPLIT, TWO_COPIES, impatient, patient, placement, quick},
    rig::Rig,
    scripted::{Mode, PATIENCE},
};

fn split<R: Rig>() -> Cluster<R> {
    Cluster::new(NumericsClass::F32, SPLIT)
}

fn two_copies<R: Rig>() -> Cluster<R> {
    Cluster::new(NumericsClass::F32, TWO_COPIES)
}

/// How often a shard was taken out.
fn ejections(stats: &DispatchStats, shard: u16) -> u64 {
    stats.shard(ShardIndex(shard)).ejections.load(Ordering::Relaxed)
}

/// Runs batches until a condition holds.
fn until(what: &str, mut attempt: impl FnMut() -> bool) {
    let start = Instant::now();
    while !attempt() {
        assert!(start.elapsed() < PATIENCE, "{what} never happened");
        thread::sleep(Duration::from_millis(1)); // between looks at the condition
    }
}

pub(crate) fn rows_come_back_in_the_order_asked_for<R: Rig>() {
    let cluster = split::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    for tokens in [1, 2, 33, 200] {
        Batch::f32(tokens).run(&mut dispatcher);
    }
    Batch::new(NumericsClass::F32, 9, 4, 1).run(&mut dispatcher);
    let stats = dispatcher.handle().stats();
    assert_eq!(stats.retried_pairs.load(Ordering::Relaxed), 0);
    let (buckets, _) = stats.round_trip.snapshot();
    let answered: u64 = buckets.iter().sum();
    let sent: u64 = stats.shards().iter().map(|shard| shard.frames.load(Ordering::Relaxed)).sum();
    assert_eq!(answered, sent);
    let tokens: u64 = stats.expert_tokens()[0].1.iter().sum();
    assert_eq!(tokens, 2 * (1 + 2 + 33 + 200) + 4 * 9);
}

pub(crate) fn an_empty_batch_and_an_empty_choice_need_no_shard<R: Rig>() {
    let mut cluster = split::<R>();
    cluster.stop(0);
    cluster.stop(1);
    let mut dispatcher = cluster.dispatcher(patient());
    Batch::f32(0).run(&mut dispatcher);
    Batch::new(NumericsClass::F32, 3, 0, 0).run(&mut dispatcher);
}

pub(crate) fn two_exchanges_overlap<R: Rig>() {
    let cluster = split::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    let (a, b) = (Batch::f32(5), Batch::new(NumericsClass::F32, 7, 3, 99));
    for _ in 0..10 {
        let first = a.send(&mut dispatcher);
        let second = b.send(&mut dispatcher);
        a.receive(&mut dispatcher, first);
        let third = a.send(&mut dispatcher);
        b.receive(&mut dispatcher, second);
        a.receive(&mut dispatcher, third);
    }
}

pub(crate) fn every_numerics_class_has_its_sizes<R: Rig>() {
    for class in NumericsClass::ALL {
        let cluster = Cluster::<R>::new(class, SPLIT);
        let mut dispatcher = cluster.dispatcher(patient());
        Batch::new(class, 17, 3, 3).run(&mut dispatcher);
    }
}

pub(crate) fn copies_share_the_work<R: Rig>() {
    let cluster = two_copies::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    until("both shards are connected and used", || {
        Batch::f32(16).run(&mut dispatcher);
        cluster.shards.iter().all(|shard| shard.frames() > 0)
    });
    let before: Vec<_> = cluster.shards.iter().map(|shard| shard.frames()).collect();
    for _ in 0..20 {
        Batch::f32(16).run(&mut dispatcher);
    }
    // Every step has four experts with eight tokens each; counted at once, they split two and two.
    for (shard, before) in cluster.shards.iter().zip(before) {
        assert_eq!(shard.frames(), before + 20);
    }
}

pub(crate) fn retryable_refusals_go_to_the_other_copy<R: Rig>() {
    for code in [RefusalCode::Overloaded, RefusalCode::Unavailable, RefusalCode::Internal, RefusalCode::Epoch]
    {
        let cluster = two_copies::<R>();
        let mut dispatcher = cluster.dispatcher(patient());
        let stats = dispatcher.handle().stats();
        cluster.shards[0].set(Mode::Refuse(code, usize::MAX));
        until("the refusing shard is asked", || {
            Batch::f32(16).run(&mut dispatcher);
            ejections(&stats, 0) > 0
        });
        assert!(stats.retried_pairs.load(Ordering::Relaxed) > 0);
        assert_eq!(ejections(&stats, 1), 0);
    }
}

pub(crate) fn a_hung_shard_is_left_within_the_bound<R: Rig>() {
    let cluster = two_copies::<R>();
    let mut dispatcher = cluster.dispatcher(quick());
    let stats = dispatcher.handle().stats();
    cluster.shards[0].set(Mode::Hold);
    until("the hung shard is asked", || {
        Batch::f32(16).run(&mut dispatcher);
        ejections(&stats, 0) > 0
    });
    // It is out now: nothing waits for it any more.
    let asked = cluster.shards[0].frames();
    for _ in 0..5 {
        Batch::f32(16).run(&mut dispatcher);
    }
    assert_eq!(cluster.shards[0].frames(), asked);
}

fn avoided(stats: &DispatchStats, shard: u16) -> bool {
    stats.shard(ShardIndex(shard)).avoided.load(Ordering::Relaxed) == 1
}

pub(crate) fn a_slow_shard_is_left_and_then_avoided_until_it_is_quick_again<R: Rig>() {
    let cluster = two_copies::<R>();
    let mut dispatcher = cluster.dispatcher(impatient());
    let stats = dispatcher.handle().stats();
    let (batch, ticket) = held_by_shard_0(&cluster, &mut dispatcher);
    // No frame times out within two minutes: only leaving the slow shard brings the rows sooner.
    let start = Instant::now();
    batch.receive(&mut dispatcher, ticket);
    assert!(start.elapsed() < PATIENCE);
    assert!(avoided(&stats, 0) && !avoided(&stats, 1));
    let asked = cluster.shards[0].frames();
    for _ in 0..5 {
        batch.run(&mut dispatcher);
    }
    assert_eq!(cluster.shards[0].frames(), asked, "the other one has everything");
    // Wrong rows: had anyone used them, the comparison would fail.
    cluster.shards[0].release(|rows| rows.fill(0xEE));
    until("the shard computes again", || {
        batch.run(&mut dispatcher);
        cluster.shards[0].frames() > asked
    });
    assert!(!avoided(&stats, 0), "it came back by its probes");
}

pub(crate) fn a_slow_shard_that_has_the_only_copy_is_waited_for<R: Rig>() {
    let cluster = split::<R>();
    let mut dispatcher = cluster.dispatcher(impatient());
    let stats = dispatcher.handle().stats();
    let batch = Batch::f32(8);
    batch.run(&mut dispatcher);
    let asked = cluster.shards[0].frames();
    cluster.shards[0].set(Mode::Hold);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| batch.run(&mut dispatcher));
        cluster.shards[0].wait_held(1);
        until("the shard is slow", || avoided(&stats, 0));
        cluster.shards[0].release(|_| {});
        waiting.join().unwrap();
    });
    assert_eq!(cluster.shards[0].frames(), asked + 1);
    assert_eq!(stats.retried_pairs.load(Ordering::Relaxed), 0);
    batch.run(&mut dispatcher);
    assert_eq!(cluster.shards[0].frames(), asked + 2, "slow, but nobody else has it");
}

pub(crate) fn wrong_answers_and_dropped_frames_go_to_the_other_copy<R: Rig>() {
    for mode in [Mode::ShortAnswer, Mode::Drop] {
        let cluster = two_copies::<R>();
        let mut dispatcher = cluster.dispatcher(patient());
        let stats = dispatcher.handle().stats();
        cluster.shards[1].set(mode);
        until("the bad shard is asked", || {
            Batch::f32(16).run(&mut dispatcher);
            ejections(&stats, 1) > 0
        });
        assert_eq!(ejections(&stats, 0), 0);
    }
}

pub(crate) fn rows_that_are_not_finite_go_to_the_other_copy_until_the_shard_proves_itself<R: Rig>() {
    for class in NumericsClass::ALL {
        let cluster = Cluster::<R>::new(class, TWO_COPIES);
        let mut dispatcher = cluster.dispatcher(patient());
        let stats = dispatcher.handle().stats();
        let batch = Batch::new(class, 16, 2, 0);
        cluster.shards[1].set(Mode::NotFinite);
        until("the broken shard is asked", || {
            batch.run(&mut dispatcher);
            ejections(&stats, 1) > 0
        });
        assert_eq!(ejections(&stats, 0), 0);
        let kind = Failure::NotFinite.index();
        assert!(stats.shard(ShardIndex(1)).failures[kind].load(Ordering::Relaxed) > 0);
        // Probes carry a row; it does not come back finite.
        until("probes are sent", || {
            batch.run(&mut dispatcher);
            stats.probes.load(Ordering::Relaxed) > 2
        });
        assert_eq!(stats.shard(ShardIndex(1)).usable.load(Ordering::Relaxed), 0);
        assert_eq!(ejections(&stats, 1), 1, "it never came back");
        cluster.shards[1].set(Mode::Compute);
        until("it is used again", || {
            batch.run(&mut dispatcher);
            stats.shard(ShardIndex(1)).usable.load(Ordering::Relaxed) == 1
        });
    }
}

pub(crate) fn without_a_copy_rows_that_are_not_finite_name_the_shard<R: Rig>() {
    let cluster = split::<R>();
    let mut config = patient();
    config.uncovered_wait = Duration::from_millis(50);
    let mut dispatcher = cluster.dispatcher(config);
    cluster.shards[1].set(Mode::NotFinite);
    let mut batch = Batch::new(NumericsClass::F32, 1, 1, 0);
    batch.topk_idx = vec![2];
    until("the shard is asked", || {
        let error = batch.fail(&mut dispatcher).to_string();
        error.starts_with("expert 2 of layer 3: no live copy")
            && error.contains("shard 1, layer 3, expert 2: element 129 of its row is not finite")
    });
    assert_eq!(dispatcher.handle().stats().shard(ShardIndex(1)).usable.load(Ordering::Relaxed), 0);
}

pub(crate) fn an_overflow_takes_nobody_out<R: Rig>() {
    let cluster = two_copies::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    let stats = dispatcher.handle().stats();
    let batch = Batch::f32(16);
    until("both shards are connected and used", || {
        batch.run(&mut dispatcher);
        cluster.shards.iter().all(|shard| shard.frames() > 0)
    });
    for shard in &cluster.shards {
        shard.set(Mode::NotFinite);
    }
    let error = Batch::new(NumericsClass::F32, 1, 1, 0).fail(&mut dispatcher);
    assert!(matches!(error, ExchangeError::NotFinite { layer: LAYER, .. }), "{error}");
    assert!(error.to_string().contains("has computed the same"), "{error}");
    let usable = |shard| stats.shard(ShardIndex(shard)).usable.load(Ordering::Relaxed) == 1;
    assert!(usable(0) && usable(1));
    for shard in &cluster.shards {
        shard.set(Mode::Compute);
    }
    batch.run(&mut dispatcher);
}

/// Sends a batch of which shard 0 holds a part; both shards are connected and share every step.
fn held_by_shard_0<R: Rig>(cluster: &Cluster<R>, dispatcher: &mut Dispatcher) -> (Batch, ExchangeTicket) {
    let batch = Batch::f32(16);
    until("both shards are connected and used", || {
        batch.run(dispatcher);
        cluster.shards.iter().all(|shard| shard.frames() > 0)
    });
    cluster.shards[0].set(Mode::Hold);
    let ticket = batch.send(dispatcher);
    cluster.shards[0].wait_held(1);
    (batch, ticket)
}

pub(crate) fn a_broken_link_is_noticed_at_once<R: Rig>() {
    let mut cluster = two_copies::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    let (batch, ticket) = held_by_shard_0(&cluster, &mut dispatcher);
    // `patient` waits two minutes for a frame: only the broken link can bring the rows sooner.
    let start = Instant::now();
    cluster.stop(0);
    batch.receive(&mut dispatcher, ticket);
    assert!(start.elapsed() < PATIENCE);
}

pub(crate) fn an_unlisted_shard_is_left_at_once<R: Rig>() {
    let mut cluster = two_copies::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    let (batch, ticket) = held_by_shard_0(&cluster, &mut dispatcher);
    let start = Instant::now();
    cluster.view.members.remove(0);
    cluster.publish(&dispatcher.handle());
    batch.receive(&mut dispatcher, ticket);
    assert!(start.elapsed() < PATIENCE);
}

pub(crate) fn a_draining_shard_gets_nothing_new<R: Rig>() {
    let mut cluster = two_copies::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    cluster.member(0).state = MemberState::Draining;
    cluster.publish(&dispatcher.handle());
    for _ in 0..10 {
        Batch::f32(16).run(&mut dispatcher);
    }
    assert_eq!(cluster.shards[0].frames(), 0);
}

fn returns<R: Rig>(same_address: bool) {
    let mut cluster = split::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    let handle = dispatcher.handle();
    Batch::f32(4).run(&mut dispatcher);
    cluster.stop(1);
    let batch = Batch::f32(4);
    thread::scope(|scope| {
        let stats = handle.stats();
        let waiting = scope.spawn(|| batch.run(&mut dispatcher));
        until("the shard is missed", || stats.shard(ShardIndex(1)).usable.load(Ordering::Relaxed) == 0);
        cluster.restart(1, same_address);
        if !same_address || R::TOLD_BY_VIEWS {
            cluster.publish(&handle);
        }
        waiting.join().unwrap();
    });
}

pub(crate) fn without_a_copy_the_step_waits_for_the_shard_at_its_old_address<R: Rig>() {
    returns::<R>(true);
}

pub(crate) fn without_a_copy_the_step_waits_for_the_shard_at_a_new_address<R: Rig>() {
    returns::<R>(false);
}

pub(crate) fn without_a_copy_the_step_waits_for_the_shard_to_be_ready<R: Rig>() {
    let mut cluster = split::<R>();
    cluster.member(0).state = MemberState::Starting;
    let mut dispatcher = cluster.dispatcher(patient());
    let handle = dispatcher.handle();
    let batch = Batch::f32(8);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| batch.run(&mut dispatcher));
        cluster.shards[1].wait_frames(1);
        assert_eq!(cluster.shards[0].frames(), 0);
        cluster.member(0).state = MemberState::Ready;
        cluster.publish(&handle);
        waiting.join().unwrap();
    });
}

pub(crate) fn without_a_copy_a_refused_frame_is_sent_again<R: Rig>() {
    let cluster = split::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    cluster.shards[0].set(Mode::Refuse(RefusalCode::Overloaded, 3));
    Batch::f32(8).run(&mut dispatcher);
    assert_eq!(cluster.shards[0].frames(), 4);
}

pub(crate) fn without_a_copy_a_late_answer_is_taken<R: Rig>() {
    let cluster = split::<R>();
    let mut dispatcher = cluster.dispatcher(quick());
    let stats = dispatcher.handle().stats();
    cluster.shards[0].set(Mode::Hold);
    let batch = Batch::f32(8);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| batch.run(&mut dispatcher));
        cluster.shards[0].wait_held(1);
        until("the frame is given up", || ejections(&stats, 0) > 0);
        cluster.shards[0].release(|_| {});
        waiting.join().unwrap();
    });
    assert_eq!(cluster.shards[0].frames(), 1, "the late answer was as good as a new one");
}

pub(crate) fn without_a_copy_the_error_names_what_is_missing<R: Rig>() {
    let mut cluster = split::<R>();
    let mut config = patient();
    config.uncovered_wait = Duration::from_millis(50);
    let mut dispatcher = cluster.dispatcher(config);
    let handle = dispatcher.handle();
    cluster.shards[1].set(Mode::Refuse(RefusalCode::Internal, usize::MAX));
    let mut batch = Batch::new(NumericsClass::F32, 1, 1, 0);
    batch.topk_idx = vec![2];
    until("the shard is asked", || {
        let error = batch.fail(&mut dispatcher);
        let ExchangeError::Uncovered { layer, expert, epoch, waited_ms, causes } = &error else {
            panic!("{error}");
        };
        assert_eq!((layer.0, expert.0, epoch.0), (LAYER.0, 2, 1));
        assert!(*waited_ms >= 50);
        assert!(error.to_string().starts_with("expert 2 of layer 3: no live copy after"));
        causes.contains("shard 1 says no")
    });
    // The rest of the cluster is unharmed.
    batch.topk_idx = vec![0];
    batch.run(&mut dispatcher);
    // A shard that was never there is named too.
    cluster.view.members.remove(1);
    let mut fresh = cluster.dispatcher(config);
    batch.topk_idx = vec![1];
    let error = batch.fail(&mut fresh).to_string();
    assert!(error.contains("shard 1 was never listed"), "{error}");
    assert!(handle.stats().uncovered.load(Ordering::Relaxed) > 0);
}

/// The bound counts from the step's first failure. Were it counted anew whenever a probe brings a copy back, this would
/// end when the shards have refused often enough, and then well.
pub(crate) fn a_step_that_always_finds_a_copy_to_fail_on_ends_within_the_bound<R: Rig>() {
    let cluster = two_copies::<R>();
    let mut config = patient();
    config.uncovered_wait = Duration::from_millis(500);
    config.health.max_probe = Duration::from_millis(20);
    let mut dispatcher = cluster.dispatcher(config);
    for shard in &cluster.shards {
        shard.set(Mode::Refuse(RefusalCode::Overloaded, 5000));
    }
    let error = Batch::f32(8).fail(&mut dispatcher);
    let ExchangeError::Uncovered { waited_ms, causes, .. } = &error else { panic!("{error}") };
    assert!(*waited_ms >= 500, "{error}");
    // What failed first comes first; then what each copy is like now.
    assert!(causes.split("; ").next().is_some_and(|first| first.contains("says no")), "{causes}");
    let frames: usize = cluster.shards.iter().map(|shard| shard.frames()).sum();
    assert!(frames > 4, "copies were tried again and again: {frames} frames");
}

pub(crate) fn late_answers_of_frames_sent_elsewhere_are_ignored<R: Rig>() {
    let cluster = two_copies::<R>();
    let mut dispatcher = cluster.dispatcher(quick());
    let stats = dispatcher.handle().stats();
    cluster.shards[0].set(Mode::Hold);
    let batch = Batch::f32(16);
    until("shard 0 hangs on a frame", || {
        batch.run(&mut dispatcher);
        cluster.shards[0].frames() > 0
    });
    // Wrong rows: had anyone used them, the comparison would fail.
    cluster.shards[0].release(|rows| rows.fill(0xEE));
    until("the late answer arrives", || {
        batch.run(&mut dispatcher);
        stats.late_answers.load(Ordering::Relaxed) > 0
    });
    batch.run(&mut dispatcher);
}

pub(crate) fn a_recovered_shard_gets_work_again<R: Rig>() {
    let cluster = two_copies::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    let stats = dispatcher.handle().stats();
    cluster.shards[0].set(Mode::Refuse(RefusalCode::Unavailable, 2));
    until("the shard is taken out", || {
        Batch::f32(16).run(&mut dispatcher);
        ejections(&stats, 0) > 0
    });
    until("the shard computes again", || {
        Batch::f32(16).run(&mut dispatcher);
        cluster.shards[0].frames() > 4
    });
    assert!(stats.probes.load(Ordering::Relaxed) > 0, "it came back by a probe");
}

pub(crate) fn another_model_is_refused_by_name<R: Rig>() {
    let cluster = two_copies::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    for shard in &cluster.shards {
        shard.contract(|contract| contract.generation.model = ModelHash([6; 16]));
    }
    let error = Batch::f32(2).fail(&mut dispatcher);
    assert!(matches!(error, ExchangeError::Generation { layer: LAYER, .. }), "{error}");
    let words = "model hash 05050505050505050505050505050505 is not ours";
    assert!(error.to_string().contains(words), "{error}");
}

pub(crate) fn another_epoch_waits_for_the_next_view<R: Rig>() {
    let mut cluster = split::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    let handle = dispatcher.handle();
    for shard in &cluster.shards {
        shard.contract(|contract| contract.generation.epoch = PlacementEpoch(2));
    }
    let batch = Batch::f32(6);
    thread::scope(|scope| {
        let stats = handle.stats();
        let waiting = scope.spawn(|| batch.run(&mut dispatcher));
        until("the shards refuse", || ejections(&stats, 0) > 0 && ejections(&stats, 1) > 0);
        cluster.view.placement = Arc::new(placement(PlacementEpoch(2), SPLIT));
        cluster.publish(&handle);
        waiting.join().unwrap();
    });
}

pub(crate) fn a_bug_of_ours_is_not_retried<R: Rig>() {
    for code in [RefusalCode::Malformed, RefusalCode::Oversize] {
        let cluster = two_copies::<R>();
        let mut dispatcher = cluster.dispatcher(patient());
        for shard in &cluster.shards {
            shard.set(Mode::Refuse(code, usize::MAX));
        }
        let error = Batch::f32(2).fail(&mut dispatcher);
        assert!(matches!(error, ExchangeError::Malformed { layer: LAYER, .. }), "{error}");
        assert!(error.to_string().contains("says no"), "{error}");
    }
}

pub(crate) fn a_batch_that_does_not_fit_is_refused_before_it_is_sent<R: Rig>() {
    let cluster = split::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    let good = Batch::f32(3);
    let mut unknown = good.clone();
    unknown.topk_idx[2] = 4;
    let mut class = good.clone();
    class.activations.format = cadre_ops::RowFormat::Bf16;
    let mut short = good.clone();
    short.activations.data = short.activations.data.slice(1..);
    let mut choices = good.dispatch_batch();
    choices.top_k = 3;
    let mut layer = good.dispatch_batch();
    layer.layer.0 += 1;
    for (words, batch) in [
        ("expert 4 of 4", unknown.dispatch_batch()),
        ("rows are Bf16 in class f32", class.dispatch_batch()),
        ("activation bytes for 3 tokens", short.dispatch_batch()),
        ("chosen experts for 3 tokens", choices),
        ("no experts of this layer are placed in epoch 1", layer),
    ] {
        let error = dispatcher.dispatch(batch).unwrap_err().to_string();
        assert!(error.contains(words), "{words:?} not in {error:?}");
    }
    assert_eq!(cluster.shards[0].frames() + cluster.shards[1].frames(), 0);
    good.run(&mut dispatcher);
}

pub(crate) fn without_a_view_there_is_no_placement<R: Rig>() {
    let mut cluster = split::<R>();
    cluster.view.generation.model = ModelHash([9; 16]);
    // The view of another model does not count as one.
    let mut dispatcher = cluster.dispatcher(patient());
    let error = dispatcher.dispatch(Batch::f32(1).dispatch_batch()).unwrap_err();
    assert_eq!(error, ExchangeError::NoPlacement { layer: LAYER });
}

pub(crate) fn closing_ends_a_wait<R: Rig>() {
    let cluster = split::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    let handle = dispatcher.handle();
    cluster.shards[0].set(Mode::Hold);
    let batch = Batch::f32(4);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| batch.fail(&mut dispatcher));
        cluster.shards[0].wait_held(1);
        handle.close();
        assert_eq!(waiting.join().unwrap(), ExchangeError::Closed { layer: LAYER });
    });
    let error = dispatcher.dispatch(batch.dispatch_batch()).unwrap_err();
    assert_eq!(error, ExchangeError::Closed { layer: LAYER });
}

pub(crate) fn abandoned_exchanges_are_forgotten<R: Rig>() {
    let cluster = split::<R>();
    let mut dispatcher = cluster.dispatcher(patient());
    let batch = Batch::f32(2);
    let abandoned: Vec<_> = (0..50).map(|_| batch.send(&mut dispatcher)).collect();
    let ticket = batch.send(&mut dispatcher);
    batch.receive(&mut dispatcher, ticket);
    for ticket in [abandoned[0], abandoned[49], ticket] {
        let error = dispatcher.combine(ticket, &mut ExpertRows::default()).unwrap_err();
        assert!(error.to_string().contains("was never dispatched or is combined already"));
    }
    batch.run(&mut dispatcher);
}

pub(crate) fn many_workers_share_the_shards<R: Rig>() {
    let cluster = two_copies::<R>();
    thread::scope(|scope| {
        for worker in 0..4 {
            let mut dispatcher = cluster.dispatcher(patient());
            scope.spawn(move || {
                for step in 0..25 {
                    let batch = Batch::new(NumericsClass::F32, 1 + step % 7, 3, worker * 50 + step as u8);
                    batch.run(&mut dispatcher);
                }
            });
        }
    });
}
