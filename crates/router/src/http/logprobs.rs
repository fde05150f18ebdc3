//! Log-probabilities in the shapes of OpenAI's two endpoints.

use cadre_proto::v1;
use cadre_text::Tokenizer;
use serde_json::{Map, Value, json};

/// JSON has no infinity; OpenAI writes this for a token that cannot be.
const IMPOSSIBLE: f32 = -9999.0;

/// The chat endpoint's `logprobs` object for some tokens.
pub(super) fn chat(tokenizer: &Tokenizer, tokens: &[v1::GeneratedToken]) -> Value {
    let entry = |token: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(token).unwrap_or_default();
        let text = String::from_utf8_lossy(bytes);
        json!({"token": text, "logprob": finite(logprob), "bytes": bytes})
    };
    let content: Vec<Value> = tokens
        .iter()
        .map(|token| {
            let mut chosen = entry(token.token, token.logprob.unwrap_or(IMPOSSIBLE));
            let top: Vec<Value> = token.top.iter().map(|top| entry(top.token, top.logprob)).collect();
            chosen["top_logprobs"] = Value::from(top);
            chosen
        })
        .collect();
    json!({"content": content, "refusal": null})
}

/// The completions endpoint's `logprobs` object for some tokens. `offset` is the number of characters of
/// the tokens before; it moves on.
pub(super) fn completions(
    tokenizer: &Tokenizer,
    tokens: &[v1::GeneratedToken],
    with_top: bool,
    offset: &mut usize,
) -> Value {
    let mut names = Vec::with_capacity(tokens.len());
    let mut offsets = Vec::with_capacity(tokens.len());
    let mut logprobs = Vec::with_capacity(tokens.len());
    let mut tops = Vec::with_capacity(tokens.len());
    for token in tokens {
        offsets.push(*offset);
        *offset +=
            String::from_utf8_lossy(tokenizer.token_bytes(token.token).unwrap_or_default()).chars().count();
        names.push(name(tokenizer, token.token));
        logprobs.push(finite(token.logprob.unwrap_or(IMPOSSIBLE)));
        let top: Map<String, Value> = token
            .top
            .iter()
            .map(|top| (name(tokenizer, top.token), Value::from(finite(top.logprob))))
            .collect();
        tops.push(Value::from(top));
    }
    let tops = if with_top { Value::from(tops) } else { Value::Null };
    json!({"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets})
}

/// A token's text, or `bytes:\x..` where it is part of a character, as OpenAI writes it.
fn name(tokenizer: &Tokenizer, token: u32) -> String {
    let bytes = tokenizer.token_bytes(token).unwrap_or_default();
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold(String::from("bytes:"), |text, byte| format!("{text}\\x{byte:02x}")),
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { IMPOSSIBLE }
}
