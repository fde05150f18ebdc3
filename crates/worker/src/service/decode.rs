//! `Decode`: one sequence, its events as the response stream.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use cadre_engine::{EngineEvent, PrefillPlace, SequenceRequest, SequenceStream};
use cadre_proto::{convert::required, v1};
use cadre_types::StopConditions;
use tokio_stream::Stream;
use tonic::{Request, Status};

use crate::{status, wire};

use super::{OpenCall, WorkerService};

impl WorkerService {
    pub(super) fn start_decode(&self, request: Request<v1::DecodeRequest>) -> Result<DecodeStream, Status> {
        let engine = self.admitting()?;
        let deadline = wire::deadline(request.metadata())?;
        let request = request.into_inner();
        self.check_generation(request.generation.as_ref(), "decode.generation")?;
        let prefill = match v1::PrefillMode::try_from(request.prefill) {
            Ok(v1::PrefillMode::Local) => PrefillPlace::Local,
            Ok(v1::PrefillMode::Handoff) => PrefillPlace::Remote,
            Ok(v1::PrefillMode::Unspecified) | Err(_) => {
                let value = request.prefill;
                return Err(Status::invalid_argument(format!("decode.prefill: unknown value {value}")));
            }
        };
        let events = engine
            .submit(SequenceRequest {
                request_id: request.request_id,
                prompt: request.prompt,
                sampling: required(request.sampling.as_ref(), "decode.sampling")?.into(),
                stop: StopConditions {
                    max_tokens: request.max_tokens,
                    stop_token_ids: request.stop_token_ids,
                    min_tokens: request.min_tokens,
                    // The router has put EOS among the stop ids, unless the client ignores it.
                    ignore_eos: true,
                },
                prefill,
                deadline,
            })
            .map_err(|error| status::of_submit(&error))?;
        Ok(DecodeStream { events, ended: false, _call: self.open_call() })
    }
}

/// The response stream of `Decode`. Dropping it cancels the sequence.
#[derive(Debug)]
pub struct DecodeStream {
    events: SequenceStream,
    ended: bool,
    _call: OpenCall,
}

impl Stream for DecodeStream {
    type Item = Result<v1::DecodeEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        use v1::decode_event::Event;
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            let event = match std::task::ready!(self.events.poll_recv(context)) {
                Some(EngineEvent::Reserved) => Event::Reserved(v1::Reserved {}),
                Some(EngineEvent::Token(token)) => Event::Token(wire::token(token)),
                Some(EngineEvent::Computed(_)) => continue,
                Some(EngineEvent::Finished(reason)) => {
                    self.ended = true;
                    Event::Finished(v1::Finished { reason: v1::FinishReason::from(reason).into() })
                }
                Some(EngineEvent::Failed(error)) => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(status::of_receiving_sequence(&error))));
                }
                None => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(Status::internal("the engine ended without an answer"))));
                }
            };
            return Poll::Ready(Some(Ok(v1::DecodeEvent { event: Some(event) })));
        }
    }
}
