//! The messages of a conversation, as OpenAI-compatible clients write them.

use minijinja::{Value, value::Serde};
use serde::{Deserialize, Serialize};
use serde_json::Map;

use super::TemplateError;

/// One message. Fields beyond role and content (`name`, `tool_calls`, `tool_call_id`,
/// `reasoning_content`) reach the template as they came, but for null and empty lists, which it does not see.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `developer` (rendered as `system`, whose newer name it is), `user`, `assistant` or
    /// `tool`.
    pub role: String,
    /// The text. `None` is null or absent (an assistant that only calls tools); templates see none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, serde_json::Value>,
}

/// Text, whole or in parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// The text.
    Text(String),
    /// Parts, joined without separator. Only text parts are accepted.
    Parts(Vec<ContentPart>),
}

/// One part of a content list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentPart {
    /// `text`; anything else is refused by name when the conversation is rendered.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text of a text part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

impl ChatMessage {
    /// A message with plain text.
    pub fn text(role: impl Into<String>, text: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(Content::Text(text.into())), extra: Map::new() }
    }
}

/// The messages as templates see them, checked; at most `limit` bytes of content in all.
pub(super) fn to_values(messages: &[ChatMessage], limit: usize) -> Result<Vec<Value>, TemplateError> {
    let mut total = 0_usize;
    let mut values = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        let role = role(index, &message.role)?;
        let content = match &message.content {
            None => Value::from(()),
            Some(Content::Text(text)) => Value::from(text.as_str()),
            Some(Content::Parts(parts)) => Value::from(join(index, parts)?),
        };
        total += content.as_str().map_or(0, str::len);
        if total > limit {
            return Err(TemplateError::TooLong { limit });
        }
        let own = [("role", Value::from(role)), ("content", content)];
        let extra = message
            .extra
            .iter()
            .filter(|(name, _)| !matches!(name.as_str(), "role" | "content"))
            .filter_map(|(name, value)| Some((name.as_str(), present(value)?)));
        values.push(Value::from_pairs(own.into_iter().chain(extra)));
    }
    Ok(values)
}

/// A value of the request as templates see it, and nothing for null and the empty list, at every depth:
/// clients write them for what is not there (`"tool_calls": null`), and templates ask with `is defined` or
/// `in` whether it is. Arguments of a tool call are the caller's data and stay as they are.
pub(super) fn present(value: &serde_json::Value) -> Option<Value> {
    use serde_json::Value as Json;
    match value {
        Json::Null => None,
        Json::Array(items) if items.is_empty() => None,
        Json::Array(items) => {
            // Places in a list mean something.
            let items = items.iter().map(|item| present(item).unwrap_or(Value::from(())));
            Some(items.collect())
        }
        Json::Object(fields) => {
            let fields = fields.iter().filter_map(|(name, value)| {
                let value = match name.as_str() {
                    "arguments" | "parameters" => Some(Value::from(Serde(value))),
                    _ => present(value),
                };
                Some((name.as_str(), value?))
            });
            Some(Value::from_pairs(fields))
        }
        plain => Some(Value::from(Serde(plain))),
    }
}

fn role(index: usize, role: &str) -> Result<&str, TemplateError> {
    match role {
        "system" | "user" | "assistant" | "tool" => Ok(role),
        "developer" => Ok("system"),
        other => Err(TemplateError::Role { index, role: other.chars().take(80).collect() }),
    }
}

fn join(index: usize, parts: &[ContentPart]) -> Result<String, TemplateError> {
    let mut text = String::new();
    for (part, ContentPart { kind, text: piece }) in parts.iter().enumerate() {
        if kind != "text" {
            let kind = kind.chars().take(80).collect();
            return Err(TemplateError::Part { index, part, kind });
        }
        text.push_str(piece.as_deref().ok_or(TemplateError::PartText { index, part })?);
    }
    Ok(text)
}
