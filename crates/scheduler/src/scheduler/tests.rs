//! Scenarios: one rule of the scheduler each. Random histories are in `tests/properties.rs`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_types::{PageId, SequenceId};

use super::*;
use crate::{PAGE_TOKENS, SequenceKind};

fn scheduler(pages: u32) -> Scheduler {
    Scheduler::new(SchedulerConfig::with_pages(pages)).unwrap()
}

fn new(kind: SequenceKind, prompt: usize, max_tokens: u32) -> NewSequence {
    NewSequence { prompt: (0..prompt as u32).collect(), max_tokens, kind, deadline: None }
}

fn local(prompt: usize, max_tokens: u32) -> NewSequence {
    new(SequenceKind::Local, prompt, max_tokens)
}

/// Commits every row of a plan; sampled tokens are 1000 + the row's number.
fn commit_all(scheduler: &mut Scheduler, plan: &StepPlan) {
    for (row, decode) in plan.decode.iter().enumerate() {
        scheduler.commit(decode.id, CommitKind::Sampled(1000 + row as u32)).unwrap();
    }
    for chunk in &plan.prefill {
        let outcome = if chunk.last { CommitKind::Sampled(7) } else { CommitKind::Prefilled };
        scheduler.commit(chunk.id, outcome).unwrap();
    }
}

fn step(scheduler: &mut Scheduler) -> StepPlan {
    let plan = scheduler.plan();
    commit_all(scheduler, &plan);
    plan
}

#[test]
fn a_local_sequence_prefills_then_decodes_from_its_newest_token() {
    let mut scheduler = scheduler(4);
    let id = scheduler.submit(local(70, 3)).unwrap();
    assert_eq!(scheduler.sequence(id).unwrap().block_table(), [] as [PageId; 0]);

    let plan = step(&mut scheduler);
    assert_eq!(plan.admitted, [id]);
    assert_eq!(plan.prefill, [PrefillChunk { id, first_position: 0, len: 70, last: true }]);
    assert_eq!(scheduler.sequence(id).unwrap().block_table(), [PageId(0), PageId(1)]);
    assert_eq!(scheduler.sequence(id).unwrap().next_position(), 70);

    let plan = step(&mut scheduler);
    assert_eq!(plan.decode, [DecodeStep { id, token: 7, position: 70 }]);
    let plan = step(&mut scheduler);
    assert_eq!(plan.decode, [DecodeStep { id, token: 1000, position: 71 }]);
    assert!(step(&mut scheduler).is_empty(), "all of max_tokens is there");

    assert_eq!(scheduler.sequence(id).unwrap().output(), [7, 1000, 1000]);
    assert!(scheduler.end(id));
    assert_eq!(scheduler.stats(), SchedulerStats { pages_free: 4, pages_total: 4, ..Default::default() });
    assert!(!scheduler.end(id));
}

#[test]
fn a_long_prompt_is_cut_into_chunks() {
    let mut scheduler = scheduler(20);
    let id = scheduler.submit(local(600, 1)).unwrap();
    let chunks: Vec<_> = (0..3).flat_map(|_| step(&mut scheduler).prefill).collect();
    assert_eq!(
        chunks,
        [
            PrefillChunk { id, first_position: 0, len: 256, last: false },
            PrefillChunk { id, first_position: 256, len: 256, last: false },
            PrefillChunk { id, first_position: 512, len: 88, last: true },
        ]
    );
}

#[test]
fn prefill_shrinks_beside_decode_rows_and_never_stops() {
    let mut scheduler = scheduler(100);
    scheduler.submit(local(1, 100)).unwrap();
    step(&mut scheduler);
    let long = scheduler.submit(local(1000, 1)).unwrap();
    let plan = scheduler.plan();
    assert_eq!(plan.decode.len(), 1);
    assert_eq!(plan.prefill, [PrefillChunk { id: long, first_position: 0, len: 128, last: false }]);
    assert_eq!(plan.rows(), 129);

    let tight =
        SchedulerConfig { max_decode_rows: 4, max_step_tokens: 5, ..SchedulerConfig::with_pages(100) };
    let mut scheduler = Scheduler::new(tight).unwrap();
    for _ in 0..6 {
        scheduler.submit(local(1, 100)).unwrap();
    }
    step(&mut scheduler);
    step(&mut scheduler);
    scheduler.submit(local(3, 1)).unwrap();
    for _ in 0..3 {
        let plan = step(&mut scheduler);
        assert_eq!((plan.decode.len(), plan.prefill.len(), plan.rows()), (4, 1, 5));
    }
}

#[test]
fn a_prefill_only_sequence_reserves_its_prompt_and_holds_it() {
    let mut scheduler = scheduler(2);
    let id = scheduler.submit(new(SequenceKind::PrefillOnly, 128, 4000)).unwrap();
    step(&mut scheduler);
    assert_eq!(scheduler.sequence(id).unwrap().state(), SequenceState::Held);
    assert_eq!(scheduler.sequence(id).unwrap().next_position(), 128);
    assert!(step(&mut scheduler).is_empty());
    let stats = scheduler.stats();
    assert_eq!((stats.held, stats.pages_used, stats.pages_free), (1, 2, 0));

    let behind = scheduler.submit(new(SequenceKind::PrefillOnly, 1, 1)).unwrap();
    assert_eq!(scheduler.plan().blocked, Some(PagesExhausted { requested: 1, free: 0, total: 2 }));
    assert_eq!(scheduler.sequence(id).unwrap().output(), [7]);
    assert!(scheduler.end(id), "the hand-off is confirmed");
    assert_eq!(scheduler.plan().admitted, [behind]);
    assert!(scheduler.end(behind), "an aborted one");
    assert_eq!(scheduler.stats().pages_free, 2);
}

#[test]
fn a_handed_off_sequence_decodes_after_its_kv_arrived() {
    let mut scheduler = scheduler(3);
    let id = scheduler.submit(new(SequenceKind::AwaitHandoff, 100, 5)).unwrap();
    let early = scheduler.handoff_complete(id, 9).unwrap_err();
    assert_eq!(early.to_string(), "handoff_complete: sequence 0 is waiting");

    let plan = scheduler.plan();
    assert_eq!((plan.admitted.as_slice(), plan.rows()), ([id].as_slice(), 0));
    assert_eq!(scheduler.sequence(id).unwrap().block_table().len(), 2);
    assert_eq!(scheduler.stats().awaiting_kv, 1);

    scheduler.handoff_complete(id, 9).unwrap();
    assert_eq!(scheduler.plan().decode, [DecodeStep { id, token: 9, position: 100 }]);
    let again = scheduler.handoff_complete(id, 9).unwrap_err();
    assert_eq!(again.to_string(), "handoff_complete: sequence 0 is decoding");
}

#[test]
fn nothing_overtakes_the_head_of_the_queue() {
    let mut scheduler = scheduler(4);
    let running = scheduler.submit(local(64, 64)).unwrap();
    let large = scheduler.submit(local(128, 128)).unwrap();
    let small = scheduler.submit(local(1, 1)).unwrap();
    let plan = step(&mut scheduler);
    assert_eq!(plan.admitted, [running]);
    assert_eq!(plan.blocked, Some(PagesExhausted { requested: 4, free: 2, total: 4 }));
    assert_eq!(scheduler.stats().waiting, 2);
    assert!(scheduler.end(running));
    assert_eq!(scheduler.plan().admitted, [large]);
    scheduler.end(large);
    assert_eq!(scheduler.plan().admitted, [small]);
}

#[test]
fn refusals_name_their_numbers() {
    let config = SchedulerConfig { max_waiting: 2, ..SchedulerConfig::with_pages(2) };
    let mut scheduler = Scheduler::new(config).unwrap();
    assert_eq!(scheduler.submit(local(0, 1)).unwrap_err(), SchedulerError::EmptyPrompt);
    assert_eq!(scheduler.submit(local(1, 0)).unwrap_err(), SchedulerError::NoOutput);
    assert_eq!(
        scheduler.submit(local(100, 29)).unwrap_err().to_string(),
        "submit: 129 tokens (prompt and max_tokens) need 3 KV pages, this worker has 2"
    );
    assert!(matches!(scheduler.submit(local(1, u32::MAX)).unwrap_err(), SchedulerError::NeverFits { .. }));
    scheduler.submit(local(100, 28)).unwrap();
    scheduler.submit(local(1, 1)).unwrap();
    let full = scheduler.submit(local(1, 1)).unwrap_err();
    assert_eq!(full, SchedulerError::QueueFull { waiting: 2, bound: 2 });
    assert_eq!(full.to_string(), "submit: 2 sequences wait already, the bound is 2");
    scheduler.plan();
    scheduler.submit(local(1, 1)).expect("admission made room in the queue");
}

#[test]
fn a_failed_step_is_planned_again_and_commits_must_match_the_plan() {
    let mut scheduler = scheduler(20);
    let first = scheduler.submit(local(300, 2)).unwrap();
    let plan = scheduler.plan();
    let again = scheduler.plan();
    assert_eq!(plan.prefill, again.prefill);
    assert_eq!(again.admitted, []);

    let wrong = scheduler.commit(first, CommitKind::Sampled(1)).unwrap_err();
    assert_eq!(wrong.to_string(), "commit: sequence 0 was not planned for Sampled(1) in this step");
    scheduler.commit(first, CommitKind::Prefilled).unwrap();
    assert!(scheduler.commit(first, CommitKind::Prefilled).is_err(), "committed already");
    let plan = scheduler.plan();
    assert_eq!((plan.prefill[0].len, plan.prefill[0].last), (44, true));
    assert!(scheduler.commit(first, CommitKind::Prefilled).is_err(), "the last chunk samples");
    scheduler.commit(first, CommitKind::Sampled(5)).unwrap();
    assert!(scheduler.commit(first, CommitKind::Sampled(6)).is_err(), "no row was planned");
}

#[test]
fn a_plan_replaces_the_one_before() {
    let config = SchedulerConfig { max_decode_rows: 1, max_step_tokens: 2, ..SchedulerConfig::with_pages(9) };
    let mut scheduler = Scheduler::new(config).unwrap();
    let first = scheduler.submit(local(1, 2)).unwrap();
    let second = scheduler.submit(local(1, 2)).unwrap();
    let decoding = scheduler.submit(new(SequenceKind::AwaitHandoff, 1, 2)).unwrap();
    assert_eq!(scheduler.plan().prefill.len(), 2);
    scheduler.handoff_complete(decoding, 9).unwrap();
    let plan = scheduler.plan();
    assert_eq!(plan.prefill.iter().map(|chunk| chunk.id).collect::<Vec<_>>(), [first]);
    let stale = CommitKind::Sampled(1);
    assert_eq!(
        scheduler.commit(second, stale).unwrap_err(),
        SchedulerError::NotPlanned { id: second, commit: stale }
    );
    commit_all(&mut scheduler, &plan);
}

#[test]
fn a_sequence_cancelled_during_its_step_is_gone_at_once() {
    let mut scheduler = scheduler(2);
    let id = scheduler.submit(local(5, 5)).unwrap();
    scheduler.plan();
    assert!(scheduler.end(id));
    assert!(!scheduler.end(id), "pages are freed once");
    assert_eq!(
        scheduler.commit(id, CommitKind::Sampled(1)).unwrap_err(),
        SchedulerError::Unknown { operation: "commit", id }
    );
    assert_eq!(scheduler.stats().pages_free, 2);
    assert_ne!(scheduler.submit(local(5, 5)).unwrap(), id, "ids are never reused");
}

#[test]
fn deadlines_name_sequences_in_every_state() {
    let mut scheduler = scheduler(2);
    let at = |deadline, kind, prompt| NewSequence { deadline, ..new(kind, prompt, 1) };
    let held = scheduler.submit(at(Some(30), SequenceKind::PrefillOnly, 64)).unwrap();
    let awaiting = scheduler.submit(at(Some(10), SequenceKind::AwaitHandoff, 1)).unwrap();
    step(&mut scheduler);
    let waiting = scheduler.submit(at(Some(20), SequenceKind::Local, 1)).unwrap();
    let patient = scheduler.submit(at(None, SequenceKind::Local, 1)).unwrap();
    assert_eq!(scheduler.next_deadline(), Some(10));
    assert_eq!(scheduler.expired(9), []);
    assert_eq!(scheduler.expired(10), [awaiting]);
    assert_eq!(scheduler.expired(20), [awaiting, waiting]);
    assert_eq!(scheduler.expired(u64::MAX), [held, awaiting, waiting]);
    for id in scheduler.expired(u64::MAX) {
        scheduler.end(id);
    }
    assert_eq!(scheduler.next_deadline(), None);
    assert_eq!(scheduler.sequences().map(Sequence::id).collect::<Vec<_>>(), [patient]);
}

#[test]
fn more_running_sequences_than_rows_take_turns() {
    let config = SchedulerConfig { max_decode_rows: 3, ..SchedulerConfig::with_pages(100) };
    let mut scheduler = Scheduler::new(config).unwrap();
    for _ in 0..8 {
        scheduler.submit(local(1, 60)).unwrap();
    }
    step(&mut scheduler);
    let mut last_turn = [0; 8];
    for turn in 1..=30 {
        let plan = step(&mut scheduler);
        assert_eq!(plan.decode.len(), 3);
        assert!(plan.decode.is_sorted_by_key(|row| row.id), "oldest first");
        for row in &plan.decode {
            last_turn[row.id.index()] = turn;
        }
        assert!(last_turn.iter().all(|&last| turn - last < 3), "{last_turn:?} at {turn}");
    }
}

#[test]
fn a_full_batch_of_32_shares_its_steps() {
    let mut scheduler = scheduler(32 * 8);
    for number in 0..32 {
        scheduler.submit(local(10 + 7 * number, 40 + number as u32)).unwrap();
    }
    let (mut steps, mut rows, mut widest) = (0, 0, 0);
    while scheduler.stats().pages_used > 0 || steps == 0 {
        let plan = step(&mut scheduler);
        steps += 1;
        rows += plan.decode.len();
        widest = widest.max(plan.decode.len());
        let done: Vec<SequenceId> = scheduler
            .sequences()
            .filter(|sequence| sequence.output().len() == sequence.max_tokens())
            .map(Sequence::id)
            .collect();
        for id in done {
            assert!(scheduler.end(id));
        }
        assert!(steps < 1000, "no progress");
    }
    assert_eq!(rows, (0..32).map(|number| 40 + number - 1).sum::<usize>(), "one row per token");
    assert_eq!(widest, 32);
    assert!(steps < 120, "{rows} decode rows took {steps} steps: they do not share");
}

#[test]
fn unusable_limits_are_refused_by_name() {
    let good = SchedulerConfig::with_pages(1);
    let refused = |config: SchedulerConfig| Scheduler::new(config).unwrap_err().to_string();
    assert!(refused(SchedulerConfig { pages: 0, ..good.clone() }).contains("pages is 0"));
    let beyond = (u32::MAX as usize / PAGE_TOKENS + 1) as u32;
    assert!(refused(SchedulerConfig { pages: beyond, ..good.clone() }).contains("pages is 67108864"));
    assert!(refused(SchedulerConfig { max_waiting: 0, ..good.clone() }).contains("max_waiting is 0"));
    assert!(refused(SchedulerConfig { max_chunk_tokens: 0, ..good.clone() }).contains("max_chunk"));
    assert!(
        refused(SchedulerConfig { prefill_tokens_with_decode: 0, ..good.clone() })
            .contains("prefill_tokens_with_decode is 0")
    );
    assert!(
        refused(SchedulerConfig { max_decode_rows: 512, ..good })
            .contains("max_step_tokens is 512, must be in 513..=")
    );
}
