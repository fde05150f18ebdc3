//! A client of `cadre.v1.Inference`, shared by `chat`, `up --exit-after` and `bench`.

use std::time::Duration;

use anyhow::{Context, Result};
use cadre_proto::{
    MAX_MESSAGE_BYTES,
    v1::{self, inference_client::InferenceClient},
};
use clap::Args;
use tonic::transport::{Channel, Endpoint};

/// How long a connection may take; the router answers from memory.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects to a router's gRPC address (`host:port`).
pub(crate) async fn connect(address: &str) -> Result<InferenceClient<Channel>> {
    let channel = Endpoint::from_shared(format!("http://{address}"))
        .with_context(|| format!("{address:?} is not host:port"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .connect()
        .await
        .with_context(|| format!("connect to the router at {address} (is `cadre up` running?)"))?;
    Ok(InferenceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

/// The first model that a router serves.
pub(crate) async fn served_model(client: &mut InferenceClient<Channel>) -> Result<v1::Model> {
    let models = client.list_models(v1::ListModelsRequest {}).await.map_err(refused)?.into_inner().models;
    models.into_iter().next().context("the router serves no model")
}

/// An error status in words, its code first: `RESOURCE_EXHAUSTED: 64 requests are waiting`.
pub(crate) fn refused(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{:?}: {}", status.code(), status.message())
}

/// How the next token is chosen. What is not given takes the checkpoint's `generation_config.json`.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct SamplingArgs {
    /// 0 is greedy; larger is more varied, up to 2. [default: the checkpoint's]
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// Keep the most likely tokens that reach this probability together. [default: the checkpoint's]
    #[arg(long)]
    pub(crate) top_p: Option<f32>,
    /// Keep this many of the most likely tokens. [default: all]
    #[arg(long)]
    pub(crate) top_k: Option<u32>,
    /// Keep tokens at least this likely relative to the most likely one. [default: 0]
    #[arg(long)]
    pub(crate) min_p: Option<f32>,
    /// Discourages tokens of the prompt and the answer; 1 is off. [default: 1]
    #[arg(long)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Same seed, same text. [default: drawn by the router]
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Most tokens to generate. [default: up to the context length]
    #[arg(long)]
    pub(crate) max_tokens: Option<u32>,
    /// A string that ends the answer; may be given several times.
    #[arg(long)]
    pub(crate) stop: Vec<String>,
}

impl SamplingArgs {
    /// Greedy, whatever the checkpoint recommends.
    pub(crate) fn greedy(max_tokens: u32) -> Self {
        Self { temperature: Some(0.0), max_tokens: Some(max_tokens), ..Self::default() }
    }

    /// A request for the next message of a conversation.
    pub(crate) fn request(&self, messages: Vec<v1::ChatMessage>) -> v1::GenerateRequest {
        v1::GenerateRequest {
            input: Some(v1::generate_request::Input::Chat(v1::Chat { messages })),
            sampling: Some(v1::SamplingOptions {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                seed: self.seed,
                ..v1::SamplingOptions::default()
            }),
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
            ..v1::GenerateRequest::default()
        }
    }
}

/// A message of the user.
pub(crate) fn user(content: &str) -> v1::ChatMessage {
    v1::ChatMessage { role: "user".into(), content: content.into() }
}
