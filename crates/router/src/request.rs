//! From what a client asked to what workers are given: validation, rendering, tokenization, defaults.
//!
//! Pure CPU work in proportion to the text; [`crate::service::Service::prepare`] runs it on a blocking
//! thread. Every refusal names the field and the values. Nothing is changed silently except the answer's
//! length, which is cut to what the longest sequence served ([`limit_tokens`]) leaves. What no sequence can
//! hold is refused by its length in bytes before it is tokenized ([`refuse_by_length`]).

use std::{sync::Arc, time::Instant};

use cadre_proto::v1;
use cadre_text::{ChatMessage, Content, EncodeError, StopStrings, TemplateError};
use cadre_types::{SamplingParams, TokenId};
use serde_json::{Map, Value};

use crate::{
    error::{RequestError, RequestResult},
    model::{ServedModel, with_defaults},
    policy::PAGE_TOKENS,
};

/// Most stop ids of a request; each generated token is compared with all.
const MAX_STOP_TOKEN_IDS: usize = 512;

/// Longest part of a client's word that an error repeats.
const EXCERPT: usize = 80;

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
    /// The field that `sampling.logprobs` came from, for errors.
    pub logprobs_field: &'static str,
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
            logprobs_field: "logprobs",
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            min_tokens: 0,
            ignore_eos: false,
        }
    }
}

impl Submission {
    /// Bytes of text to tokenize.
    pub fn text_bytes(&self) -> usize {
        let of = |input: &Input| match input {
            Input::Text(text) => text.len(),
            Input::Tokens(_) => 0,
            Input::Chat { messages, .. } => messages.iter().map(content_bytes).sum(),
        };
        self.inputs.iter().map(of).sum()
    }
}

fn content_bytes(message: &ChatMessage) -> usize {
    match &message.content {
        None => 0,
        Some(Content::Text(text)) => text.len(),
        Some(Content::Parts(parts)) => {
            parts.iter().filter_map(|part| part.text.as_ref()).map(String::len).sum()
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
    /// Longest sequence, prompt and answer ([`limit_tokens`]).
    pub limit_tokens: usize,
    /// Most sequences of one request.
    pub max_sequences: u32,
    /// When the request fails; what it needs a thread for is given up then.
    pub deadline: Option<Instant>,
}

/// The longest sequence that is served: the context, or what the largest cache of a worker holds in whole
/// pages, where that is less. A worker reserves pages for the whole answer.
pub fn limit_tokens(model: &ServedModel, capacity_tokens: Option<u64>) -> usize {
    let context_tokens = model.context_tokens();
    let pages = |capacity: u64| capacity / PAGE_TOKENS * PAGE_TOKENS;
    let fits =
        capacity_tokens.map_or(usize::MAX, |capacity| usize::try_from(pages(capacity)).unwrap_or(usize::MAX));
    context_tokens.min(fits)
}

/// Refuses prompts that no tokenization makes short enough: no token is longer than the longest of the
/// vocabulary. A conversation is not looked at, because a template may leave parts of it out; what it is
/// rendered to is, before it is tokenized.
pub fn refuse_by_length(
    model: &ServedModel,
    submission: &Submission,
    limit_tokens: usize,
) -> RequestResult<()> {
    submission.inputs.iter().try_for_each(|input| match input {
        Input::Text(text) => check_length(model, text, limit_tokens),
        Input::Tokens(ids) if ids.len() >= limit_tokens => {
            Err(too_long(model, ids.len(), false, limit_tokens))
        }
        Input::Tokens(_) | Input::Chat { .. } => Ok(()),
    })
}

fn check_length(model: &ServedModel, text: &str, limit_tokens: usize) -> RequestResult<()> {
    match model.tokenizer.least_tokens(text) {
        least if least >= limit_tokens => Err(too_long(model, least, true, limit_tokens)),
        _ => Ok(()),
    }
}

fn too_long(model: &ServedModel, prompt_tokens: usize, at_least: bool, limit_tokens: usize) -> RequestError {
    let context_tokens = model.context_tokens();
    RequestError::PromptTooLong { prompt_tokens, at_least, limit_tokens, context_tokens }
}

/// The sequences of a request: `n` for each prompt, prompt by prompt. The seed of the `k`-th is the
/// request's plus `k`. Ends with [`RequestError::Cancelled`] soon after `stop` says so.
pub fn prepare(
    model: &ServedModel,
    submission: Submission,
    context: &Context,
    stop: &dyn Fn() -> bool,
) -> RequestResult<Vec<PreparedSequence>> {
    check_model(model, submission.model.as_deref())?;
    check_count(&submission, context.max_sequences)?;
    let seed = submission.sampling.seed.unwrap_or(context.drawn_seed);
    let base = with_defaults(&model.defaults, &submission.sampling, seed);
    base.validate().map_err(|error| {
        RequestError::invalid(
            if error.field == "logprobs" { submission.logprobs_field } else { error.field },
            format!("{} is not allowed, it must be {}", error.value, error.expected),
        )
    })?;
    let stops = StopStrings::new(submission.stop.clone(), false)
        .map_err(|error| RequestError::invalid("stop", error.to_string()))?
        .spelling(model.tokenizer.special_texts().map(|(_, text)| text));
    let stop_token_ids = stop_ids(model, &submission)?;
    let mut sequences = Vec::new();
    for (index, input) in submission.inputs.iter().enumerate() {
        let prompt: Arc<[TokenId]> = tokenize(model, input, index, context, stop)?.into();
        let max_tokens = answer_length(model, &submission, prompt.len(), context.limit_tokens)?;
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

fn tokenize(
    model: &ServedModel,
    input: &Input,
    index: usize,
    context: &Context,
    stop: &dyn Fn() -> bool,
) -> RequestResult<Vec<TokenId>> {
    let limit_tokens = context.limit_tokens;
    let encode = |text: &str, add_special: bool, field: &'static str| {
        check_length(model, text, limit_tokens)?;
        model.tokenizer.encode_within(text, add_special, limit_tokens, stop).map_err(|error| match error {
            EncodeError::TooLong { tokens } => too_long(model, tokens, true, limit_tokens),
            EncodeError::Stopped => RequestError::Cancelled,
            EncodeError::Text(error) => RequestError::invalid(field, error.to_string()),
        })
    };
    let (prompt, field) = match input {
        Input::Text(text) => (encode(text, true, "prompt")?, "prompt"),
        Input::Tokens(ids) => {
            check_vocabulary(model, ids, "prompt")?;
            (ids.clone(), "prompt")
        }
        Input::Chat { messages, variables } => {
            check_messages(messages)?;
            let text = render(model, messages, variables, context.deadline)?;
            (encode(&text, false, "messages")?, "messages")
        }
    };
    if prompt.is_empty() {
        return Err(RequestError::invalid(field, format!("prompt {index} has no tokens")));
    }
    Ok(prompt)
}

/// What no template is asked: roles and parts of messages that this server does not know. The same for every
/// front door.
fn check_messages(messages: &[ChatMessage]) -> RequestResult<()> {
    if messages.is_empty() {
        return Err(RequestError::invalid("messages", "there are none"));
    }
    for (index, message) in messages.iter().enumerate() {
        let invalid = |field: &str, problem: String| {
            Err(RequestError::invalid(format!("messages[{index}].{field}"), problem))
        };
        match message.role.as_str() {
            "system" | "developer" | "user" | "assistant" => {}
            "tool" | "function" => {
                return invalid("role", format!("{:?} is not supported: tools are not", message.role));
            }
            other => {
                let shown: String = other.chars().take(EXCERPT).collect();
                return invalid("role", format!("{shown:?} is none of system, developer, user, assistant"));
            }
        }
        for field in ["tool_calls", "tool_call_id", "function_call", "audio"] {
            if message.extra.get(field).is_some_and(|value| !asks_nothing(value)) {
                return invalid(field, "tools are not supported by this server".into());
            }
        }
        if message.content.is_none() && message.role != "assistant" {
            return invalid("content", "it is required: a string or a list of text parts".into());
        }
    }
    Ok(())
}

/// Whether a value asks for nothing: null, false, "", [], {}.
pub(crate) fn asks_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn render(
    model: &ServedModel,
    messages: &[ChatMessage],
    variables: &Map<String, Value>,
    deadline: Option<Instant>,
) -> RequestResult<String> {
    let template = model.tokenizer.chat_template().map_err(template_error)?;
    template.render_until(messages, None, true, variables, deadline).map_err(template_error)
}

fn template_error(error: TemplateError) -> RequestError {
    match error {
        TemplateError::Busy { .. } | TemplateError::Thread { .. } => {
            RequestError::Internal { problem: error.to_string() }
        }
        error if error.is_the_servers() => RequestError::ChatUnavailable { problem: error.to_string() },
        TemplateError::Reserved { .. } => RequestError::invalid("chat_template_kwargs", error.to_string()),
        _ => RequestError::invalid("messages", error.to_string()),
    }
}

fn answer_length(
    model: &ServedModel,
    submission: &Submission,
    prompt_tokens: usize,
    limit_tokens: usize,
) -> RequestResult<u32> {
    if prompt_tokens >= limit_tokens {
        return Err(too_long(model, prompt_tokens, false, limit_tokens));
    }
    let room = u32::try_from(limit_tokens - prompt_tokens).unwrap_or(u32::MAX);
    let length = match submission.max_tokens {
        Some(0) => {
            let problem = "0 is not allowed, it must be at least 1";
            return Err(RequestError::invalid(submission.max_tokens_field, problem));
        }
        Some(asked) => asked.min(room),
        None => room,
    };
    if submission.min_tokens > length {
        let problem = format!("{} is more than the answer's longest, {length}", submission.min_tokens);
        return Err(RequestError::invalid("min_tokens", problem));
    }
    Ok(length)
}

#[cfg(test)]
mod tests;
