//! Every refusal of the HTTP front door: status, shape, and the word for programs.

use std::time::Duration;

use cadre_proto::v1::FinishReason;
use serde_json::{Value, json};

use crate::{
    cluster::{Cluster, MODEL, impatient, options, tokens},
    fake_worker::{FakeWorker, Script, Step},
    http_client::{post, post_json, send},
};

async fn worker() -> FakeWorker {
    FakeWorker::start(Script::tokens(&tokens("fine"), FinishReason::Stop)).await
}

fn check(body: &Value, code: &str, words: &[&str]) {
    let error = &body["error"];
    assert_eq!(error["code"], code, "{body}");
    for field in ["message", "type", "param", "code"] {
        assert!(error.get(field).is_some(), "{field} is missing in {body}");
    }
    for word in words {
        assert!(error["message"].as_str().unwrap().contains(word), "{body} lacks {word}");
    }
}

#[tokio::test]
async fn bad_requests_are_400_and_name_the_field() {
    let worker = worker().await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let completion = |more: Value| {
        let mut body = json!({"model": MODEL, "prompt": "a"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ("/v1/completions", body)
    };
    let chat = |more: Value| {
        let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "a"}]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ("/v1/chat/completions", body)
    };
    for ((path, body), param) in [
        (completion(json!({"temperature": 3})), "temperature"),
        (completion(json!({"temperature": "hot"})), "temperature"),
        (completion(json!({"echo": true})), "echo"),
        (completion(json!({"suffix": "x"})), "suffix"),
        (completion(json!({"best_of": 4})), "best_of"),
        (completion(json!({"logprobs": 21})), "logprobs"),
        (completion(json!({"prompt": [4096]})), "prompt"),
        (completion(json!({"prompt": []})), "prompt"),
        (completion(json!({"max_tokens": 0})), "max_tokens"),
        (completion(json!({"n": 0})), "n"),
        (completion(json!({"n": 100000})), "n"),
        (completion(json!({"stop": ["a", ""]})), "stop"),
        (completion(json!({"stream_options": {"include_usage": true}})), "stream_options"),
        (chat(json!({"messages": []})), "messages"),
        (chat(json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})), "messages"),
        (chat(json!({"max_completion_tokens": 0})), "max_completion_tokens"),
        (chat(json!({"tools": [{}]})), "tools"),
        (chat(json!({"response_format": {"type": "json_schema"}})), "response_format"),
        (chat(json!({"top_logprobs": 2})), "top_logprobs"),
        (chat(json!({"logprobs": true, "top_logprobs": 21})), "logprobs"),
        (chat(json!({"chat_template_kwargs": {"messages": 1}})), "chat_template_kwargs"),
    ] {
        let (status, answer) = post_json(cluster.at.http, path, &body).await;
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{body}: {answer}");
        check(&answer, "invalid_value", &[]);
        assert_eq!(answer["error"]["type"], "invalid_request_error");
    }
    assert!(worker.seen.decodes.lock().unwrap().is_empty());
    let invalid = "cadre_router_requests_total{api=\"http_chat\",outcome=\"invalid\"}";
    assert_eq!(cluster.metric(invalid).await, 8.0);
}

#[tokio::test]
async fn unknown_models_long_prompts_and_malformed_bodies() {
    let worker = worker().await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let at = cluster.at.http;
    let (status, body) = post_json(at, "/v1/completions", &json!({"model": "gpt-x", "prompt": "a"})).await;
    assert_eq!(status, 404);
    check(&body, "model_not_found", &["gpt-x", MODEL]);
    let (status, body) = post_json(at, "/v1/completions", &json!({"prompt": "a"})).await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("model")));
    let long = json!({"model": MODEL, "prompt": vec![5; 5000]});
    let (status, body) = post_json(at, "/v1/completions", &long).await;
    assert_eq!(status, 400);
    check(&body, "context_length_exceeded", &["5000", "4096"]);
    for malformed in ["{\"model\": ", "[1]", ""] {
        let (status, body) = send(at, "POST", "/v1/completions", &[], malformed).await.json().await;
        assert_eq!(status, 400);
        check(&body, "invalid_json", &["not valid JSON"]);
    }
    let headers = [("x-request-timeout-ms", "soon")];
    let (status, body) = send(at, "POST", "/v1/completions", &headers, "{}").await.json().await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("x-request-timeout-ms")));
}

#[tokio::test]
async fn unknown_routes_and_methods_answer_in_the_same_shape() {
    let worker = worker().await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let (status, body) = send(cluster.at.http, "GET", "/v2/nothing", &[], "").await.json().await;
    assert_eq!(status, 404);
    check(&body, "unknown_url", &["GET", "/v2/nothing"]);
    let (status, body) = send(cluster.at.http, "GET", "/v1/completions", &[], "").await.json().await;
    assert_eq!(status, 405);
    check(&body, "method_not_allowed", &["GET"]);
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_413() {
    let worker = worker().await;
    let mut options = options();
    options.limits.max_body_bytes = 1000;
    let cluster = Cluster::with_worker(options, &worker).await;
    let large = json!({"model": MODEL, "prompt": "x".repeat(2000)});
    let (status, body) = post_json(cluster.at.http, "/v1/completions", &large).await;
    assert_eq!(status, 413);
    check(&body, "body_too_large", &["1000 bytes"]);
}

#[tokio::test]
async fn no_ready_worker_is_503_and_says_what_is_missing() {
    let cluster = Cluster::bare(impatient()).await;
    let request = json!({"model": MODEL, "prompt": "a"});
    let answer = post(cluster.at.http, "/v1/completions", &request).await;
    assert!(answer.headers.contains_key("retry-after"));
    let (status, body) = answer.json().await;
    assert_eq!(status, 503);
    check(&body, "no_worker", &["0/0 both", "0/0 decode", "0/0 prefill"]);
    let (status, text) = crate::http_client::get(cluster.at.admin, "/readyz").await;
    let missing: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &missing["missing"][0]["condition"]), (503, &json!("workers")));
}

#[tokio::test]
async fn a_deadline_is_504_and_says_where_it_passed() {
    let worker = worker().await;
    worker.set(Script { reserve: None, ..Script::steps(Vec::new()) });
    let cluster = Cluster::with_worker(options(), &worker).await;
    let body = json!({"model": MODEL, "prompt": "a"}).to_string();
    let ask =
        || send(cluster.at.http, "POST", "/v1/completions", &[("x-request-timeout-ms", "700")], body.clone());
    let (status, answer) = ask().await.json().await;
    assert_eq!(status, 504);
    check(&answer, "deadline_exceeded", &["700ms", "reserving KV pages"]);
    worker.seen.open(0).await;
    worker.set(Script::steps(vec![Step::Token(40), Step::Hang]));
    let (status, answer) = ask().await.json().await;
    assert_eq!(status, 504);
    check(&answer, "deadline_exceeded", &["generating"]);
    worker.seen.open(0).await;
    let deadline = "cadre_router_requests_total{api=\"http_completions\",outcome=\"deadline\"}";
    assert_eq!(cluster.metric(deadline).await, 2.0);
}

#[tokio::test]
async fn a_worker_that_hangs_is_named_after_the_stall_timeout() {
    let worker = worker().await;
    let mut options = options();
    options.limits.stall_timeout = Duration::from_millis(100);
    worker.set(Script::steps(vec![Step::Token(40), Step::Hang]));
    let cluster = Cluster::with_worker(options, &worker).await;
    let (status, answer) =
        post_json(cluster.at.http, "/v1/completions", &json!({"model": MODEL, "prompt": "a"})).await;
    assert_eq!(status, 503);
    check(&answer, "worker_stalled", &["w-1", "100ms"]);
    worker.seen.open(0).await;
}
