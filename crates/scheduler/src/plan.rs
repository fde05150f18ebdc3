//! What goes into and comes out of a step.

use cadre_types::{Position, SequenceId, TokenId};

use crate::pages::PagesExhausted;

/// The rows of one step. A sequence appears at most once.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct StepPlan {
    /// Sequences that left the waiting queue just now, oldest first: they hold their pages. For
    /// [`crate::SequenceKind::AwaitHandoff`] this is the moment to ask for the KV.
    pub admitted: Vec<SequenceId>,
    /// Why the head of the waiting queue still waits, if something does.
    pub blocked: Option<PagesExhausted>,
    /// One row per running sequence, oldest first.
    pub decode: Vec<DecodeStep>,
    /// Prompt chunks, oldest sequence first.
    pub prefill: Vec<PrefillChunk>,
}

impl StepPlan {
    /// Rows of the step: decode rows and prompt tokens.
    pub fn rows(&self) -> usize {
        self.decode.len() + self.prefill.iter().map(|chunk| chunk.len).sum::<usize>()
    }

    /// Whether there is nothing to compute. What can change that is a submission, a hand-off, a finish or
    /// a cancellation.
    pub fn is_empty(&self) -> bool {
        self.decode.is_empty() && self.prefill.is_empty()
    }
}

/// Consecutive prompt positions of one sequence, to be computed in prefill form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillChunk {
    /// The sequence.
    pub id: SequenceId,
    /// Position of the first token.
    pub first_position: Position,
    /// Tokens; at least 1.
    pub len: usize,
    /// Whether the prompt ends here: sample from the last row.
    pub last: bool,
}

/// One generated position of one sequence, to be computed in decode form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeStep {
    /// The sequence.
    pub id: SequenceId,
    /// Its newest token, which is in no cache yet.
    pub token: TokenId,
    /// The position of that token.
    pub position: Position,
}

/// The outcome of a planned row or chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitKind {
    /// A prompt chunk that is not the last is in the cache.
    Prefilled,
    /// The last prompt chunk, or a decode row, is in the cache and this token was sampled from it.
    Sampled(TokenId),
}

/// How full the scheduler is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SchedulerStats {
    /// Sequences in the waiting queue.
    pub waiting: usize,
    /// Sequences whose prompt is being computed here.
    pub prefilling: usize,
    /// Sequences with pages, whose KV is on its way from a prefill worker.
    pub awaiting_kv: usize,
    /// Sequences that generate tokens.
    pub decoding: usize,
    /// Prefilled sequences whose hand-off is neither confirmed nor aborted.
    pub held: usize,
    /// Pages free.
    pub pages_free: usize,
    /// Pages reserved by sequences.
    pub pages_used: usize,
    /// Pages of the pool.
    pub pages_total: usize,
}
