//! From token ids to text, one at a time.
//!
//! A token of a byte-level vocabulary is a run of bytes that may begin or end inside a character.
//! Bytes that can still become a character are held back (at most three); bytes that cannot are
//! replaced by U+FFFD as soon as that is certain, one per maximal invalid run. Whatever the order of
//! calls, the pieces joined are what [`Tokenizer::decode`](crate::Tokenizer::decode) gives for all ids
//! at once.

use std::sync::Arc;

use cadre_types::TokenId;

use crate::vocabulary::Vocabulary;

/// The text of one sequence, as far as it is certain. Memory: one token and three bytes.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    skip_special: bool,
    /// Between calls: the beginning of a character, at most three bytes.
    held: Vec<u8>,
}

impl Detokenizer {
    pub(crate) fn new(vocabulary: Arc<Vocabulary>, skip_special: bool) -> Self {
        Self { vocabulary, skip_special, held: Vec::new() }
    }

    /// Takes one token and appends to `out` what became certain: whole characters, or nothing. An id
    /// that the tokenizer does not know adds nothing.
    ///
    /// Returns how many of the characters of this and later calls come before the one that the token's
    /// first byte belongs to: 1 if it settles that bytes held before it are no character, else 0.
    pub fn push(&mut self, id: TokenId, out: &mut String) -> usize {
        let before = self.held.len();
        self.held.extend_from_slice(self.vocabulary.visible(id, self.skip_special));
        let (mut kept, mut seen, mut broken_before) = (0, 0, 0);
        let mut chunks = self.held.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            out.push_str(chunk.valid());
            let invalid = chunk.invalid();
            seen += chunk.valid().len() + invalid.len();
            if chunks.peek().is_none() && may_complete(invalid) {
                kept = invalid.len();
            } else if !invalid.is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
                // What was held is the beginning of one character at most.
                broken_before += usize::from(seen <= before);
            }
        }
        let settled = self.held.len() - kept;
        self.held.drain(..settled);
        broken_before
    }

    /// Ends the text: a character that was begun and never completed becomes U+FFFD. Pushing again
    /// starts a new text.
    pub fn finish(&mut self, out: &mut String) {
        if !self.held.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.held.clear();
        }
    }

    /// Whether the last tokens hold the beginning of a character that is not shown yet.
    pub fn holds_partial_character(&self) -> bool {
        !self.held.is_empty()
    }
}

/// Whether these trailing bytes are the beginning of a character, not an error.
fn may_complete(bytes: &[u8]) -> bool {
    !bytes.is_empty() && std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests;
