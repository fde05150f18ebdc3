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

/// The completions endpoint's `logprobs` object for some tokens, of which each begins at that character of
/// the text. `top_logprobs` holds the chosen token even if it is not among the best, as OpenAI's does.
pub(super) fn completions(
    tokenizer: &Tokenizer,
    tokens: &[v1::GeneratedToken],
    offsets: &[usize],
    with_top: bool,
) -> Value {
    let names: Vec<String> = tokens.iter().map(|token| name(tokenizer, token.token)).collect();
    let logprobs: Vec<f32> = tokens.iter().map(chosen).collect();
    let tops = tokens.iter().zip(&names).map(|(token, name_of_chosen)| {
        let mut top = Map::new();
        for likely in &token.top {
            // Of two tokens with one spelling the likelier is told.
            top.entry(name(tokenizer, likely.token)).or_insert_with(|| finite(likely.logprob).into());
        }
        if token.top.iter().all(|likely| likely.token != token.token) {
            top.insert(name_of_chosen.clone(), chosen(token).into());
        }
        Value::from(top)
    });
    let tops = if with_top { tops.collect() } else { Value::Null };
    json!({"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets})
}

fn chosen(token: &v1::GeneratedToken) -> f32 {
    finite(token.logprob.unwrap_or(IMPOSSIBLE))
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn the_chosen_token_is_always_among_the_top() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/pocket");
        let tokenizer = Tokenizer::load(std::path::Path::new(dir)).unwrap();
        let [a, b, c] = ["a", "b", "c"].map(|text| tokenizer.encode(text, false).unwrap()[0]);
        let likely = |token, logprob| v1::TokenLogprob { token, logprob };
        let token = |token| v1::GeneratedToken {
            position: 7,
            token,
            logprob: Some(-3.0),
            top: vec![likely(a, -0.5), likely(b, -3.0)],
        };
        let written = completions(&tokenizer, &[token(b), token(c)], &[0, 1], true);
        assert_eq!(
            written["top_logprobs"],
            json!([{"a": -0.5, "b": -3.0}, {"a": -0.5, "b": -3.0, "c": -3.0}])
        );
        assert_eq!(written["text_offset"], json!([0, 1]));
        assert_eq!(completions(&tokenizer, &[token(c)], &[0], false)["top_logprobs"], Value::Null);
    }
}
