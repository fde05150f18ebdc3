//! One step's work: rows of several sequences, each in prefill or decode form.

use cadre_ops::AttentionForm;
use cadre_types::{PageId, Position, TokenId};

/// In which form the rows of a segment attend. Prompt positions are always computed in prefill form and
/// generated ones in decode form, so that a position's KV is a function of (tokens, prompt length).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// A chunk of a prompt, naive form.
    Prefill,
    /// Generated tokens, absorbed form.
    Decode,
}

impl From<SegmentKind> for AttentionForm {
    fn from(kind: SegmentKind) -> Self {
        match kind {
            SegmentKind::Prefill => Self::Naive,
            SegmentKind::Decode => Self::Absorbed,
        }
    }
}

/// Consecutive rows of one sequence.
#[derive(Clone, Debug)]
pub struct Segment<'a> {
    /// The form.
    pub kind: SegmentKind,
    /// The tokens, one row each.
    pub tokens: &'a [TokenId],
    /// Position of the first token.
    pub first_position: Position,
    /// Pages of the sequence, reserved up to the last position at least.
    pub block_table: &'a [PageId],
    /// Which rows' logits are wanted.
    pub logits: LogitRows,
}

/// Rows of a segment whose logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a chunk in the middle of a prompt.
    None,
    /// The last one: the end of a prompt, or one decode step.
    Last,
    /// All of them: scoring, and verification of drafts.
    All,
}

/// One step.
#[derive(Clone, Debug, Default)]
pub struct StepBatch<'a> {
    /// The segments; rows are numbered through them in order.
    pub segments: Vec<Segment<'a>>,
}

impl StepBatch<'_> {
    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.segments.iter().map(|segment| segment.tokens.len()).sum()
    }

    /// Batch rows whose logits are wanted, ascending.
    pub fn logit_rows(&self) -> impl Iterator<Item = usize> {
        let mut next = 0;
        self.segments.iter().flat_map(move |segment| {
            let first = next;
            next += segment.tokens.len();
            match segment.logits {
                LogitRows::None => next..next,
                LogitRows::Last => next.saturating_sub(1).max(first)..next,
                LogitRows::All => first..next,
            }
        })
    }
}

/// What a step yields, on the host. Wanted rows in order of segments, and of rows within one.
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// `[wanted, vocab_size]` F32.
    pub logits: Vec<f32>,
    /// `[wanted, hidden_size]` F32, after the final norm: the MTP module's input.
    pub hidden: Vec<f32>,
}
