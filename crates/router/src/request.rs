//! From what a client asked to what workers are given: validation, rendering, tokenization, defaults.
//!
//! Pure CPU work in proportion to the text; [`crate::service::Service::prepare`] runs it on a blocking
//! thread. Every refusal names the field and the values. Nothing is changed silently except the answer's
//! length, which is cut to what the context (and, if `max_tokens` is absent, the workers' cache) leaves.

use std::sync::Arc;

use cadre_proto::v1;
use cadre_text::{ChatMessage, StopStrings, TemplateError};
use cadre_types::{SamplingParams, TokenId};
use serde_json::{Map, Value};

use crate::{
    error::{RequestError, RequestResult},
    model::{ServedModel, with_defaults},
    policy::PAGE_TOKENS,
};

/// Most stop ids of a request; each generated token is compared with all.
const MAX_STOP_TOKEN_IDS: usize = 512;

/// A prompt as a client gives it.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Text; BOS is added as the checkpoint's configuration says.
    Text(String),
    /// Token ids, used as they are.
    Tokens(Vec<TokenId>),
    /// A conversation for the chat template, with further variables for it.
    Chat {
        /// The messages.
        messages: Vec<ChatMessage>,
        /// `chat_template_kwargs`.
        variables: Map<String, Value>,
    },
}

/// A request, whatever the front door.
#[derive(Clone, Debug, PartialEq)]
pub struct Submission {
    /// The model's name; `None` means the only one.
    pub model: Option<String>,
    /// The prompts; at least one.
    pub inputs: Vec<Input>,
    /// Answers per prompt.
    pub n: u32,
    /// Sampling as far as given.
    pub sampling: v1::SamplingOptions,
    /// Most tokens to generate; `None` means up to the context.
    pub max_tokens: Option<u32>,
    /// The field that `max_tokens` came from, for errors.
    pub max_tokens_field: &'static str,
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// Ids that end the text, beside EOS.
    pub stop_token_ids: Vec<TokenId>,
    /// Tokens before a stop id counts.
    pub min_tokens: u32,
    /// Do not stop at EOS.
    pub ignore_eos: bool,
}

impl Default for Submission {
    fn default() -> Self {
        Self {
            model: None,
            inputs: Vec::new(),
            n: 1,
            sampling: v1::SamplingOptions::default(),
            max_tokens: None,
            max_tokens_field: "max_tokens",
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            min_tokens: 0,
            ignore_eos: false,
        }
    }
}

/// One sequence, ready for workers.
#[derive(Clone, Debug)]
pub struct PreparedSequence {
    /// The router's name for it.
    pub request_id: String,
    /// The prompt.
    pub prompt: Arc<[TokenId]>,
    /// Complete parameters.
    pub sampling: SamplingParams,
    /// Most tokens to generate; prompt and this fit the context.
    pub max_tokens: u32,
    /// Stop ids, EOS included unless ignored.
    pub stop_token_ids: Vec<TokenId>,
    /// Tokens before a stop id counts.
    pub min_tokens: u32,
    /// Matcher of stop strings, fresh.
    pub stops: StopStrings,
}

impl PreparedSequence {
    /// Tokens of prompt and longest answer.
    pub fn total_tokens(&self) -> u64 {
        self.prompt.len() as u64 + u64::from(self.max_tokens)
    }
}

/// What [`prepare`] takes from outside the request.
#[derive(Clone, Debug)]
pub struct Context {
    /// The router's name for the request.
    pub request_id: String,
    /// Seed for requests that bring none.
    pub drawn_seed: u64,
    /// Positions of the largest ready worker's cache, if known.
    pub capacity_tokens: Option<u64>,
    /// Most sequences of one request.
    pub max_sequences: u32,
}

/// The sequences of a request: `n` for each prompt, prompt by prompt. The seed of the `k`-th is the
/// request's plus `k`.
pub fn prepare(
    model: &ServedModel,
    submission: Submission,
    context: &Context,
) -> RequestResult<Vec<PreparedSequence>> {
    check_model(model, submission.model.as_deref())?;
    check_count(&submission, context.max_sequences)?;
    let seed = submission.sampling.seed.unwrap_or(context.drawn_seed);
    let base = with_defaults(&model.defaults, &submission.sampling, seed);
    base.validate().map_err(|error| {
        RequestError::invalid(
            error.field,
            format!("{} is not allowed, it must be {}", error.value, error.expected),
        )
    })?;
    let stops = StopStrings::new(submission.stop.clone(), false)
        .map_err(|error| RequestError::invalid("stop", error.to_string()))?;
    let stop_token_ids = stop_ids(model, &submission)?;
    let mut sequences = Vec::new();
    for (index, input) in submission.inputs.iter().enumerate() {
        let prompt: Arc<[TokenId]> = tokenize(model, input, index)?.into();
        let max_tokens = answer_length(model, &submission, prompt.len(), context.capacity_tokens)?;
        for _ in 0..submission.n {
            let at = sequences.len() as u64;
            sequences.push(PreparedSequence {
                request_id: format!("{}-{at}", context.request_id),
                prompt: Arc::clone(&prompt),
                sampling: SamplingParams { seed: seed.wrapping_add(at), ..base.clone() },
                max_tokens,
                stop_token_ids: stop_token_ids.clone(),
                min_tokens: submission.min_tokens,
                stops: stops.clone(),
            });
        }
    }
    Ok(sequences)
}

/// Refuses a name that is not the served model's. An empty one means the only model.
pub fn check_model(model: &ServedModel, requested: Option<&str>) -> RequestResult<()> {
    match requested {
        None | Some("") => Ok(()),
        Some(name) if model.answers_to(name) => Ok(()),
        Some(name) => Err(RequestError::UnknownModel {
            // A hostile name is not repeated whole.
            requested: name.chars().take(256).collect(),
            served: model.name.clone(),
        }),
    }
}

fn check_count(submission: &Submission, max_sequences: u32) -> RequestResult<()> {
    if submission.inputs.is_empty() {
        return Err(RequestError::invalid("prompt", "there is none"));
    }
    if submission.n == 0 {
        return Err(RequestError::invalid("n", "0 is not allowed, it must be at least 1"));
    }
    let total = submission.inputs.len() as u64 * u64::from(submission.n);
    if total > u64::from(max_sequences) {
        let problem = format!(
            "{} prompts x n = {} are {total} sequences, at most {max_sequences} are allowed in one request",
            submission.inputs.len(),
            submission.n
        );
        return Err(RequestError::invalid("n", problem));
    }
    Ok(())
}

fn stop_ids(model: &ServedModel, submission: &Submission) -> RequestResult<Vec<TokenId>> {
    let given = &submission.stop_token_ids;
    if given.len() > MAX_STOP_TOKEN_IDS {
        let problem = format!("{} ids, at most {MAX_STOP_TOKEN_IDS} are allowed", given.len());
        return Err(RequestError::invalid("stop_token_ids", problem));
    }
    check_vocabulary(model, given, "stop_token_ids")?;
    let eos = model.tokenizer.eos_ids().iter().filter(|_| !submission.ignore_eos);
    let mut ids: Vec<TokenId> = eos.chain(given).copied().collect();
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn check_vocabulary(model: &ServedModel, ids: &[TokenId], field: &'static str) -> RequestResult<()> {
    let size = model.config.vocab_size;
    match ids.iter().position(|&id| id as usize >= size) {
        None => Ok(()),
        Some(at) => Err(RequestError::invalid(
            field,
            format!("token {} at index {at} is not in the vocabulary of {size}", ids[at]),
        )),
    }
}

fn tokenize(model: &ServedModel, input: &Input, index: usize) -> RequestResult<Vec<TokenId>> {
    let encode = |text: &str, add_special: bool, field: &'static str| {
        let ids = model.tokenizer.encode(text, add_special);
        ids.map_err(|error| RequestError::invalid(field, error.to_string()))
    };
    let (prompt, field) = match input {
        Input::Text(text) => (encode(text, true, "prompt")?, "prompt"),
        Input::Tokens(ids) => {
            check_vocabulary(model, ids, "prompt")?;
            (ids.clone(), "prompt")
        }
        Input::Chat { messages, variables } => {
            if messages.is_empty() {
                return Err(RequestError::invalid("messages", "there are none"));
            }
            (encode(&render(model, messages, variables)?, false, "messages")?, "messages")
        }
    };
    if prompt.is_empty() {
        return Err(RequestError::invalid(field, format!("prompt {index} has no tokens")));
    }
    Ok(prompt)
}

fn render(
    model: &ServedModel,
    messages: &[ChatMessage],
    variables: &Map<String, Value>,
) -> RequestResult<String> {
    let template = model.tokenizer.chat_template().map_err(template_error)?;
    template.render(messages, None, true, variables).map_err(template_error)
}

fn template_error(error: TemplateError) -> RequestError {
    match error {
        TemplateError::Syntax { .. } => RequestError::Internal { problem: error.to_string() },
        TemplateError::Reserved { .. } => RequestError::invalid("chat_template_kwargs", error.to_string()),
        _ => RequestError::invalid("messages", error.to_string()),
    }
}

fn answer_length(
    model: &ServedModel,
    submission: &Submission,
    prompt_tokens: usize,
    capacity_tokens: Option<u64>,
) -> RequestResult<u32> {
    let context_tokens = model.context_tokens();
    if prompt_tokens >= context_tokens {
        return Err(RequestError::PromptTooLong { prompt_tokens, context_tokens });
    }
    let room = u32::try_from(context_tokens - prompt_tokens).unwrap_or(u32::MAX);
    let length = match submission.max_tokens {
        Some(0) => {
            let problem = "0 is not allowed, it must be at least 1";
            return Err(RequestError::invalid(submission.max_tokens_field, problem));
        }
        Some(asked) => asked.min(room),
        // A worker reserves pages for the whole answer, so an open end is cut to what fits its cache.
        None => capacity_tokens.map_or(room, |capacity| {
            let fits = (capacity / PAGE_TOKENS * PAGE_TOKENS).saturating_sub(prompt_tokens as u64);
            room.min(u32::try_from(fits).unwrap_or(u32::MAX)).max(1)
        }),
    };
    if submission.min_tokens > length {
        let problem = format!("{} is more than the answer's longest, {length}", submission.min_tokens);
        return Err(RequestError::invalid("min_tokens", problem));
    }
    Ok(length)
}

#[cfg(test)]
mod tests;
