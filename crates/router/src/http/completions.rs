//! `/v1/completions`: raw prompts, as text or token ids, one or several.

use std::sync::Arc;

use axum::{Extension, body::Body, extract::State, http::HeaderMap, response::Response};
use serde_json::{Value, json};

use super::{
    RequestId, error_response,
    fields::{Delivery, Fields, as_ids, excerpt},
    logprobs, receive,
    respond::{Shape, reason, respond},
    unsupported::Endpoint,
};
use crate::{
    error::{RequestError, RequestResult},
    generate::{Chunk, Completion},
    metrics::Api,
    model::ServedModel,
    request::{Input, Submission},
    service::Service,
};

/// OpenAI's default for this endpoint.
const DEFAULT_MAX_TOKENS: u32 = 16;

pub(super) async fn handle(
    State(service): State<Service>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    match receive(&service, Api::HttpCompletions, id, &headers, body, read).await {
        Err(error) => error_response(&error),
        Ok((admitted, submission, delivery)) => {
            let shape =
                Completions { model: Arc::clone(&service.model), logprobs: submission.sampling.logprobs };
            respond(&service, admitted, submission, delivery, shape).await
        }
    }
}

fn read(fields: &mut Fields) -> RequestResult<(Submission, Delivery)> {
    let delivery = fields.delivery()?;
    let mut submission = fields.submission(Endpoint::Completions)?;
    submission.inputs = prompts(fields.value("prompt"))?;
    submission.max_tokens = Some(fields.u32("max_tokens")?.unwrap_or(DEFAULT_MAX_TOKENS));
    submission.sampling.logprobs = fields.u32("logprobs")?;
    Ok((submission, delivery))
}

/// A string, a list of strings, a list of token ids, or a list of such lists.
fn prompts(value: Option<Value>) -> RequestResult<Vec<Input>> {
    const EXPECTED: &str = "a string, a list of token ids, or a list of either";
    let value =
        value.ok_or_else(|| RequestError::invalid("prompt", format!("it is required: {EXPECTED}")))?;
    let wrong = || RequestError::invalid("prompt", format!("expected {EXPECTED}, found {}", excerpt(&value)));
    match &value {
        Value::String(text) => Ok(vec![Input::Text(text.clone())]),
        Value::Array(items) => match items.first() {
            None => Err(wrong()),
            Some(Value::String(_)) => items
                .iter()
                .map(|item| item.as_str().map(|text| Input::Text(text.to_owned())))
                .collect::<Option<_>>()
                .ok_or_else(wrong),
            Some(Value::Array(_)) => items
                .iter()
                .map(|item| as_ids(item).map(Input::Tokens))
                .collect::<Option<_>>()
                .ok_or_else(wrong),
            Some(_) => as_ids(&value).map(|ids| vec![Input::Tokens(ids)]).ok_or_else(wrong),
        },
        _ => Err(wrong()),
    }
}

struct Completions {
    model: Arc<ServedModel>,
    logprobs: Option<u32>,
}

impl Completions {
    fn logprobs(&self, tokens: &[cadre_proto::v1::GeneratedToken], offsets: &[usize]) -> Value {
        let Some(count) = self.logprobs else { return Value::Null };
        logprobs::completions(&self.model.tokenizer, tokens, offsets, count > 0)
    }
}

impl Shape for Completions {
    fn objects(&self) -> (&'static str, &'static str) {
        ("text_completion", "text_completion")
    }

    fn id_prefix(&self) -> &'static str {
        "cmpl-"
    }

    fn choice(&mut self, index: usize, completion: &Completion) -> Value {
        json!({
            "index": index,
            "text": completion.text,
            "logprobs": self.logprobs(&completion.tokens, &completion.text_offsets),
            "finish_reason": reason(completion.finish.reason),
        })
    }

    fn opening(&mut self, _index: usize) -> Option<Value> {
        None
    }

    fn piece(&mut self, index: usize, chunk: &Chunk) -> Option<Value> {
        let logprobs = match chunk.tokens.is_empty() {
            true => Value::Null,
            false => self.logprobs(&chunk.tokens, &chunk.text_offsets),
        };
        if chunk.text.is_empty() && logprobs.is_null() {
            return None;
        }
        Some(json!({"index": index, "text": chunk.text, "logprobs": logprobs, "finish_reason": null}))
    }

    fn ending(&mut self, index: usize, reason: &'static str) -> Value {
        json!({"index": index, "text": "", "logprobs": null, "finish_reason": reason})
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn the_four_forms_of_a_prompt() {
        let read = |value| prompts(Some(value)).unwrap();
        let text = |text: &str| Input::Text(text.to_owned());
        assert_eq!(read(json!("a")), [text("a")]);
        assert_eq!(read(json!(["a", "b"])), [text("a"), text("b")]);
        assert_eq!(read(json!([1, 2])), [Input::Tokens(vec![1, 2])]);
        assert_eq!(read(json!([[1], [2, 3]])), [Input::Tokens(vec![1]), Input::Tokens(vec![2, 3])]);
        for wrong in [
            json!([]),
            json!({"a": 1}),
            json!(7),
            json!(["a", 1]),
            json!([1, "a"]),
            json!([1.5]),
            json!([[1], "a"]),
        ] {
            let error = prompts(Some(wrong.clone())).unwrap_err();
            assert!(error.to_string().starts_with("prompt: expected"), "{wrong}: {error}");
        }
        assert!(prompts(None).unwrap_err().to_string().contains("required"));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name_and_neutral_values_pass() {
        let read = |more: &str| {
            let json = format!(r#"{{"model": "m", "prompt": "p", {more}}}"#);
            read(&mut Fields::parse(json.as_bytes()).unwrap())
        };
        for (json, field) in
            [(r#""suffix": "x""#, "suffix"), (r#""echo": true"#, "echo"), (r#""best_of": 3"#, "best_of")]
        {
            let error = read(json).unwrap_err();
            assert!(
                matches!(&error, RequestError::Invalid { field: found, .. } if found == field),
                "{error}"
            );
        }
        let neutral = r#""suffix": null, "echo": false, "best_of": 2, "n": 2, "user": "u", "anything": {}"#;
        let (submission, _) = read(neutral).unwrap();
        assert_eq!((submission.n, submission.max_tokens), (2, Some(16)));
    }
}
