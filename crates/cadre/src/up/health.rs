//! Whether a process that runs does anything: asked over its admin port, as Kubernetes asks a container.
//!
//! `/startedz` says that its files are read; after that `/healthz` depends on no peer and no weight, so a process that does not answer is stopped, deadlocked or blocked in
//! the kernel. It is given up after [`MISSES`] in a row: half a minute, in which a busy machine answers once.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::http;

/// Pause between two questions.
const PAUSE: Duration = Duration::from_secs(2);

/// An answer from memory, on a machine whose cores are all computing, comes within this.
const LIMIT: Duration = Duration::from_secs(5);

/// Questions without an answer, one after the other, that a hung process is told by.
const MISSES: u32 = 4;

/// A process has started when it has opened its checkpoint; Kubernetes gives it as long.
const OPENING: Duration = Duration::from_secs(900);

/// Between two questions before the first answer: what hangs right after it began to serve has answered by then, and is
/// not taken for one that opens its checkpoint.
const UNTIL_FIRST_ANSWER: Duration = Duration::from_millis(100);

/// Completes, with the reason in words, when the process behind an admin port hangs.
pub(crate) async fn hung(admin: String) -> String {
    hung_within(admin, PAUSE, LIMIT, OPENING).await
}

async fn hung_within(admin: String, pause: Duration, limit: Duration, opening: Duration) -> String {
    let begun = Instant::now();
    let (mut answered, mut misses) = (false, 0);
    loop {
        sleep(if answered { pause } else { pause.min(UNTIL_FIRST_ANSWER) }).await;
        // Whatever the answer is, there is one.
        // What has started and answers is alive whatever it answers; what is still reading its files says so.
        let path = if answered { "/healthz" } else { "/startedz" };
        match http::get_within(limit, &admin, path).await {
            Ok((status, _)) if answered || status.is_success() => (answered, misses) = (true, 0),
            Ok(_) | Err(_) => misses += 1,
        }
        if misses >= MISSES && (answered || begun.elapsed() >= opening) {
            let seconds = limit.as_secs_f64();
            return format!("hung: {misses} times no answer from http://{admin}{path} within {seconds} s");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::sync::Arc;

    use cadre_telemetry::axum::{self, Router, routing::get};
    use tokio::{net::TcpListener, sync::Notify, time::timeout};

    use super::*;

    const SOON: Duration = Duration::from_millis(10);
    const LONG: Duration = Duration::from_secs(600);

    #[tokio::test]
    async fn a_process_that_has_not_answered_yet_has_as_long_as_it_needs() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let why = timeout(LONG, hung_within(address.clone(), SOON, SOON, Duration::ZERO)).await.unwrap();
        assert!(why.starts_with("hung: 4 times no answer") && why.contains(&address), "{why}");
        timeout(20 * SOON, hung_within(address, SOON, SOON, LONG)).await.unwrap_err();
    }

    #[tokio::test]
    async fn a_process_that_stops_to_answer_is_hung() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Notify::new());
        let note = Arc::clone(&asked);
        let healthz = get(move || {
            note.notify_one();
            async { "ok" }
        });
        let started = get(|| async { "started" });
        let routes = Router::new().route("/healthz", healthz).route("/startedz", started);
        let server = tokio::spawn(async move { axum::serve(listener, routes).await });
        let watched = tokio::spawn(hung_within(address, SOON, LONG, LONG));
        // It asks again because it was answered.
        for _ in 0..MISSES + 1 {
            timeout(LONG, asked.notified()).await.unwrap();
        }
        assert!(!watched.is_finished());
        server.abort();
        assert!(timeout(LONG, watched).await.unwrap().unwrap().starts_with("hung: 4 times no answer"));
    }
}
