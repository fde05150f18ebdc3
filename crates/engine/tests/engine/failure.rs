//! Failed steps and a stopping engine.

use std::sync::Arc;

use cadre_engine::{EngineError, EngineEvent, SubmitError};
use cadre_model::ModelError;
use cadre_ops::ExchangeError;

use crate::support::{Setup, outcome, prompt, request, wait_empty};

#[tokio::test]
async fn a_failed_step_fails_the_sequences_in_it_and_no_other() {
    let mut setup = Setup::default();
    setup.scheduler.pages = 2;
    let engine = setup.spawn();
    let handle = engine.handle();
    let mut running = handle.submit(request("running", prompt(1, 10), 100)).unwrap();
    while !matches!(running.recv().await.unwrap(), EngineEvent::Token(_)) {}
    setup.switches.hold();
    setup.switches.wait_held();
    // It waits for pages, so it is not in the step that fails.
    let waiting = handle.submit(request("waiting", prompt(2, 10), 60)).unwrap();
    setup.switches.fail_next();
    setup.switches.release();

    let error = outcome(running).await.failed();
    let EngineError::Step { position, source } = &error else { panic!("{error}") };
    assert!(*position >= 10);
    assert!(matches!(&**source, ModelError::Exchange(ExchangeError::Uncovered { .. })), "{source}");
    assert!(error.to_string().contains("no live copy"), "{error}");
    assert_eq!(outcome(waiting).await.finished().len(), 60);
    wait_empty(&handle).await;
}

#[tokio::test]
async fn every_sequence_of_a_failed_step_shares_the_cause() {
    let setup = Setup::default();
    let engine = setup.spawn();
    let handle = engine.handle();
    setup.switches.hold();
    let first = handle.submit(request("first", prompt(1, 10), 5)).unwrap();
    setup.switches.wait_held();
    // Both are admitted into the step after the one that is held.
    let others = ["second", "third"].map(|name| handle.submit(request(name, prompt(2, 10), 5)).unwrap());
    setup.switches.fail_next();
    setup.switches.release();
    // The held step is the first one's alone.
    outcome(first).await.failed();
    for other in others {
        assert_eq!(outcome(other).await.finished().len(), 5);
    }

    setup.switches.hold();
    let first = handle.submit(request("held", prompt(3, 10), 5)).unwrap();
    setup.switches.wait_held();
    let pair = ["fourth", "fifth"].map(|name| handle.submit(request(name, prompt(4, 10), 5)).unwrap());
    drop(first);
    // The rest of the held step: two expert layers.
    setup.switches.let_through(2);
    setup.switches.wait_held();
    setup.switches.fail_next();
    setup.switches.release();
    let [fourth, fifth] = pair;
    let causes = [outcome(fourth).await.failed(), outcome(fifth).await.failed()];
    let [EngineError::Step { source: a, .. }, EngineError::Step { source: b, .. }] = &causes else {
        panic!("{causes:?}")
    };
    assert!(Arc::ptr_eq(a, b));
    wait_empty(&handle).await;
}

#[tokio::test]
async fn stopping_ends_what_runs_and_refuses_what_comes() {
    let setup = Setup::default();
    let engine = setup.spawn();
    let handle = engine.handle();
    let mut running = handle.submit(request("running", prompt(1, 10), 400)).unwrap();
    while !matches!(running.recv().await.unwrap(), EngineEvent::Token(_)) {}
    let (prefilling, mut kv) = handle
        .submit_prefill(cadre_engine::PrefillRequest {
            request_id: "prefilling".into(),
            prompt: prompt(2, 300),
            sampling: Default::default(),
            stop: Default::default(),
            deadline: None,
        })
        .unwrap();
    engine.stop();
    handle.stopped().await;
    assert!(matches!(outcome(running).await.failed(), EngineError::Stopped));
    // It may have got through before the stop; the KV ends either way.
    let _ = outcome(prefilling).await;
    while kv.recv().await.is_some() {}
    let late = handle.submit(request("late", prompt(1, 4), 1)).unwrap_err();
    assert_eq!(late, SubmitError::Stopped { request_id: "late".into() });
    assert!(matches!(handle.self_test(0).await, Err(cadre_engine::SelfTestError::Submit(_))));
}
