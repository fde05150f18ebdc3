//! What goes into an engine and what comes out: requests, their validation, events.

use std::time::Instant;

use cadre_types::{FinishReason, Position, SamplingParams, StopConditions, TokenId};

use crate::error::SubmitError;

/// Longest request id in bytes; it is a key, logged and sent with every hand-off.
const MAX_REQUEST_ID_BYTES: usize = 256;
/// Most stop ids of a request: they are searched once per token.
const MAX_STOP_IDS: usize = 1024;

/// Where the prompt's KV comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefillPlace {
    /// This engine computes it.
    Local,
    /// A prefill worker hands it off ([`crate::EngineHandle::begin_handoff`]).
    Remote,
}

/// A sequence to generate.
#[derive(Clone, Debug)]
pub struct SequenceRequest {
    /// Unique among the running sequences of this engine; names the hand-off.
    pub request_id: String,
    /// The prompt; at least one token.
    pub prompt: Vec<TokenId>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// When it ends. `max_tokens` is cut to what the context leaves.
    pub stop: StopConditions,
    /// Where the prompt is computed.
    pub prefill: PrefillPlace,
    /// When it ends with [`FinishReason::Deadline`], in whatever state it is.
    pub deadline: Option<Instant>,
}

/// A prompt to compute and hand off, first token included.
#[derive(Clone, Debug)]
pub struct PrefillRequest {
    /// As in [`SequenceRequest`].
    pub request_id: String,
    /// The prompt.
    pub prompt: Vec<TokenId>,
    /// How the first token is chosen.
    pub sampling: SamplingParams,
    /// As in [`SequenceRequest`]: with `min_tokens` above 0 the first token is none that would end it.
    /// `max_tokens` means nothing here.
    pub stop: StopConditions,
    /// As in [`SequenceRequest`].
    pub deadline: Option<Instant>,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct GeneratedToken {
    /// Its position; the first one's is the prompt length.
    pub position: Position,
    /// The token.
    pub token: TokenId,
    /// Its log-probability under the model's distribution, if asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens with theirs, descending; as many as asked for.
    pub top: Vec<(TokenId, f32)>,
}

/// What happens to a sequence, in order.
#[derive(Clone, Debug)]
pub enum EngineEvent {
    /// Its pages are reserved.
    Reserved,
    /// So many positions of its prompt are computed (only of [`PrefillRequest`]s).
    Computed(u32),
    /// One generated token. The token that ends a sequence (EOS, a stop id) is not among them.
    Token(GeneratedToken),
    /// The end. Pages are free.
    Finished(FinishReason),
    /// The end, by failure. Pages are free.
    Failed(crate::EngineError),
}

/// What every request of an engine is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineLimits {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Longest sequence, prompt and answer.
    pub max_positions: usize,
}

impl EngineLimits {
    /// Most tokens of a prompt: one position is left for the answer.
    pub fn max_prompt(&self) -> usize {
        self.max_positions.saturating_sub(1)
    }

    pub(crate) fn check_prompt(
        &self,
        request_id: &str,
        prompt: &[TokenId],
        sampling: &SamplingParams,
    ) -> Result<(), SubmitError> {
        let invalid = |problem: String| SubmitError::Invalid { request_id: request_id.to_owned(), problem };
        if request_id.is_empty() || request_id.len() > MAX_REQUEST_ID_BYTES {
            let bytes = request_id.len();
            return Err(SubmitError::Invalid {
                // A hostile id is not repeated whole in an error.
                request_id: request_id.chars().take(MAX_REQUEST_ID_BYTES / 4).collect(),
                problem: format!("the request id has {bytes} bytes, must be 1..={MAX_REQUEST_ID_BYTES}"),
            });
        }
        if prompt.is_empty() {
            return Err(invalid("the prompt is empty".into()));
        }
        if prompt.len() > self.max_prompt() {
            return Err(SubmitError::PromptTooLong {
                request_id: request_id.to_owned(),
                tokens: prompt.len(),
                most: self.max_prompt(),
            });
        }
        let vocab_size = self.vocab_size;
        if let Some((at, token)) = prompt.iter().enumerate().find(|(_, token)| **token as usize >= vocab_size)
        {
            return Err(invalid(format!(
                "prompt token {token} at position {at} is not in the vocabulary of {vocab_size}"
            )));
        }
        sampling.validate().map_err(|error| invalid(error.to_string()))
    }

    pub(crate) fn check_stop(&self, request_id: &str, stop: &StopConditions) -> Result<(), SubmitError> {
        let invalid = |problem: String| SubmitError::Invalid { request_id: request_id.to_owned(), problem };
        if stop.max_tokens == 0 {
            return Err(invalid("max_tokens is 0, must be at least 1".into()));
        }
        if stop.stop_token_ids.len() > MAX_STOP_IDS {
            let given = stop.stop_token_ids.len();
            return Err(invalid(format!("{given} stop ids, at most {MAX_STOP_IDS}")));
        }
        Ok(())
    }

    /// The answer's bound: what was asked for, or what the context leaves.
    pub(crate) fn max_tokens(&self, prompt: usize, asked: u32) -> u32 {
        let left = self.max_positions.saturating_sub(prompt);
        asked.min(u32::try_from(left).unwrap_or(u32::MAX))
    }
}
