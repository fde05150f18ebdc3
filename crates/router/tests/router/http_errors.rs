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
        (
            chat(json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})),
            "messages[0].content[0].type",
        ),
        (chat(json!({"messages": [{"role": "user", "content": 7}]})), "messages[0].content"),
        (chat(json!({"messages": [{"role": "tool", "content": "4"}]})), "messages[0].role"),
        (chat(json!({"max_completion_tokens": 0})), "max_completion_tokens"),
        (chat(json!({"tools": [{}]})), "tools"),
        (chat(json!({"response_format": {"type": "json_schema"}})), "response_format"),
        (chat(json!({"top_logprobs": 2})), "top_logprobs"),
        (chat(json!({"logprobs": true, "top_logprobs": 21})), "top_logprobs"),
        (chat(json!({"echo": true})), "echo"),
        (completion(json!({"skip_special_tokens": false})), "skip_special_tokens"),
        (completion(json!({"repetition_penalty": 1e-44})), "repetition_penalty"),
        (chat(json!({"chat_template_kwargs": {"messages": 1}})), "chat_template_kwargs"),
    ] {
        let (status, answer) = post_json(cluster.at.http, path, &body).await;
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{body}: {answer}");
        check(&answer, "invalid_value", &[]);
        assert_eq!(answer["error"]["type"], "invalid_request_error");
    }
    assert!(worker.seen.decodes.lock().unwrap().is_empty());
    let invalid = "cadre_router_requests_total{api=\"http_chat\",outcome=\"invalid\"}";
    assert_eq!(cluster.metric(invalid).await, 11.0);
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

#[tokio::test]
async fn every_answer_has_the_requests_name_and_openais_shape() {
    let worker = worker().await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let at = cluster.at.http;
    let gzip = [("content-encoding", "gzip")];
    let bad_timeout = [("x-request-timeout-ms", "soon")];
    let mut names = Vec::new();
    for (method, path, headers, body, status, code) in [
        ("GET", "/health", &[][..], "", 200, ""),
        ("GET", "/v1/models", &[], "", 200, ""),
        ("GET", "/v1/models/pocket", &[], "", 200, ""),
        ("GET", "/v1/models/%ff", &[], "", 400, "invalid_value"),
        ("GET", "/v1/models/other", &[], "", 404, "model_not_found"),
        ("GET", "/nothing", &[], "", 404, "unknown_url"),
        ("GET", "/v1/completions", &[], "", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/completions", &[], "", 405, "method_not_allowed"),
        ("POST", "/v1/completions", &[], "{", 400, "invalid_json"),
        ("POST", "/v1/completions", &bad_timeout, "{}", 400, "invalid_value"),
        ("POST", "/v1/chat/completions", &gzip, "{}", 415, "unsupported_content_encoding"),
    ] {
        let answer = send(at, method, path, headers, body).await;
        names.push(answer.headers["x-request-id"].to_str().unwrap().to_owned());
        let (found, answer) = answer.json().await;
        assert_eq!(found, status, "{method} {path}: {answer}");
        if !code.is_empty() {
            check(&answer, code, &[]);
        }
    }
    let (all, one) = (names.len(), names.iter().collect::<std::collections::BTreeSet<_>>().len());
    assert_eq!(all, one, "{names:?}");

    // What is no request never reaches a route.
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(100_000));
    for (said, status, code) in [("nonsense\r\n\r\n", 400, "invalid_http"), (&long, 431, "headers_too_large")]
    {
        let mut stream = tokio::net::TcpStream::connect(at).await.unwrap();
        stream.write_all(said.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // It is reset where more was sent than read; the answer came before.
        let _ = stream.read_to_string(&mut answer).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
        assert!(
            head.starts_with(&format!("HTTP/1.1 {status} ")) && head.contains("x-request-id: "),
            "{head}"
        );
        check(&serde_json::from_str(body).unwrap(), code, &[]);
    }
}

#[tokio::test]
async fn browsers_are_answered_only_for_the_origins_that_were_given() {
    let worker = worker().await;
    let mut options = options();
    options.limits.cors_origins = vec!["https://chat.example".into()];
    let cluster = Cluster::with_worker(options, &worker).await;
    let preflight = |origin| {
        let headers = [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization,content-type"),
        ];
        async move { send(cluster.at.http, "OPTIONS", "/v1/completions", &headers, "").await }
    };
    let allowed = preflight("https://chat.example").await;
    assert_eq!(allowed.status, 200);
    assert_eq!(allowed.headers["access-control-allow-origin"], "https://chat.example");
    assert_eq!(allowed.headers["access-control-allow-headers"], "authorization,content-type");
    assert!(allowed.headers.contains_key("x-request-id"));
    let other = preflight("https://evil.example").await;
    assert!(!other.headers.contains_key("access-control-allow-origin"));
    let request = json!({"model": MODEL, "prompt": "a"}).to_string();
    let headers = [("origin", "https://chat.example")];
    let answer = send(cluster.at.http, "POST", "/v1/completions", &headers, request).await;
    assert_eq!(
        (answer.status, &answer.headers["access-control-allow-origin"]),
        (200, &"https://chat.example".parse().unwrap())
    );
}

#[tokio::test]
async fn health_says_whether_a_request_could_be_served() {
    let cluster = Cluster::bare(options()).await;
    let (status, body) = send(cluster.at.http, "GET", "/health", &[], "").await.json().await;
    assert_eq!(status, 503);
    check(&body, "no_worker", &["workers"]);
}

#[tokio::test]
async fn the_longest_sequence_is_one_number_for_prompts_answers_and_what_is_advertised() {
    let worker = worker().await;
    let mut cluster = Cluster::bare(options()).await;
    let mut small = crate::cluster::report("w-1", cadre_proto::v1::Role::Both, worker.address.to_string());
    small.worker.as_mut().unwrap().total_pages = 2;
    small.worker.as_mut().unwrap().free_pages = 2;
    cluster.add(small).await;
    cluster.ready(true).await;
    let (_, models) = crate::http_client::get(cluster.at.http, "/v1/models").await;
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!(models["data"][0]["max_model_len"], 128);
    let listed = cluster.grpc().await.list_models(cadre_proto::v1::ListModelsRequest {}).await.unwrap();
    assert_eq!(listed.into_inner().models[0].max_context_tokens, 128);
    for (asked, given) in [(5, 5), (1000, 118), (100_000, 118)] {
        let body = json!({"model": MODEL, "prompt": vec![5; 10], "max_tokens": asked});
        assert_eq!(post_json(cluster.at.http, "/v1/completions", &body).await.0, 200);
        assert_eq!(worker.seen.decodes.lock().unwrap().last().unwrap().max_tokens, given);
    }
    let body = json!({"model": MODEL, "prompt": vec![5; 128]});
    let (status, answer) = post_json(cluster.at.http, "/v1/completions", &body).await;
    assert_eq!(status, 400);
    check(&answer, "context_length_exceeded", &["128 tokens", "4096"]);
}
