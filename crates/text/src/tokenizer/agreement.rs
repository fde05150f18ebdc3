//! Whether the files of a checkpoint agree: `config.json`, `generation_config.json`, `tokenizer.json`,
//! `tokenizer_config.json` and the chat template. Each of them alone may be in order and the model still
//! never end a text, or refuse a prompt in a worker's words.

use std::{collections::BTreeSet, path::Path};

use cadre_types::{ModelConfig, TokenId};

use super::{TOKENIZER_FILE, Tokenizer, files};
use crate::{
    chat_template::ChatMessage,
    error::{Finding, TextError},
};

/// Longest quotation of a checkpoint's own text.
const MAX_QUOTED_CHARS: usize = 80;

/// What the text side of a checkpoint is, and what is wrong with it.
#[derive(Debug, Default)]
pub struct Survey {
    /// The tokenizer, if it can be loaded.
    pub tokenizer: Option<Tokenizer>,
    /// What prevents use.
    pub problems: Vec<Finding>,
    /// What does not.
    pub warnings: Vec<Finding>,
}

/// Reads the text files of a checkpoint and holds them against the model that `config.json` describes.
pub fn survey(dir: &Path, config: &ModelConfig) -> Survey {
    match Tokenizer::load(dir) {
        Ok(tokenizer) => {
            let (problems, mut warnings) = tokenizer.against(dir, config);
            warnings.splice(..0, tokenizer.warnings().iter().cloned());
            Survey { tokenizer: Some(tokenizer), problems, warnings }
        }
        Err(_) if has_no_text(dir) => Survey { warnings: vec![no_text(dir)], ..Survey::default() },
        Err(error) => Survey { problems: of_error(dir, error), ..Survey::default() },
    }
}

/// Weights alone, as `cadre synth` writes them: enough for every process but a router.
fn has_no_text(dir: &Path) -> bool {
    let files = [TOKENIZER_FILE, super::TIKTOKEN_FILE, files::TOKENIZER_CONFIG_FILE];
    files.iter().all(|file| !dir.join(file).exists())
}

fn no_text(dir: &Path) -> Finding {
    Finding {
        file: dir.join(TOKENIZER_FILE),
        subject: "tokenizer".to_owned(),
        expected: "tokenizer.json and tokenizer_config.json".to_owned(),
        found: "neither".to_owned(),
        fix: "a router needs both; copy them from the checkpoint that the weights came from".to_owned(),
    }
}

fn of_error(dir: &Path, error: TextError) -> Vec<Finding> {
    let one = |file: &Path, expected: &str, found: String, fix: String| {
        let (subject, expected) = ("text".to_owned(), expected.to_owned());
        vec![Finding { file: file.to_owned(), subject, expected, found, fix }]
    };
    match error {
        TextError::Read { path, fix, source } => {
            one(&path, "a file that can be read", source.to_string(), fix.to_owned())
        }
        TextError::Invalid { path, reason, fix } => one(&path, "a file in order", reason, fix.to_owned()),
        TextError::Contradictions { findings, .. } => findings,
        other => one(dir, "a tokenizer that loads", other.to_string(), super::SAME_CHECKPOINT.to_owned()),
    }
}

impl Tokenizer {
    /// Loads and refuses files that contradict the model's configuration.
    pub fn load_for(dir: &Path, config: &ModelConfig) -> Result<Self, TextError> {
        let mut tokenizer = Self::load(dir)?;
        let (findings, warnings) = tokenizer.against(dir, config);
        tokenizer.warnings.extend(warnings);
        match findings.is_empty() {
            true => Ok(tokenizer),
            false => Err(TextError::Contradictions { dir: dir.to_owned(), findings }),
        }
    }

    /// Problems and warnings of these files beside a model.
    fn against(&self, dir: &Path, config: &ModelConfig) -> (Vec<Finding>, Vec<Finding>) {
        let (mut problems, mut warnings) = (Vec::new(), Vec::new());
        let vocab_size = config.vocab_size;
        let finding = |file: &Path, subject: &str, expected: String, found: String, fix: &str| Finding {
            file: file.to_owned(),
            subject: subject.to_owned(),
            expected,
            found,
            fix: fix.to_owned(),
        };
        for &id in &self.eos_ids {
            let file = &self.eos_file;
            if id as usize >= vocab_size {
                let expected = format!("token ids below config.json's vocab_size = {vocab_size}");
                let fix = "no answer would ever end: correct the id";
                problems.push(finding(file, "eos_token_id", expected, id.to_string(), fix));
            } else if self.token_bytes(id).is_none() {
                let expected = format!("a token that {TOKENIZER_FILE} has");
                let fix = "no answer would ever end: correct the id, or fetch both files from one checkpoint";
                problems.push(finding(file, "eos_token_id", expected, id.to_string(), fix));
            } else if !self.is_special(id) {
                let found = format!("{id}, which is the ordinary text {:?}", self.text_of(id));
                let fix = "answers end where they say this; correct the id if that is not meant";
                warnings.push(finding(file, "eos_token_id", "a special token".to_owned(), found, fix));
            }
        }
        let path = dir.join(TOKENIZER_FILE);
        let beyond = (vocab_size..self.vocab_size()).map(|id| id as TokenId);
        let beyond: Vec<TokenId> = beyond.filter(|&id| self.token_bytes(id).is_some()).collect();
        if let Some(&first) = beyond.first() {
            let found = format!("{} beyond it, the first is {first} {:?}", beyond.len(), self.text_of(first));
            let expected = format!("tokens below config.json's vocab_size = {vocab_size}");
            let fix = "the model has no embedding for it: fetch both files from one checkpoint, or enlarge \
                       the embedding when tokens are added";
            problems.push(finding(&path, "vocabulary", expected, found, fix));
        }
        if let Some(bos) = self.bos.filter(|&bos| bos != config.bos_token_id) {
            let expected = format!("config.json's bos_token_id = {}", config.bos_token_id);
            let found = format!("bos_token {bos} {:?}", self.text_of(bos));
            let fix = "prompts begin with the tokenizer's";
            warnings.push(finding(
                &dir.join(files::TOKENIZER_CONFIG_FILE),
                "bos_token",
                expected,
                found,
                fix,
            ));
        }
        (problems, warnings)
    }

    /// `tokenizer_config.json` repeats the added tokens; Hugging Face would go by it.
    pub(super) fn check_added_tokens(
        &mut self,
        dir: &Path,
        added: &[(TokenId, String, Option<bool>)],
    ) -> Result<(), TextError> {
        let file = dir.join(files::TOKENIZER_CONFIG_FILE);
        let mut findings = Vec::new();
        for (id, content, special) in added {
            let known = self.token_bytes(*id);
            let finding = |expected: String, found: String, fix: &str| Finding {
                file: file.clone(),
                subject: format!("added_tokens_decoder.{id}"),
                expected,
                found,
                fix: fix.to_owned(),
            };
            let found = quote(content);
            if known != Some(content.as_bytes()) {
                let expected = match known {
                    Some(_) => format!("{:?}, as {TOKENIZER_FILE} has it", self.text_of(*id)),
                    None => format!("an id that {TOKENIZER_FILE} has"),
                };
                findings.push(finding(expected, format!("{found:?}"), super::SAME_CHECKPOINT));
            } else if let Some(special) = special.filter(|&special| special != self.is_special(*id)) {
                let expected = format!("special: {}, as {TOKENIZER_FILE} has it", self.is_special(*id));
                let fix = "it is shown or hidden as tokenizer.json says";
                self.warnings.push(finding(expected, format!("special: {special} for {found:?}"), fix));
            }
        }
        match findings.is_empty() {
            true => Ok(()),
            false => Err(TextError::Contradictions { dir: dir.to_owned(), findings }),
        }
    }

    /// A template of another family writes marks that this tokenizer takes for ordinary text.
    pub(super) fn check_template_tokens(&mut self) {
        let Ok(template) = &self.template else { return };
        let messages = [ChatMessage::text("user", "Hello")];
        let Ok(text) = template.render(&messages, None, true, &serde_json::Map::new()) else { return };
        let unknown: BTreeSet<String> =
            marks(&text).filter(|mark| self.bpe.token_to_id(mark).is_none()).map(quote).collect();
        for mark in unknown {
            self.warnings.push(Finding {
                file: self.eos_file.with_file_name(TOKENIZER_FILE),
                subject: "chat template".to_owned(),
                expected: "marks that are tokens of this tokenizer".to_owned(),
                found: format!("{mark:?}, which is encoded as ordinary text"),
                fix: "fetch the template and the tokenizer from one checkpoint".to_owned(),
            });
        }
    }

    fn text_of(&self, id: TokenId) -> String {
        quote(&String::from_utf8_lossy(self.token_bytes(id).unwrap_or_default()))
    }
}

/// What looks like a special token: `<|…|>` and `<｜…｜>`, without blanks.
fn marks(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices('<').filter_map(|(start, _)| {
        let rest = &text[start..];
        let bar = rest.chars().nth(1).filter(|bar| matches!(bar, '|' | '｜'))?;
        let end = rest.find('>')?;
        let mark = &rest[..=end];
        let whole = mark[..end].ends_with(bar) && mark.chars().count() > 4;
        (whole && !mark.contains(char::is_whitespace)).then_some(mark)
    })
}

fn quote(text: &str) -> String {
    text.chars().take(MAX_QUOTED_CHARS).collect()
}
