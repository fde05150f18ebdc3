//! The checkpoint's tokenizer: text to ids and back.
//!
//! Loaded once, strictly: what this crate could not reproduce faithfully (a decoder that is not
//! byte-level, cleaned-up spaces) is refused by name. Truncation and padding that a `tokenizer.json`
//! may carry are switched off, because they would change prompts silently.
//!
//! Beginning of sequence: `encode(text, true)` puts BOS in front if `add_bos_token` says so and the
//! text does not begin with BOS already; there are never two. A rendered chat template brings its own
//! BOS and is encoded with `false`, as Hugging Face does.

mod agreement;
mod files;
mod pieces;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use cadre_types::{SamplingParams, TokenId};
use tokenizers::{DecoderWrapper, ModelWrapper, Tokenizer as Bpe};

use crate::{
    chat_template::{ChatTemplate, TemplateError},
    detokenizer::Detokenizer,
    error::{Finding, TextError},
    generation_config,
    vocabulary::Vocabulary,
};
pub use agreement::{Survey, survey};
use files::{Templates, TokenizerConfig};
use pieces::{LONGEST_BYTES, Pieces};

const TOKENIZER_FILE: &str = "tokenizer.json";
const TIKTOKEN_FILE: &str = "tiktoken.model";
const CONVERT: &str = "this checkpoint's tokenizer is tiktoken.model with Python code, which cadre does not \
     run: convert it to a tokenizer.json once (docs/checkpoint.md says how) and put that beside it";
/// Why some texts have a limit of their own.
const WHOLE: &str = "this tokenizer normalises, strips or looks behind, so a text is encoded whole";
const SAME_CHECKPOINT: &str = "copy it unchanged from the checkpoint that the weights came from";

/// A tokenizer with its special tokens and chat template. Immutable, `Send + Sync`; share it in an
/// `Arc`.
#[derive(Debug)]
pub struct Tokenizer {
    bpe: Bpe,
    vocabulary: Arc<Vocabulary>,
    pieces: Option<Pieces>,
    special: SpecialTokens,
    bos: Option<TokenId>,
    eos: Option<TokenId>,
    add_bos: bool,
    add_eos: bool,
    eos_ids: Vec<TokenId>,
    /// The file that names them.
    eos_file: PathBuf,
    template: Result<ChatTemplate, TemplateError>,
    defaults: SamplingParams,
    warnings: Vec<Finding>,
}

/// Why a text has no ids.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// It has more than were asked for.
    #[error("the text has at least {tokens} tokens")]
    TooLong {
        /// Tokens counted so far.
        tokens: usize,
    },
    /// Whoever asked wants them no more.
    #[error("encoding was stopped")]
    Stopped,
    /// The tokenizer refused it.
    #[error(transparent)]
    Text(#[from] TextError),
}

/// The texts of the special tokens that `tokenizer_config.json` names, as templates see them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Beginning of sequence.
    pub bos_token: Option<String>,
    /// End of sequence.
    pub eos_token: Option<String>,
    /// Padding.
    pub pad_token: Option<String>,
    /// Unknown text; byte-level vocabularies have none.
    pub unk_token: Option<String>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` or `config.json`
    /// (end-of-sequence ids) and `chat_template.jinja` (if there is one) from a checkpoint's folder.
    pub fn load(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join(TOKENIZER_FILE);
        let bpe = load_bpe(&path)?;
        let vocabulary = Vocabulary::new(&bpe).map_err(|reason| TextError::Invalid {
            path,
            reason,
            fix: SAME_CHECKPOINT,
        })?;
        let config = TokenizerConfig::load(dir)?;
        let id_of = |field: &str, text: &Option<String>| match text {
            None => Ok(None),
            Some(text) => bpe.token_to_id(text).map(Some).ok_or_else(|| TextError::Invalid {
                path: dir.join(files::TOKENIZER_CONFIG_FILE),
                reason: format!("{field} is {text:?}, which {TOKENIZER_FILE} does not know"),
                fix: SAME_CHECKPOINT,
            }),
        };
        let bos = id_of("bos_token", &config.special.bos_token)?;
        let eos = id_of("eos_token", &config.special.eos_token)?;
        let (eos_ids, eos_file) = files::eos_ids(dir, eos)?;
        let defaults = generation_config::sampling_defaults(&dir.join(files::GENERATION_CONFIG_FILE))?;
        let add_bos = match config.add_bos_token {
            Some(add) => add,
            None => bos.is_some() && post_processor_begins_with(&bpe, bos),
        };
        let add_eos = config.add_eos_token.unwrap_or(false);
        for (needed, id, field, other) in
            [(add_bos, bos, "add_bos_token", "bos_token"), (add_eos, eos, "add_eos_token", "eos_token")]
        {
            if needed && id.is_none() {
                return Err(TextError::Invalid {
                    path: dir.join(files::TOKENIZER_CONFIG_FILE),
                    reason: format!("{field} is true and {other} is missing"),
                    fix: "name the token, or switch the addition off",
                });
            }
        }
        let mut warnings = config.warnings;
        let template = match config.templates {
            None => Err(TemplateError::Missing),
            Some(found) => usable(found, &config.special, &mut warnings),
        };
        let pieces = Pieces::of(&bpe);
        if pieces.is_none() {
            warnings.push(Finding {
                file: dir.join(TOKENIZER_FILE),
                subject: "tokenizer".to_owned(),
                expected: "one whose texts can be encoded in pieces".to_owned(),
                found: WHOLE.to_owned(),
                fix: "nothing: prompts of more than 1 MiB are refused, all others are served".to_owned(),
            });
        }
        let mut tokenizer = Self {
            pieces,
            bpe,
            vocabulary: Arc::new(vocabulary),
            special: config.special,
            bos,
            eos,
            add_bos,
            add_eos,
            eos_ids,
            eos_file,
            template,
            defaults,
            warnings,
        };
        tokenizer.check_added_tokens(dir, &config.added_tokens)?;
        tokenizer.check_template_tokens();
        Ok(tokenizer)
    }

    /// What a request gets for the sampling fields that it leaves out: `generation_config.json` over the
    /// neutral values.
    pub fn sampling_defaults(&self) -> &SamplingParams {
        &self.defaults
    }

    /// Findings that do not prevent use.
    pub fn warnings(&self) -> &[Finding] {
        &self.warnings
    }

    /// The ids of a text. Special tokens that the text spells become their ids. With `add_special`,
    /// BOS (and EOS) are added as the checkpoint's configuration says, unless already there.
    ///
    /// Takes time in proportion to the text: see the crate's header.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, TextError> {
        let encoding = self
            .bpe
            .encode_fast(text, false)
            .map_err(|error| TextError::Encode { bytes: text.len(), reason: error.to_string() })?;
        Ok(self.with_special(encoding.get_ids().to_vec(), add_special))
    }

    /// As [`Self::encode`], for texts of strangers: piece by piece, so that it takes memory for one piece, ends
    /// soon after `stop` says so, and after the piece in which the text turns out to have `limit_tokens` or
    /// more. A text of one piece is encoded to its end. Where a tokenizer's texts cannot be cut, they are of one
    /// piece, and longer ones than a MiB are refused.
    pub fn encode_within(
        &self,
        text: &str,
        add_special: bool,
        limit_tokens: usize,
        stop: &dyn Fn() -> bool,
    ) -> Result<Vec<TokenId>, EncodeError> {
        match &self.pieces {
            Some(pieces) if !pieces.holds(text) => {
                let ids = pieces.encode(&self.bpe, text, limit_tokens, stop)?;
                Ok(self.with_special(ids, add_special))
            }
            _ if stop() => Err(EncodeError::Stopped),
            None if text.len() > LONGEST_BYTES => {
                let reason = format!("{WHOLE}, at most {LONGEST_BYTES} bytes of it");
                Err(EncodeError::Text(TextError::Encode { bytes: text.len(), reason }))
            }
            _ => Ok(self.encode(text, add_special)?),
        }
    }

    /// Tokens that a text of so many bytes has at least: no token is longer than the longest. 0 where the
    /// tokenizer may drop parts of a text.
    pub fn least_tokens(&self, text: &str) -> usize {
        match self.pieces.as_ref().and(self.vocabulary.longest()) {
            Some(longest) => text.len().div_ceil(longest),
            None => 0,
        }
    }

    fn with_special(&self, mut ids: Vec<TokenId>, add_special: bool) -> Vec<TokenId> {
        if add_special {
            if let Some(bos) = self.bos.filter(|_| self.add_bos)
                && ids.first() != Some(&bos)
            {
                ids.insert(0, bos);
            }
            if let Some(eos) = self.eos.filter(|_| self.add_eos)
                && ids.last() != Some(&eos)
            {
                ids.push(eos);
            }
        }
        ids
    }

    /// The text of ids, all at once. Bytes that are no UTF-8 become U+FFFD, unknown ids nothing.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.vocabulary.visible(id, skip_special));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The same, token by token.
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.vocabulary), skip_special)
    }

    /// The raw bytes of a token, which may hold parts of characters; of a special token its text.
    /// `None` for ids that the tokenizer does not know.
    pub fn token_bytes(&self, id: TokenId) -> Option<&[u8]> {
        self.vocabulary.bytes_of(id)
    }

    /// Whether a token is special (and is left out of text by `skip_special`).
    pub fn is_special(&self, id: TokenId) -> bool {
        self.vocabulary.is_special(id)
    }

    /// One more than the largest id the tokenizer knows. The model's own vocabulary may be larger.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// Beginning-of-sequence token.
    pub fn bos_id(&self) -> Option<TokenId> {
        self.bos
    }

    /// Tokens that end a sequence, ascending; at least one.
    pub fn eos_ids(&self) -> &[TokenId] {
        &self.eos_ids
    }

    /// The special tokens that the configuration names.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// The spelling of every special token, by id.
    pub fn special_texts(&self) -> impl Iterator<Item = (TokenId, &str)> + Clone {
        self.vocabulary.special_ids().filter_map(|id| {
            let text = std::str::from_utf8(self.vocabulary.bytes_of(id)?).ok()?;
            Some((id, text))
        })
    }

    /// The checkpoint's chat template, or the refusal that says it has none.
    pub fn chat_template(&self) -> Result<&ChatTemplate, TemplateError> {
        self.template.as_ref().map_err(Clone::clone)
    }
}

fn load_bpe(path: &Path) -> Result<Bpe, TextError> {
    // What Kimi K2 is published with.
    let is_tiktoken = !path.exists() && path.with_file_name(TIKTOKEN_FILE).exists();
    let bytes = files::read(path, if is_tiktoken { CONVERT } else { SAME_CHECKPOINT })?;
    let invalid = |reason| TextError::Invalid {
        path: path.to_owned(),
        reason,
        fix: "only byte-level BPE tokenizers, as DeepSeek's are, are supported",
    };
    let mut bpe = Bpe::from_bytes(bytes).map_err(|error| invalid(format!("no tokenizer: {error}")))?;
    if !matches!(bpe.get_model(), ModelWrapper::BPE(_)) {
        return Err(invalid("the model is not BPE".to_owned()));
    }
    if !matches!(bpe.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
        return Err(invalid("the decoder is not ByteLevel".to_owned()));
    }
    bpe.with_padding(None);
    bpe.with_truncation(None).map_err(|error| invalid(error.to_string()))?;
    Ok(bpe)
}

/// Without `add_bos_token` the post-processor of `tokenizer.json` decides.
fn post_processor_begins_with(bpe: &Bpe, bos: Option<TokenId>) -> bool {
    bpe.encode_fast("", true).is_ok_and(|encoding| encoding.get_ids().first().copied() == bos)
}

/// Compiles the templates and renders small conversations. Raw completions need no template, so one that
/// cannot be used is a warning here and a refusal of every conversation.
fn usable(
    found: Templates,
    special: &SpecialTokens,
    warnings: &mut Vec<Finding>,
) -> Result<ChatTemplate, TemplateError> {
    let Templates { path, default, tool_use } = found;
    let compiled = ChatTemplate::new(default, special.clone()).and_then(|template| match tool_use {
        Some(source) => template.with_tool_use(source),
        None => Ok(template),
    });
    let mut warn = |found: String, fix: &str| {
        warnings.push(Finding {
            file: path.clone(),
            subject: "chat template".to_owned(),
            expected: "Jinja as Hugging Face accepts it".to_owned(),
            found,
            fix: fix.to_owned(),
        });
    };
    match compiled.and_then(|template| template.trial().map(|failed| (template, failed))) {
        Ok((template, failed)) => {
            const SOME: &str = "conversations that reach it are refused with status 501, others are served";
            for gap in template.gaps() {
                warn(format!("{gap}, which is not known here"), SOME);
            }
            for failure in failed {
                warn(failure, "correct the template");
            }
            Ok(template)
        }
        Err(error) => {
            warn(error.to_string(), "correct the template; until then only raw completions are served");
            Err(TemplateError::Unusable { reason: error.to_string() })
        }
    }
}
