//! One sequence: its tokens, its pages and its life.
//!
//! ```text
//! Local         Waiting → Prefilling → Decoding → end
//! PrefillOnly   Waiting → Prefilling → Held → end (hand-off confirmed)
//! AwaitHandoff  Waiting → AwaitingKv → Decoding → end
//! ```
//! `cancel` ends any of them at any point. Invariant from the first sampled token on (spec §8): KV length
//! = known tokens − 1; the newest token is in no cache yet.

use std::fmt;

use cadre_types::{PageId, Position, SequenceId, TokenId};

use crate::{
    error::SchedulerError,
    pages::{BlockTable, pages_for},
    plan::{CommitKind, DecodeStep, PrefillChunk},
};

/// A sequence to be submitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSequence {
    /// The prompt; at least one token.
    pub prompt: Vec<TokenId>,
    /// Most tokens to generate; at least 1. A prefill-only sequence generates one and reserves for none.
    pub max_tokens: u32,
    /// What happens here.
    pub kind: SequenceKind,
    /// When [`crate::Scheduler::expired`] begins to name it, in nanoseconds of the caller's clock.
    pub deadline: Option<u64>,
}

/// Which part of a sequence's life happens on this worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SequenceKind {
    /// Prefill and decode.
    Local,
    /// Prefill and the first token; then its pages are held until the hand-off is confirmed or aborted.
    PrefillOnly,
    /// Decode; the KV of the prompt comes from a prefill worker.
    AwaitHandoff,
}

/// Where a sequence is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SequenceState {
    /// In the queue, without pages.
    Waiting,
    /// Has pages; KV of `computed` prompt positions is in the cache.
    Prefilling {
        /// Prompt positions in the cache; fewer than the prompt has.
        computed: usize,
    },
    /// Has pages; a prefill worker is filling them.
    AwaitingKv,
    /// Generates tokens.
    Decoding,
    /// Prefilled, first token sampled, waiting for the decode worker to confirm.
    Held,
}

impl fmt::Display for SequenceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting => f.write_str("waiting"),
            Self::Prefilling { computed } => write!(f, "prefilling ({computed} tokens computed)"),
            Self::AwaitingKv => f.write_str("awaiting KV"),
            Self::Decoding => f.write_str("decoding"),
            Self::Held => f.write_str("held for hand-off"),
        }
    }
}

/// One sequence of a worker. Changed only by the scheduler.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) state: SequenceState,
    kind: SequenceKind,
    prompt: Vec<TokenId>,
    output: Vec<TokenId>,
    max_tokens: usize,
    deadline: Option<u64>,
    pub(crate) block_table: BlockTable,
    /// What the last plan asked for and nobody has committed yet.
    planned: Option<Planned>,
    /// The step that last gave it a token: what rotation is fair by.
    pub(crate) last_step: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Planned {
    Chunk { len: usize, last: bool },
    Row,
}

impl Sequence {
    pub(crate) fn new(id: SequenceId, new: NewSequence) -> Result<Self, SchedulerError> {
        if new.prompt.is_empty() {
            return Err(SchedulerError::EmptyPrompt);
        }
        if new.max_tokens == 0 {
            return Err(SchedulerError::NoOutput);
        }
        Ok(Self {
            id,
            state: SequenceState::Waiting,
            kind: new.kind,
            prompt: new.prompt,
            output: Vec::new(),
            max_tokens: new.max_tokens as usize,
            deadline: new.deadline,
            block_table: BlockTable::default(),
            planned: None,
            last_step: 0,
        })
    }

    /// Its name.
    pub fn id(&self) -> SequenceId {
        self.id
    }

    /// Which part of its life happens here.
    pub fn kind(&self) -> SequenceKind {
        self.kind
    }

    /// Where it is in its life.
    pub fn state(&self) -> SequenceState {
        self.state
    }

    /// The prompt.
    pub fn prompt(&self) -> &[TokenId] {
        &self.prompt
    }

    /// The tokens generated so far.
    pub fn output(&self) -> &[TokenId] {
        &self.output
    }

    /// Most tokens to generate.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// When it expires, in nanoseconds of the caller's clock.
    pub fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Its pages: entry `i` holds positions `64 i .. 64 i + 64`. Empty while it waits.
    pub fn block_table(&self) -> &[PageId] {
        self.block_table.pages()
    }

    /// The position that the next row computes, which is the number of positions in the cache. While
    /// pages are being filled by a prefill worker it is 0.
    pub fn next_position(&self) -> Position {
        match self.state {
            SequenceState::Waiting | SequenceState::AwaitingKv => 0,
            SequenceState::Prefilling { computed } => position(computed),
            SequenceState::Decoding | SequenceState::Held => {
                position(self.prompt.len() + self.output.len() - 1)
            }
        }
    }

    // --- reservation and admission ---------------------------------------------------------------

    /// Positions to reserve for. The last generated token never enters the cache, so one of them is
    /// spare: it is the room for a draft row once decoding speculates.
    pub(crate) fn reservation_tokens(&self) -> usize {
        match self.kind {
            SequenceKind::PrefillOnly => self.prompt.len(),
            SequenceKind::Local | SequenceKind::AwaitHandoff => {
                self.prompt.len().saturating_add(self.max_tokens)
            }
        }
    }

    pub(crate) fn reservation(&self) -> usize {
        pages_for(self.reservation_tokens())
    }

    pub(crate) fn admit(&mut self, block_table: BlockTable) {
        self.block_table = block_table;
        self.state = match self.kind {
            SequenceKind::Local | SequenceKind::PrefillOnly => SequenceState::Prefilling { computed: 0 },
            SequenceKind::AwaitHandoff => SequenceState::AwaitingKv,
        };
    }

    // --- planning --------------------------------------------------------------------------------

    pub(crate) fn forget_plan(&mut self) {
        self.planned = None;
    }

    /// Whether a decode row is due. A sequence with all its tokens waits for the engine to finish it.
    pub(crate) fn wants_row(&self) -> bool {
        self.state == SequenceState::Decoding && self.output.len() < self.max_tokens
    }

    /// Plans a decode row; `None` if the sequence has no token to decode from.
    pub(crate) fn plan_row(&mut self) -> Option<DecodeStep> {
        let token = *self.output.last()?;
        self.planned = Some(Planned::Row);
        Some(DecodeStep { id: self.id, token, position: self.next_position() })
    }

    /// Plans up to `most` prompt tokens; `None` if the prompt is not being computed here.
    pub(crate) fn plan_chunk(&mut self, most: usize) -> Option<PrefillChunk> {
        let SequenceState::Prefilling { computed } = self.state else { return None };
        let rest = self.prompt.len() - computed;
        let len = rest.min(most);
        let last = len == rest;
        self.planned = Some(Planned::Chunk { len, last });
        Some(PrefillChunk { id: self.id, first_position: position(computed), len, last })
    }

    // --- outcomes --------------------------------------------------------------------------------

    pub(crate) fn commit(&mut self, commit: CommitKind, step: u64) -> Result<(), SchedulerError> {
        match (self.state, self.planned, commit) {
            (
                SequenceState::Prefilling { computed },
                Some(Planned::Chunk { len, last: false }),
                CommitKind::Prefilled,
            ) => {
                self.state = SequenceState::Prefilling { computed: computed + len };
            }
            (_, Some(Planned::Chunk { last: true, .. }), CommitKind::Sampled(token)) => {
                self.state = match self.kind {
                    SequenceKind::PrefillOnly => SequenceState::Held,
                    SequenceKind::Local | SequenceKind::AwaitHandoff => SequenceState::Decoding,
                };
                self.append(token, step);
            }
            (_, Some(Planned::Row), CommitKind::Sampled(token)) => self.append(token, step),
            _ => return Err(SchedulerError::NotPlanned { id: self.id, commit }),
        }
        self.planned = None;
        Ok(())
    }

    pub(crate) fn receive_kv(&mut self, first_token: TokenId, step: u64) -> Result<(), SchedulerError> {
        if self.state != SequenceState::AwaitingKv {
            return Err(SchedulerError::WrongState {
                operation: "handoff_complete",
                id: self.id,
                state: self.state,
            });
        }
        self.state = SequenceState::Decoding;
        self.append(first_token, step);
        Ok(())
    }

    fn append(&mut self, token: TokenId, step: u64) {
        self.output.push(token);
        self.last_step = step;
    }
}

/// A count of a sequence's tokens as a position.
fn position(tokens: usize) -> Position {
    Position::try_from(tokens)
        .expect("submit refuses sequences larger than the pool, and config checks the pool fits u32")
}
