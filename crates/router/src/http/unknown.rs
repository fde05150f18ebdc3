//! Fields that this server does not know.
//!
//! Servers that refuse them all break clients that send what only their own backends read, and such clients are many;
//! servers that drop them all answer a misspelled `temprature` with another text and no word. So: a name that is
//! nearly one that would change the answer is refused with that name; what is known to change nothing passes; the rest
//! is ignored, counted (`cadre_router_ignored_fields_total`), and each name is logged once.

use std::{collections::BTreeSet, sync::Mutex};

use super::unsupported;

/// Fields that are taken on one of the endpoints at least.
const TAKEN: &[&str] = &[
    "model",
    "messages",
    "prompt",
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "max_tokens",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "chat_template_kwargs",
];

/// Fields of other servers that change nothing of an answer: who asks, what for, and how it is scheduled or kept.
pub(super) const WITHOUT_EFFECT: &[&str] = &[
    "user",
    "safety_identifier",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "priority",
    "request_id",
    "rid",
    "cache_salt",
    "kv_transfer_params",
    "session_id",
    "include_reasoning",
    "separate_reasoning",
    "stream_reasoning",
];

/// Names that are remembered as logged; a client that makes up names is logged so often.
const MOST_LOGGED: usize = 256;

/// Longest name that is logged.
const MOST_CHARACTERS: usize = 64;

/// What to say of a field that was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unknown {
    /// It changes nothing.
    Harmless,
    /// It is nearly this one.
    Misspelled(&'static str),
    /// Nobody here knows.
    Ignored,
}

pub(super) fn judge(name: &str) -> Unknown {
    // Known on the other endpoint: taken there, refused there if it asks for something.
    if WITHOUT_EFFECT.contains(&name) {
        return Unknown::Harmless;
    }
    if TAKEN.contains(&name) || unsupported::names().any(|known| known == name) {
        return Unknown::Ignored;
    }
    let plain = |name: &str| -> Vec<u8> {
        name.bytes().filter(u8::is_ascii_alphanumeric).map(|byte| byte.to_ascii_lowercase()).collect()
    };
    let ours = plain(name);
    let near = |known: &&str| {
        let theirs = plain(known);
        // Of short names more than one letter is another word.
        let most = if theirs.len() < 6 { usize::from(theirs.len() >= 4) } else { 2 };
        ours.len().abs_diff(theirs.len()) <= most && distance(&ours, &theirs) <= most
    };
    let known = TAKEN.iter().copied().chain(unsupported::names());
    match known.filter(|known| near(known)).min_by_key(|known| distance(&ours, &plain(known))) {
        Some(known) => Unknown::Misspelled(known),
        None => Unknown::Ignored,
    }
}

/// Letters to insert, remove or change.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, right) in b.iter().enumerate() {
            let changed = diagonal + usize::from(left != right);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

/// Whether a name has not been logged yet.
pub(super) fn is_news(name: &str) -> bool {
    static LOGGED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let name: String = name.chars().take(MOST_CHARACTERS).collect();
    let mut logged = LOGGED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    logged.len() < MOST_LOGGED && logged.insert(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelled_field_is_told_from_one_of_another_server() {
        for (name, meant) in [
            ("temprature", "temperature"),
            ("Temperature", "temperature"),
            ("topP", "top_p"),
            ("maxTokens", "max_tokens"),
            ("max_token", "max_tokens"),
            ("max_output_tokens", ""),
            ("frequencyPenalty", "frequency_penalty"),
            ("stop_sequences", ""),
            ("stops", "stop"),
            ("sead", "seed"),
            ("response_fromat", "response_format"),
            ("logit_biases", "logit_bias"),
        ] {
            let expected = if meant.is_empty() { Unknown::Ignored } else { Unknown::Misspelled(meant) };
            assert_eq!(judge(name), expected, "{name}");
        }
        // What clients are known to send, and what they may make up.
        for name in WITHOUT_EFFECT {
            assert_eq!(judge(name), Unknown::Harmless, "{name}");
        }
        for name in ["port", "url", "id", "api_base", "nvext", "mirostat", "tags", "trace_id", "suffix", "x"]
        {
            assert_eq!(judge(name), Unknown::Ignored, "{name}");
        }
    }

    #[test]
    fn the_documentation_has_the_fields_without_effect() {
        let page = include_str!("../../../../docs/http-api.md");
        let quoted: Vec<String> = WITHOUT_EFFECT.iter().map(|name| format!("`{name}`")).collect();
        let line = quoted.join(", ");
        assert!(page.contains(&line), "docs/http-api.md lacks: {line}");
    }

    #[test]
    fn a_name_is_logged_once() {
        assert!(is_news("a test's own name"));
        assert!(!is_news("a test's own name"));
    }
}
