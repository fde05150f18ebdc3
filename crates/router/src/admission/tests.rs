#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_telemetry::Metrics;
use tokio::sync::mpsc;

use super::*;

const AFTER: Duration = Duration::from_secs(5);

fn admission(max_concurrent: u32, max_waiting: u32) -> Admission {
    let limits = Limits { max_concurrent, max_waiting, ..Limits::default() };
    Admission::new(&limits, RouterMetrics::register(&Metrics::new()).unwrap())
}

fn deadline() -> Instant {
    Instant::now() + AFTER
}

#[tokio::test(start_paused = true)]
async fn a_full_router_refuses_at_once_and_takes_again_when_one_leaves() {
    let admission = admission(1, 2);
    let tickets: Vec<Arc<Ticket>> = (0..3).map(|_| admission.ticket().unwrap()).collect();
    let refused = admission.ticket().unwrap_err();
    assert!(matches!(refused, RequestError::QueueFull { in_router: 3, most: 3, .. }), "{refused}");
    // Three requests, one at a time, at the initial mean of a second each.
    assert_eq!(refused.retry_after_s(), Some(3));
    drop(tickets);
    assert!(admission.ticket().is_ok());
}

#[tokio::test(start_paused = true)]
async fn turns_come_in_order_of_asking_even_past_a_large_request() {
    let admission = admission(3, 16);
    let first = admission.ticket().unwrap().turn(2, deadline(), AFTER).await.unwrap();
    let (sender, mut order) = mpsc::channel(8);
    let mut waiters = Vec::new();
    for (name, sequences) in [("large", 3), ("small", 1), ("last", 2)] {
        let (admission, sender) = (admission.clone(), sender.clone());
        let (asked, was_asked) = tokio::sync::oneshot::channel();
        waiters.push(tokio::spawn(async move {
            let ticket = admission.ticket().unwrap();
            asked.send(()).unwrap();
            let turn = ticket.turn(sequences, deadline(), AFTER).await.unwrap();
            sender.send(name).await.unwrap();
            drop(turn);
        }));
        was_asked.await.unwrap();
        tokio::task::yield_now().await;
    }
    // One permit is free, and "small" would fit; it stays behind "large".
    assert!(order.try_recv().is_err());
    drop(first);
    for name in ["large", "small", "last"] {
        assert_eq!(order.recv().await, Some(name));
    }
    for waiter in waiters {
        waiter.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn the_wait_for_a_turn_ends_at_the_deadline() {
    let admission = admission(1, 1);
    let _running = admission.ticket().unwrap().turn(1, deadline(), AFTER).await.unwrap();
    let waiting = admission.ticket().unwrap();
    let error = waiting.turn(1, deadline(), AFTER).await.unwrap_err();
    assert_eq!(error, RequestError::Deadline { after: AFTER, stage: "waiting in the queue" });
    assert_eq!(admission.inner.metrics.waiting.get(), 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_split_turn_returns_its_permits_one_by_one() {
    let admission = admission(2, 4);
    let mut turn = admission.ticket().unwrap().turn(2, deadline(), AFTER).await.unwrap();
    let (one, two) = (turn.split().unwrap(), turn.split().unwrap());
    assert!(turn.split().is_none());
    drop(turn);
    assert_eq!(admission.inner.turns.available_permits(), 0);
    drop(one);
    assert_eq!(admission.inner.turns.available_permits(), 1);
    assert_eq!(admission.inner.metrics.running.get(), 1.0);
    drop(two);
    assert_eq!(admission.inner.metrics.running.get(), 0.0);
}

#[tokio::test(start_paused = true)]
async fn more_sequences_than_may_ever_run_are_refused_by_name() {
    let admission = admission(2, 4);
    let error = admission.ticket().unwrap().turn(3, deadline(), AFTER).await.unwrap_err();
    assert!(matches!(&error, RequestError::Invalid { field, .. } if field == "n"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn draining_refuses_new_requests_and_waits_for_the_old() {
    let admission = admission(1, 1);
    let ticket = admission.ticket().unwrap();
    let drained = tokio::spawn({
        let admission = admission.clone();
        async move { admission.drain().await }
    });
    tokio::task::yield_now().await;
    assert_eq!(admission.ticket().unwrap_err(), RequestError::Draining);
    assert!(!drained.is_finished());
    // One that has its ticket still gets its turn.
    drop(ticket.turn(1, deadline(), AFTER).await.unwrap());
    drop(ticket);
    drained.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_estimate_follows_the_service_time() {
    let admission = admission(1, 0);
    for _ in 0..50 {
        let turn = admission.ticket().unwrap().turn(1, deadline(), AFTER).await.unwrap();
        tokio::time::advance(Duration::from_secs(20)).await;
        drop(turn);
    }
    let _ticket = admission.ticket().unwrap();
    assert_eq!(admission.ticket().unwrap_err().retry_after_s(), Some(20));
}
