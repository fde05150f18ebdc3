//! The scheduler's limits, their defaults with their arithmetic, and the checks that make them usable.

use crate::{error::SchedulerError, pages::PAGE_TOKENS};

/// Most decode rows of a step. Beyond about 64 rows a CPU step is bound by arithmetic, so that more rows
/// add latency and no throughput.
const MAX_DECODE_ROWS: usize = 64;
/// Most rows of a step: enough for a matrix product at full speed, and the bound of every activation buffer.
const MAX_STEP_TOKENS: usize = 512;
/// Half a step, so that a long prompt leaves room for the one behind it.
const MAX_CHUNK_TOKENS: usize = MAX_STEP_TOKENS / 2;
/// Two full decode batches of extra rows: a step that carries prompt work beside decode rows takes at most
/// about three times as long as the decode rows alone.
const PREFILL_TOKENS_WITH_DECODE: usize = 2 * MAX_DECODE_ROWS;
/// Full batches that may wait. A batch of 256-token answers at 50 ms a step turns over in 13 s; the last
/// of four waiting batches starts within about a minute, which is as long as a client is likely to stay.
/// Longer queues belong to the router, which can choose another worker.
const WAITING_BATCHES: usize = 4;

/// Limits of one scheduler. [`SchedulerConfig::with_pages`] gives the defaults; fields may be changed
/// before [`crate::Scheduler::new`] checks them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Pages of the KV pool.
    pub pages: u32,
    /// Most sequences in the waiting queue. Default: four times `max_decode_rows`.
    pub max_waiting: usize,
    /// Most decode rows of a step; further running sequences take turns.
    pub max_decode_rows: usize,
    /// Most rows of a step, decode rows and prompt tokens together. More than `max_decode_rows`, so that
    /// prompts always advance.
    pub max_step_tokens: usize,
    /// Most prompt tokens of one sequence in a step.
    pub max_chunk_tokens: usize,
    /// Most prompt tokens, over all sequences, of a step that has decode rows.
    pub prefill_tokens_with_decode: usize,
}

impl SchedulerConfig {
    /// The defaults for a pool of `pages` pages.
    pub fn with_pages(pages: u32) -> Self {
        Self {
            pages,
            max_waiting: WAITING_BATCHES * MAX_DECODE_ROWS,
            max_decode_rows: MAX_DECODE_ROWS,
            max_step_tokens: MAX_STEP_TOKENS,
            max_chunk_tokens: MAX_CHUNK_TOKENS,
            prefill_tokens_with_decode: PREFILL_TOKENS_WITH_DECODE,
        }
    }

    /// Refuses limits under which some sequence could never run.
    pub fn check(&self) -> Result<(), SchedulerError> {
        // Positions are u32; a pool that one sequence could fill beyond them is refused here, so that no
        // later conversion can fail.
        let most_pages = u32::MAX as usize / PAGE_TOKENS;
        let rules = [
            ("pages", self.pages as usize, (1, most_pages)),
            ("max_waiting", self.max_waiting, (1, usize::MAX)),
            ("max_decode_rows", self.max_decode_rows, (1, usize::MAX - 1)),
            ("max_step_tokens", self.max_step_tokens, (self.max_decode_rows.saturating_add(1), usize::MAX)),
            ("max_chunk_tokens", self.max_chunk_tokens, (1, usize::MAX)),
            ("prefill_tokens_with_decode", self.prefill_tokens_with_decode, (1, usize::MAX)),
        ];
        match rules.into_iter().find(|(_, value, (least, most))| value < least || value > most) {
            Some((field, value, (least, most))) => Err(SchedulerError::Config { field, value, least, most }),
            None => Ok(()),
        }
    }

    /// Prompt tokens that may join `decode_rows` decode rows in a step; at least 1.
    pub(crate) fn prefill_budget(&self, decode_rows: usize) -> usize {
        match decode_rows {
            0 => self.max_step_tokens,
            rows => self.prefill_tokens_with_decode.min(self.max_step_tokens - rows),
        }
    }
}
