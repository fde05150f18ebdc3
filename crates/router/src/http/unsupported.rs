//! The one table of fields that would change the answer and that this server does not build. Such a field is
//! refused by its name, unless its value asks for what is done anyway. docs/http-api.md shows the same table;
//! a test compares them.

use serde_json::Value;

use super::fields::{Fields, excerpt};
use crate::{
    error::{RequestError, RequestResult},
    request::asks_nothing,
};

/// Which endpoint a request came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    Completions,
    Chat,
}

/// On which endpoints a field is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    Both,
    Completions,
    Chat,
}

/// A value that asks for what is done anyway. `null` always does.
#[derive(Clone, Copy, Debug)]
enum Accepted {
    /// Only `null`.
    Null,
    /// false, "", [], {}.
    Nothing,
    /// false, "", [], {} and this word.
    Words(&'static [&'static str]),
    True,
    Number(f64),
    /// The number of answers.
    SameAsN,
    /// `{"type": "text"}`.
    TextFormat,
    /// `["text"]`.
    TextModality,
}

struct Unsupported {
    name: &'static str,
    on: On,
    accepted: Accepted,
}

const fn row(name: &'static str, on: On, accepted: Accepted) -> Unsupported {
    Unsupported { name, on, accepted }
}

use Accepted::{Nothing, Null, Number, SameAsN, TextFormat, TextModality, True, Words};
use On::{Both, Chat, Completions};

/// By what they would change. Names are those of OpenAI, vLLM, SGLang and TGI.
const TABLE: &[Unsupported] = &[
    // How many answers, and which of them.
    row("best_of", Both, SameAsN),
    row("use_beam_search", Both, Nothing),
    row("length_penalty", Both, Number(1.0)),
    row("early_stopping", Both, Nothing),
    // The prompt.
    row("suffix", Completions, Nothing),
    row("echo", Both, Nothing),
    row("add_generation_prompt", Both, True),
    row("continue_final_message", Both, Nothing),
    row("add_special_tokens", Completions, True),
    row("add_special_tokens", Chat, Nothing),
    row("truncate_prompt_tokens", Both, Null),
    row("truncate", Both, Nothing),
    row("chat_template", Both, Null),
    row("documents", Both, Nothing),
    row("reasoning_effort", Both, Null),
    row("verbosity", Both, Words(&["medium"])),
    row("prompt_embeds", Both, Null),
    row("mm_processor_kwargs", Both, Nothing),
    row("lora_path", Both, Null),
    // Which tokens may come.
    row("logit_bias", Both, Nothing),
    row("bad_words", Both, Nothing),
    row("allowed_token_ids", Both, Nothing),
    row("logits_processors", Both, Nothing),
    row("custom_logit_processor", Both, Null),
    row("typical_p", Both, Number(1.0)),
    row("top_a", Both, Number(0.0)),
    row("xtc_probability", Both, Number(0.0)),
    row("dry_multiplier", Both, Number(0.0)),
    row("no_repeat_ngram_size", Both, Number(0.0)),
    row("response_format", Both, TextFormat),
    row("structured_outputs", Both, Nothing),
    row("guided_json", Both, Null),
    row("guided_regex", Both, Null),
    row("guided_choice", Both, Null),
    row("guided_grammar", Both, Null),
    row("json_schema", Both, Null),
    row("regex", Both, Null),
    row("ebnf", Both, Null),
    row("structural_tag", Both, Null),
    // How the answer is told.
    row("skip_special_tokens", Both, True),
    row("spaces_between_special_tokens", Both, True),
    row("include_stop_str_in_output", Both, Nothing),
    row("no_stop_trim", Both, Nothing),
    row("stop_regex", Both, Nothing),
    row("prompt_logprobs", Both, Null),
    row("logprob_token_ids", Both, Nothing),
    row("return_tokens_as_token_ids", Both, Nothing),
    row("return_token_ids", Both, Nothing),
    row("return_hidden_states", Both, Nothing),
    row("details", Both, Nothing),
    row("decoder_input_details", Both, Nothing),
    // Tools and other media.
    row("tools", Both, Nothing),
    row("tool_choice", Both, Words(&["none", "auto"])),
    row("functions", Both, Nothing),
    row("function_call", Both, Words(&["none", "auto"])),
    row("audio", Both, Nothing),
    row("prediction", Both, Nothing),
    row("web_search_options", Both, Nothing),
    row("modalities", Both, TextModality),
];

impl Accepted {
    fn allows(self, value: &Value, n: u32) -> bool {
        let is_word = |words: &[&str]| value.as_str().is_some_and(|word| words.contains(&word));
        match self {
            Null => false,
            Nothing => asks_nothing(value),
            Words(words) => asks_nothing(value) || is_word(words),
            True => *value == Value::Bool(true),
            Number(number) => value.as_f64() == Some(number),
            SameAsN => value.as_u64() == Some(u64::from(n)),
            TextFormat => value.get("type").and_then(Value::as_str) == Some("text"),
            TextModality => {
                value.as_array().is_some_and(|words| matches!(words.as_slice(), [word] if word == "text"))
            }
        }
    }

    /// The value to send instead, in words.
    fn instead(self) -> String {
        match self {
            Null => "leave it out".into(),
            Nothing => "leave it out or empty".into(),
            Words(words) => format!("leave it out or use {}", words.join(" or ")),
            True => "leave it out or use true".into(),
            Number(number) => format!("leave it out or use {number}"),
            SameAsN => "leave it out or use the value of n".into(),
            TextFormat => r#"leave it out or use {"type": "text"}"#.into(),
            TextModality => r#"leave it out or use ["text"]"#.into(),
        }
    }
}

/// The table's fields, some of them twice.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    TABLE.iter().map(|row| row.name)
}

/// Refuses every field of the table whose value asks for something.
pub(super) fn refuse(fields: &mut Fields, endpoint: Endpoint, n: u32) -> RequestResult<()> {
    for Unsupported { name, on, accepted } in TABLE {
        let here = matches!(
            (on, endpoint),
            (On::Both, _) | (On::Completions, Endpoint::Completions) | (On::Chat, Endpoint::Chat)
        );
        if !here {
            continue;
        }
        if let Some(value) = fields.value(name)
            && !accepted.allows(&value, n)
        {
            let problem =
                format!("{} is not supported by this server; {}", excerpt(&value), accepted.instead());
            return Err(RequestError::invalid(*name, problem));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use serde_json::json;

    use super::*;

    fn refused(endpoint: Endpoint, name: &str, value: Value, n: u32) -> Option<String> {
        let body = json!({ name: value }).to_string();
        let error = refuse(&mut Fields::parse(body.as_bytes()).unwrap(), endpoint, n).err()?;
        match error {
            RequestError::Invalid { field, problem } => {
                assert_eq!(field, name, "{problem}");
                Some(problem)
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn what_changes_the_answer_is_refused_by_name_with_its_value() {
        for (name, value) in [
            ("add_generation_prompt", json!(false)),
            ("bad_words", json!(["x"])),
            ("allowed_token_ids", json!([1])),
            ("skip_special_tokens", json!(false)),
            ("include_stop_str_in_output", json!(true)),
            ("truncate_prompt_tokens", json!(5)),
            ("prompt_logprobs", json!(0)),
            ("echo", json!(true)),
            ("best_of", json!(3)),
            ("logit_bias", json!({"1": 2})),
            ("response_format", json!({"type": "json_object"})),
            ("tool_choice", json!("required")),
            ("guided_choice", json!(["a"])),
        ] {
            for endpoint in [Endpoint::Completions, Endpoint::Chat] {
                let problem = refused(endpoint, name, value.clone(), 1).unwrap_or_else(|| panic!("{name}"));
                assert!(problem.contains(&value.to_string()), "{problem}");
            }
        }
        assert!(refused(Endpoint::Completions, "add_special_tokens", json!(false), 1).is_some());
        assert!(refused(Endpoint::Chat, "add_special_tokens", json!(true), 1).is_some());
    }

    #[test]
    fn what_asks_for_what_is_done_anyway_passes() {
        for (name, value) in [
            ("add_generation_prompt", json!(true)),
            ("skip_special_tokens", json!(true)),
            ("echo", json!(false)),
            ("best_of", json!(2)),
            ("length_penalty", json!(1)),
            ("modalities", json!(["text"])),
            ("response_format", json!({"type": "text"})),
            ("tools", json!([])),
            ("tool_choice", json!("auto")),
            ("prompt_logprobs", Value::Null),
            ("anything_else", json!({"a": 1})),
        ] {
            assert_eq!(refused(Endpoint::Chat, name, value, 2), None, "{name}");
        }
    }

    /// The table as docs/http-api.md has it.
    fn documented() -> String {
        let mut table = String::from("| field | refused on | accepted beside null |\n| --- | --- | --- |\n");
        for Unsupported { name, on, accepted } in TABLE {
            let on = match on {
                Both => "both",
                Completions => "completions",
                Chat => "chat",
            };
            let accepted = match accepted {
                Null => "nothing".to_owned(),
                Nothing => "`false`, `\"\"`, `[]`, `{}`".to_owned(),
                Words(words) => {
                    let quoted: Vec<String> = words.iter().map(|word| format!("`\"{word}\"`")).collect();
                    format!("an empty value, {}", quoted.join(", "))
                }
                True => "`true`".to_owned(),
                Number(number) => format!("`{number}`"),
                SameAsN => "the value of `n`".to_owned(),
                TextFormat => "`{\"type\": \"text\"}`".to_owned(),
                TextModality => "`[\"text\"]`".to_owned(),
            };
            table.push_str(&format!("| `{name}` | {on} | {accepted} |\n"));
        }
        table
    }

    #[test]
    fn the_documentation_has_this_table() {
        let page = include_str!("../../../../docs/http-api.md");
        let table = documented();
        assert!(page.contains(&table), "docs/http-api.md lacks this table:\n{table}");
    }
}
