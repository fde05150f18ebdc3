//! The OpenAI-compatible front door when all goes well.

use cadre_proto::v1::FinishReason;
use serde_json::{Value, json};

use crate::{
    cluster::{Cluster, MODEL, TOKENIZER, gate, options, tokens},
    fake_worker::{FakeWorker, Script, Step},
    http_client::{get, post, post_json, send},
};

const ANSWER: &str = " is a group of containers.";

async fn cluster() -> (FakeWorker, Cluster) {
    let worker = FakeWorker::start(Script::tokens(&tokens(ANSWER), FinishReason::Stop)).await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    (worker, cluster)
}

fn parse(event: &str) -> Value {
    serde_json::from_str(event).unwrap_or_else(|error| panic!("{error}: {event}"))
}

#[tokio::test]
async fn models_are_listed_and_found() {
    let (_worker, cluster) = cluster().await;
    let (status, list) = get(cluster.at.http, "/v1/models").await;
    let list = parse(&list);
    assert_eq!((status, &list["object"], &list["data"][0]["id"]), (200, &json!("list"), &json!(MODEL)));
    let (status, model) = get(cluster.at.http, "/v1/models/pocket").await;
    assert_eq!((status, parse(&model)), (200, list["data"][0].clone()));
    let (status, error) = get(cluster.at.http, "/v1/models/deep/seek").await;
    let error = parse(&error);
    assert_eq!((status, &error["error"]["code"]), (404, &json!("model_not_found")));
    assert!(error["error"]["message"].as_str().unwrap().contains("deep/seek"));
}

#[tokio::test]
async fn a_whole_completion() {
    let (worker, cluster) = cluster().await;
    let request = json!({"model": MODEL, "prompt": "A Pod", "seed": 3, "temperature": 0, "user": "u"});
    let answer = post(cluster.at.http, "/v1/completions", &request).await;
    assert!(answer.headers.contains_key("x-request-id"));
    let (status, body) = answer.json().await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["object"], "text_completion");
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    let choice = json!({"index": 0, "text": ANSWER, "logprobs": null, "finish_reason": "stop"});
    assert_eq!(body["choices"], json!([choice]));
    let prompt = TOKENIZER.encode("A Pod", true).unwrap().len();
    let completion = tokens(ANSWER).len();
    let usage = json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion});
    assert_eq!(body["usage"], usage);
    let decode = worker.seen.decode(0);
    assert_eq!(decode.max_tokens, 16, "OpenAI's default");
    assert_eq!(decode.sampling.unwrap().seed, 3);
}

#[tokio::test]
async fn a_streamed_completion_with_usage() {
    let (_worker, cluster) = cluster().await;
    let request =
        json!({"model": MODEL, "prompt": [5, 6], "stream": true, "stream_options": {"include_usage": true}});
    let answer = post(cluster.at.http, "/v1/completions", &request).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let mut events = answer.events().await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let usage = parse(&events.pop().unwrap());
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["prompt_tokens"], 2);
    assert_eq!(usage["usage"]["completion_tokens"], tokens(ANSWER).len());
    let events: Vec<Value> = events.iter().map(|event| parse(event)).collect();
    let text: String = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, ANSWER);
    assert!(events.iter().all(|event| event["usage"].is_null() && event.get("usage").is_some()));
    let reasons: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["finish_reason"]).collect();
    assert_eq!(*reasons[reasons.len() - 1], "stop");
    assert!(reasons[..reasons.len() - 1].iter().all(|reason| reason.is_null()));
}

#[tokio::test]
async fn a_whole_chat_and_a_streamed_one() {
    let (worker, cluster) = cluster().await;
    let mut request = json!({
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a Pod?"}]},
        ],
        "max_completion_tokens": 50,
    });
    let (status, body) = post_json(cluster.at.http, "/v1/chat/completions", &request).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(
        body["choices"][0]["message"],
        json!({"role": "assistant", "content": ANSWER, "refusal": null})
    );
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let decode = worker.seen.decode(0);
    assert_eq!(decode.max_tokens, 50);
    assert_eq!(
        decode.prompt,
        tokens("<｜begin▁of▁sentence｜>Be brief.<｜User｜>What is a Pod?<｜Assistant｜>")
    );

    request["stream"] = json!(true);
    let mut events = post(cluster.at.http, "/v1/chat/completions", &request).await.events().await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let events: Vec<Value> = events.iter().map(|event| parse(event)).collect();
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let text: String =
        events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, ANSWER);
    let last = &events[events.len() - 1]["choices"][0];
    assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("stop")));
    let ids: std::collections::BTreeSet<&str> =
        events.iter().map(|event| event["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 1, "one id for the whole stream");
    assert!(events.iter().all(|event| event.get("usage").is_none()), "usage only when asked for");
}

#[tokio::test]
async fn several_prompts_and_choices_are_sequences_of_their_own() {
    let (worker, cluster) = cluster().await;
    let request = json!({"model": MODEL, "prompt": [[5], [6, 7]], "n": 2, "seed": 10, "max_tokens": 30});
    let (status, body) = post_json(cluster.at.http, "/v1/completions", &request).await;
    assert_eq!(status, 200, "{body}");
    let indices: Vec<u64> =
        body["choices"].as_array().unwrap().iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    let mut asked: Vec<(u64, Vec<u32>)> = worker
        .seen
        .decodes
        .lock()
        .unwrap()
        .iter()
        .map(|decode| (decode.sampling.as_ref().unwrap().seed, decode.prompt.clone()))
        .collect();
    asked.sort();
    let expected = [(10, vec![5]), (11, vec![5]), (12, vec![6, 7]), (13, vec![6, 7])];
    assert_eq!(asked, expected);
    assert_eq!(body["usage"]["prompt_tokens"], 3, "a prompt counts once");
    assert_eq!(body["usage"]["completion_tokens"], 4 * tokens(ANSWER).len());

    let request =
        json!({"model": MODEL, "messages": [{"role": "user", "content": "x"}], "n": 3, "stream": true});
    let mut events = post(cluster.at.http, "/v1/chat/completions", &request).await.events().await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let mut texts = [const { String::new() }; 3];
    for event in &events {
        let choice = &parse(event)["choices"][0];
        texts[choice["index"].as_u64().unwrap() as usize]
            .push_str(choice["delta"]["content"].as_str().unwrap_or_default());
    }
    assert_eq!(texts, [ANSWER; 3]);
}

#[tokio::test]
async fn logprobs_in_both_shapes() {
    let (worker, cluster) = cluster().await;
    let pod = tokens(" Pod")[0];
    let crab = tokens("🦀")[0];
    worker.set(Script::steps(vec![
        Step::Scored(pod, -0.5, vec![(pod, -0.5), (crab, f32::NEG_INFINITY)]),
        Step::Scored(crab, -1.5, vec![(crab, -1.5), (pod, -2.0)]),
        Step::Finish(FinishReason::Length),
    ]));
    let request = json!({"model": MODEL, "prompt": "a", "logprobs": 2, "max_tokens": 2});
    let (_, body) = post_json(cluster.at.http, "/v1/completions", &request).await;
    let logprobs = &body["choices"][0]["logprobs"];
    let crab_bytes = TOKENIZER.token_bytes(crab).unwrap();
    let crab_name = crab_bytes.iter().fold("bytes:".to_owned(), |name, byte| format!("{name}\\x{byte:02x}"));
    assert_eq!(logprobs["tokens"], json!([" Pod", crab_name]));
    assert_eq!(logprobs["token_logprobs"], json!([-0.5, -1.5]));
    assert_eq!(logprobs["text_offset"], json!([0, 4]));
    assert_eq!(logprobs["top_logprobs"][0], json!({" Pod": -0.5, crab_name: -9999.0}));
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(worker.seen.decode(0).sampling.unwrap().logprobs, Some(2));

    let request = json!({
        "model": MODEL, "messages": [{"role": "user", "content": "x"}], "logprobs": true, "top_logprobs": 2,
    });
    let (_, body) = post_json(cluster.at.http, "/v1/chat/completions", &request).await;
    let content = &body["choices"][0]["logprobs"]["content"];
    assert_eq!(content[0]["token"], " Pod");
    assert_eq!(content[0]["bytes"], json!(b" Pod"));
    assert_eq!(content[1]["logprob"], -1.5);
    assert_eq!(content[1]["bytes"], json!(crab_bytes));
    assert_eq!(content[1]["top_logprobs"][1]["token"], " Pod");
}

#[tokio::test]
async fn an_idle_stream_is_kept_open_by_comments() {
    let (worker, _) = cluster().await;
    let gate = gate();
    worker.set(Script::steps(vec![
        Step::Gate(gate.clone()),
        Step::Token(40),
        Step::Finish(FinishReason::Stop),
    ]));
    let mut options = options();
    options.limits.sse_keep_alive = std::time::Duration::from_millis(20);
    let cluster = Cluster::with_worker(options, &worker).await;
    let request = json!({"model": MODEL, "prompt": "a", "stream": true});
    let mut answer = post(cluster.at.http, "/v1/completions", &request).await;
    let comment = answer.frame().await.unwrap();
    assert!(comment.starts_with(':'), "{comment:?}");
    gate.add_permits(1);
    assert_eq!(answer.events().await.last().unwrap(), "[DONE]");
}

#[tokio::test]
async fn admin_tells_readiness_metrics_load_and_members() {
    let (_worker, cluster) = cluster().await;
    let request = json!({"model": MODEL, "prompt": "a"});
    let (status, _) = post_json(cluster.at.http, "/v1/completions", &request).await;
    assert_eq!(status, 200);
    let at = cluster.at.admin;
    assert_eq!(get(at, "/healthz").await.0, 200);
    assert_eq!(get(at, "/readyz").await.0, 200);
    let ok = "cadre_router_requests_total{api=\"http_completions\",outcome=\"ok\"}";
    assert_eq!(cluster.metric(ok).await, 1.0);
    assert_eq!(cluster.metric("cadre_router_members{role=\"both\",state=\"ready\"}").await, 1.0);
    assert_eq!(cluster.metric("cadre_router_placement_epoch").await, 1.0);
    assert_eq!(cluster.metric("cadre_router_running_sequences").await, 0.0);
    assert_eq!(
        cluster.metric("cadre_router_time_to_first_token_seconds_count{api=\"http_completions\"}").await,
        1.0
    );
    let (_, load) = get(at, "/expert-load").await;
    let load: cadre_placement::ExpertLoad = serde_json::from_str(&load).unwrap();
    assert_eq!((load.num_experts(), load.layers().len()), (32, 5));
    let (_, members) = get(at, "/cluster").await;
    let members = parse(&members);
    assert_eq!((&members["epoch"], &members["covered"]), (&json!(1), &json!(true)));
}

#[tokio::test]
async fn the_health_of_a_name_given_to_the_model() {
    let worker = FakeWorker::start(Script::tokens(&tokens(ANSWER), FinishReason::Stop)).await;
    let mut options = options();
    options.served_model_name = Some("org/tiny".into());
    let cluster = Cluster::with_worker(options, &worker).await;
    let (status, _) = get(cluster.at.http, "/v1/models/org/tiny").await;
    assert_eq!(status, 200);
    let headers = [("x-request-timeout-ms", "60000")];
    let body = json!({"model": "org/tiny", "prompt": "a"}).to_string();
    assert_eq!(send(cluster.at.http, "POST", "/v1/completions", &headers, body).await.status, 200);
}
