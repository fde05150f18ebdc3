//! Workers and clients that go away.

use cadre_proto::v1::{self, FinishReason};
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::{
    cluster::{Cluster, MODEL, gate, impatient, options, report, text_request, tokens},
    fake_worker::{FakeWorker, Script, Step},
    http_client::{post, post_json},
};

fn endless() -> Script {
    Script::steps(vec![Step::Token(40), Step::Token(41), Step::Hang])
}

fn fine() -> Script {
    Script::tokens(&tokens("fine"), FinishReason::Stop)
}

#[tokio::test]
async fn a_client_that_goes_away_frees_the_worker() {
    let worker = FakeWorker::start(endless()).await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    // HTTP, streamed.
    let request = json!({"model": MODEL, "prompt": "a", "stream": true});
    let mut answer = post(cluster.at.http, "/v1/completions", &request).await;
    answer.event().await.unwrap();
    worker.seen.open(1).await;
    drop(answer);
    worker.seen.open(0).await;
    // HTTP, whole.
    let at = cluster.at.http;
    let waiting =
        tokio::spawn(
            async move { post(at, "/v1/completions", &json!({"model": MODEL, "prompt": "a"})).await },
        );
    worker.seen.begun(2).await;
    waiting.abort();
    worker.seen.open(0).await;
    // gRPC, streamed, between two tokens.
    let mut client = cluster.grpc().await;
    let mut stream = client.generate_stream(text_request("a")).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    drop(stream);
    worker.seen.open(0).await;
    for api in ["http_completions", "grpc_stream"] {
        let line = format!("cadre_router_requests_total{{api=\"{api}\",outcome=\"cancelled\"}}");
        while cluster.metric(&line).await < 1.0 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_worker_that_dies_mid_stream_is_named_and_the_rest_goes_on() {
    let mut dying = FakeWorker::start(endless()).await;
    let healthy = FakeWorker::start(fine()).await;
    let mut cluster = Cluster::bare(options()).await;
    cluster.add_worker("w-dying", v1::Role::Both, &dying).await;
    cluster.ready(true).await;
    let mut client = cluster.grpc().await;
    let mut over_grpc = client.generate_stream(text_request("a")).await.unwrap().into_inner();
    over_grpc.message().await.unwrap().unwrap();
    let request = json!({"model": MODEL, "prompt": "a", "stream": true});
    let mut over_http = post(cluster.at.http, "/v1/completions", &request).await;
    over_http.event().await.unwrap();
    cluster.add_worker("w-healthy", v1::Role::Both, &healthy).await;
    dying.kill();

    let status = loop {
        match over_grpc.message().await {
            Ok(chunk) => assert!(chunk.is_some(), "the stream ended well"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("decode on worker w-dying failed"), "{}", status.message());
    let events = over_http.events().await;
    let error: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(error["error"]["code"], "worker_failed", "no [DONE] after a failure: {events:?}");
    assert!(error["error"]["message"].as_str().unwrap().contains("w-dying"));
    // Still in the view, but new requests find their way.
    for _ in 0..3 {
        let answer = client.generate(text_request("b")).await.unwrap().into_inner();
        assert_eq!(answer.text, "fine");
    }
}

#[tokio::test]
async fn failures_before_the_first_token_move_the_request() {
    let bad = FakeWorker::start(fine()).await;
    let good = FakeWorker::start(fine()).await;
    let mut cluster = Cluster::bare(options()).await;
    // By name the bad one is first among equals.
    cluster.add_worker("a-bad", v1::Role::Both, &bad).await;
    cluster.add_worker("b-good", v1::Role::Both, &good).await;
    cluster.ready(true).await;
    let mut client = cluster.grpc().await;
    for (turn, script) in [
        Script::refusing(Status::unavailable("loading")),
        Script::refusing(Status::resource_exhausted("queue full")),
        Script::steps(vec![Step::Fail(Status::internal("broken"))]),
        Script::steps(vec![Step::End]),
        Script::steps(vec![Step::Misplaced(40)]),
        Script::steps(vec![Step::Fail(Status::aborted("hand-off failed"))]),
    ]
    .into_iter()
    .enumerate()
    {
        let aborted = turn == 5;
        bad.set(script);
        let result = client.generate(text_request("a")).await;
        if aborted {
            // Nobody is to blame, so the same worker is asked again, at most three times in all.
            let status = result.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable);
            assert!(status.message().contains("hand-off"), "{}", status.message());
            continue;
        }
        assert_eq!(result.unwrap().into_inner().text, "fine", "script {turn}");
    }
    let ids: Vec<String> = bad.seen.decodes.lock().unwrap().iter().map(|d| d.request_id.clone()).collect();
    let distinct: std::collections::BTreeSet<&String> = ids.iter().collect();
    assert_eq!(ids.len(), 5 + 3);
    assert_eq!(distinct.len(), ids.len(), "each attempt has its own id: {ids:?}");
}

#[tokio::test]
async fn what_a_worker_has_waited_for_in_vain_is_not_waited_for_again() {
    let mut uncovered =
        Status::unavailable("step at position 4: expert 37 of layer 12: no live copy after 30000 ms");
    uncovered.metadata_mut().insert(cadre_proto::UNCOVERED, "1".parse().unwrap());
    let one = FakeWorker::start(Script::steps(vec![Step::Fail(uncovered)])).await;
    let two = FakeWorker::start(fine()).await;
    let mut cluster = Cluster::bare(options()).await;
    cluster.add_worker("a", v1::Role::Both, &one).await;
    cluster.add_worker("b", v1::Role::Both, &two).await;
    cluster.ready(true).await;
    let (status, body) =
        post_json(cluster.at.http, "/v1/completions", &json!({"model": MODEL, "prompt": "a"})).await;
    assert_eq!((status, &body["error"]["code"]), (503, &json!("expert_unavailable")), "{body}");
    assert!(body["error"]["message"].as_str().unwrap().contains("expert 37 of layer 12"), "{body}");
    assert_eq!((one.seen.decodes.lock().unwrap().len(), two.seen.decodes.lock().unwrap().len()), (1, 0));
}

#[tokio::test]
async fn the_error_of_several_attempts_keeps_the_first_cause() {
    let broken = |words: &str| Script::steps(vec![Step::Fail(Status::internal(words))]);
    let one = FakeWorker::start(broken("the disk burns")).await;
    let two = FakeWorker::start(broken("out of coffee")).await;
    let mut cluster = Cluster::bare(options()).await;
    cluster.add_worker("a", v1::Role::Both, &one).await;
    cluster.add_worker("b", v1::Role::Both, &two).await;
    cluster.ready(true).await;
    let (status, body) =
        post_json(cluster.at.http, "/v1/completions", &json!({"model": MODEL, "prompt": "a"})).await;
    let message = body["error"]["message"].as_str().unwrap();
    assert_eq!((status, &body["error"]["code"]), (503, &json!("worker_failed")), "{body}");
    let (first, last) = (message.find("the disk burns"), message.find("out of coffee"));
    assert!(first.is_some() && first < last, "{message}");
}

#[tokio::test]
async fn attempts_are_bounded_in_sum_and_not_one_by_one() {
    // Three workers that are silent for longer than the bound on everything that is tried again: one is asked.
    let hanging = || FakeWorker::start(Script::steps(vec![Step::Token(40), Step::Hang]));
    let mut options = options();
    options.limits.stall_timeout = std::time::Duration::from_millis(300);
    options.limits.reserve_timeout = std::time::Duration::from_millis(200);
    let mut cluster = Cluster::bare(options).await;
    let silent = || Script { steps: vec![Step::Hang], prefill: None, reserve: None };
    let workers = [hanging().await, hanging().await, hanging().await];
    for (worker, name) in workers.iter().zip(["a", "b", "c"]) {
        worker.set(silent());
        cluster.add_worker(name, v1::Role::Both, worker).await;
    }
    cluster.ready(true).await;
    let (status, body) =
        post_json(cluster.at.http, "/v1/completions", &json!({"model": MODEL, "prompt": "a"})).await;
    assert_eq!((status, &body["error"]["code"]), (503, &json!("worker_stalled")), "{body}");
    let asked: usize = workers.iter().map(|worker| worker.seen.decodes.lock().unwrap().len()).sum();
    assert_eq!(asked, 1, "{body}");
}

#[tokio::test]
async fn an_impossible_request_is_not_tried_elsewhere() {
    let one = FakeWorker::start(Script::refusing(Status::invalid_argument("9 pages, the cache has 4"))).await;
    let two = FakeWorker::start(fine()).await;
    let mut cluster = Cluster::bare(options()).await;
    cluster.add_worker("a", v1::Role::Both, &one).await;
    cluster.add_worker("b", v1::Role::Both, &two).await;
    cluster.ready(true).await;
    let (status, body) =
        post_json(cluster.at.http, "/v1/completions", &json!({"model": MODEL, "prompt": "a"})).await;
    assert_eq!(status, 400);
    assert!(body["error"]["message"].as_str().unwrap().contains("the cache has 4"), "{body}");
    assert!(two.seen.decodes.lock().unwrap().is_empty());
}

#[tokio::test]
async fn every_worker_full_is_429() {
    let worker = FakeWorker::start(Script::refusing(Status::resource_exhausted("queue of 8 is full"))).await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let answer = post(cluster.at.http, "/v1/completions", &json!({"model": MODEL, "prompt": "a"})).await;
    assert!(answer.headers.contains_key("retry-after"));
    let (status, body) = answer.json().await;
    assert_eq!((status, &body["error"]["code"]), (429, &json!("overloaded")));
}

#[tokio::test]
async fn a_worker_of_another_generation_at_request_time_is_an_error_that_names_it() {
    let worker = FakeWorker::start(Script::refusing(Status::failed_precondition("numerics class fp8"))).await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let status = cluster.grpc().await.generate(text_request("a")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("w-1") && status.message().contains("fp8"), "{}", status.message());
}

// --- hand-off --------------------------------------------------------------------------------------

struct Split {
    decode: FakeWorker,
    prefills: [FakeWorker; 2],
    cluster: Cluster,
}

async fn split() -> Split {
    let decode = FakeWorker::start(fine()).await;
    let prefills = [FakeWorker::start(fine()).await, FakeWorker::start(fine()).await];
    let mut cluster = Cluster::bare(impatient()).await;
    cluster.add_worker("decode", v1::Role::Decode, &decode).await;
    cluster.add_worker("prefill-0", v1::Role::Prefill, &prefills[0]).await;
    cluster.add_worker("prefill-1", v1::Role::Prefill, &prefills[1]).await;
    cluster.ready(true).await;
    Split { decode, prefills, cluster }
}

#[tokio::test]
async fn with_separate_workers_the_prompt_is_prefilled_for_the_decode_worker() {
    let split = split().await;
    // Tokens only after the prefill, as with a real decode worker.
    let gate = gate();
    let mut steps = vec![Step::Gate(gate.clone())];
    steps.extend(fine().steps);
    split.decode.set(Script::steps(steps));
    let mut client = split.cluster.grpc().await;
    let answer = tokio::spawn(async move { client.generate(text_request("a")).await });
    split.prefills[0].seen.prefilled(1).await;
    gate.add_permits(1);
    assert_eq!(answer.await.unwrap().unwrap().into_inner().text, "fine");
    let decode = split.decode.seen.decode(0);
    assert_eq!(decode.prefill(), v1::PrefillMode::Handoff);
    let prefill = split.prefills[0].seen.prefills.lock().unwrap()[0].clone();
    assert_eq!(prefill.request_id, decode.request_id);
    assert_eq!(prefill.prompt, decode.prompt);
    assert_eq!(prefill.sampling, decode.sampling);
    assert_eq!(prefill.decode_address, split.decode.address.to_string());
}

#[tokio::test]
async fn a_prefill_worker_that_fails_is_replaced_and_the_first_reservation_is_dropped() {
    let mut split = split().await;
    split.decode.set(Script::steps(vec![Step::Hang]));
    split.prefills[0].set(Script { prefill: Some(Err(Status::internal("broken"))), ..fine() });
    let stream = split.cluster.grpc().await.generate_stream(text_request("a")).await.unwrap();
    split.decode.seen.begun(2).await;
    split.decode.seen.open(1).await;
    assert_eq!(split.prefills[0].seen.prefills.lock().unwrap().len(), 1);
    drop(stream);
    split.decode.seen.open(0).await;
    // With the last one gone, too, the error names it.
    split.prefills[1].kill();
    let status = split.cluster.grpc().await.generate(text_request("a")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("prefill"), "{}", status.message());
    split.decode.seen.open(0).await;
}

#[tokio::test]
async fn a_request_waits_for_its_prefill_and_its_deadline_frees_both() {
    let split = split().await;
    split.decode.set(Script::steps(vec![Step::Hang]));
    for prefill in &split.prefills {
        prefill.set(Script { prefill: None, ..fine() });
    }
    let mut request = tonic::Request::new(text_request("a"));
    request.metadata_mut().insert("grpc-timeout", "800m".parse().unwrap());
    let mut client = split.cluster.grpc().await;
    let mut stream = client.generate_stream(request).await.unwrap().into_inner();
    let status = stream.message().await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    split.decode.seen.open(0).await;
}

#[tokio::test]
async fn a_decode_worker_alone_is_not_enough() {
    let decode = FakeWorker::start(fine()).await;
    let mut cluster = Cluster::bare(impatient()).await;
    cluster.add(report("decode", v1::Role::Decode, decode.address.to_string())).await;
    let status = cluster.grpc().await.generate(text_request("a")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("1/1 decode, 0/0 prefill"), "{}", status.message());
}

// --- withdrawn workers, restarts -------------------------------------------------------------------

#[tokio::test]
async fn a_request_waits_for_a_worker_that_restarts_and_nothing_is_dropped() {
    let mut first = FakeWorker::start(fine()).await;
    let second = FakeWorker::start(fine()).await;
    let mut cluster = Cluster::with_worker(options(), &first).await;
    // It is killed and still in the view: whoever comes now meets a closed port, and waits.
    first.kill();
    let mut client = cluster.grpc().await;
    let ask = || {
        let mut client = client.clone();
        tokio::spawn(async move { client.generate(text_request("a")).await })
    };
    let early: Vec<_> = (0..4).map(|_| ask()).collect();
    while cluster.metric("cadre_router_reserve_retries_total").await < 4.0 {
        tokio::task::yield_now().await;
    }
    cluster.remove("w-1");
    // Nobody is in the view: whoever comes now waits, too.
    cluster.ready(false).await;
    let late: Vec<_> = (0..4).map(|_| ask()).collect();
    cluster.add_worker("w-2", v1::Role::Both, &second).await;
    for answer in early.into_iter().chain(late) {
        assert_eq!(answer.await.unwrap().unwrap().into_inner().text, "fine");
    }
    assert_eq!(client.generate(text_request("a")).await.unwrap().into_inner().text, "fine");
}

#[tokio::test]
async fn workers_withdrawn_between_choice_and_reserve_cost_no_attempt() {
    let mut cluster = Cluster::bare(options()).await;
    let mut leaving = Vec::new();
    for index in 0..5 {
        let worker =
            FakeWorker::start(Script::refusing(Status::unavailable("this worker is draining"))).await;
        cluster.add_worker(&format!("a-{index}"), v1::Role::Both, &worker).await;
        leaving.push(worker);
    }
    let staying = FakeWorker::start(fine()).await;
    cluster.add_worker("b", v1::Role::Both, &staying).await;
    cluster.ready(true).await;
    let answer = cluster.grpc().await.generate(text_request("a")).await.unwrap().into_inner();
    assert_eq!(answer.text, "fine");
    assert!(leaving.iter().all(|worker| worker.seen.decodes.lock().unwrap().len() == 1));
}

#[tokio::test]
async fn a_prefill_worker_withdrawn_before_its_turn_is_replaced() {
    let mut split = split().await;
    split.decode.set(Script::steps(vec![Step::Hang]));
    for prefill in &split.prefills {
        prefill.set(Script { prefill: Some(Err(Status::unavailable("draining"))), ..fine() });
    }
    let third = FakeWorker::start(fine()).await;
    let stream = split.cluster.grpc().await.generate_stream(text_request("a")).await.unwrap();
    split.prefills[1].seen.prefilled(1).await;
    split.cluster.add_worker("prefill-2", v1::Role::Prefill, &third).await;
    third.seen.prefilled(1).await;
    drop(stream);
    split.decode.seen.open(0).await;
}

#[tokio::test]
async fn without_any_worker_the_wait_is_bounded_and_the_error_says_what_is_missing() {
    let cluster = Cluster::bare(impatient()).await;
    let status = cluster.grpc().await.generate(text_request("a")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("no worker is ready"), "{}", status.message());
}
