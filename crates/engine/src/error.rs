//! What the engine refuses and how sequences fail. Each variant names the operation and its values; the
//! worker turns them into gRPC codes in one place.

use std::{sync::Arc, time::Duration};

use cadre_model::ModelError;
use cadre_ops::OpsError;
use cadre_sampler::SampleError;
use cadre_scheduler::SchedulerError;
use cadre_types::{FinishReason, LayerId, Position, TokenId};

/// Why an engine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum EngineStartError {
    /// The scheduler's limits are unusable.
    #[error(transparent)]
    Scheduler(#[from] SchedulerError),
    /// The backend has no room for cache or activations.
    #[error("allocate {what}: {source}")]
    Backend {
        /// What was allocated.
        what: &'static str,
        /// What the backend said.
        source: OpsError,
    },
    /// The system gives no thread.
    #[error("start the engine thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Why a request was not taken. Nothing was reserved.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// More commands wait for the engine than it can take: try later or elsewhere.
    #[error("request {request_id}: {bound} commands wait for the engine already")]
    Overloaded {
        /// The request.
        request_id: String,
        /// The bound of the command queue.
        bound: usize,
    },
    /// Too much of what sequences have generated waits to be read: read it, or try elsewhere.
    #[error("request {request_id}: {bytes} bytes of events wait for their readers, at most {bound}")]
    Unread {
        /// The request.
        request_id: String,
        /// What waits.
        bytes: u64,
        /// The bound.
        bound: u64,
    },
    /// The request asks for something impossible.
    #[error("request {request_id}: {problem}")]
    Invalid {
        /// The request.
        request_id: String,
        /// What is impossible about it.
        problem: String,
    },
    /// The prompt fills the context.
    #[error("request {request_id}: the prompt has {tokens} tokens, the model takes at most {most}")]
    PromptTooLong {
        /// The request.
        request_id: String,
        /// Tokens of the prompt.
        tokens: usize,
        /// Most tokens of a prompt (one position is left for the answer).
        most: usize,
    },
    /// The engine has stopped.
    #[error("request {request_id}: the engine has stopped")]
    Stopped {
        /// The request.
        request_id: String,
    },
}

/// How a sequence failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// The scheduler refused it: it can never fit, or the waiting queue is full.
    #[error(transparent)]
    Refused(#[from] SchedulerError),
    /// Another sequence has this request id.
    #[error("request {request_id} is running already")]
    Duplicate {
        /// The request id.
        request_id: String,
    },
    /// A step that it was part of failed.
    #[error("step at position {position}: {source}")]
    Step {
        /// The sequence's first position of the step.
        position: Position,
        /// What failed.
        source: Arc<ModelError>,
    },
    /// No token can be chosen from its logits.
    #[error("sample position {position}: {source}")]
    Sample {
        /// The position.
        position: Position,
        /// What the sampler said.
        source: SampleError,
    },
    /// Its hand-off failed.
    #[error(transparent)]
    Handoff(#[from] HandoffError),
    /// The engine stopped while it ran.
    #[error("the engine has stopped")]
    Stopped,
}

/// Why a self-test failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SelfTestError {
    /// It was not taken.
    #[error("self-test: {0}")]
    Submit(#[from] SubmitError),
    /// Its sequence failed.
    #[error("self-test: {0}")]
    Engine(#[from] EngineError),
    /// Its sequence ended otherwise than by its length.
    #[error("self-test ended by {reason:?}, expected two tokens")]
    Ended {
        /// How it ended.
        reason: FinishReason,
    },
}

/// Why a hand-off was refused or given up.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum HandoffError {
    /// Nobody waits for it: never announced, cancelled, or ended.
    #[error("hand-off of {request_id}: no sequence waits for it here")]
    Unknown {
        /// The request id.
        request_id: String,
    },
    /// The sequence has no pages yet.
    #[error("hand-off of {request_id}: its pages are not reserved yet")]
    NotReserved {
        /// The request id.
        request_id: String,
    },
    /// It runs already.
    #[error("hand-off of {request_id}: another one has begun")]
    AlreadyBegun {
        /// The request id.
        request_id: String,
    },
    /// Sender and receiver disagree on what is handed off.
    #[error("hand-off of {request_id}: {what} is {theirs}, ours is {ours}")]
    Mismatch {
        /// The request id.
        request_id: String,
        /// What they disagree on.
        what: &'static str,
        /// Our value.
        ours: u64,
        /// The sender's value.
        theirs: u64,
    },
    /// Rows of a layer that is not handed off.
    #[error("hand-off: {layer} does not exist, {layers} layers are handed off")]
    UnknownLayer {
        /// The layer.
        layer: LayerId,
        /// Layers of the hand-off.
        layers: usize,
    },
    /// Rows of a layer came out of order of position.
    #[error("hand-off, {layer}: rows from position {first}, expected {expected}")]
    OutOfOrder {
        /// The layer.
        layer: LayerId,
        /// First position of the rows.
        first: Position,
        /// The position that is due.
        expected: Position,
    },
    /// Rows reach beyond the prompt, or there are none.
    #[error("hand-off, {layer}: {count} rows from position {first}, the prompt has {prompt_tokens}")]
    OutOfRange {
        /// The layer.
        layer: LayerId,
        /// First position.
        first: Position,
        /// Rows.
        count: u32,
        /// Positions of the prompt.
        prompt_tokens: u32,
    },
    /// The bytes are not as many as the rows need, or more than a frame may carry.
    #[error("hand-off, {layer}: {bytes} bytes for {count} rows, expected {expected}")]
    WrongSize {
        /// The layer.
        layer: LayerId,
        /// Bytes received.
        bytes: usize,
        /// Rows announced.
        count: u32,
        /// Bytes that the rows need.
        expected: usize,
    },
    /// The end came before all rows.
    #[error("hand-off ended early: {layer} has {received} of {prompt_tokens} positions")]
    Incomplete {
        /// The first layer that lacks rows.
        layer: LayerId,
        /// Positions received of it.
        received: u32,
        /// Positions of the prompt.
        prompt_tokens: u32,
    },
    /// The first token cannot be one.
    #[error(
        "hand-off: first token {token} at position {position}, expected below {vocab_size} at {expected}"
    )]
    FirstToken {
        /// The token.
        token: TokenId,
        /// Its position.
        position: Position,
        /// Entries of the vocabulary.
        vocab_size: usize,
        /// The position that is due.
        expected: Position,
    },
    /// The other side went away before the end.
    #[error("hand-off: the peer went away after {rows} rows")]
    Aborted {
        /// Rows that had passed.
        rows: u64,
    },
    /// Nothing moved for too long.
    #[error("hand-off: no progress for {waited:?} after {rows} rows")]
    Stalled {
        /// How long.
        waited: Duration,
        /// Rows that had passed.
        rows: u64,
    },
    /// No prefill worker came.
    #[error("hand-off: no prefill worker began within {waited:?}")]
    NeverBegun {
        /// How long was waited.
        waited: Duration,
    },
    /// The cache refused a transfer.
    #[error("hand-off, {layer}: {source}")]
    Cache {
        /// The layer.
        layer: LayerId,
        /// What the backend said.
        source: OpsError,
    },
    /// The engine has stopped.
    #[error("hand-off: the engine has stopped")]
    Stopped,
}
