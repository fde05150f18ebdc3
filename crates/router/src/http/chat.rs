//! `/v1/chat/completions`: conversations through the checkpoint's chat template.

use std::sync::Arc;

use axum::{Extension, body::Body, extract::State, http::HeaderMap, response::Response};
use cadre_text::{ChatMessage, Content, ContentPart};
use serde_json::{Map, Value, json};

use super::{
    RequestId, error_response,
    fields::{Delivery, Fields, excerpt},
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

pub(super) async fn handle(
    State(service): State<Service>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    match receive(&service, Api::HttpChat, id, &headers, body, read).await {
        Err(error) => error_response(&error),
        Ok((admitted, submission, delivery)) => {
            let with_logprobs = submission.sampling.logprobs.is_some();
            let shape = Chat { model: Arc::clone(&service.model), with_logprobs };
            respond(&service, admitted, submission, delivery, shape).await
        }
    }
}

fn read(fields: &mut Fields) -> RequestResult<(Submission, Delivery)> {
    let delivery = fields.delivery()?;
    let mut submission = fields.submission(Endpoint::Chat)?;
    let variables = fields.object("chat_template_kwargs")?.unwrap_or_default();
    submission.inputs = vec![Input::Chat { messages: messages(fields.value("messages"))?, variables }];
    // The newer name wins; OpenAI keeps both.
    let old = fields.u32("max_tokens")?;
    let new = fields.u32("max_completion_tokens")?;
    submission.max_tokens = new.or(old);
    if new.is_some() {
        submission.max_tokens_field = "max_completion_tokens";
    }
    submission.sampling.logprobs = top_logprobs(fields)?;
    submission.logprobs_field = "top_logprobs";
    Ok((submission, delivery))
}

fn messages(value: Option<Value>) -> RequestResult<Vec<ChatMessage>> {
    let value = value.ok_or_else(|| RequestError::invalid("messages", "they are required"))?;
    let Value::Array(items) = value else {
        return Err(RequestError::invalid("messages", format!("expected a list, found {}", excerpt(&value))));
    };
    items.into_iter().enumerate().map(|(index, item)| message(index, item)).collect()
}

/// A message as it came; what no template is asked is refused with the rest of the request.
fn message(index: usize, item: Value) -> RequestResult<ChatMessage> {
    let Value::Object(mut item) = item else {
        let problem = format!("expected an object with role and content, found {}", excerpt(&item));
        return Err(RequestError::invalid(format!("messages[{index}]"), problem));
    };
    let role = match take(&mut item, "role") {
        Some(Value::String(role)) => role,
        None => return Err(RequestError::invalid(format!("messages[{index}].role"), "it is required")),
        Some(other) => {
            let problem = format!("expected a string, found {}", excerpt(&other));
            return Err(RequestError::invalid(format!("messages[{index}].role"), problem));
        }
    };
    let content = match take(&mut item, "content") {
        None => None,
        Some(Value::String(text)) => Some(Content::Text(text)),
        Some(Value::Array(parts)) => {
            let parts = parts.into_iter().enumerate().map(|(part, value)| content_part(index, part, value));
            Some(Content::Parts(parts.collect::<RequestResult<_>>()?))
        }
        Some(other) => {
            let problem = format!("expected a string or a list of text parts, found {}", excerpt(&other));
            return Err(RequestError::invalid(format!("messages[{index}].content"), problem));
        }
    };
    Ok(ChatMessage { role, content, extra: item })
}

fn content_part(index: usize, part: usize, value: Value) -> RequestResult<ContentPart> {
    let invalid = |field: &str, problem: String| {
        Err(RequestError::invalid(format!("messages[{index}].content[{part}]{field}"), problem))
    };
    let Value::Object(mut fields) = value else {
        return invalid("", format!("expected an object with type and text, found {}", excerpt(&value)));
    };
    match take(&mut fields, "type") {
        Some(Value::String(kind)) if kind == "text" => match take(&mut fields, "text") {
            Some(Value::String(text)) => Ok(ContentPart { kind, text: Some(text) }),
            None => invalid(".text", "it is required".into()),
            Some(other) => invalid(".text", format!("expected a string, found {}", excerpt(&other))),
        },
        None => invalid(".type", "it is required: \"text\"".into()),
        Some(other) => invalid(".type", format!("only \"text\" is supported, found {}", excerpt(&other))),
    }
}

/// A field that is there and not null.
fn take(fields: &mut Map<String, Value>, name: &str) -> Option<Value> {
    fields.shift_remove(name).filter(|value| !value.is_null())
}

/// `logprobs: true` with `top_logprobs` alternatives; the range is checked with the other parameters.
fn top_logprobs(fields: &mut Fields) -> RequestResult<Option<u32>> {
    let top = fields.u32("top_logprobs")?;
    match (fields.bool("logprobs")?.unwrap_or(false), top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(RequestError::invalid("top_logprobs", "only allowed with logprobs = true")),
    }
}

struct Chat {
    model: Arc<ServedModel>,
    with_logprobs: bool,
}

impl Chat {
    fn logprobs(&self, tokens: &[cadre_proto::v1::GeneratedToken]) -> Value {
        match self.with_logprobs {
            true => logprobs::chat(&self.model.tokenizer, tokens),
            false => Value::Null,
        }
    }
}

impl Shape for Chat {
    fn objects(&self) -> (&'static str, &'static str) {
        ("chat.completion", "chat.completion.chunk")
    }

    fn id_prefix(&self) -> &'static str {
        "chatcmpl-"
    }

    fn choice(&mut self, index: usize, completion: &Completion) -> Value {
        json!({
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": null},
            "logprobs": self.logprobs(&completion.tokens),
            "finish_reason": reason(completion.finish.reason),
        })
    }

    fn opening(&mut self, index: usize) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        Some(json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null}))
    }

    fn piece(&mut self, index: usize, chunk: &Chunk) -> Option<Value> {
        let tell = !chunk.text.is_empty() || (self.with_logprobs && !chunk.tokens.is_empty());
        tell.then(|| {
            let logprobs = match chunk.tokens.is_empty() {
                true => Value::Null,
                false => self.logprobs(&chunk.tokens),
            };
            json!({"index": index, "delta": {"content": chunk.text}, "logprobs": logprobs, "finish_reason": null})
        })
    }

    fn ending(&mut self, index: usize, reason: &'static str) -> Value {
        json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": reason})
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn read_with(more: &str) -> RequestResult<(Submission, Delivery)> {
        let json = format!(r#"{{"model": "m", "messages": [{{"role": "user", "content": "hi"}}]{more}}}"#);
        read(&mut Fields::parse(json.as_bytes()).unwrap())
    }

    fn field_of(error: RequestError) -> String {
        match error {
            RequestError::Invalid { field, .. } => field.into_owned(),
            other => other.to_string(),
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (json, field) in [
            (r#", "tools": [{"type": "function"}]"#, "tools"),
            (r#", "tool_choice": "required""#, "tool_choice"),
            (r#", "functions": [{}]"#, "functions"),
            (r#", "response_format": {"type": "json_object"}"#, "response_format"),
            (r#", "modalities": ["audio"]"#, "modalities"),
            (r#", "logit_bias": {"1": 2}"#, "logit_bias"),
            (r#", "top_logprobs": 3"#, "top_logprobs"),
        ] {
            assert_eq!(field_of(read_with(json).unwrap_err()), field);
        }
        let neutral = r#", "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
            "modalities": ["text"], "store": true, "user": "u", "service_tier": "auto""#;
        assert!(read_with(neutral).is_ok());
    }

    #[test]
    fn messages_are_named_by_their_index() {
        let read = |messages: Value| super::messages(Some(messages)).map_err(field_of);
        assert_eq!(read(json!("hi")).unwrap_err(), "messages");
        for (second, field) in [
            (json!("hi"), "messages[1]"),
            (json!({"content": "b"}), "messages[1].role"),
            (json!({"role": 7, "content": "b"}), "messages[1].role"),
            (json!({"role": "user", "content": 7}), "messages[1].content"),
            (json!({"role": "user", "content": {"text": "a"}}), "messages[1].content"),
            (json!({"role": "user", "content": ["a"]}), "messages[1].content[0]"),
            (json!({"role": "user", "content": [{"text": "a"}]}), "messages[1].content[0].type"),
            (json!({"role": "user", "content": [{"type": "text"}]}), "messages[1].content[0].text"),
            (
                json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}),
                "messages[1].content[1].type",
            ),
        ] {
            let found = read(json!([{"role": "user", "content": "a"}, second])).unwrap_err();
            assert_eq!(found, field);
        }
        let error = super::messages(Some(json!([{"role": "user", "content": 7}]))).unwrap_err();
        assert_eq!(
            error.to_string(),
            "messages[0].content: expected a string or a list of text parts, found 7"
        );
        let kept = read(json!([{"role": "user", "content": "a", "name": "n"}])).unwrap();
        assert_eq!(kept[0].extra["name"], "n");
    }

    #[test]
    fn lengths_and_logprobs() {
        let (submission, _) = read_with("").unwrap();
        assert_eq!((submission.max_tokens, submission.sampling.logprobs), (None, None));
        let (submission, _) = read_with(r#", "max_tokens": 5, "max_completion_tokens": 7"#).unwrap();
        assert_eq!((submission.max_tokens, submission.max_tokens_field), (Some(7), "max_completion_tokens"));
        let (submission, _) = read_with(r#", "logprobs": true"#).unwrap();
        assert_eq!(submission.sampling.logprobs, Some(0));
        let (submission, _) = read_with(r#", "logprobs": true, "top_logprobs": 5"#).unwrap();
        assert_eq!(submission.sampling.logprobs, Some(5));
    }
}
