//! The gRPC front door: `cadre.v1.Inference`.
//!
//! Deadlines come as `grpc-timeout`. A client gives up at that moment by itself, so ours is a little earlier
//! and says what the request was waiting for. A compressed message (`grpc-encoding: gzip`) is refused with
//! UNIMPLEMENTED, which names the encoding.

use std::{pin::Pin, time::Duration};

use cadre_proto::v1::{self, generate_request, inference_server::Inference};
use cadre_text::ChatMessage;
use cadre_types::FinishReason;
use prost::Message as _;
use serde_json::Map;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, metadata::MetadataMap};

use crate::{
    error::{RequestError, RequestResult},
    generate::{Chunk, Completion, Finish, Generation},
    http::RequestId,
    metrics::Api,
    request::{Input, Submission},
    service::Service,
};

/// Share of the client's time that is left for the answer to travel.
const MARGIN: u32 = 20;

/// The service over the request path.
#[derive(Clone, Debug)]
pub struct InferenceService {
    service: Service,
}

impl InferenceService {
    /// A front door.
    pub fn new(service: Service) -> Self {
        Self { service }
    }

    async fn start(
        &self,
        api: Api,
        request: Request<v1::GenerateRequest>,
    ) -> RequestResult<(String, Generation)> {
        let timeout = grpc_timeout(request.metadata())?;
        let request_id = match request.extensions().get::<RequestId>() {
            Some(RequestId(named)) => named.clone(),
            None => self.service.request_id(),
        };
        let arrived = self.service.arrive(api, request_id, timeout)?;
        let admitted = self.service.admit(arrived, request.get_ref().encoded_len())?;
        let submission = admitted.tracked.note(submission(request.into_inner()))?;
        let sequences = self.service.prepare(&admitted, submission).await?;
        let mut generations = self.service.start(&admitted, sequences).await?;
        let generation = generations
            .pop()
            .ok_or_else(|| RequestError::Internal { problem: "a request without sequences".into() })?;
        Ok((admitted.request_id, generation))
    }
}

#[tonic::async_trait]
impl Inference for InferenceService {
    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<v1::GenerateResponse>, Status> {
        let (request_id, generation) = self.start(Api::GrpcGenerate, request).await?;
        let Completion { text, tokens, finish, seed, .. } = generation.collect().await?;
        Ok(Response::new(v1::GenerateResponse {
            request_id,
            text,
            tokens,
            finish_reason: wire_reason(finish.reason).into(),
            usage: Some(usage(finish)),
            seed,
        }))
    }

    type GenerateStreamStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateChunk, Status>> + Send>>;

    async fn generate_stream(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        let (request_id, generation) = self.start(Api::GrpcStream, request).await?;
        let seed = generation.seed;
        let chunks = generation.map(move |chunk| {
            let Chunk { text, tokens, finish, .. } = chunk?;
            let finish_reason =
                finish.map_or(v1::FinishReason::Unspecified, |finish| wire_reason(finish.reason));
            Ok(v1::GenerateChunk {
                request_id: request_id.clone(),
                text,
                tokens,
                finish_reason: finish_reason.into(),
                usage: finish.map(usage),
                seed,
            })
        });
        Ok(Response::new(Box::pin(chunks)))
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let model = &self.service.model;
        let generation = self.service.pool.generation();
        Ok(Response::new(v1::ListModelsResponse {
            models: vec![v1::Model {
                name: model.name.clone(),
                max_context_tokens: u32::try_from(self.service.limit_tokens()).unwrap_or(u32::MAX),
                generation: Some(generation.into()),
                weights: model.weights.to_string(),
            }],
        }))
    }
}

fn wire_reason(reason: FinishReason) -> v1::FinishReason {
    reason.into()
}

fn usage(finish: Finish) -> v1::Usage {
    v1::Usage { prompt_tokens: finish.prompt_tokens, completion_tokens: finish.completion_tokens }
}

fn submission(request: v1::GenerateRequest) -> RequestResult<Submission> {
    let input = match request.input {
        None => return Err(RequestError::invalid("input", "text, tokens or chat is required")),
        Some(generate_request::Input::Text(text)) => Input::Text(text),
        Some(generate_request::Input::Tokens(tokens)) => Input::Tokens(tokens.ids),
        Some(generate_request::Input::Chat(chat)) => Input::Chat {
            messages: chat.messages.into_iter().map(|m| ChatMessage::text(m.role, m.content)).collect(),
            variables: Map::new(),
        },
    };
    Ok(Submission {
        model: Some(request.model),
        inputs: vec![input],
        sampling: request.sampling.unwrap_or_default(),
        max_tokens: request.max_tokens,
        stop: request.stop,
        stop_token_ids: request.stop_token_ids,
        min_tokens: request.min_tokens,
        ignore_eos: request.ignore_eos,
        ..Submission::default()
    })
}

/// The client's time-out less what the answer needs to travel. `grpc-timeout` is at most 8 digits and a
/// unit.
fn grpc_timeout(metadata: &MetadataMap) -> RequestResult<Option<Duration>> {
    let Some(value) = metadata.get("grpc-timeout") else { return Ok(None) };
    let invalid = || RequestError::invalid("grpc-timeout", format!("{value:?} is no time-out"));
    let text = value.to_str().map_err(|_| invalid())?;
    let unit = text.chars().last().ok_or_else(invalid)?;
    let digits = &text[..text.len() - unit.len_utf8()];
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(invalid());
    }
    let amount: u64 = digits.parse().map_err(|_| invalid())?;
    let timeout = match unit {
        'H' => Duration::from_secs(amount * 3600),
        'M' => Duration::from_secs(amount * 60),
        'S' => Duration::from_secs(amount),
        'm' => Duration::from_millis(amount),
        'u' => Duration::from_micros(amount),
        'n' => Duration::from_nanos(amount),
        _ => return Err(invalid()),
    };
    Ok(Some(timeout - timeout / MARGIN))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn timeout(value: &str) -> RequestResult<Option<Duration>> {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", value.parse().unwrap());
        grpc_timeout(&metadata)
    }

    #[test]
    fn the_grpc_timeout_is_read_with_a_margin() {
        assert_eq!(grpc_timeout(&MetadataMap::new()).unwrap(), None);
        assert_eq!(timeout("2S").unwrap(), Some(Duration::from_millis(1900)));
        assert_eq!(timeout("99999999H").unwrap().unwrap().as_secs(), 99_999_999 * 3600 / 20 * 19);
        for bad in ["", "S", "5", "123456789S", "-1S", "1x", "1.5S"] {
            assert!(timeout(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_absent_input_is_named() {
        let error = submission(v1::GenerateRequest::default()).unwrap_err();
        assert!(matches!(error, RequestError::Invalid { field, .. } if field == "input"));
    }
}
