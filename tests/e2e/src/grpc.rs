//! gRPC clients and requests.

use cadre_proto::{
    MAX_MESSAGE_BYTES,
    v1::{self, generate_request::Input, inference_client::InferenceClient},
};
use tonic::{Status, transport::Channel};

/// A connection of its own.
pub async fn connect(address: &str) -> InferenceClient<Channel> {
    let client = InferenceClient::connect(format!("http://{address}")).await.expect("the router answers");
    client.max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// A greedy answer to one user message.
pub fn chat(prompt: &str) -> v1::GenerateRequest {
    let message = v1::ChatMessage { role: "user".into(), content: prompt.into() };
    request(Input::Chat(v1::Chat { messages: vec![message] }))
}

/// A greedy continuation of token ids.
pub fn tokens(ids: &[u32]) -> v1::GenerateRequest {
    request(Input::Tokens(v1::TokenIds { ids: ids.to_vec() }))
}

fn request(input: Input) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(input),
        sampling: Some(v1::SamplingOptions { temperature: Some(0.0), ..v1::SamplingOptions::default() }),
        ..v1::GenerateRequest::default()
    }
}

/// As long as asked for, whatever EOS says.
pub fn endless(prompt: &str, max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest { max_tokens: Some(max_tokens), ignore_eos: true, ..chat(prompt) }
}

/// A streamed answer, collected.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Streamed {
    /// All text.
    pub text: String,
    /// All tokens.
    pub tokens: Vec<v1::GeneratedToken>,
    /// Of the last chunk.
    pub reason: i32,
    /// Of the last chunk.
    pub usage: Option<v1::Usage>,
}

/// Runs a stream to its end.
pub async fn stream(
    client: &mut InferenceClient<Channel>,
    request: v1::GenerateRequest,
) -> Result<Streamed, Status> {
    let mut chunks = client.generate_stream(request).await?.into_inner();
    let mut streamed = Streamed::default();
    while let Some(chunk) = chunks.message().await? {
        streamed.text.push_str(&chunk.text);
        streamed.tokens.extend(chunk.tokens);
        streamed.reason = chunk.finish_reason;
        streamed.usage = chunk.usage;
    }
    Ok(streamed)
}
