//! A running cluster as the target of a load, over the client API.

use anyhow::{Result, bail};
use cadre_proto::v1::{self, inference_client::InferenceClient};
use tonic::transport::Channel;

use super::load::Target;
use crate::client;

/// A router.
pub(crate) struct Cluster {
    client: InferenceClient<Channel>,
    /// The model that it serves.
    pub(crate) model: v1::Model,
}

impl Cluster {
    /// Connects.
    pub(crate) async fn connect(address: &str) -> Result<Self> {
        let mut client = client::connect(address).await?;
        let model = client::served_model(&mut client).await?;
        Ok(Self { client, model })
    }
}

impl Target for Cluster {
    async fn generate(
        &self,
        prompt: Vec<u32>,
        generate: u32,
        mut on_token: impl FnMut() + Send,
    ) -> Result<()> {
        let request = v1::GenerateRequest {
            input: Some(v1::generate_request::Input::Tokens(v1::TokenIds { ids: prompt })),
            sampling: Some(v1::SamplingOptions { temperature: Some(0.0), ..v1::SamplingOptions::default() }),
            max_tokens: Some(generate),
            ignore_eos: true,
            ..v1::GenerateRequest::default()
        };
        let mut stream =
            self.client.clone().generate_stream(request).await.map_err(client::refused)?.into_inner();
        while let Some(chunk) = stream.message().await.map_err(client::refused)? {
            chunk.tokens.iter().for_each(|_| on_token());
            match chunk.finish_reason() {
                v1::FinishReason::Unspecified | v1::FinishReason::Length => {}
                reason => bail!("a stream ended with {}", reason.as_str_name()),
            }
        }
        Ok(())
    }
}
