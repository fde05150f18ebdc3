//! Sequences, KV pages and continuous batching: pure decisions, no I/O.
//!
//! Owned by the engine thread of one worker, which loops: [`Scheduler::plan`] → compute the rows of the
//! [`StepPlan`] → [`Scheduler::commit`] each of them → [`Scheduler::end`] what has all it needs. This crate
//! decides *which rows run together and where their KV lives*; it refuses to know the model, the
//! sampler, time (deadlines come in as plain nanoseconds) and the network. Its answers depend on nothing
//! but the calls made before, so a run can be replayed; and no answer changes a sequence's text, because
//! KV and logits of a position do not depend on the rows beside it (docs/numerics.md).
//!
//! Read [`Scheduler`] first, then [`Sequence`]. The rules, each tested as a property:
//! - **Reservation.** A sequence is given all the pages it can ever need when it is admitted: prompt +
//!   `max_tokens`, or the prompt alone if it leaves after its first token. A running sequence therefore
//!   never lacks a page, and there is no preemption.
//! - **FIFO, head of line.** If the oldest waiting sequence does not fit, nothing overtakes it. Large
//!   requests cannot starve; the price is pages left idle while it waits. What can never fit is refused.
//! - **Decode first, bounded prefill.** Every step carries the decode rows, then prompt chunks up to a
//!   budget that is smaller when there are decode rows, so that one long prompt delays every token of
//!   the others by a bounded amount.
//! - **Nothing moves before commit.** A step that failed is planned again, and is the same.
//!
//! Why no preemption yet: it needs the KV of emitted tokens to be rebuilt in decode form (the KV of a
//! position is a pure function of tokens and prompt length), which arrives with the teacher-forced
//! replay that also serves a lost decode worker. Then `Sequence::reservation` shrinks to what is in use,
//! a sequence that cannot grow sends the youngest one back to the head of the queue, and a
//! `Replaying` state joins [`SequenceState`]. Until then an unused tail of `max_tokens` costs pages.
//!
//! Size: nano-vllm's scheduler and block manager are 212 lines. The difference here is types and words
//! for what that code asserts or leaves out: typed refusals, a bounded queue, deadlines and cancellation,
//! the two hand-off kinds, chunks beside decode rows, fair rotation, and documented invariants. What it
//! has and this has not: the prefix cache and preemption.

mod config;
mod error;
mod pages;
mod plan;
mod scheduler;
mod sequence;

pub use config::SchedulerConfig;
pub use error::SchedulerError;
pub use pages::{BlockTable, PAGE_TOKENS, PagesExhausted, pages_for};
pub use plan::{CommitKind, DecodeStep, PrefillChunk, SchedulerStats, StepPlan};
pub use scheduler::Scheduler;
pub use sequence::{NewSequence, Sequence, SequenceKind, SequenceState};
