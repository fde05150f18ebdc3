//! The messages of a KV hand-off, through the gRPC service of a decode worker over the bundled checkpoint. Whatever
//! comes, the call ends with a receipt or a status that blames the right side, and no page stays taken.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use axum::http::Request;
use bytes::{BufMut, Bytes, BytesMut};
use cadre_engine::{PrefillPlace, SequenceRequest, prompt_hash};
use cadre_proto::v1::{self, kv_frame::Frame};
use cadre_types::{NumericsClass, Role, SamplingParams, StopConditions, TokenId};
use cadre_worker::{
    inprocess::{InProcess, InProcessOptions},
    service::{ServiceOptions, WorkerService},
};
use http_body_util::{BodyExt, Full};
use prost::Message;
use tokio::runtime::Runtime;
use tonic::Code;
use tower::ServiceExt;

use crate::{draw::Draw, pocket};

/// Of any wait; the engine is idle but for this.
const PATIENCE: Duration = Duration::from_secs(30);

struct Rig {
    engine: InProcess,
    service: WorkerService,
    runtime: Runtime,
}

static RIG: LazyLock<Rig> = LazyLock::new(|| {
    let options =
        InProcessOptions { threads: Some(1), kv_pages: 32, ..InProcessOptions::new(NumericsClass::Bf16) };
    let engine = InProcess::open(&pocket(), &options).expect("the bundled checkpoint");
    let service = WorkerService::new(ServiceOptions {
        generation: engine.generation(),
        role: Role::Decode,
        handoff_timeout: PATIENCE,
        secret: None,
    });
    service.serve_with(engine.handle());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    Rig { engine, service, runtime }
});

pub(crate) fn run(bytes: &[u8]) {
    let rig = &*RIG;
    let mut draw = Draw::new(bytes);
    let prompt: Vec<TokenId> = (0..1 + draw.below(20) as u32).map(|at| 5 + at).collect();
    let mut body = BytesMut::new();
    if draw.one_in(6) {
        body.extend_from_slice(draw.rest());
    } else {
        for frame in frames(rig, &prompt, draw) {
            let message = v1::KvFrame { frame: Some(frame) }.encode_to_vec();
            body.put_u8(0);
            body.put_u32(message.len() as u32);
            body.extend_from_slice(&message);
        }
    }
    rig.runtime.block_on(hand_off(rig, prompt, body.freeze()));
}

async fn hand_off(rig: &Rig, prompt: Vec<TokenId>, body: Bytes) {
    let engine = rig.engine.handle();
    let wanted = SequenceRequest {
        request_id: "fuzzed".into(),
        prompt,
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        stop: StopConditions { max_tokens: 2, ignore_eos: true, ..StopConditions::default() },
        prefill: PrefillPlace::Remote,
        deadline: None,
    };
    let events = engine.submit(wanted).expect("room for one");
    let request = Request::post("http://worker/cadre.v1.Worker/ReceiveKv")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(body))
        .expect("a request");
    let call = rig.service.clone().into_server().oneshot(request);
    let response = tokio::time::timeout(PATIENCE, call).await.expect("the call ends").expect("infallible");
    let mut status = tonic::Status::from_header_map(response.headers());
    let body = tokio::time::timeout(PATIENCE, response.into_body().collect()).await.expect("the answer ends");
    if let Ok(body) = body
        && let Some(trailers) = body.trailers()
    {
        status = status.or_else(|| tonic::Status::from_header_map(trailers));
    }
    let status = status.expect("a gRPC status");
    assert!(
        !matches!(status.code(), Code::Unknown | Code::Unimplemented),
        "a hand-off ends in words of ours: {status:?}"
    );
    drop(events);
    // The engine takes note of the dropped stream in its next step.
    let begun = Instant::now();
    loop {
        let load = engine.stats().load();
        if engine.in_flight() == 0 && load.pages_free == load.pages_total {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "pages leak: {load:?}, {status:?}");
        tokio::time::sleep(Duration::from_micros(50)).await;
    }
}

/// A hand-off that is right but for what the input changes.
fn frames(rig: &Rig, prompt: &[TokenId], mut draw: Draw<'_>) -> Vec<Frame> {
    let shape = rig.engine.handle().kv_shape();
    let tokens = prompt.len() as u32;
    let begin = v1::KvBegin {
        format_version: 1,
        generation: Some(rig.engine.generation().into()),
        request_id: "fuzzed".into(),
        prompt_tokens: tokens,
        prompt_hash: prompt_hash(prompt),
        layers: shape.layers as u32,
        row_width: shape.row_width as u32,
        dtype: v1::Dtype::Bf16.into(),
    };
    let rows = (0..shape.layers as u32).map(|layer| {
        let rows = vec![0; prompt.len() * shape.row_bytes()].into();
        Frame::Rows(v1::KvRows { layer, first_position: 0, count: tokens, rows })
    });
    let first_token =
        Some(v1::GeneratedToken { position: tokens, token: 9, ..v1::GeneratedToken::default() });
    let mut frames: Vec<Frame> = std::iter::once(Frame::Begin(begin))
        .chain(rows)
        .chain([Frame::Finish(v1::KvFinish { first_token })])
        .collect();
    while !draw.is_empty() && !frames.is_empty() {
        let at = draw.below(frames.len());
        match draw.below(5) {
            0 => drop(frames.remove(at)),
            1 => frames.insert(at, frames[draw.below(frames.len())].clone()),
            _ => change(&mut frames[at], &mut draw),
        }
    }
    frames
}

fn change(frame: &mut Frame, draw: &mut Draw<'_>) {
    match frame {
        Frame::Begin(begin) => match draw.below(8) {
            0 => begin.format_version = draw.number() as u32,
            1 => begin.generation = None,
            2 => begin.request_id = String::from_utf8_lossy(draw.bytes()).into_owned(),
            3 => begin.prompt_tokens = draw.number() as u32,
            4 => begin.prompt_hash = draw.number(),
            5 => begin.layers = draw.number() as u32,
            6 => begin.row_width = draw.number() as u32,
            _ => begin.dtype = draw.number() as i32,
        },
        Frame::Rows(rows) => match draw.below(4) {
            0 => rows.layer = draw.number() as u32,
            1 => rows.first_position = draw.number() as u32,
            2 => rows.count = draw.number() as u32,
            _ => {
                let new = draw.bytes();
                let mut bytes = rows.rows.to_vec();
                let at = (draw.below(256) * 64).min(bytes.len());
                let end = (at + new.len()).min(bytes.len());
                match draw.below(3) {
                    0 => bytes.truncate(at),
                    1 => bytes.extend_from_slice(new),
                    _ => bytes[at..end].copy_from_slice(&new[..end - at]),
                }
                rows.rows = bytes.into();
            }
        },
        Frame::Finish(finish) => match (draw.below(5), &mut finish.first_token) {
            (1, Some(token)) => token.position = draw.number() as u32,
            (2, Some(token)) => token.token = draw.number() as u32,
            (3, Some(token)) => token.logprob = Some(f32::from_bits(draw.number() as u32)),
            (4, Some(token)) => {
                let logprob = f32::from_bits(draw.number() as u32);
                token.top.push(v1::TokenLogprob { token: draw.number() as u32, logprob });
            }
            _ => finish.first_token = None,
        },
    }
}
