//! What the scheduler refuses. Refusals of `submit` are the client's or the load's; the others mean
//! that the caller and the scheduler disagree about a sequence.

use cadre_types::SequenceId;

use crate::{plan::CommitKind, sequence::SequenceState};

/// Why a call was refused. Nothing has changed when one is returned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SchedulerError {
    /// A limit under which some sequence could never run.
    #[error("scheduler config: {field} is {value}, must be in {least}..={most}")]
    Config {
        /// The field of [`crate::SchedulerConfig`].
        field: &'static str,
        /// Its value.
        value: usize,
        /// The least usable value.
        least: usize,
        /// The largest usable value.
        most: usize,
    },
    /// A prompt without tokens has no position to sample from.
    #[error("submit: the prompt is empty")]
    EmptyPrompt,
    /// `max_tokens` is 0.
    #[error("submit: max_tokens is 0, must be at least 1")]
    NoOutput,
    /// The sequence needs more pages than the pool has.
    #[error("submit: {tokens} tokens (prompt and max_tokens) need {pages} KV pages, this worker has {total}")]
    NeverFits {
        /// Tokens to reserve for.
        tokens: usize,
        /// Pages they need.
        pages: usize,
        /// Pages of the pool.
        total: usize,
    },
    /// The waiting queue is full: try later or elsewhere.
    #[error("submit: {waiting} sequences wait already, the bound is {bound}")]
    QueueFull {
        /// Sequences that wait.
        waiting: usize,
        /// Most that may wait.
        bound: usize,
    },
    /// The sequence does not exist (any more): it was cancelled, or has finished.
    #[error("{operation}: {id} does not exist")]
    Unknown {
        /// The call.
        operation: &'static str,
        /// The sequence.
        id: SequenceId,
    },
    /// The call does not fit the sequence's state.
    #[error("{operation}: {id} is {state}")]
    WrongState {
        /// The call.
        operation: &'static str,
        /// The sequence.
        id: SequenceId,
        /// Its state.
        state: SequenceState,
    },
    /// The commit is not the outcome of what the last plan asked of the sequence.
    #[error("commit: {id} was not planned for {commit:?} in this step")]
    NotPlanned {
        /// The sequence.
        id: SequenceId,
        /// What was to be committed.
        commit: CommitKind,
    },
}
