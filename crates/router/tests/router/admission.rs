//! The queue as clients see it: order, refusal, drain.

use cadre_proto::v1::FinishReason;
use serde_json::json;
use tonic::Code;

use crate::{
    cluster::{Cluster, MODEL, gate, options, text_request},
    fake_worker::{FakeWorker, Script, Step},
    http_client::post,
};

fn gated(gate: &std::sync::Arc<tokio::sync::Semaphore>) -> Script {
    Script::steps(vec![Step::Gate(gate.clone()), Step::Token(40), Step::Finish(FinishReason::Stop)])
}

/// Waits until a gauge has a value; gauges move only when requests do.
async fn gauge(cluster: &Cluster, name: &str, value: f64) {
    while cluster.metric(name).await != value {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn requests_run_in_the_order_in_which_they_came() {
    let gate = gate();
    let worker = FakeWorker::start(gated(&gate)).await;
    let mut options = options();
    options.limits.max_concurrent = 1;
    let cluster = Cluster::with_worker(options, &worker).await;
    let mut answers = Vec::new();
    for seed in 0..5_u32 {
        let at = cluster.at.http;
        let body = json!({"model": MODEL, "prompt": "a", "seed": seed});
        answers.push(tokio::spawn(async move { post(at, "/v1/completions", &body).await.status }));
        match seed {
            0 => worker.seen.begun(1).await,
            _ => gauge(&cluster, "cadre_router_waiting_requests", f64::from(seed)).await,
        }
    }
    gate.add_permits(5);
    for answer in answers {
        assert_eq!(answer.await.unwrap(), 200);
    }
    let seeds: Vec<u64> = worker
        .seen
        .decodes
        .lock()
        .unwrap()
        .iter()
        .map(|decode| decode.sampling.as_ref().unwrap().seed)
        .collect();
    assert_eq!(seeds, [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn a_full_queue_refuses_on_both_front_doors_and_recovers() {
    let gate = gate();
    let worker = FakeWorker::start(gated(&gate)).await;
    let mut options = options();
    (options.limits.max_concurrent, options.limits.max_waiting) = (1, 1);
    let cluster = Cluster::with_worker(options, &worker).await;
    let mut client = cluster.grpc().await;
    let mut running = client.generate_stream(text_request("a")).await.unwrap().into_inner();
    let waiting = tokio::spawn({
        let mut client = client.clone();
        async move { client.generate(text_request("b")).await.unwrap().into_inner() }
    });
    gauge(&cluster, "cadre_router_waiting_requests", 1.0).await;

    let request = json!({"model": MODEL, "prompt": "a"});
    let answer = post(cluster.at.http, "/v1/completions", &request).await;
    assert_eq!(answer.status, 429);
    let retry: u32 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!(retry >= 1);
    let (_, body) = answer.json().await;
    assert_eq!(body["error"]["code"], "queue_full");
    let status = client.generate(text_request("c")).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.metadata().get("retry-after").is_some());

    gate.add_permits(3);
    while running.message().await.unwrap().is_some() {}
    assert_eq!(waiting.await.unwrap().finish_reason(), FinishReason::Stop);
    gauge(&cluster, "cadre_router_running_sequences", 0.0).await;
    assert_eq!(post(cluster.at.http, "/v1/completions", &request).await.status, 200);
}

#[tokio::test]
async fn shutdown_finishes_what_runs_and_refuses_what_comes() {
    let gate = gate();
    let worker = FakeWorker::start(gated(&gate)).await;
    let mut cluster = Cluster::with_worker(options(), &worker).await;
    let mut client = cluster.grpc().await;
    let mut running = client.generate_stream(text_request("a")).await.unwrap().into_inner();
    worker.seen.begun(1).await;
    cluster.stop();
    cluster_not_ready(&cluster).await;
    // The connection is told to go away; a request that still gets in is refused. Either way it does not
    // reach a worker.
    let refused = client.generate(text_request("b")).await.unwrap_err();
    assert!(matches!(refused.code(), Code::Unavailable | Code::Cancelled), "{refused}");
    assert_eq!(worker.seen.decodes.lock().unwrap().len(), 1);
    gate.add_permits(1);
    let mut text = String::new();
    while let Some(chunk) = running.message().await.unwrap() {
        text.push_str(&chunk.text);
    }
    assert!(!text.is_empty());
    cluster.ended().await.unwrap();
}

async fn cluster_not_ready(cluster: &Cluster) {
    while crate::http_client::get(cluster.at.admin, "/readyz").await.0 != 503 {
        tokio::task::yield_now().await;
    }
}
