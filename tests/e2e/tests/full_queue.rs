//! A full admission queue refuses at once and says when to come back.

use cadre_e2e::{Cluster, golden, grpc, http, wait};
use serde_json::json;
use tonic::Code;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_is_refused_on_both_front_doors() {
    let cluster = Cluster::start(&[
        "--experts=1",
        "--prefill=0",
        "--router-arg=--max-concurrent=1",
        "--router-arg=--max-waiting=1",
    ]);
    let mut client = grpc::connect(&cluster.grpc()).await;
    // One runs, one waits; both would take minutes.
    let mut running =
        client.generate_stream(grpc::endless("What is a Pod?", 4000)).await.expect("a stream").into_inner();
    running.message().await.expect("it runs");
    let waiting = tokio::spawn({
        let mut client = client.clone();
        async move { client.generate_stream(grpc::endless("What is a Pod?", 4000)).await.map(drop) }
    });
    let admin = cluster.member("router").admin;
    wait::until_async("one waits", || async {
        (http::metric(&admin, "cadre_router_waiting_requests", &[]).await >= 1.0).then_some(())
    })
    .await;

    let refused = client.generate(grpc::chat("What is a Pod?")).await.expect_err("no room");
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.metadata().contains_key("retry-after"), "{refused:?}");

    let body = json!({"model": "pocket", "messages": [{"role": "user", "content": "x"}]});
    let answer = http::post(&cluster.http(), "/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 429, "{}", answer.body);
    let retry_after = answer.headers.get("retry-after").and_then(|value| value.to_str().ok());
    assert!(
        retry_after.is_some_and(|seconds| seconds.parse::<u32>().is_ok_and(|seconds| seconds >= 1)),
        "{retry_after:?}"
    );
    assert_eq!(answer.json()["error"]["code"], "queue_full");

    // Those that had a place keep it, and room that is freed is used.
    waiting.abort();
    drop(running);
    let text = wait::until_async("there is room again", || async {
        client
            .clone()
            .generate(grpc::chat("What is a Pod?"))
            .await
            .ok()
            .map(|answer| answer.into_inner().text)
    })
    .await;
    assert_eq!(text, golden::pod().greedy_text);
}
