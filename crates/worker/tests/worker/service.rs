//! `cadre.v1.Worker` over loopback gRPC: two workers, hand-off between them, everything that can go wrong
//! with it, and who hears of it.

use std::{sync::Arc, time::Duration};

use cadre_engine::{EngineHandle, GeneratedToken, prompt_hash};
use cadre_proto::v1::{
    self, decode_event::Event, kv_frame::Frame, prefill_event::Event as PrefillEvent,
    worker_client::WorkerClient,
};
use cadre_types::{Generation, ModelHash, NumericsClass, Role};
use cadre_worker::inprocess::{InProcess, InProcessOptions};
use tokio_stream::StreamExt;
use tonic::{Code, Request, Status, Streaming, transport::Channel};

use crate::support::{Served, generate, open, prompt, request, small, wait_empty};

/// Long: a test that ends by a time-out asks for it.
const LONG: Duration = Duration::from_secs(600);

/// A worker with an engine in this process.
struct Worker {
    engine: InProcess,
    served: Served,
}

impl Worker {
    async fn start(role: Role, handoff_timeout: Duration) -> Self {
        Self::with(role, handoff_timeout, &small(NumericsClass::Bf16)).await
    }

    async fn with(role: Role, handoff_timeout: Duration, options: &InProcessOptions) -> Self {
        let engine = open(options);
        let served = Served::start(role, engine.generation(), handoff_timeout).await;
        served.service.serve_with(engine.handle());
        Self { engine, served }
    }

    fn client(&self) -> WorkerClient<Channel> {
        self.served.client()
    }

    fn handle(&self) -> EngineHandle {
        self.engine.handle()
    }

    fn address(&self) -> String {
        self.served.address.to_string()
    }
}

fn decode_request(
    worker: &Worker,
    wanted: &cadre_engine::SequenceRequest,
    mode: v1::PrefillMode,
) -> v1::DecodeRequest {
    v1::DecodeRequest {
        generation: Some(worker.engine.generation().into()),
        request_id: wanted.request_id.clone(),
        prompt: wanted.prompt.clone(),
        sampling: Some((&wanted.sampling).into()),
        max_tokens: wanted.stop.max_tokens,
        stop_token_ids: wanted.stop.stop_token_ids.clone(),
        min_tokens: wanted.stop.min_tokens,
        prefill: mode.into(),
    }
}

fn prefill_request(
    worker: &Worker,
    wanted: &cadre_engine::SequenceRequest,
    decode_address: String,
) -> v1::PrefillRequest {
    v1::PrefillRequest {
        generation: Some(worker.engine.generation().into()),
        request_id: wanted.request_id.clone(),
        prompt: wanted.prompt.clone(),
        sampling: Some((&wanted.sampling).into()),
        decode_address,
        stop_token_ids: wanted.stop.stop_token_ids.clone(),
        min_tokens: wanted.stop.min_tokens,
    }
}

async fn event(stream: &mut Streaming<v1::DecodeEvent>) -> Result<Event, Status> {
    let event = stream.next().await.expect("the stream ends without an end")?;
    Ok(event.event.expect("an event"))
}

/// Opens `Decode` and reads `Reserved`.
async fn reserved(worker: &Worker, request: v1::DecodeRequest) -> Streaming<v1::DecodeEvent> {
    let mut stream = worker.client().decode(request).await.unwrap().into_inner();
    assert_eq!(event(&mut stream).await.unwrap(), Event::Reserved(v1::Reserved {}));
    stream
}

/// Tokens and reason of a stream that must finish.
async fn finished(mut stream: Streaming<v1::DecodeEvent>) -> (Vec<v1::GeneratedToken>, v1::FinishReason) {
    let mut tokens = Vec::new();
    loop {
        match event(&mut stream).await.unwrap() {
            Event::Reserved(_) => {}
            Event::Token(token) => tokens.push(token),
            Event::Finished(finished) => {
                assert!(stream.next().await.is_none(), "something follows the end");
                return (tokens, finished.reason());
            }
        }
    }
}

/// The status of a stream that must fail.
async fn failed(mut stream: Streaming<v1::DecodeEvent>) -> Status {
    loop {
        match event(&mut stream).await {
            Ok(Event::Finished(finished)) => panic!("finished: {:?}", finished.reason()),
            Ok(_) => {}
            Err(status) => return status,
        }
    }
}

async fn prefill_end(mut stream: Streaming<v1::PrefillEvent>) -> Result<v1::HandedOff, Status> {
    loop {
        let event = stream.next().await.expect("the stream ends without an end")?;
        match event.event.expect("an event") {
            PrefillEvent::ComputedTokens(_) => {}
            PrefillEvent::HandedOff(handed_off) => return Ok(handed_off),
        }
    }
}

fn same(wire: &[v1::GeneratedToken], local: &[GeneratedToken]) -> bool {
    wire.len() == local.len()
        && wire.iter().zip(local).all(|(wire, local)| {
            let top: Vec<_> = wire.top.iter().map(|likely| (likely.token, likely.logprob)).collect();
            (wire.position, wire.token, wire.logprob) == (local.position, local.token, local.logprob)
                && top == local.top
        })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handed_off_prompt_gives_the_local_tokens() {
    let prefill = Worker::start(Role::Prefill, LONG).await;
    let decode =
        Worker::with(Role::Decode, LONG, &InProcessOptions { shards: 2, ..small(NumericsClass::Bf16) }).await;
    for (nth, length) in [1, 64, 200, 700].into_iter().enumerate() {
        let wanted = request(&format!("request-{nth}"), prompt(nth as u32, length), 12);
        let local = generate(&prefill.handle(), wanted.clone()).await;
        let by_call = reserved(&decode, decode_request(&decode, &wanted, v1::PrefillMode::Local)).await;
        let (by_call, reason) = finished(by_call).await;
        assert!(same(&by_call, &local), "{length} tokens, local");
        assert_eq!(reason, v1::FinishReason::Length);

        let stream = reserved(&decode, decode_request(&decode, &wanted, v1::PrefillMode::Handoff)).await;
        let prefilled =
            prefill.client().prefill(prefill_request(&prefill, &wanted, decode.address())).await.unwrap();
        let handed_off = prefill_end(prefilled.into_inner()).await.unwrap();
        assert_eq!(handed_off.first_token, local[0].token);
        let shape = decode.handle().kv_shape();
        let kv_bytes = shape.layers * length as usize * shape.row_bytes();
        assert_eq!(handed_off.kv_bytes, kv_bytes as u64);
        let (tokens, reason) = finished(stream).await;
        assert!(same(&tokens, &local), "{length} tokens, handed off");
        assert_eq!(reason, v1::FinishReason::Length);
    }
    wait_empty(&prefill.handle()).await;
    wait_empty(&decode.handle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_hand_offs_at_once() {
    let prefill = Arc::new(Worker::start(Role::Both, LONG).await);
    let decode = Arc::new(Worker::start(Role::Decode, LONG).await);
    let tasks: Vec<_> = (0..12)
        .map(|nth| {
            let (prefill, decode) = (Arc::clone(&prefill), Arc::clone(&decode));
            tokio::spawn(async move {
                let wanted = request(&format!("request-{nth}"), prompt(nth, 20 + 30 * nth), 6);
                let stream =
                    reserved(&decode, decode_request(&decode, &wanted, v1::PrefillMode::Handoff)).await;
                let call = prefill_request(&prefill, &wanted, decode.address());
                let prefilled = prefill.client().prefill(call).await.unwrap().into_inner();
                prefill_end(prefilled).await.unwrap();
                let (tokens, _) = finished(stream).await;
                let local = request(&format!("local-{nth}"), wanted.prompt, 6);
                assert!(same(&tokens, &generate(&prefill.handle(), local).await), "request {nth}");
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    wait_empty(&prefill.handle()).await;
    wait_empty(&decode.handle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_aborted_midway_fails_the_decode_and_frees_everything() {
    let scheduler = cadre_scheduler::SchedulerConfig {
        max_chunk_tokens: 8,
        ..cadre_scheduler::SchedulerConfig::with_pages(160)
    };
    let slow = InProcessOptions { scheduler: Some(scheduler), ..small(NumericsClass::Bf16) };
    let prefill = Worker::with(Role::Prefill, LONG, &slow).await;
    let decode = Worker::start(Role::Decode, LONG).await;
    let wanted = request("aborted", prompt(1, 2000), 12);
    let stream = reserved(&decode, decode_request(&decode, &wanted, v1::PrefillMode::Handoff)).await;
    let call = prefill_request(&prefill, &wanted, decode.address());
    let mut prefilled = prefill.client().prefill(call).await.unwrap().into_inner();
    // Midway: some rows have certainly left, 249 chunks are to come.
    let first = prefilled.next().await.unwrap().unwrap();
    assert!(matches!(first.event, Some(PrefillEvent::ComputedTokens(_))));
    while decode.handle().stats().kv_bytes_received.load(std::sync::atomic::Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    drop(prefilled);
    let status = failed(stream).await;
    assert_eq!(status.code(), Code::Aborted, "{status}");
    assert!(status.message().contains("hand-off"), "{status}");
    wait_empty(&decode.handle()).await;
    wait_empty(&prefill.handle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decode_worker_that_is_gone_fails_the_prefill_and_is_named() {
    let prefill = Worker::start(Role::Prefill, LONG).await;
    let wanted = request("nowhere", prompt(1, 100), 12);
    // A port that was just free.
    let nobody =
        tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let call = prefill_request(&prefill, &wanted, nobody.clone());
    let status = prefill_end(prefill.client().prefill(call).await.unwrap().into_inner()).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "{status}");
    assert!(status.message().contains(&nobody), "{status}");

    // One that lives and does not know the request.
    let decode = Worker::start(Role::Decode, LONG).await;
    let call = prefill_request(&prefill, &wanted, decode.address());
    let status = prefill_end(prefill.client().prefill(call).await.unwrap().into_inner()).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "{status}");
    assert!(status.message().contains("no sequence waits"), "{status}");
    wait_empty(&prefill.handle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_the_decode_call_frees_both_sides() {
    let prefill = Worker::start(Role::Prefill, LONG).await;
    let decode = Worker::start(Role::Decode, LONG).await;
    let wanted = request("dropped", prompt(1, 600), 300);
    let stream = reserved(&decode, decode_request(&decode, &wanted, v1::PrefillMode::Handoff)).await;
    drop(stream);
    wait_empty(&decode.handle()).await;
    let call = prefill_request(&prefill, &wanted, decode.address());
    let status = prefill_end(prefill.client().prefill(call).await.unwrap().into_inner()).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "{status}");

    let mut stream = reserved(&decode, decode_request(&decode, &wanted, v1::PrefillMode::Local)).await;
    assert!(matches!(event(&mut stream).await.unwrap(), Event::Token(_)));
    drop(stream);
    wait_empty(&decode.handle()).await;
    wait_empty(&prefill.handle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadlines_of_the_call_reach_the_engine() {
    let worker = Worker::start(Role::Both, LONG).await;
    let wanted = request("late", prompt(1, 10), 3000);
    let mut call = Request::new(decode_request(&worker, &wanted, v1::PrefillMode::Handoff));
    call.set_timeout(Duration::from_millis(200));
    let mut stream = worker.client().decode(call).await.unwrap().into_inner();
    // The client's own timer and the engine's run down together; either word is right, the pages tell.
    loop {
        match event(&mut stream).await {
            Ok(Event::Finished(finished)) => {
                assert_eq!(finished.reason(), v1::FinishReason::Deadline);
                break;
            }
            Ok(_) => {}
            Err(status) => {
                assert!(matches!(status.code(), Code::Cancelled | Code::DeadlineExceeded), "{status}");
                break;
            }
        }
    }
    wait_empty(&worker.handle()).await;
    let mut call = Request::new(decode_request(&worker, &wanted, v1::PrefillMode::Local));
    call.metadata_mut().insert("grpc-timeout", "soon".parse().unwrap());
    let status = worker.client().decode(call).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_this_worker_cannot_answer_are_refused_by_code() {
    let worker = Worker::start(Role::Decode, LONG).await;
    let wanted = request("refused", prompt(1, 10), 3);
    let good = decode_request(&worker, &wanted, v1::PrefillMode::Local);
    let ours = worker.engine.generation();
    type Change = fn(&mut v1::DecodeRequest, Generation);
    let cases: [(Code, &str, Change); 7] = [
        (Code::FailedPrecondition, "model hash", |call, ours| {
            call.generation = Some(Generation { model: ModelHash([9; 16]), ..ours }.into());
        }),
        (Code::FailedPrecondition, "numerics class f32", |call, ours| {
            call.generation = Some(Generation { numerics: NumericsClass::F32, ..ours }.into());
        }),
        (Code::InvalidArgument, "decode.generation", |call, _| call.generation = None),
        (Code::InvalidArgument, "decode.sampling", |call, _| call.sampling = None),
        (Code::InvalidArgument, "decode.prefill", |call, _| call.prefill = 0),
        (Code::InvalidArgument, "4096", |call, _| call.prompt = prompt(1, 5000)),
        (Code::InvalidArgument, "not in the vocabulary", |call, _| call.prompt[3] = 1 << 31),
    ];
    for (code, words, change) in cases {
        let mut call = good.clone();
        change(&mut call, ours);
        let status = worker.client().decode(call).await.unwrap_err();
        assert_eq!(status.code(), code, "{words}: {status}");
        assert!(status.message().contains(words) || words == "4096", "{words}: {status}");
    }
    let call = prefill_request(&worker, &wanted, "127.0.0.1:1".into());
    let status = worker.client().prefill(call).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");

    let idle = Served::start(Role::Both, ours, LONG).await;
    let status = idle.client().decode(good.clone()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "this worker is loading its weights"));
    worker.served.service.drain();
    let status = worker.client().decode(good).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "this worker is draining"));
}

/// Frames of a hand-off that are right in every respect.
struct Frames {
    begin: v1::KvBegin,
    layers: u32,
    tokens: u32,
    row_bytes: usize,
}

impl Frames {
    fn of(worker: &Worker, wanted: &cadre_engine::SequenceRequest) -> Self {
        let shape = worker.handle().kv_shape();
        let begin = v1::KvBegin {
            format_version: 1,
            generation: Some(worker.engine.generation().into()),
            request_id: wanted.request_id.clone(),
            prompt_tokens: wanted.prompt.len() as u32,
            prompt_hash: prompt_hash(&wanted.prompt),
            layers: shape.layers as u32,
            row_width: shape.row_width as u32,
            dtype: v1::Dtype::Bf16.into(),
        };
        Self {
            begin,
            layers: shape.layers as u32,
            tokens: wanted.prompt.len() as u32,
            row_bytes: shape.row_bytes(),
        }
    }

    fn rows(&self, layer: u32) -> v1::KvRows {
        let rows = vec![0; self.tokens as usize * self.row_bytes].into();
        v1::KvRows { layer, first_position: 0, count: self.tokens, rows }
    }

    fn finish(&self) -> v1::KvFinish {
        v1::KvFinish {
            first_token: Some(v1::GeneratedToken { position: self.tokens, token: 9, ..Default::default() }),
        }
    }

    fn whole(&self) -> Vec<Frame> {
        let rows = (0..self.layers).map(|layer| Frame::Rows(self.rows(layer)));
        std::iter::once(Frame::Begin(self.begin.clone()))
            .chain(rows)
            .chain([Frame::Finish(self.finish())])
            .collect()
    }
}

async fn send(worker: &Worker, frames: Vec<Frame>) -> Result<v1::KvReceipt, Status> {
    let frames: Vec<_> = frames.into_iter().map(|frame| v1::KvFrame { frame: Some(frame) }).collect();
    let receipt = worker.client().receive_kv(tokio_stream::iter(frames)).await?;
    Ok(receipt.into_inner())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_hand_offs_are_refused_and_end_their_sequence_alone() {
    let worker = Worker::start(Role::Decode, LONG).await;
    type Change = fn(&Frames, &mut Vec<Frame>);
    fn begin(frames: &mut [Frame]) -> &mut v1::KvBegin {
        let Frame::Begin(begin) = &mut frames[0] else { panic!("begin is first") };
        begin
    }
    // What is wrong, the code, words of the refusal, and whether the sequence ends by it.
    let cases: [(&str, Code, &str, bool, Change); 14] = [
        ("no begin", Code::InvalidArgument, "first frame is not begin", false, |_, frames| {
            frames.remove(0);
        }),
        ("nothing", Code::InvalidArgument, "no frames", false, |_, frames| frames.clear()),
        ("version", Code::InvalidArgument, "format_version", false, |_, frames| {
            begin(frames).format_version = 2
        }),
        ("dtype", Code::InvalidArgument, "dtype", false, |_, frames| begin(frames).dtype = 77),
        ("wide rows", Code::FailedPrecondition, "row size", false, |_, frames| {
            begin(frames).dtype = v1::Dtype::F32.into();
        }),
        ("hash", Code::FailedPrecondition, "prompt hash", false, |_, frames| begin(frames).prompt_hash ^= 1),
        ("layers", Code::FailedPrecondition, "number of layers", false, |_, frames| begin(frames).layers = 7),
        ("generation", Code::InvalidArgument, "kv_begin.generation", false, |_, frames| {
            begin(frames).generation = None;
        }),
        ("nobody's", Code::NotFound, "stranger", false, |_, frames| {
            begin(frames).request_id = "stranger".into()
        }),
        ("begin twice", Code::InvalidArgument, "second begin", true, |kv, frames| {
            frames.insert(2, Frame::Begin(kv.begin.clone()));
        }),
        ("no finish", Code::Aborted, "without finish", true, |_, frames| {
            frames.pop();
        }),
        ("a layer short", Code::InvalidArgument, "ended early", true, |_, frames| {
            frames.remove(3);
        }),
        ("no first token", Code::InvalidArgument, "first_token", true, |_, frames| {
            *frames.last_mut().unwrap() = Frame::Finish(v1::KvFinish::default());
        }),
        ("too many bytes", Code::InvalidArgument, "at most 1048576", true, |kv, frames| {
            let rows = vec![0; (1 << 20) + 1].into();
            frames[1] = Frame::Rows(v1::KvRows { rows, ..kv.rows(0) });
        }),
    ];
    for (name, code, words, ends, change) in cases {
        let wanted = request(name, prompt(4, 20), 3);
        let stream = reserved(&worker, decode_request(&worker, &wanted, v1::PrefillMode::Handoff)).await;
        let kv = Frames::of(&worker, &wanted);
        let mut frames = kv.whole();
        change(&kv, &mut frames);
        let status = send(&worker, frames).await.expect_err(name);
        assert_eq!(status.code(), code, "{name}: {status}");
        assert!(status.message().contains(words), "{name}: {status}");
        if ends {
            let status = failed(stream).await;
            assert_eq!(status.code(), Code::Aborted, "{name}: {status}");
        } else {
            // It waits still, for the right one.
            let receipt = send(&worker, kv.whole()).await.unwrap();
            assert_eq!(receipt.kv_bytes, (kv.layers * 20) as u64 * kv.row_bytes as u64, "{name}");
            assert_eq!(finished(stream).await.0.len(), 3, "{name}");
        }
    }
    wait_empty(&worker.handle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_beyond_the_limit_ends_the_hand_off() {
    let worker = Worker::start(Role::Decode, LONG).await;
    let wanted = request("oversize", prompt(4, 20), 3);
    let stream = reserved(&worker, decode_request(&worker, &wanted, v1::PrefillMode::Handoff)).await;
    let kv = Frames::of(&worker, &wanted);
    let rows = v1::KvRows { rows: vec![0; 3 << 20].into(), ..kv.rows(0) };
    let status = send(&worker, vec![Frame::Begin(kv.begin.clone()), Frame::Rows(rows)]).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    assert_eq!(failed(stream).await.code(), Code::Aborted);
    wait_empty(&worker.handle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_sender_is_given_up_within_the_bound() {
    let worker = Worker::start(Role::Decode, Duration::from_millis(50)).await;
    let wanted = request("silent", prompt(4, 20), 3);
    let stream = reserved(&worker, decode_request(&worker, &wanted, v1::PrefillMode::Handoff)).await;
    let kv = Frames::of(&worker, &wanted);
    let begin = v1::KvFrame { frame: Some(Frame::Begin(kv.begin.clone())) };
    // A stream that stays open after its first frame.
    let frames = tokio_stream::once(begin).chain(tokio_stream::pending());
    let status = worker.client().receive_kv(frames).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "{status}");
    assert!(status.message().contains("the next frame"), "{status}");
    assert_eq!(failed(stream).await.code(), Code::Aborted);
    wait_empty(&worker.handle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decode_worker_that_dies_midway_ends_the_prefill() {
    let scheduler = cadre_scheduler::SchedulerConfig {
        max_chunk_tokens: 8,
        ..cadre_scheduler::SchedulerConfig::with_pages(160)
    };
    let slow = InProcessOptions { scheduler: Some(scheduler), ..small(NumericsClass::Bf16) };
    let prefill = Worker::with(Role::Prefill, Duration::from_secs(2), &slow).await;
    let decode = Worker::start(Role::Decode, LONG).await;
    let wanted = request("orphan", prompt(1, 2000), 12);
    let stream = reserved(&decode, decode_request(&decode, &wanted, v1::PrefillMode::Handoff)).await;
    let call = prefill_request(&prefill, &wanted, decode.address());
    let mut prefilled = prefill.client().prefill(call).await.unwrap().into_inner();
    prefilled.next().await.unwrap().unwrap();
    decode.served.kill();
    drop((stream, decode));
    let status = prefill_end(prefilled).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "{status}");
    wait_empty(&prefill.handle()).await;
}
