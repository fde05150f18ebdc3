//! `/v1/chat/completions`: conversations through the checkpoint's chat template.

use std::sync::Arc;

use axum::{body::Body, extract::State, http::HeaderMap, response::Response};
use cadre_text::ChatMessage;
use serde_json::{Value, json};

use super::{
    error_response,
    fields::{Delivery, Fields, excerpt, is_empty},
    logprobs, named, receive,
    respond::{Shape, reason, respond},
};
use crate::{
    error::{RequestError, RequestResult},
    generate::{Chunk, Completion},
    metrics::Api,
    model::ServedModel,
    request::{Input, Submission},
    service::Service,
};

pub(super) async fn handle(State(service): State<Service>, headers: HeaderMap, body: Body) -> Response {
    let (admitted, mut fields) = match receive(&service, Api::HttpChat, &headers, body).await {
        Ok(received) => received,
        Err(error) => return error_response(&error),
    };
    let read = admitted.tracked.note(read(&mut fields));
    match read {
        Err(error) => named(&admitted.request_id, error_response(&error)),
        Ok((submission, delivery)) => {
            let with_logprobs = submission.sampling.logprobs.is_some();
            let shape = Chat { model: Arc::clone(&service.model), with_logprobs };
            respond(&service, admitted, submission, delivery, shape).await
        }
    }
}

fn read(fields: &mut Fields) -> RequestResult<(Submission, Delivery)> {
    refuse_unsupported(fields)?;
    let delivery = fields.delivery()?;
    let mut submission = fields.submission()?;
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
    Ok((submission, delivery))
}

fn refuse_unsupported(fields: &mut Fields) -> RequestResult<()> {
    let word = |allowed: &'static [&'static str]| {
        move |value: &Value| value.as_str().is_some_and(|word| allowed.contains(&word))
    };
    fields.unsupported("tools", is_empty)?;
    fields.unsupported("tool_choice", word(&["none", "auto"]))?;
    fields.unsupported("functions", is_empty)?;
    fields.unsupported("function_call", word(&["none", "auto"]))?;
    fields.unsupported("audio", is_empty)?;
    fields.unsupported("prediction", is_empty)?;
    fields.unsupported("web_search_options", is_empty)?;
    fields.unsupported("modalities", |value| *value == json!(["text"]))?;
    match fields.value("response_format") {
        Some(format) if format["type"] != "text" => {
            let problem = format!("only {{\"type\": \"text\"}} is supported, found {}", excerpt(&format));
            Err(RequestError::invalid("response_format", problem))
        }
        _ => Ok(()),
    }
}

fn messages(value: Option<Value>) -> RequestResult<Vec<ChatMessage>> {
    let value = value.ok_or_else(|| RequestError::invalid("messages", "they are required"))?;
    let Value::Array(items) = value else {
        return Err(RequestError::invalid("messages", format!("expected a list, found {}", excerpt(&value))));
    };
    items.into_iter().enumerate().map(|(index, item)| message(index, item)).collect()
}

fn message(index: usize, item: Value) -> RequestResult<ChatMessage> {
    for field in ["tool_calls", "tool_call_id", "function_call", "audio"] {
        if item.get(field).is_some_and(|value| !is_empty(value)) {
            let problem = "tools are not supported by this server";
            return Err(RequestError::invalid(format!("messages[{index}].{field}"), problem));
        }
    }
    if item.get("role") == Some(&Value::from("tool")) {
        let problem = "tools are not supported by this server";
        return Err(RequestError::invalid(format!("messages[{index}].role"), problem));
    }
    serde_json::from_value(item)
        .map_err(|error| RequestError::invalid(format!("messages[{index}]"), error.to_string()))
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
        assert_eq!(
            read(json!([{"role": "user", "content": "a"}, {"content": "b"}])).unwrap_err(),
            "messages[1]"
        );
        let call = json!([{"role": "assistant", "content": null, "tool_calls": [{"id": "x"}]}]);
        assert_eq!(read(call).unwrap_err(), "messages[0].tool_calls");
        assert_eq!(read(json!([{"role": "tool", "content": "4"}])).unwrap_err(), "messages[0].role");
        assert_eq!(read(json!([{"role": "user", "content": "a", "tool_calls": []}])).unwrap().len(), 1);
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
