//! What clients see of a healthy cluster, gRPC and HTTP. One cluster serves all cases: none of them may
//! disturb another, which is a claim of its own.

use std::{sync::LazyLock, time::Duration};

use cadre_e2e::{Cluster, golden, grpc, http, wait};
use cadre_proto::{
    secret::{ClusterSecret, Present},
    v1::{
        self, FinishReason, coordinator_client::CoordinatorClient, expert_client::ExpertClient,
        worker_client::WorkerClient,
    },
};
use serde_json::{Value, json};
use tokio_stream::StreamExt;
use tonic::{
    Code, Request,
    transport::{Channel, Endpoint},
};

/// Stops with the test process (its standard input ends).
static CLUSTER: LazyLock<Cluster> = LazyLock::new(|| Cluster::start(&[]));

const MODEL: &str = "pocket";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn greedy_text_is_the_golden_text() {
    let mut client = grpc::connect(&CLUSTER.grpc()).await;
    let golden = golden::pod();
    let answer = client.generate(grpc::chat(&golden.prompt)).await.expect("an answer").into_inner();
    assert_eq!(answer.text, golden.greedy_text);
    assert_eq!(answer.finish_reason(), FinishReason::Stop);
    let usage = answer.usage.expect("usage");
    assert_eq!(usage.prompt_tokens as usize, golden.prompt_ids.len());

    let streamed = grpc::stream(&mut client, grpc::chat(&golden.prompt)).await.expect("a stream");
    assert_eq!(streamed.text, golden.greedy_text);
    assert_eq!(streamed.tokens, answer.tokens);
    assert_eq!(streamed.usage, Some(usage));

    let ids = client.generate(grpc::tokens(&golden.prompt_ids)).await.expect("an answer").into_inner();
    assert_eq!(ids.tokens, answer.tokens, "text and its tokens are the same prompt");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_serves_the_same_text() {
    let golden = golden::pod();
    let body = json!({
        "model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": golden.prompt}],
    });
    let answer = http::post(&CLUSTER.http(), "/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.json()["choices"][0]["message"]["content"], golden.greedy_text.as_str());

    let body = json!({"model": MODEL, "temperature": 0, "max_tokens": 96, "prompt": golden.prompt_ids});
    let answer = http::post(&CLUSTER.http(), "/v1/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.json()["choices"][0]["text"], golden.greedy_text.as_str());
    assert_eq!(answer.json()["usage"]["prompt_tokens"], golden.prompt_ids.len());

    let models = http::get(&CLUSTER.http(), "/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], MODEL);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_two_streams_together_write_what_each_writes_alone() {
    let mut client = grpc::connect(&CLUSTER.grpc()).await;
    let requests: Vec<v1::GenerateRequest> = (0..32)
        .map(|index| {
            let golden = &golden::all()[index % golden::all().len()];
            let mut request = grpc::chat(&golden.prompt);
            request.max_tokens = Some(8 + index as u32);
            // Sampled, not greedy: company must not shift the random numbers either.
            request.sampling = Some(v1::SamplingOptions {
                temperature: Some(1.0),
                seed: Some(index as u64),
                logprobs: Some(2),
                ..v1::SamplingOptions::default()
            });
            request
        })
        .collect();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(grpc::stream(&mut client, request.clone()).await.expect("a stream"));
    }
    let tasks: Vec<_> = requests
        .into_iter()
        .map(|request| {
            let mut client = client.clone();
            tokio::spawn(async move { grpc::stream(&mut client, request).await })
        })
        .collect();
    for (task, alone) in tasks.into_iter().zip(alone) {
        let together = task.await.expect("the task").expect("a stream");
        // Tokens, logprobs and their alternatives, bit for bit.
        assert_eq!(together, alone);
    }
}

/// Pages in use on both workers.
async fn pages_used() -> f64 {
    let mut used = 0.0;
    for worker in ["prefill 0", "decode 0"] {
        used +=
            http::metric(&CLUSTER.member(worker).admin, "cadre_worker_kv_pages", &["state=\"used\""]).await;
    }
    used
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_stream_gives_its_pages_back() {
    let mut client = grpc::connect(&CLUSTER.grpc()).await;
    let mut chunks =
        client.generate_stream(grpc::endless("What is a Pod?", 3000)).await.expect("a stream").into_inner();
    let first = chunks.message().await.expect("a chunk");
    assert!(first.is_some());
    wait::until_async("pages are in use", || async { (pages_used().await > 0.0).then_some(()) }).await;
    drop(chunks);
    wait::until_async("every page is free again", || async { (pages_used().await == 0.0).then_some(()) })
        .await;
    // And the cluster goes on.
    let answer = client.generate(grpc::chat("What is a Pod?")).await.expect("an answer").into_inner();
    assert_eq!(answer.text, golden::pod().greedy_text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_ends_the_request_and_frees_its_pages() {
    let mut client = grpc::connect(&CLUSTER.grpc()).await;
    let mut request = Request::new(grpc::endless("What is a Pod?", 4000));
    request.set_timeout(Duration::from_millis(400));
    let status = client.generate(request).await.expect_err("it takes longer");
    // The client's own timer may win the race against the router's answer; tonic calls that Cancelled.
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status}");
    wait::until_async("every page is free again", || async { (pages_used().await == 0.0).then_some(()) })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_name_what_is_wrong() {
    let mut client = grpc::connect(&CLUSTER.grpc()).await;
    let too_long = client.generate(grpc::tokens(&vec![100; 4096])).await.expect_err("no room for an answer");
    assert_eq!(too_long.code(), Code::InvalidArgument);
    assert!(too_long.message().contains("4096"), "{too_long}");

    let unknown = v1::GenerateRequest { model: "gpt-4".into(), ..grpc::chat("x") };
    let unknown = client.generate(unknown).await.expect_err("not served");
    assert_eq!(unknown.code(), Code::NotFound);
    assert!(unknown.message().contains("gpt-4") && unknown.message().contains(MODEL), "{unknown}");

    let outside = client.generate(grpc::tokens(&[4096])).await.expect_err("no such token");
    assert_eq!(outside.code(), Code::InvalidArgument);
    assert!(outside.message().contains("4096"), "{outside}");

    let empty = client.generate(v1::GenerateRequest::default()).await.expect_err("no input");
    assert_eq!(empty.code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_refusals_have_the_shape_of_openai() {
    let chat = "/v1/chat/completions";
    let message = json!([{"role": "user", "content": "x"}]);
    let long: Vec<u32> = vec![100; 4096];
    let cases: [(&str, &str, String, u16, &str); 6] = [
        ("POST", chat, "{\"model\": ".into(), 400, "invalid_json"),
        ("POST", chat, json!({"model": "gpt-4", "messages": message}).to_string(), 404, "model_not_found"),
        (
            "POST",
            chat,
            json!({"model": MODEL, "messages": message, "top_p": 7}).to_string(),
            400,
            "invalid_value",
        ),
        ("POST", chat, json!({"model": MODEL, "messages": "x"}).to_string(), 400, "invalid_value"),
        (
            "POST",
            "/v1/completions",
            json!({"model": MODEL, "prompt": long}).to_string(),
            400,
            "context_length_exceeded",
        ),
        ("POST", chat, "[1]".into(), 400, "invalid_json"),
    ];
    for (method, path, body, status, code) in cases {
        let answer = http::send(method, &CLUSTER.http(), path, &body).await.expect("an answer");
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
        let error = &answer.json()["error"];
        assert_eq!(error["code"], code, "{body}: {error}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
        assert!(error["type"].is_string(), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_reflection_are_served() {
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", CLUSTER.grpc()))
        .expect("an address")
        .connect()
        .await
        .expect("the router answers");
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let request = tonic_health::pb::HealthCheckRequest { service: "cadre.v1.Inference".into() };
    let status = health.check(request).await.expect("an answer").into_inner().status();
    assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving);

    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::once(ask))
        .await
        .expect("an answer")
        .into_inner();
    let answer = answers.next().await.expect("one").expect("no error").message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
    assert!(list.service.iter().any(|service| service.name == "cadre.v1.Inference"), "{list:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_role_is_ready_and_tells_its_metrics() {
    for name in ["router", "prefill 0", "decode 0", "expert 0", "expert 3"] {
        let admin = CLUSTER.member(name).admin;
        assert_eq!(http::get(&admin, "/healthz").await.status, 200);
        let ready = http::get(&admin, "/readyz").await;
        assert_eq!(ready.status, 200, "{name}: {}", ready.body);
        let metrics = http::get(&admin, "/metrics").await.body;
        assert!(metrics.contains("# TYPE cadre_"), "{name}: {metrics}");
    }
}

async fn channel(address: &str) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
    endpoint.connect().await.expect("somebody listens")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_internal_service_asks_for_the_secret() {
    let cluster = http::get(&CLUSTER.member("router").admin, "/cluster").await.json();
    assert_eq!(cluster["members"].as_array().map(Vec::len), Some(6), "they know each other: {cluster}");
    let other = ClusterSecret::draw().expect("random bytes");
    for present in [Present::default(), Present::new(Some(&other))] {
        let coordinator = channel(&CLUSTER.coordinator()).await;
        let worker = channel(&CLUSTER.member("decode 0").grpc).await;
        let shard = channel(&CLUSTER.member("expert 0").grpc).await;
        let mut coordinator = CoordinatorClient::with_interceptor(coordinator, present.clone());
        let mut worker = WorkerClient::with_interceptor(worker, present.clone());
        let mut shard = ExpertClient::with_interceptor(shard, present);
        let refusals = [
            ("Watch", coordinator.watch(tokio_stream::empty()).await.err()),
            ("Operate", coordinator.operate(tokio_stream::empty()).await.err()),
            ("Decode", worker.decode(v1::DecodeRequest::default()).await.err()),
            ("Prefill", worker.prefill(v1::PrefillRequest::default()).await.err()),
            ("ReceiveKv", worker.receive_kv(tokio_stream::empty()).await.err()),
            ("Dispatch", shard.dispatch(tokio_stream::empty()).await.err()),
        ];
        for (call, refusal) in refusals {
            assert_eq!(refusal.map(|status| status.code()), Some(Code::Unauthenticated), "{call}");
        }
    }
}

/// A frame to a shard as a worker would send it, apart from what `change` does.
async fn frame_refused(change: impl FnOnce(&mut v1::DispatchFrame)) -> v1::DispatchError {
    let generation = {
        let mut client = grpc::connect(&CLUSTER.grpc()).await;
        let models = client.list_models(v1::ListModelsRequest {}).await.expect("models").into_inner().models;
        models[0].generation.clone().expect("a stamp")
    };
    let mut frame = v1::DispatchFrame {
        sequence: 7,
        generation: Some(generation),
        layer: 1,
        num_tokens: 1,
        dtype: v1::Dtype::Bf16.into(),
        activations: vec![0; 512].into(),
        scales: Vec::new().into(),
        pair_tokens: vec![0],
        pair_slots: vec![0],
    };
    change(&mut frame);
    let shard = CLUSTER.member("expert 0");
    let mut client = ExpertClient::with_interceptor(channel(&shard.grpc).await, CLUSTER.present())
        .max_encoding_message_size(cadre_proto::MAX_MESSAGE_BYTES)
        .max_decoding_message_size(cadre_proto::MAX_MESSAGE_BYTES);
    // The stream stays open until the answer is there, as a worker's does.
    let frames = tokio_stream::once(frame).chain(tokio_stream::pending());
    let mut answers = client.dispatch(frames).await.expect("a stream").into_inner();
    let answer = answers.message().await.expect("an answer, not a broken stream").expect("one");
    assert_eq!(answer.sequence, 7);
    answer.error.unwrap_or_else(|| panic!("the frame was computed: {} bytes", answer.rows.len()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_refuses_frames_that_do_not_fit_by_name() {
    use v1::DispatchErrorCode as E;
    let epoch = frame_refused(|frame| frame.generation.as_mut().expect("a stamp").epoch += 8).await;
    assert_eq!(epoch.code(), E::Epoch, "{}", epoch.message);
    assert!(epoch.message.contains("epoch"), "{}", epoch.message);

    let model = frame_refused(|frame| {
        frame.generation.as_mut().expect("a stamp").model_hash = vec![7; 16].into();
    });
    assert_eq!(model.await.code(), E::Generation);

    let class = frame_refused(|frame| {
        frame.generation.as_mut().expect("a stamp").numerics = v1::NumericsClass::F32.into();
    });
    assert_eq!(class.await.code(), E::Generation);

    let short = frame_refused(|frame| frame.activations = vec![0; 100].into()).await;
    assert_eq!(short.code(), E::Malformed, "{}", short.message);
    let slot = frame_refused(|frame| frame.pair_slots = vec![60_000]).await;
    assert_eq!(slot.code(), E::Malformed, "{}", slot.message);

    let oversize = frame_refused(|frame| {
        frame.num_tokens = 5000;
        frame.activations = vec![0; 5000 * 512].into();
    })
    .await;
    assert_eq!(oversize.code(), E::Oversize, "{}", oversize.message);

    // None of it harmed the shard.
    let mut client = grpc::connect(&CLUSTER.grpc()).await;
    let answer = client.generate(grpc::chat("What is a Pod?")).await.expect("an answer").into_inner();
    assert_eq!(answer.text, golden::pod().greedy_text);
}

/// The cheapest check that streams carry what they should: server-sent events as they are on the wire.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_streams_end_with_done() {
    let body = json!({
        "model": MODEL, "temperature": 0, "stream": true, "max_tokens": 5,
        "messages": [{"role": "user", "content": "What is a Pod?"}],
    });
    let answer = http::post(&CLUSTER.http(), "/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let data: Vec<&str> = answer.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let (done, chunks) = data.split_last().expect("events");
    assert_eq!(*done, "[DONE]");
    let text: String = chunks
        .iter()
        .map(|chunk| serde_json::from_str::<Value>(chunk).expect("JSON"))
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(ToOwned::to_owned))
        .collect();
    assert!(!text.is_empty() && golden::pod().greedy_text.starts_with(&text), "{text:?}");
}
