//! From tokens to text: detokenizes as tokens come, applies stop strings, keeps count.
//!
//! A chunk's text may be empty (half a character, or text held back because it could begin a stop
//! string); its tokens are always the ones that arrived. A stop string ends the text before the match;
//! the tokens that spelled it stay in `tokens` and in the usage, because they were computed.

use std::sync::Arc;

use cadre_proto::v1;
use cadre_text::{Detokenizer, StopStrings};
use cadre_types::FinishReason;

use crate::model::ServedModel;

/// What a client is told at a time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chunk {
    /// Text that became certain.
    pub text: String,
    /// Tokens that arrived.
    pub tokens: Vec<v1::GeneratedToken>,
    /// Where in the answer each token's text begins, in characters. Tokens of one character share its
    /// place; those of a stop string lie beyond the end of the text.
    pub text_offsets: Vec<usize>,
    /// On the last chunk only.
    pub finish: Option<Finish>,
}

/// How a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
}

/// The text side of one sequence.
#[derive(Debug)]
pub(crate) struct TextOutput {
    model: Arc<ServedModel>,
    detokenizer: Detokenizer,
    stops: StopStrings,
    prompt_tokens: u32,
    completion_tokens: u32,
    /// Characters that became certain so far, held back or not.
    characters: usize,
    piece: String,
}

impl TextOutput {
    /// Output of a sequence that begins after a prompt of so many tokens.
    pub(crate) fn new(model: Arc<ServedModel>, stops: StopStrings, prompt_tokens: u32) -> Self {
        let detokenizer = model.tokenizer.detokenizer(true);
        let piece = String::new();
        Self { model, detokenizer, stops, prompt_tokens, completion_tokens: 0, characters: 0, piece }
    }

    /// Takes a token. The chunk is final if it completed a stop string.
    pub(crate) fn push(&mut self, token: v1::GeneratedToken) -> Chunk {
        self.completion_tokens += 1;
        self.piece.clear();
        let id = token.token;
        let offset = self.characters + self.detokenizer.push(id, &mut self.piece);
        self.characters += self.piece.chars().count();
        let mut chunk = Chunk { tokens: vec![token], text_offsets: vec![offset], ..Chunk::default() };
        let tokenizer = &self.model.tokenizer;
        let matched = match tokenizer.token_bytes(id).map(std::str::from_utf8) {
            Some(Ok(spelling)) if tokenizer.is_special(id) => {
                self.stops.push_hidden(spelling, &mut chunk.text)
            }
            _ => self.stops.push(&self.piece, &mut chunk.text),
        };
        if matched.is_some() {
            chunk.finish = Some(self.finish_as(FinishReason::Stop));
        }
        chunk
    }

    /// The last chunk of a sequence that its worker ended: releases what was held back.
    pub(crate) fn finish(&mut self, reason: FinishReason) -> Chunk {
        self.piece.clear();
        self.detokenizer.finish(&mut self.piece);
        let mut chunk = Chunk::default();
        // U+FFFD may complete a stop string like any other character.
        if self.stops.push(&self.piece, &mut chunk.text).is_none() {
            self.stops.finish(&mut chunk.text);
            chunk.finish = Some(self.finish_as(reason));
        } else {
            chunk.finish = Some(self.finish_as(FinishReason::Stop));
        }
        chunk
    }

    fn finish_as(&self, reason: FinishReason) -> Finish {
        Finish { reason, prompt_tokens: self.prompt_tokens, completion_tokens: self.completion_tokens }
    }
}
