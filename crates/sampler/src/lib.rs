//! From a row of logits to one token: penalties, filters, counter-based random numbers, logprobs.
//!
//! A sample is a pure function of (logits, parameters, history, seed, position): of nothing that a
//! cluster or a batch could change. What makes it so (docs/sampling.md has the whole account):
//! - the random number of a position is Philox4x32-10 of (seed, position), not the next of a sequence;
//! - weights are integers (module `weight`), so their sums are exact in any order;
//! - candidates are ordered by (logit descending, id ascending), a total order, so a partial selection
//!   gives the same prefix as a full sort.
//!
//! A device that holds the logits does the long part of a draw there and leaves the short one to the same code:
//! [`penalty_changes`], [`Found`] and [`draw_from`], [`LogSoftmax`].
//!
//! **Speculation.** The token of a position does not depend on a draft: sample the target at each
//! drafted position (with the drafts before it in the history) and accept a draft as long as it is
//! equal to the sample; the first sample that differs is the next token. A draft `d` is accepted with
//! probability `p(d)`, and otherwise the token is drawn from `p` without `d`: that is rejection
//! sampling with a one-hot proposal, and the text is the one written without speculation.

mod found;
mod logprobs;
mod penalties;
mod philox;
mod ranking;
mod sampler;
mod weight;

pub use found::{Found, draw_from, first_candidates, needs_total, total_weight};
pub use logprobs::{LogSoftmax, TokenLogprob};
pub use penalties::{PenaltyChange, penalty_changes};
pub use philox::{philox4x32_10, random_bits};
pub use ranking::Candidate;
pub use sampler::{History, Sample, SampleError, Sampler};
