//! Long texts, piece by piece: the same ids as of the whole, in memory for one piece, and with a question
//! after each whether to go on.
//!
//! A text is cut where the pre-tokenizer cuts it anyway. A window of the text is pre-tokenized; of its cuts
//! the last one counts that is far enough from the window's end not to depend on what follows, and from which
//! pre-tokenizing afresh gives the same next cuts as going on did. Pre-tokenizers of byte-level BPE match
//! from left to right, so what agrees there agrees from there on. Those that look behind, anchor, normalise or
//! strip are not cut: their texts are encoded whole, and are refused beyond [`LONGEST_BYTES`].

use serde_json::Value;
use tokenizers::{Model, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer as Bpe};

use super::EncodeError;
use crate::error::TextError;

/// Bytes of a piece: some ten milliseconds of work.
const PIECE_BYTES: usize = 64 << 10;
/// A cut so far from the window's end does not depend on what follows: the pre-tokenizers look one character
/// ahead, and added tokens are added to this.
const MARGIN_BYTES: usize = 4 << 10;
/// How far cuts are compared.
const COMPARED_BYTES: usize = 1 << 10;
/// Cuts that are tried in a window before it is made larger.
const TRIES: usize = 8;
/// Longest window: a stretch of text that the pre-tokenizer leaves whole for longer is refused. Merging one
/// takes memory of some hundred bytes for each byte.
pub(super) const LONGEST_BYTES: usize = 1 << 20;

/// How the texts of a tokenizer are cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pieces {
    piece_bytes: usize,
    margin_bytes: usize,
    compared_bytes: usize,
    longest_bytes: usize,
}

impl Pieces {
    /// `None` where texts must be encoded whole.
    pub(super) fn of(bpe: &Bpe) -> Option<Self> {
        let as_json = |value: Option<Value>| value.unwrap_or(Value::Null);
        let normalizer = as_json(bpe.get_normalizer().and_then(|part| serde_json::to_value(part).ok()));
        let nothing = normalizer.is_null()
            || (normalizer["type"] == "Sequence"
                && normalizer["normalizers"].as_array().is_some_and(Vec::is_empty));
        let pre_tokenizer = as_json(bpe.get_pre_tokenizer().and_then(|part| serde_json::to_value(part).ok()));
        let added = bpe.get_added_tokens_decoder();
        let plain = added.values().all(|token| !token.lstrip && !token.rstrip && !token.single_word);
        let longest = added.values().map(|token| token.content.len()).max().unwrap_or(0);
        (nothing && plain && matches_rightwards(&pre_tokenizer)).then_some(Self {
            piece_bytes: PIECE_BYTES,
            margin_bytes: MARGIN_BYTES + longest,
            compared_bytes: COMPARED_BYTES,
            longest_bytes: LONGEST_BYTES,
        })
    }

    /// Whether a text is short enough to be encoded whole.
    pub(super) fn holds(&self, text: &str) -> bool {
        text.len() <= self.piece_bytes
    }

    /// The ids of a text; ends early with [`EncodeError::TooLong`] once there are `limit_tokens` and more to
    /// come.
    pub(super) fn encode(
        &self,
        bpe: &Bpe,
        text: &str,
        limit_tokens: usize,
        stop: &dyn Fn() -> bool,
    ) -> Result<Vec<u32>, EncodeError> {
        let mut ids = Vec::new();
        let (mut at, mut size) = (0, self.piece_bytes);
        while at < text.len() {
            if stop() {
                return Err(EncodeError::Stopped);
            }
            if ids.len() >= limit_tokens {
                return Err(EncodeError::TooLong { tokens: ids.len() });
            }
            let end = text.floor_char_boundary(at.saturating_add(size));
            let window = &text[at..end];
            let mut parts = pre_tokenize(bpe, window)?;
            let cut = match end == text.len() {
                true => window.len(),
                false => match self.cut(bpe, &parts, window)? {
                    Some(cut) => cut,
                    None if size >= self.longest_bytes => return Err(uncut(size)),
                    None => {
                        size *= 2;
                        continue;
                    }
                },
            };
            let model = bpe.get_model();
            parts.tokenize(|part| model.tokenize(part.get())).map_err(|error| failed(window, &*error))?;
            for (_, (start, _), tokens) in parts.get_splits(OffsetReferential::Original, OffsetType::Byte) {
                if start >= cut {
                    break;
                }
                ids.extend(tokens.iter().flatten().map(|token| token.id));
            }
            (at, size) = (at + cut, self.piece_bytes);
        }
        Ok(ids)
    }

    /// Where a window can be cut.
    fn cut(&self, bpe: &Bpe, parts: &PreTokenizedString, window: &str) -> Result<Option<usize>, EncodeError> {
        let ends = cuts(parts);
        let last = window.len().saturating_sub(self.margin_bytes);
        let candidates = ends.iter().rev().copied().filter(|&cut| cut > 0 && cut <= last);
        for cut in candidates.take(TRIES) {
            let rest = window.get(cut..).ok_or_else(|| uncut(cut))?;
            let again = pre_tokenize(bpe, &rest[..rest.floor_char_boundary(self.margin_bytes)])?;
            let near = |cut: &usize| *cut < self.compared_bytes;
            let afresh = cuts(&again).into_iter().take_while(near);
            let going_on = ends.iter().filter(|&&end| end > cut).map(|end| end - cut).take_while(near);
            if afresh.eq(going_on) {
                return Ok(Some(cut));
            }
        }
        Ok(None)
    }
}

/// Ends of the pre-tokenizer's parts.
fn cuts(parts: &PreTokenizedString) -> Vec<usize> {
    let splits = parts.get_splits(OffsetReferential::Original, OffsetType::Byte);
    splits.into_iter().map(|(_, (_, end), _)| end).collect()
}

fn pre_tokenize(bpe: &Bpe, text: &str) -> Result<PreTokenizedString, EncodeError> {
    let mut parts = bpe.get_added_vocabulary().extract_and_normalize(bpe.get_normalizer(), text);
    if let Some(pre_tokenizer) = bpe.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut parts).map_err(|error| failed(text, &*error))?;
    }
    Ok(parts)
}

fn failed(text: &str, error: &dyn std::error::Error) -> EncodeError {
    EncodeError::Text(TextError::Encode { bytes: text.len(), reason: error.to_string() })
}

fn uncut(bytes: usize) -> EncodeError {
    let reason = "the text has a stretch that the tokenizer takes for one word of such a length".to_owned();
    EncodeError::Text(TextError::Encode { bytes, reason })
}

/// Whether a pre-tokenizer matches from left to right and looks at nothing before a match.
fn matches_rightwards(part: &Value) -> bool {
    match part["type"].as_str() {
        Some("Sequence") => {
            part["pretokenizers"].as_array().is_some_and(|parts| parts.iter().all(matches_rightwards))
        }
        Some("ByteLevel") => part["add_prefix_space"] == false,
        Some("Digits") => true,
        Some("Split") => {
            let pattern = &part["pattern"];
            let rightwards = match pattern["Regex"].as_str() {
                Some(regex) => looks_rightwards(regex),
                None => pattern["String"].is_string(),
            };
            part["behavior"] == "Isolated" && part["invert"] == false && rightwards
        }
        _ => false,
    }
}

/// Whether a regular expression has no anchor, word boundary, back reference or look behind.
fn looks_rightwards(regex: &str) -> bool {
    let mut in_class = false;
    let mut rest = regex;
    while let Some(first) = rest.chars().next() {
        let mut skip = first.len_utf8();
        match first {
            '\\' => {
                let Some(escaped) = rest[skip..].chars().next() else { return false };
                if !in_class && matches!(escaped, 'b' | 'B' | 'A' | 'G' | 'K' | 'z' | 'Z' | '1'..='9' | 'k') {
                    return false;
                }
                skip += escaped.len_utf8();
            }
            '[' => in_class = true,
            ']' => in_class = false,
            '^' | '$' if !in_class => return false,
            '(' if !in_class && rest.starts_with("(?<") => return false,
            _ => {}
        }
        if first == '[' {
            // What negates a class is no anchor, and a bracket that comes first is no end.
            let inner = rest[skip..].strip_prefix('^').map_or(0, |_| 1);
            skip += inner;
            skip += rest[skip..].strip_prefix(']').map_or(0, |_| 1);
        }
        rest = &rest[skip..];
    }
    true
}

#[cfg(test)]
mod tests;
