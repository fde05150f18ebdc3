//! The gRPC front door, and what workers are asked.

use cadre_proto::v1::{self, FinishReason, generate_request::Input};
use tonic::Code;

use crate::{
    cluster::{Cluster, MODEL, TOKENIZER, options, text_request, tokens},
    fake_worker::{FakeWorker, Script, Step},
};

const ANSWER: &str = "A Pod is the smallest unit 🦀 that Kubernetes schedules.";

fn answering() -> Script {
    Script::tokens(&tokens(ANSWER), FinishReason::Stop)
}

#[tokio::test]
async fn unary_and_stream_give_the_same_text_tokens_and_usage() {
    let worker = FakeWorker::start(answering()).await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let mut client = cluster.grpc().await;
    let request = v1::GenerateRequest {
        sampling: Some(v1::SamplingOptions { seed: Some(77), ..Default::default() }),
        ..text_request("What is a Pod?")
    };
    let whole = client.generate(request.clone()).await.unwrap().into_inner();
    assert_eq!(whole.text, ANSWER);
    assert_eq!(whole.tokens.iter().map(|token| token.token).collect::<Vec<_>>(), tokens(ANSWER));
    assert_eq!(whole.finish_reason(), FinishReason::Stop);
    assert_eq!(whole.seed, 77);
    let usage = whole.usage.unwrap();
    let prompt = TOKENIZER.encode("What is a Pod?", true).unwrap();
    assert_eq!(
        (usage.prompt_tokens as usize, usage.completion_tokens as usize),
        (prompt.len(), tokens(ANSWER).len())
    );

    let mut stream = client.generate_stream(request).await.unwrap().into_inner();
    let (mut text, mut got, mut last) = (String::new(), Vec::new(), None);
    while let Some(chunk) = stream.message().await.unwrap() {
        assert!(last.is_none(), "something came after the last chunk");
        text.push_str(&chunk.text);
        got.extend(chunk.tokens);
        last = chunk.usage.map(|usage| (chunk.finish_reason, usage));
    }
    assert_eq!(text, whole.text);
    assert_eq!(got, whole.tokens);
    assert_eq!(last, Some((FinishReason::Stop.into(), usage)));

    let decode = worker.seen.decode(0);
    assert_eq!(decode.prompt, prompt, "BOS as the checkpoint's configuration says");
    assert_eq!(decode.prompt[0], TOKENIZER.bos_id().unwrap());
    assert_eq!(decode.prefill(), v1::PrefillMode::Local);
    assert_eq!(decode.generation.unwrap().epoch, 1);
}

#[tokio::test]
async fn absent_fields_take_the_checkpoints_defaults_and_given_ones_win() {
    let worker = FakeWorker::start(answering()).await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let mut client = cluster.grpc().await;
    let first = client.generate(text_request("a")).await.unwrap().into_inner();
    let decode = worker.seen.decode(0);
    let sampling = decode.sampling.unwrap();
    // models/pocket/generation_config.json: 0.6 and 0.95; the rest neutral.
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.6, 0.95, None));
    assert_eq!((sampling.min_p, sampling.repetition_penalty), (0.0, 1.0));
    assert_eq!(decode.max_tokens as usize, 4096 - decode.prompt.len(), "up to the context");
    assert_eq!(decode.stop_token_ids, TOKENIZER.eos_ids());
    assert_eq!(sampling.seed, first.seed, "the drawn seed is reported");
    let second = client.generate(text_request("a")).await.unwrap().into_inner();
    assert_ne!(first.seed, second.seed);
    assert_ne!(first.request_id, second.request_id);

    let request = v1::GenerateRequest {
        sampling: Some(v1::SamplingOptions { temperature: Some(0.0), top_k: Some(3), ..Default::default() }),
        max_tokens: Some(5000),
        stop_token_ids: vec![9],
        ignore_eos: true,
        ..text_request("a")
    };
    client.generate(request).await.unwrap();
    let decode = worker.seen.decode(2);
    let sampling = decode.sampling.unwrap();
    assert_eq!((sampling.temperature, sampling.top_k), (0.0, Some(3)));
    assert_eq!(decode.max_tokens as usize, 4096 - decode.prompt.len(), "cut to the context");
    assert_eq!(decode.stop_token_ids, [9]);
}

#[tokio::test]
async fn tokens_are_used_as_they_are_and_chats_are_rendered() {
    let worker = FakeWorker::start(answering()).await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let mut client = cluster.grpc().await;
    let mut ask = async |input| {
        let request = v1::GenerateRequest { input: Some(input), model: MODEL.into(), ..Default::default() };
        client.generate(request).await.unwrap();
    };
    ask(Input::Tokens(v1::TokenIds { ids: vec![5, 6, 7] })).await;
    assert_eq!(worker.seen.decode(0).prompt, [5, 6, 7]);
    let message = v1::ChatMessage { role: "user".into(), content: "Hi".into() };
    ask(Input::Chat(v1::Chat { messages: vec![message] })).await;
    let rendered = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>";
    assert_eq!(worker.seen.decode(1).prompt, tokens(rendered));
}

#[tokio::test]
async fn a_stop_string_across_tokens_ends_the_text_before_it_and_drops_the_worker_stream() {
    let spoken = tokens("one two three four five");
    let mut steps: Vec<Step> = spoken.iter().map(|&token| Step::Token(token)).collect();
    steps.push(Step::Hang);
    let worker = FakeWorker::start(Script::steps(steps)).await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let mut client = cluster.grpc().await;
    // "o three f" begins in the middle of one word and ends in another.
    let request = v1::GenerateRequest { stop: vec!["o three f".into()], ..text_request("count") };
    let mut stream = client.generate_stream(request).await.unwrap().into_inner();
    let (mut text, mut reason, mut count) = (String::new(), FinishReason::Unspecified, 0);
    while let Some(chunk) = stream.message().await.unwrap() {
        assert!(!text.contains("o three"), "held-back text was sent: {text:?}");
        text.push_str(&chunk.text);
        reason = chunk.finish_reason();
        count += chunk.tokens.len();
        if let Some(usage) = chunk.usage {
            assert_eq!(usage.completion_tokens as usize, count);
        }
    }
    assert_eq!(text, "one tw");
    assert_eq!(reason, FinishReason::Stop);
    assert!(count > 2 && count <= spoken.len());
    worker.seen.open(0).await;
}

#[tokio::test]
async fn no_chunk_ever_holds_half_a_character() {
    let spoken = tokens("🦀é漢🦀");
    assert!(spoken.len() > 4, "the vocabulary splits these characters: {spoken:?}");
    let worker = FakeWorker::start(Script::tokens(&spoken, FinishReason::Stop)).await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let mut client = cluster.grpc().await;
    let mut stream = client.generate_stream(text_request("crab")).await.unwrap().into_inner();
    let (mut text, mut silent) = (String::new(), 0);
    while let Some(chunk) = stream.message().await.unwrap() {
        assert!(!chunk.text.contains('\u{fffd}'), "{:?}", chunk.text);
        silent += usize::from(chunk.text.is_empty() && !chunk.tokens.is_empty());
        text.push_str(&chunk.text);
    }
    assert_eq!(text, "🦀é漢🦀");
    assert!(silent > 0, "some tokens complete no character");

    // A sequence cut inside a character ends with the replacement character, once.
    worker.set(Script::tokens(&spoken[..1], FinishReason::Length));
    let cut = client.generate(text_request("crab")).await.unwrap().into_inner();
    assert_eq!((cut.text.as_str(), cut.finish_reason()), ("\u{fffd}", FinishReason::Length));
}

#[tokio::test]
async fn bad_values_are_invalid_arguments_that_name_the_field() {
    let worker = FakeWorker::start(answering()).await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let client = cluster.grpc().await;
    let sampling = |sampling| v1::GenerateRequest { sampling: Some(sampling), ..text_request("a") };
    let ids =
        |ids| v1::GenerateRequest { input: Some(Input::Tokens(v1::TokenIds { ids })), ..Default::default() };
    let options = v1::SamplingOptions::default;
    let cases: Vec<(v1::GenerateRequest, &[&str])> = vec![
        (v1::GenerateRequest::default(), &["input"]),
        (sampling(v1::SamplingOptions { temperature: Some(2.5), ..options() }), &["temperature", "2.5"]),
        (sampling(v1::SamplingOptions { top_p: Some(0.0), ..options() }), &["top_p"]),
        (sampling(v1::SamplingOptions { min_p: Some(f32::NAN), ..options() }), &["min_p"]),
        (sampling(v1::SamplingOptions { logprobs: Some(21), ..options() }), &["logprobs", "20"]),
        (v1::GenerateRequest { max_tokens: Some(0), ..text_request("a") }, &["max_tokens"]),
        (v1::GenerateRequest { stop: vec![String::new()], ..text_request("a") }, &["stop"]),
        (
            v1::GenerateRequest { stop_token_ids: vec![4096], ..text_request("a") },
            &["stop_token_ids", "4096"],
        ),
        (v1::GenerateRequest { min_tokens: 9, max_tokens: Some(8), ..text_request("a") }, &["min_tokens"]),
        (ids(vec![]), &["prompt"]),
        (ids(vec![1, 4096]), &["prompt", "4096", "index 1"]),
        (ids(vec![1; 4096]), &["4096 tokens", "context is 4096"]),
        (
            v1::GenerateRequest {
                input: Some(Input::Chat(v1::Chat {
                    messages: vec![v1::ChatMessage { role: "wizard".into(), content: "x".into() }],
                })),
                ..Default::default()
            },
            &["messages[0].role", "wizard"],
        ),
        (
            v1::GenerateRequest {
                input: Some(Input::Chat(v1::Chat {
                    messages: vec![
                        v1::ChatMessage { role: "user".into(), content: "2+2".into() },
                        v1::ChatMessage { role: "tool".into(), content: "4".into() },
                    ],
                })),
                ..Default::default()
            },
            &["messages[1].role", "tool"],
        ),
        (
            sampling(v1::SamplingOptions { repetition_penalty: Some(1e-44), ..options() }),
            &["repetition_penalty", "between 0.01 and 100"],
        ),
    ];
    for (request, words) in cases {
        let status = client.clone().generate(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        for word in words {
            assert!(status.message().contains(word), "{} lacks {word}", status.message());
        }
    }
    let unknown = v1::GenerateRequest { model: "gpt-x".into(), ..text_request("a") };
    let status = client.clone().generate(unknown).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("gpt-x") && status.message().contains(MODEL), "{}", status.message());
    assert!(worker.seen.decodes.lock().unwrap().is_empty(), "no bad request reached a worker");
}

#[tokio::test]
async fn models_reflection_and_health_are_served() {
    let worker = FakeWorker::start(answering()).await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let models =
        cluster.grpc().await.list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    assert_eq!((models[0].name.as_str(), models[0].max_context_tokens), (MODEL, 4096));
    assert_eq!(models[0].generation.as_ref().unwrap().epoch, 1);

    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(cluster.channel().await);
    let answers = reflection.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"cadre.v1.Inference") && names.contains(&"grpc.health.v1.Health"), "{names:?}");

    use tonic_reflection::pb::v1alpha as alpha;
    let request = alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
            "cadre.v1.Inference".into(),
        )),
    };
    let mut reflection =
        alpha::server_reflection_client::ServerReflectionClient::new(cluster.channel().await);
    let answers = reflection.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    assert!(
        matches!(
            answer.message_response,
            Some(alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(_))
        ),
        "{answer:?}"
    );
}

#[tokio::test]
async fn a_message_beyond_the_limit_is_resource_exhausted_and_a_compressed_one_unimplemented() {
    let worker = FakeWorker::start(answering()).await;
    let mut options = options();
    options.limits.max_body_bytes = 1000;
    let cluster = Cluster::with_worker(options, &worker).await;
    let mut client = cluster.grpc().await;
    let status = client.generate(text_request(&"x".repeat(2000))).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains("1000"), "{status}");
    assert!(status.metadata().contains_key("x-request-id"), "{status:?}");
    let mut compressed = tonic::Request::new(text_request("a"));
    compressed.metadata_mut().insert("grpc-encoding", "gzip".parse().unwrap());
    let status = client.generate(compressed).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented, "{status}");
    assert!(status.message().contains("gzip"), "{status}");
    client.generate(text_request("a")).await.unwrap();
}

#[tokio::test]
async fn the_clients_deadline_ends_the_request_and_frees_the_worker() {
    let worker = FakeWorker::start(Script::steps(vec![Step::Token(40), Step::Hang])).await;
    let cluster = Cluster::with_worker(options(), &worker).await;
    let mut client = cluster.grpc().await;
    let mut request = tonic::Request::new(text_request("a"));
    request.metadata_mut().insert("grpc-timeout", "1S".parse().unwrap());
    let mut stream = client.generate_stream(request).await.unwrap().into_inner();
    let status = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended well"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(
        status.message().contains("950ms") && status.message().contains("generating"),
        "{}",
        status.message()
    );
    worker.seen.open(0).await;
}
