//! The steps of workers.

use cadre_proto::{
    secret::Present,
    v1::{self, decode_event, prefill_event, worker_client::WorkerClient},
};
use cadre_types::{Generation, Member};
use tonic::{Status, Streaming, transport::Channel};

use super::Verdict;

/// One token, drawn greedily.
fn sampling() -> Option<v1::SamplingParams> {
    Some(v1::SamplingParams { top_p: 1.0, repetition_penalty: 1.0, ..v1::SamplingParams::default() })
}

fn request(member: &Member, generation: Generation, prefill: v1::PrefillMode) -> v1::DecodeRequest {
    v1::DecodeRequest {
        generation: Some(generation.into()),
        request_id: format!("proof of {}", member.id),
        prompt: vec![0],
        sampling: sampling(),
        max_tokens: 1,
        prefill: prefill.into(),
        ..v1::DecodeRequest::default()
    }
}

/// One token from one token.
pub(super) async fn decode(
    channel: Channel,
    present: Present,
    member: &Member,
    generation: Generation,
) -> Result<Verdict, Status> {
    let mut client = WorkerClient::with_interceptor(channel, present);
    let events = client.decode(request(member, generation, v1::PrefillMode::Local)).await?.into_inner();
    one_token(events).await
}

/// A prompt of one token, handed by the first to the second.
pub(super) async fn prefill(
    [channel, decode]: [Channel; 2],
    present: Present,
    member: &Member,
    decode_address: &str,
    generation: Generation,
) -> Result<Verdict, Status> {
    let mut decode = WorkerClient::with_interceptor(decode, present.clone());
    let waiting = request(member, generation, v1::PrefillMode::Handoff);
    let prompt = v1::PrefillRequest {
        generation: waiting.generation.clone(),
        request_id: waiting.request_id.clone(),
        prompt: waiting.prompt.clone(),
        sampling: sampling(),
        decode_address: decode_address.to_owned(),
        ..v1::PrefillRequest::default()
    };
    let mut events = decode.decode(waiting).await?.into_inner();
    match events.message().await?.and_then(|first| first.event) {
        Some(decode_event::Event::Reserved(_)) => {}
        _ => {
            return Ok(Verdict::Unanswered(format!("{decode_address} has reserved no pages for the prompt")));
        }
    }
    let mut client = WorkerClient::with_interceptor(channel, present);
    let mut progress = client.prefill(prompt).await?.into_inner();
    loop {
        match progress.message().await?.map(|event| event.event) {
            Some(Some(prefill_event::Event::HandedOff(_))) => return one_token(events).await,
            Some(Some(prefill_event::Event::ComputedTokens(_)) | None) => {}
            None => return Ok(Verdict::Wrong("the prompt ended without a hand-off".to_owned())),
        }
    }
}

async fn one_token(mut events: Streaming<v1::DecodeEvent>) -> Result<Verdict, Status> {
    let mut tokens = 0;
    while let Some(event) = events.message().await? {
        match event.event {
            Some(decode_event::Event::Token(_)) => tokens += 1,
            Some(decode_event::Event::Finished(_)) if tokens == 1 => return Ok(Verdict::Passed),
            Some(decode_event::Event::Finished(_)) => {
                return Ok(Verdict::Wrong(format!("{tokens} tokens where one was asked for")));
            }
            Some(decode_event::Event::Reserved(_)) | None => {}
        }
    }
    Ok(Verdict::Wrong("the answer ended without an end".to_owned()))
}
