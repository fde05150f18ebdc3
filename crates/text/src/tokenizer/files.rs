//! The small JSON files beside `tokenizer.json`, read field by field so that a mistake is named.

use std::{
    fs,
    path::{Path, PathBuf},
};

use cadre_types::TokenId;
use serde_json::{Map, Value};

use super::{SAME_CHECKPOINT, SpecialTokens};
use crate::error::{Finding, TextError};

pub(super) const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
const TEMPLATE_FILE: &str = "chat_template.jinja";
pub(super) const GENERATION_CONFIG_FILE: &str = "generation_config.json";
const CONFIG_FILE: &str = "config.json";
const CORRECT_IT: &str = "correct the field";

/// What `tokenizer_config.json` and `chat_template.jinja` say.
#[derive(Debug)]
pub(super) struct TokenizerConfig {
    pub(super) special: SpecialTokens,
    pub(super) add_bos_token: Option<bool>,
    pub(super) add_eos_token: Option<bool>,
    pub(super) templates: Option<Templates>,
    /// `added_tokens_decoder`: id, text, and whether it is special, as far as they are given.
    pub(super) added_tokens: Vec<(TokenId, String, Option<bool>)>,
    pub(super) warnings: Vec<Finding>,
}

/// Template sources and where they were found.
#[derive(Debug)]
pub(super) struct Templates {
    pub(super) path: PathBuf,
    pub(super) default: String,
    pub(super) tool_use: Option<String>,
}

impl TokenizerConfig {
    pub(super) fn load(dir: &Path) -> Result<Self, TextError> {
        let object = Object::load(dir.join(TOKENIZER_CONFIG_FILE))?;
        let mut warnings = Vec::new();
        if object.boolean("clean_up_tokenization_spaces")? == Some(true) {
            warnings.push(Finding {
                file: object.path.clone(),
                subject: "clean_up_tokenization_spaces".to_owned(),
                expected: "false".to_owned(),
                found: "true, which would rewrite text already streamed".to_owned(),
                fix: "spaces are not cleaned up here, so text may differ in them; set it to false".to_owned(),
            });
        }
        let special = SpecialTokens {
            bos_token: object.token("bos_token")?,
            eos_token: object.token("eos_token")?,
            pad_token: object.token("pad_token")?,
            unk_token: object.token("unk_token")?,
        };
        Ok(Self {
            special,
            add_bos_token: object.boolean("add_bos_token")?,
            add_eos_token: object.boolean("add_eos_token")?,
            templates: templates(dir, &object)?,
            added_tokens: added_tokens(&object)?,
            warnings,
        })
    }
}

/// `added_tokens_decoder`, an object from ids to objects.
fn added_tokens(object: &Object) -> Result<Vec<(TokenId, String, Option<bool>)>, TextError> {
    const FIELD: &str = "added_tokens_decoder";
    let entries = match object.fields.get(FIELD) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(object.expected(FIELD, "an object", other)),
    };
    let read = |(id, token): (&String, &Value)| {
        let content = token.get("content").and_then(Value::as_str);
        let (Ok(id), Some(content)) = (id.parse(), content) else {
            return Err(object.expected(FIELD, "an object from ids to objects with `content`", token));
        };
        Ok((id, content.to_owned(), token.get("special").and_then(Value::as_bool)))
    };
    entries.iter().map(read).collect()
}

/// A separate file wins over the field, as in Hugging Face.
fn templates(dir: &Path, object: &Object) -> Result<Option<Templates>, TextError> {
    let path = dir.join(TEMPLATE_FILE);
    if path.exists() {
        let bytes = read(&path, "make it readable or remove it")?;
        let default = String::from_utf8(bytes).map_err(|error| TextError::Invalid {
            path: path.clone(),
            reason: error.to_string(),
            fix: SAME_CHECKPOINT,
        })?;
        return Ok(Some(Templates { path, default, tool_use: None }));
    }
    let path = object.path.clone();
    match object.fields.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(Templates { path, default: source.clone(), tool_use: None })),
        Some(Value::Array(list)) => named_templates(object, list).map(Some),
        Some(other) => Err(object.expected("chat_template", "a string or a list", other)),
    }
}

fn named_templates(object: &Object, list: &[Value]) -> Result<Templates, TextError> {
    let mut default = None;
    let mut tool_use = None;
    for (index, entry) in list.iter().enumerate() {
        let text = |field| entry.get(field).and_then(Value::as_str);
        let (Some(name), Some(source)) = (text("name"), text("template")) else {
            let reason = format!("chat_template[{index}] needs the strings `name` and `template`");
            return Err(object.invalid(reason, CORRECT_IT));
        };
        match name {
            "default" => default = Some(source.to_owned()),
            "tool_use" => tool_use = Some(source.to_owned()),
            // Others (`rag`) are chosen by name in Hugging Face; no request of ours names one.
            _ => {}
        }
    }
    let default = default
        .ok_or_else(|| object.invalid("chat_template has no entry named `default`".to_owned(), CORRECT_IT))?;
    Ok(Templates { path: object.path.clone(), default, tool_use })
}

/// End-of-sequence ids: `generation_config.json` if it names any, else `config.json`, else the
/// `eos_token` of the tokenizer. Ascending, without repeats; and the file that names them.
pub(super) fn eos_ids(dir: &Path, tokenizer: Option<TokenId>) -> Result<(Vec<TokenId>, PathBuf), TextError> {
    for file in [GENERATION_CONFIG_FILE, CONFIG_FILE] {
        let path = dir.join(file);
        if !path.exists() {
            continue;
        }
        if let Some(mut ids) = Object::load(path.clone())?.ids("eos_token_id")? {
            ids.sort_unstable();
            ids.dedup();
            return Ok((ids, path));
        }
    }
    tokenizer.map(|id| (vec![id], dir.join(TOKENIZER_CONFIG_FILE))).ok_or_else(|| TextError::Invalid {
        path: dir.join(CONFIG_FILE),
        reason: "eos_token_id is missing here and in generation_config.json, and \
                 tokenizer_config.json has no eos_token"
            .to_owned(),
        fix: "add eos_token_id: without it no sequence would end by itself",
    })
}

pub(super) fn read(path: &Path, fix: &'static str) -> Result<Vec<u8>, TextError> {
    fs::read(path).map_err(|source| TextError::Read { path: path.to_owned(), fix, source })
}

/// A JSON object that remembers its file.
struct Object {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Object {
    fn load(path: PathBuf) -> Result<Self, TextError> {
        let bytes = read(&path, SAME_CHECKPOINT)?;
        match serde_json::from_slice(&bytes) {
            Ok(fields) => Ok(Self { path, fields }),
            Err(error) => Err(TextError::Invalid {
                path,
                reason: format!("no JSON object: {error}"),
                fix: SAME_CHECKPOINT,
            }),
        }
    }

    fn invalid(&self, reason: String, fix: &'static str) -> TextError {
        TextError::Invalid { path: self.path.clone(), reason, fix }
    }

    fn expected(&self, field: &str, what: &str, found: &Value) -> TextError {
        let found: String = found.to_string().chars().take(80).collect();
        self.invalid(format!("{field} must be {what}, found {found}"), CORRECT_IT)
    }

    fn boolean(&self, field: &str) -> Result<Option<bool>, TextError> {
        match self.fields.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(self.expected(field, "true or false", other)),
        }
    }

    /// A special token: its text, or an `AddedToken` object with the text in `content`.
    fn token(&self, field: &str) -> Result<Option<String>, TextError> {
        let found = match self.fields.get(field) {
            None | Some(Value::Null) => return Ok(None),
            Some(found) => found,
        };
        found
            .as_str()
            .or_else(|| found.get("content").and_then(Value::as_str))
            .map(|text| Some(text.to_owned()))
            .ok_or_else(|| self.expected(field, "a string or an object with `content`", found))
    }

    /// One id or a list of them; an empty list names none.
    fn ids(&self, field: &str) -> Result<Option<Vec<TokenId>>, TextError> {
        let found = match self.fields.get(field) {
            None | Some(Value::Null) => return Ok(None),
            Some(found) => found,
        };
        let id = |value: &Value| value.as_u64().and_then(|id| TokenId::try_from(id).ok());
        let ids = match found {
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<_>>>(),
            one => id(one).map(|id| vec![id]),
        };
        match ids {
            Some(ids) if ids.is_empty() => Ok(None),
            Some(ids) => Ok(Some(ids)),
            None => Err(self.expected(field, "a token id or a list of them", found)),
        }
    }
}
