//! The admin server of every role: `/metrics`, `/healthz`, `/readyz`, and what the role adds.
//!
//! `/healthz` says that the process is alive and answers; it never depends on a peer, so that losing
//! one never makes Kubernetes restart another. It is answered from the first moment on; `/startedz` is 200 once the files are
//! read and the servers listen, and 503 before. `/readyz` is 200 only when every condition of
//! [`Readiness`] holds, and otherwise lists what is missing. With `?hold=SECONDS` a process that has not started, or was never
//! ready, answers only when it has or is, or after so long: a probe that waits for a start is not one that fails.

use std::{future::Future, time::Duration};

use axum::{
    Json, Router,
    extract::{Query, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use cadre_net::{IntakeOptions, ServerOptions};
use tokio::net::TcpListener;

use crate::{metrics::Metrics, readiness::Readiness};

/// Bytes of incomplete requests: the routes take none with a body.
const INTAKE_BYTES: usize = 1 << 20;

#[derive(Clone)]
struct AdminState {
    metrics: Metrics,
    readiness: Readiness,
}

/// The admin routes, with `extra` merged in.
pub fn router(metrics: Metrics, readiness: Readiness, extra: Router) -> Router {
    Router::new()
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/startedz", get(startedz))
        .route("/readyz", get(readyz))
        .with_state(AdminState { metrics, readiness })
        .merge(extra)
}

/// Serves the admin routes until the future is dropped. `extra` must not repeat the four routes above
/// (axum panics on that at start).
pub fn serve(
    listener: TcpListener,
    metrics: Metrics,
    readiness: Readiness,
    extra: Router,
) -> impl Future<Output = ()> + Send + 'static {
    let app = router(metrics, readiness, extra);
    let options = ServerOptions::http("admin", IntakeOptions::new(INTAKE_BYTES));
    cadre_net::serve(listener, app, options, std::future::pending())
}

async fn metrics_text(State(state): State<AdminState>) -> Response {
    match state.metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, Metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "metrics could not be encoded");
            (StatusCode::INTERNAL_SERVER_ERROR, format!("metrics: {error}\n")).into_response()
        }
    }
}

/// Longest hold: who asks for more is answered after so long. Longer than any start, so that a probe's own time-out
/// decides; an end, so that no connection stays for ever.
const MAX_HOLD: Duration = Duration::from_secs(3600);

/// How `/startedz` and `/readyz` are asked.
#[derive(Debug, Default, serde::Deserialize)]
struct Asked {
    /// Seconds to wait for the start, or for the first readiness, of this process.
    #[serde(default)]
    hold: u64,
}

async fn startedz(State(state): State<AdminState>, Query(asked): Query<Asked>) -> Response {
    // Started in time or not: what is true now is said below.
    let _ = tokio::time::timeout(hold(&asked), state.readiness.wait_started()).await;
    match state.readiness.has_started() {
        true => (StatusCode::OK, "started\n").into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response(),
    }
}

fn hold(asked: &Asked) -> Duration {
    Duration::from_secs(asked.hold).min(MAX_HOLD)
}

async fn readyz(State(state): State<AdminState>, Query(asked): Query<Asked>) -> Response {
    // Ready in time or not: what holds now is said below.
    let _ = tokio::time::timeout(hold(&asked), state.readiness.first()).await;
    let missing = state.readiness.missing();
    let status = if missing.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::json!({ "ready": missing.is_empty(), "missing": missing });
    (status, Json(body)).into_response()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Status and body of one request over a real socket.
    async fn fetch(address: std::net::SocketAddr, path: &str) -> (u16, String) {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, body.to_owned())
    }

    #[tokio::test]
    async fn the_four_routes_and_the_roles_own() {
        let readiness = Readiness::new(&[("weights", "loading 3 of 9 bytes")]);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let extra = Router::new().route("/expert-load", get(|| async { "{}" }));
        tokio::spawn(serve(listener, Metrics::new(), readiness.clone(), extra));

        assert_eq!(fetch(address, "/healthz").await, (200, "ok\n".into()));
        assert_eq!(fetch(address, "/startedz").await, (503, "starting\n".into()));
        let held = tokio::spawn(async move { fetch(address, "/startedz?hold=600").await.0 });
        assert_eq!((fetch(address, "/startedz?hold=0").await.0, held.is_finished()), (503, false));
        readiness.started();
        assert_eq!(held.await.unwrap(), 200);
        assert_eq!(fetch(address, "/startedz").await, (200, "started\n".into()));
        assert_eq!(fetch(address, "/expert-load").await, (200, "{}".into()));
        let (status, body) = fetch(address, "/readyz").await;
        assert_eq!(status, 503);
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["missing"][0]["condition"], "weights");
        assert_eq!(body["missing"][0]["reason"], "loading 3 of 9 bytes");
        let held = tokio::spawn(async move { fetch(address, "/readyz?hold=600").await.0 });
        let (status, _) = fetch(address, "/readyz?hold=0").await;
        assert_eq!((status, held.is_finished()), (503, false));
        assert_eq!(fetch(address, "/readyz?hold=soon").await.0, 400);
        readiness.met("weights");
        assert_eq!(held.await.unwrap(), 200);
        assert_eq!(fetch(address, "/readyz").await.0, 200);
        readiness.unmet("weights", "lost");
        assert_eq!(fetch(address, "/readyz?hold=600").await.0, 503, "only the first readiness is waited for");
        readiness.met("weights");
        let (status, text) = fetch(address, "/metrics").await;
        assert_eq!(status, 200);
        assert!(text.contains("process_"), "{text}");
        assert_eq!(fetch(address, "/nothing").await.0, 404);
    }

    /// The paused clock goes on when nobody has anything to do.
    #[tokio::test(start_paused = true)]
    async fn who_connects_and_says_nothing_is_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, Metrics::new(), Readiness::new(&[]), Router::new()));
        let mut silent = tokio::net::TcpStream::connect(address).await.unwrap();
        let mut rest = Vec::new();
        assert_eq!(silent.read_to_end(&mut rest).await.unwrap(), 0);
    }
}
