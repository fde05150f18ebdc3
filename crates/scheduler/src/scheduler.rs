//! The scheduler: owns every sequence of a worker and the pool of pages they live in.
//!
//! Sequences are kept in one map ordered by id. Ids are given in order of submission and admission is
//! FIFO, so the map's order is also the queue's order and the order of age; there is no second list to
//! keep consistent. Every call walks at most all sequences, whose number is bounded by `max_waiting` and,
//! since each admitted one holds a page, by the pool: microseconds beside a step of milliseconds.
//!
//! Edges: an empty scheduler plans empty steps; planning twice without a commit gives the same rows; a
//! sequence cancelled while its step runs is gone at once (its commit is refused as unknown), and its
//! pages can be given away only by the next plan, which the engine makes after the step.

use std::collections::BTreeMap;

use cadre_types::{SequenceId, TokenId};

use crate::{
    config::SchedulerConfig,
    error::SchedulerError,
    pages::{PagePool, PagesExhausted},
    plan::{CommitKind, DecodeStep, PrefillChunk, SchedulerStats, StepPlan},
    sequence::{NewSequence, Sequence, SequenceState},
};

/// The sequences and pages of one worker.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: PagePool,
    sequences: BTreeMap<SequenceId, Sequence>,
    next_id: u64,
    /// Plans made so far.
    step: u64,
}

impl Scheduler {
    /// An empty scheduler with all pages free.
    pub fn new(config: SchedulerConfig) -> Result<Self, SchedulerError> {
        config.check()?;
        Ok(Self {
            pool: PagePool::new(config.pages),
            config,
            sequences: BTreeMap::new(),
            next_id: 0,
            step: 0,
        })
    }

    /// The limits.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// A sequence that has neither finished nor been cancelled.
    pub fn sequence(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// Every sequence, oldest first.
    pub fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.sequences.values()
    }

    /// How full the scheduler is.
    pub fn stats(&self) -> SchedulerStats {
        let mut stats = SchedulerStats {
            pages_free: self.pool.free(),
            pages_used: self.pool.total() - self.pool.free(),
            pages_total: self.pool.total(),
            ..SchedulerStats::default()
        };
        for sequence in self.sequences.values() {
            *match sequence.state {
                SequenceState::Waiting => &mut stats.waiting,
                SequenceState::Prefilling { .. } => &mut stats.prefilling,
                SequenceState::AwaitingKv => &mut stats.awaiting_kv,
                SequenceState::Decoding => &mut stats.decoding,
                SequenceState::Held => &mut stats.held,
            } += 1;
        }
        stats
    }

    // --- arrivals ----------------------------------------------------------------------------------

    /// Puts a sequence at the end of the waiting queue; the next plans admit it.
    pub fn submit(&mut self, new: NewSequence) -> Result<SequenceId, SchedulerError> {
        let sequence = Sequence::new(SequenceId(self.next_id), new)?;
        if sequence.reservation() > self.pool.total() {
            return Err(SchedulerError::NeverFits {
                tokens: sequence.reservation_tokens(),
                pages: sequence.reservation(),
                total: self.pool.total(),
            });
        }
        let (waiting, bound) = (self.stats().waiting, self.config.max_waiting);
        if waiting >= bound {
            return Err(SchedulerError::QueueFull { waiting, bound });
        }
        let id = sequence.id;
        self.next_id += 1;
        self.sequences.insert(id, sequence);
        Ok(id)
    }

    /// The KV of the prompt has arrived in the sequence's pages, with the token sampled from it: the
    /// sequence decodes from the next plan on.
    pub fn handoff_complete(&mut self, id: SequenceId, first_token: TokenId) -> Result<(), SchedulerError> {
        let step = self.step;
        self.get("handoff_complete", id)?.receive_kv(first_token, step)
    }

    // --- the step ----------------------------------------------------------------------------------

    /// Admits what fits and chooses the rows of the next step. Replaces the plan before: rows of it that
    /// were not committed are planned again.
    pub fn plan(&mut self) -> StepPlan {
        self.step += 1;
        self.sequences.values_mut().for_each(Sequence::forget_plan);
        let (admitted, blocked) = self.admit();
        let decode = self.plan_decode();
        let prefill = self.plan_prefill(self.config.prefill_budget(decode.len()));
        StepPlan { admitted, blocked, decode, prefill }
    }

    /// Records the outcome of a row or chunk of the last plan.
    pub fn commit(&mut self, id: SequenceId, commit: CommitKind) -> Result<(), SchedulerError> {
        let step = self.step;
        self.get("commit", id)?.commit(commit, step)
    }

    /// Gives pages to waiting sequences, oldest first, until one does not fit.
    fn admit(&mut self) -> (Vec<SequenceId>, Option<PagesExhausted>) {
        let mut admitted = Vec::new();
        let waiting = self.sequences.values_mut().filter(|sequence| sequence.state == SequenceState::Waiting);
        for sequence in waiting {
            match self.pool.allocate(sequence.reservation()) {
                Ok(block_table) => sequence.admit(block_table),
                Err(exhausted) => return (admitted, Some(exhausted)),
            }
            admitted.push(sequence.id);
        }
        (admitted, None)
    }

    /// Rows for the sequences that decode: all, or if they are too many those that have waited longest.
    /// Each of `n` sequences has its turn within `ceil(n / max_decode_rows)` committed steps.
    fn plan_decode(&mut self) -> Vec<DecodeStep> {
        let mut ready: Vec<&mut Sequence> =
            self.sequences.values_mut().filter(|sequence| sequence.wants_row()).collect();
        if ready.len() > self.config.max_decode_rows {
            ready.sort_by_key(|sequence| (sequence.last_step, sequence.id));
            ready.truncate(self.config.max_decode_rows);
            ready.sort_by_key(|sequence| sequence.id);
        }
        ready.into_iter().filter_map(Sequence::plan_row).collect()
    }

    /// Prompt chunks, oldest sequence first, until the budget is spent.
    fn plan_prefill(&mut self, mut budget: usize) -> Vec<PrefillChunk> {
        let mut chunks = Vec::new();
        for sequence in self.sequences.values_mut() {
            if budget == 0 {
                break;
            }
            if let Some(chunk) = sequence.plan_chunk(budget.min(self.config.max_chunk_tokens)) {
                budget -= chunk.len;
                chunks.push(chunk);
            }
        }
        chunks
    }

    // --- departures --------------------------------------------------------------------------------

    /// Ends a sequence in any state and frees its pages: it has its tokens, its hand-off is confirmed or failed,
    /// it was cancelled. Returns whether it existed. Ids are never reused, so KV that still arrives for it names
    /// no sequence.
    pub fn end(&mut self, id: SequenceId) -> bool {
        self.remove(id).is_some()
    }

    /// Sequences whose deadline is at or before `now`, in any state, oldest first. They stay until the
    /// caller ends them.
    pub fn expired(&self, now: u64) -> Vec<SequenceId> {
        self.sequences
            .values()
            .filter(|sequence| sequence.deadline().is_some_and(|deadline| deadline <= now))
            .map(Sequence::id)
            .collect()
    }

    /// The earliest deadline: how long an engine without rows to compute may sleep.
    pub fn next_deadline(&self) -> Option<u64> {
        self.sequences.values().filter_map(Sequence::deadline).min()
    }

    fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&id)?;
        self.pool.release(std::mem::take(&mut sequence.block_table));
        Some(sequence)
    }

    fn get(&mut self, operation: &'static str, id: SequenceId) -> Result<&mut Sequence, SchedulerError> {
        self.sequences.get_mut(&id).ok_or(SchedulerError::Unknown { operation, id })
    }
}

#[cfg(test)]
mod tests;
