//! The life of a sequence on one engine: ends, bounds, refusals.

use std::time::{Duration, Instant};

use cadre_engine::{EngineError, EngineEvent, EngineHandle, PrefillPlace, SubmitError};
use cadre_scheduler::SchedulerError;
use cadre_types::{FinishReason, SamplingParams};

use crate::support::{Setup, config, outcome, prompt, request, wait_empty};

#[tokio::test]
async fn tokens_come_in_order_and_the_pages_are_free_at_the_end() {
    let engine = Setup::default().spawn();
    let handle = engine.handle();
    let ended = outcome(handle.submit(request("plain", prompt(1, 70), 9)).unwrap()).await;
    // Pages are free when the end is told, not some time after.
    let load = handle.stats().load();
    assert_eq!((load.running, load.pages_free), (0, load.pages_total));
    assert_eq!(ended.reserved, 1);
    let positions: Vec<u32> = ended.tokens.iter().map(|token| token.position).collect();
    assert_eq!(positions, (70..79).collect::<Vec<u32>>());
    for token in &ended.tokens {
        assert!(token.logprob.is_some_and(|logprob| logprob <= 0.0));
        assert_eq!(token.top.len(), 3);
        assert!(token.top.is_sorted_by(|a, b| a.1 >= b.1));
    }
    assert_eq!(ended.end.unwrap(), FinishReason::Length);
}

#[tokio::test]
async fn stop_ids_end_the_text_and_are_not_in_it() {
    let engine = Setup::default().spawn();
    let handle = engine.handle();
    let mut greedy = request("free", prompt(6, 12), 12);
    greedy.sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let free = outcome(handle.submit(greedy.clone()).unwrap()).await.ids();
    // A token that was not there before its place.
    let at = (1..free.len()).find(|&at| !free[..at].contains(&free[at])).unwrap();

    greedy.request_id = "stopped".into();
    greedy.stop.stop_token_ids = vec![free[at]];
    let stopped = outcome(handle.submit(greedy.clone()).unwrap()).await;
    assert_eq!(stopped.ids(), free[..at]);
    assert_eq!(stopped.end.unwrap(), FinishReason::Stop);

    greedy.request_id = "minimum".into();
    greedy.stop.min_tokens = at as u32 + 1;
    let minimum = outcome(handle.submit(greedy.clone()).unwrap()).await;
    assert_eq!(minimum.ids()[..at], free[..at]);
    assert_ne!(minimum.ids()[at], free[at], "within the minimum a stop id is not even drawn");

    greedy.request_id = "at-once".into();
    greedy.stop.stop_token_ids = vec![free[0]];
    greedy.stop.min_tokens = 0;
    let nothing = outcome(handle.submit(greedy).unwrap()).await;
    assert!(nothing.tokens.is_empty());
    assert_eq!(nothing.end.unwrap(), FinishReason::Stop);
}

#[tokio::test]
async fn the_context_bounds_the_answer() {
    let engine = Setup::default().spawn();
    let handle = engine.handle();
    let most = config().max_position_embeddings;
    let full = request("full", prompt(1, most as u32 - 3), u32::MAX);
    let ended = outcome(handle.submit(full).unwrap()).await;
    assert_eq!(ended.tokens.len(), 3);
    assert_eq!(ended.end.unwrap(), FinishReason::Length);
    let over = handle.submit(request("over", prompt(1, most as u32), 1)).unwrap_err();
    assert_eq!(over, SubmitError::PromptTooLong { request_id: "over".into(), tokens: most, most: most - 1 });
}

#[tokio::test]
async fn impossible_requests_are_refused_and_named() {
    let engine = Setup::default().spawn();
    let handle = engine.handle();
    let good = || request("bad", prompt(1, 4), 2);
    type Change = fn(&mut cadre_engine::SequenceRequest);
    let cases: [(&str, Change); 7] = [
        ("prompt is empty", |request| request.prompt.clear()),
        ("prompt token 256 at position 2", |request| request.prompt[2] = 256),
        ("max_tokens is 0", |request| request.stop.max_tokens = 0),
        ("temperature", |request| request.sampling.temperature = f32::NAN),
        ("top_p", |request| request.sampling.top_p = 0.0),
        ("1025 stop ids", |request| request.stop.stop_token_ids = vec![3; 1025]),
        ("request id has 0 bytes", |request| request.request_id.clear()),
    ];
    for (words, change) in cases {
        let mut request = good();
        change(&mut request);
        let refused = handle.submit(request).unwrap_err();
        assert!(matches!(refused, SubmitError::Invalid { .. }), "{words}: {refused}");
        assert!(refused.to_string().contains(words), "{words}: {refused}");
    }
    assert_eq!(outcome(handle.submit(good()).unwrap()).await.tokens.len(), 2);
}

#[tokio::test]
async fn what_never_fits_and_what_is_taken_fail_at_once() {
    let mut setup = Setup::default();
    setup.scheduler.pages = 2;
    let engine = setup.spawn();
    let handle = engine.handle();
    let never = outcome(handle.submit(request("never", prompt(1, 100), 60)).unwrap()).await.failed();
    assert!(
        matches!(never, EngineError::Refused(SchedulerError::NeverFits { pages: 3, total: 2, .. })),
        "{never}"
    );
    let mut waits = request("twin", prompt(1, 10), 3);
    waits.prefill = PrefillPlace::Remote;
    let first = handle.submit(waits.clone()).unwrap();
    let second = outcome(handle.submit(waits).unwrap()).await.failed();
    assert!(matches!(&second, EngineError::Duplicate { request_id } if request_id == "twin"), "{second}");
    // A name is free again as soon as its stream is dropped.
    drop(first);
    let again = outcome(handle.submit(request("twin", prompt(1, 10), 3)).unwrap()).await;
    assert_eq!(again.tokens.len(), 3);
    wait_empty(&handle).await;
}

#[tokio::test]
async fn a_dropped_stream_frees_its_pages_in_every_state() {
    let mut setup = Setup::default();
    setup.scheduler.pages = 4;
    let engine = setup.spawn();
    let handle = engine.handle();
    // Decoding, awaiting KV (which take all pages), waiting.
    let mut decoding = handle.submit(request("decoding", prompt(1, 10), 100)).unwrap();
    while !matches!(decoding.recv().await.unwrap(), EngineEvent::Token(_)) {}
    let mut awaiting = request("awaiting", prompt(2, 10), 100);
    awaiting.prefill = PrefillPlace::Remote;
    let mut awaiting = handle.submit(awaiting).unwrap();
    assert!(matches!(awaiting.recv().await, Some(EngineEvent::Reserved)));
    let waiting = handle.submit(request("waiting", prompt(3, 10), 100)).unwrap();
    while handle.stats().load().waiting == 0 {
        tokio::task::yield_now().await;
    }
    drop(waiting);
    while handle.stats().load().waiting == 1 {
        tokio::task::yield_now().await;
    }
    drop(decoding);
    drop(awaiting);
    wait_empty(&handle).await;
}

#[tokio::test]
async fn cancel_by_name_ends_as_cancelled() {
    let engine = Setup::default().spawn();
    let handle = engine.handle();
    let mut waits = request("named", prompt(1, 10), 3);
    waits.prefill = PrefillPlace::Remote;
    let events = handle.submit(waits).unwrap();
    handle.cancel("named").unwrap();
    handle.cancel("nobody").unwrap();
    assert_eq!(outcome(events).await.end.unwrap(), FinishReason::Cancelled);
    wait_empty(&handle).await;
}

#[tokio::test]
async fn a_deadline_ends_a_sequence_in_any_state() {
    let mut setup = Setup::default();
    setup.scheduler.pages = 2;
    let engine = setup.spawn();
    let handle = engine.handle();
    let soon = Some(Instant::now() + Duration::from_millis(30));
    let mut awaiting = request("awaiting", prompt(1, 10), 100);
    (awaiting.prefill, awaiting.deadline) = (PrefillPlace::Remote, soon);
    let mut waiting = request("waiting", prompt(1, 10), 100);
    waiting.deadline = soon;
    let mut past = request("past", prompt(1, 10), 100);
    past.deadline = Some(Instant::now() - Duration::from_secs(1));
    for request in [past, awaiting, waiting].map(|request| handle.submit(request).unwrap()) {
        assert_eq!(outcome(request).await.end.unwrap(), FinishReason::Deadline);
    }
    wait_empty(&handle).await;
}

#[tokio::test]
async fn full_queues_refuse() {
    let mut setup = Setup::default();
    setup.scheduler.pages = 2;
    setup.scheduler.max_waiting = 2;
    let engine = setup.spawn();
    let handle = engine.handle();
    // One runs and holds every page, two wait, the fourth is refused by the scheduler.
    let long = || request("", prompt(1, 10), 100);
    let named = |name: &str| cadre_engine::SequenceRequest { request_id: name.into(), ..long() };
    let mut first = handle.submit(named("first")).unwrap();
    while !matches!(first.recv().await.unwrap(), EngineEvent::Token(_)) {}
    setup.switches.hold();
    setup.switches.wait_held();
    let waiting = ["second", "third"].map(|name| handle.submit(named(name)).unwrap());
    let fourth = handle.submit(named("fourth")).unwrap();
    // The engine is held in a step: its command queue fills, and says so at once.
    let bound = 2 + 256;
    let mut flood = Vec::new();
    let overloaded = loop {
        match handle.submit(named(&format!("flood-{}", flood.len()))) {
            Ok(events) => flood.push(events),
            Err(error) => break error,
        }
    };
    assert_eq!(flood.len(), bound - 3);
    assert!(matches!(overloaded, SubmitError::Overloaded { bound: 258, .. }), "{overloaded}");
    setup.switches.release();
    for refused in std::iter::once(fourth).chain(flood) {
        let refused = outcome(refused).await.failed();
        assert!(
            matches!(refused, EngineError::Refused(SchedulerError::QueueFull { bound: 2, .. })),
            "{refused}"
        );
    }
    drop(first);
    for waiting in waiting {
        assert_eq!(outcome(waiting).await.finished().len(), 100);
    }
    wait_empty(&handle).await;
}

#[tokio::test]
async fn a_self_test_goes_through_the_engine() {
    let setup = Setup::default();
    let engine = setup.spawn();
    let handle = engine.handle();
    handle.self_test(0).await.unwrap();
    let steps = handle.stats().steps.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(steps, 2, "a prefill step and a decode step");
    setup.switches.fail_next();
    let failed = handle.self_test(1).await.unwrap_err().to_string();
    assert!(failed.contains("no live copy"), "{failed}");
    handle.self_test(2).await.unwrap();
}

/// Waits until nothing runs.
async fn ended(engine: &EngineHandle) {
    while engine.in_flight() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn answers_that_nobody_reads_keep_new_requests_out() {
    let engine = Setup { max_unread_bytes: 1000, ..Setup::default() }.spawn();
    let handle = engine.handle();
    let mut unread = Vec::new();
    // Each one ends and gives its pages back; its 24 tokens with three candidates each wait.
    let refused = loop {
        match handle.submit(request(&format!("unread-{}", unread.len()), prompt(1, 8), 24)) {
            Ok(stream) => unread.push(stream),
            Err(error) => break error,
        }
        assert!(unread.len() < 100, "nothing bounds what waits");
        ended(&handle).await;
    };
    assert_eq!(unread.len(), 1, "one answer is more than the bound");
    assert!(matches!(refused, SubmitError::Unread { bytes: 1000.., bound: 1000, .. }), "{refused}");
    // Reading it, or dropping it, makes room.
    outcome(unread.remove(0)).await.end.unwrap();
    let dropped = handle.submit(request("dropped", prompt(1, 8), 24)).unwrap();
    ended(&handle).await;
    assert!(handle.submit(request("refused", prompt(1, 8), 24)).is_err());
    drop(dropped);
    outcome(handle.submit(request("read", prompt(1, 8), 24)).unwrap()).await.end.unwrap();
}
