#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::{mpsc, oneshot};

use super::*;

fn queue() -> Arc<Queue> {
    Arc::new(Queue::new(Gauge::new("due", "due").unwrap()))
}

fn key(name: &str) -> ModelKey {
    ModelKey::new("ns", name)
}

/// Runs the queue in the background; every reconcile is announced and waits for its permit.
#[expect(clippy::type_complexity, reason = "a test's plumbing")]
fn start(
    queue: &Arc<Queue>,
    concurrency: usize,
    again: Option<Duration>,
) -> (
    mpsc::UnboundedReceiver<(ModelKey, oneshot::Sender<()>)>,
    oneshot::Sender<()>,
    tokio::task::JoinHandle<()>,
) {
    let (announce, announced) = mpsc::unbounded_channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let queue = Arc::clone(queue);
    let task = tokio::spawn(async move {
        let stop = async { drop(stopped.await) };
        let work = |key| {
            let announce = announce.clone();
            async move {
                let (permit, permitted) = oneshot::channel();
                announce.send((key, permit)).unwrap();
                permitted.await.ok();
                again
            }
        };
        queue.run(concurrency, stop, work).await;
    });
    (announced, stop, task)
}

#[tokio::test(start_paused = true)]
async fn a_storm_of_triggers_is_one_reconcile_and_delays_it_by_the_debounce_only() {
    let queue = queue();
    let (mut announced, _stop, _task) = start(&queue, 4, None);
    let began = Instant::now();
    let storm = tokio::spawn({
        let queue = Arc::clone(&queue);
        async move {
            for _ in 0..20 {
                queue.trigger(key("a"));
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    });
    let (first, permit) = announced.recv().await.unwrap();
    assert_eq!((first, began.elapsed()), (key("a"), DEBOUNCE));
    storm.await.unwrap();
    permit.send(()).unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(announced.try_recv().is_err(), "one reconcile covers the whole storm");
}

#[tokio::test(start_paused = true)]
async fn a_model_never_runs_twice_at_once_and_a_trigger_meanwhile_is_not_lost() {
    let queue = queue();
    let (mut announced, _stop, _task) = start(&queue, 4, None);
    queue.trigger(key("a"));
    let (_, permit) = announced.recv().await.unwrap();
    queue.trigger(key("a"));
    queue.trigger(key("b"));
    let (second, _keep_b) = announced.recv().await.unwrap();
    assert_eq!(second, key("b"), "others go on");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(announced.try_recv().is_err());
    permit.send(()).unwrap();
    assert_eq!(announced.recv().await.unwrap().0, key("a"));
}

#[tokio::test(start_paused = true)]
async fn concurrency_is_bounded_and_requeues_come_back() {
    let queue = queue();
    let (mut announced, _stop, _task) = start(&queue, 2, Some(Duration::from_secs(60)));
    for name in ["a", "b", "c"] {
        queue.trigger(key(name));
    }
    let (first, permit) = announced.recv().await.unwrap();
    let _second = announced.recv().await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(announced.try_recv().is_err(), "two run, the third waits");
    let before = Instant::now();
    permit.send(()).unwrap();
    assert_eq!(announced.recv().await.unwrap().0, key("c"));
    let (again, _permit) = {
        // c and b never end: only a comes back, after its minute, once a place is free.
        drop(_second);
        announced.recv().await.unwrap()
    };
    assert_eq!(again, first);
    assert_eq!(before.elapsed(), Duration::from_secs(60));
}

#[tokio::test(start_paused = true)]
async fn stopping_takes_nothing_new_and_finishes_what_is_in_hand() {
    let queue = queue();
    let (mut announced, stop, task) = start(&queue, 1, None);
    queue.trigger(key("a"));
    queue.trigger(key("b"));
    let (_, permit) = announced.recv().await.unwrap();
    stop.send(()).unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!task.is_finished());
    permit.send(()).unwrap();
    task.await.unwrap();
    assert!(announced.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_reconcile_that_panics_is_tried_again() {
    let queue = queue();
    let runs = Arc::new(AtomicUsize::new(0));
    let (done, is_done) = oneshot::channel::<()>();
    let done = Arc::new(Mutex::new(Some(done)));
    queue.trigger(key("a"));
    let work = |_| {
        let (runs, done) = (Arc::clone(&runs), Arc::clone(&done));
        async move {
            assert!(runs.fetch_add(1, Ordering::SeqCst) > 0, "the first one breaks");
            done.lock().unwrap().take().map(|done| done.send(()));
            None
        }
    };
    queue.run(1, async { drop(is_done.await) }, work).await;
    assert_eq!(runs.load(Ordering::SeqCst), 2);
}
