//! What is needed to continue a request on another worker: the prompt, how tokens are chosen, and every
//! token emitted so far. One per sequence, owned by the task that generates it.
//!
//! A replay would reopen `Decode` elsewhere with the prompt and the emitted tokens teacher-forced in
//! decode form (design, point 3), and go on at the next position; because tokens depend on (seed,
//! position, weights, tokens) only, the client would see no seam. That call does not exist on the wire
//! yet; the journal is complete for it.
//!
//! Bound: at most `max_tokens` entries of 4 bytes beside the prompt.

use std::sync::Arc;

use cadre_types::{SamplingParams, TokenId};

/// The record of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Journal {
    /// The router's name for the sequence.
    pub request_id: String,
    /// The prompt.
    pub prompt: Arc<[TokenId]>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Most tokens to generate.
    pub max_tokens: u32,
    emitted: Vec<TokenId>,
}

impl Journal {
    /// An empty record.
    pub fn new(
        request_id: String,
        prompt: Arc<[TokenId]>,
        sampling: SamplingParams,
        max_tokens: u32,
    ) -> Self {
        Self { request_id, prompt, sampling, max_tokens, emitted: Vec::new() }
    }

    /// Appends a token received from the decode worker. `position` must be the next one: a gap or a
    /// repeat would make the record useless and is the worker's error.
    pub fn append(&mut self, position: u32, token: TokenId) -> Result<(), JournalError> {
        let expected = self.next_position();
        if position as usize != expected {
            return Err(JournalError::Position { expected, found: position });
        }
        if self.emitted.len() >= self.max_tokens as usize {
            return Err(JournalError::TooMany { max_tokens: self.max_tokens });
        }
        self.emitted.push(token);
        Ok(())
    }

    /// The tokens emitted so far.
    pub fn emitted(&self) -> &[TokenId] {
        &self.emitted
    }

    /// Where the next token goes.
    pub fn next_position(&self) -> usize {
        self.prompt.len() + self.emitted.len()
    }
}

/// A token that does not continue the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Not the next position.
    #[error("a token for position {found} arrived, expected {expected}")]
    Position {
        /// The next position.
        expected: usize,
        /// The token's.
        found: u32,
    },
    /// More tokens than were asked for.
    #[error("more than max_tokens = {max_tokens} tokens arrived")]
    TooMany {
        /// The bound.
        max_tokens: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_next_position_is_taken_and_never_more_than_asked() {
        let mut journal = Journal::new("r".into(), Arc::from([7, 8]), SamplingParams::default(), 2);
        assert_eq!(journal.append(1, 9), Err(JournalError::Position { expected: 2, found: 1 }));
        assert_eq!(journal.append(2, 9), Ok(()));
        assert_eq!(journal.append(2, 9), Err(JournalError::Position { expected: 3, found: 2 }));
        assert_eq!(journal.append(3, 10), Ok(()));
        assert_eq!(journal.append(4, 11), Err(JournalError::TooMany { max_tokens: 2 }));
        assert_eq!(journal.emitted(), [9, 10]);
    }
}
