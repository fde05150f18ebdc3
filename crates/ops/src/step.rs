//! What a step and a pass are made from, and what the host keeps of a step.

use cadre_sampler::History;
use cadre_types::{PageId, Position, SamplingParams, TokenId};

use crate::{check, error::OpsError, shape::KvLayout};

/// In which form the rows of a segment attend. Prompt positions are always computed in naive form and
/// generated ones in absorbed form, so that a position's KV is a function of (tokens, prompt length).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttentionForm {
    /// Keys and values expanded from the cached latents: chunks of a prompt.
    Naive,
    /// Queries absorbed into the latent space: generated tokens.
    Absorbed,
}

/// Consecutive rows of a step that are consecutive positions of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct StepSegment<'a> {
    /// The form.
    pub form: AttentionForm,
    /// Rows; may be 0.
    pub rows: usize,
    /// Position of the first row.
    pub first_position: Position,
    /// Pages of the sequence; entry `i` holds positions `64 i .. 64 i + 64`. Reaches the last position at
    /// least.
    pub block_table: &'a [PageId],
}

/// One step, as the host describes it. Rows are numbered through the segments in order.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepRows<'a> {
    /// One token per row.
    pub ids: &'a [TokenId],
    /// The rows by sequence. Empty for a step without attention (a benchmark, a test of the gate).
    pub segments: &'a [StepSegment<'a>],
    /// Rows whose logits are wanted, ascending.
    pub wanted: &'a [u32],
}

/// What the host keeps of a step: sizes and bounds, so that each operation's check is a few comparisons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepInfo {
    /// Rows.
    pub rows: usize,
    /// Rows that belong to a segment: 0 or all.
    pub attending: usize,
    /// Wanted rows.
    pub wanted: usize,
    /// One more than the largest token id.
    pub ids_end: usize,
    /// One more than the largest position.
    pub positions_end: usize,
    /// One more than the largest page that a position of the step or before it lies in.
    pub pages_end: usize,
    /// Whether any row attends in naive form.
    pub naive: bool,
    /// Whether any row attends in absorbed form.
    pub absorbed: bool,
}

/// Consecutive pairs of a pass that go through one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowGroup {
    /// Slot in the expert table.
    pub expert: usize,
    /// Pairs; may be 0.
    pub rows: usize,
}

/// One pass of a shard: pairs of (row, expert), in groups by expert.
#[derive(Clone, Copy, Debug, Default)]
pub struct PassRows<'a> {
    /// Per pair its row of the received rows; a row may serve several pairs.
    pub input: &'a [u32],
    /// Per pair its row of the results; none twice.
    pub output: &'a [u32],
    /// The pairs by expert: group after group, together all pairs.
    pub groups: &'a [RowGroup],
}

/// One token to draw.
#[derive(Clone, Copy, Debug)]
pub struct SampleRow<'a> {
    /// Row of the logits.
    pub row: usize,
    /// What the request asks for.
    pub params: &'a SamplingParams,
    /// The tokens that penalties look at.
    pub history: History<'a>,
    /// Index of the token in the sequence, prompt included.
    pub position: Position,
}

impl StepInfo {
    /// Checks a step and measures it. Every backend's [`Backend::begin_step`](crate::Backend::begin_step)
    /// starts with this.
    pub fn of(op: &'static str, step: &StepRows<'_>) -> Result<Self, OpsError> {
        let rows = step.ids.len();
        let attending = step.segments.iter().map(|segment| segment.rows).sum();
        if attending != 0 || !step.segments.is_empty() {
            check::equal(op, "rows of the segments", attending, rows)?;
        }
        for pair in step.wanted.windows(2) {
            check::at_least(
                op,
                "a wanted row after its predecessor",
                pair[1] as usize,
                pair[0] as usize + 1,
            )?;
        }
        if let Some(&last) = step.wanted.last() {
            check::index(op, "wanted row", last as usize, rows)?;
        }
        let mut info = Self {
            rows,
            attending,
            wanted: step.wanted.len(),
            ids_end: step.ids.iter().max().map_or(0, |id| *id as usize + 1),
            ..Self::default()
        };
        for segment in step.segments.iter().filter(|segment| segment.rows > 0) {
            info.take(op, segment)?;
        }
        distinct_places(op, step.segments)?;
        Ok(info)
    }

    fn take(&mut self, op: &'static str, segment: &StepSegment<'_>) -> Result<(), OpsError> {
        let end = (segment.first_position as usize).saturating_add(segment.rows);
        // Positions are 32 bits wide.
        check::at_least(op, "last position", u32::MAX as usize, end)?;
        let pages = end.div_ceil(KvLayout::PAGE_TOKENS);
        check::index(op, "page of the block table", pages - 1, segment.block_table.len())?;
        self.positions_end = self.positions_end.max(end);
        let largest = segment.block_table[..pages].iter().map(|page| page.index() + 1).max();
        self.pages_end = self.pages_end.max(largest.unwrap_or(0));
        match segment.form {
            AttentionForm::Naive => self.naive = true,
            AttentionForm::Absorbed => self.absorbed = true,
        }
        Ok(())
    }
}

/// No two rows of a step may be stored in one place: which of them stayed would depend on the device.
fn distinct_places(op: &'static str, segments: &[StepSegment<'_>]) -> Result<(), OpsError> {
    // Per page that is written: (page, first offset, end).
    let mut written: Vec<(PageId, usize, usize)> = Vec::new();
    for segment in segments {
        let mut position = segment.first_position as usize;
        let end = position + segment.rows;
        while position < end {
            let offset = position % KvLayout::PAGE_TOKENS;
            let count = (KvLayout::PAGE_TOKENS - offset).min(end - position);
            written.push((segment.block_table[position / KvLayout::PAGE_TOKENS], offset, offset + count));
            position += count;
        }
    }
    written.sort_unstable();
    written.windows(2).filter(|pair| pair[0].0 == pair[1].0).try_for_each(|pair| {
        check::at_least(op, "offset in a page after that of another row", pair[1].1, pair[0].2)
    })
}

/// Checks a pass: groups add up to the pairs, inputs exist, outputs are each written once.
pub fn check_pass(op: &'static str, pass: &PassRows<'_>) -> Result<PassInfo, OpsError> {
    let pairs = pass.input.len();
    check::equal(op, "output rows", pass.output.len(), pairs)?;
    let grouped = pass.groups.iter().fold(0_usize, |sum, group| sum.saturating_add(group.rows));
    check::equal(op, "pairs of the groups", grouped, pairs)?;
    let mut seen = vec![0_u64; pairs.div_ceil(64)];
    for &row in pass.output {
        let row = row as usize;
        // Of `pairs` distinct rows at least one is `pairs - 1` or more; results lie without gaps.
        check::index(op, "output row", row, pairs)?;
        if seen[row / 64] & 1 << (row % 64) != 0 {
            let what = "output row, named twice:";
            return Err(OpsError::Range { op, what, index: row, limit: pairs });
        }
        seen[row / 64] |= 1 << (row % 64);
    }
    Ok(PassInfo {
        pairs,
        input_end: pass.input.iter().max().map_or(0, |row| *row as usize + 1),
        experts_end: pass.groups.iter().map(|group| group.expert + 1).max().unwrap_or(0),
    })
}

/// What the host keeps of a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassInfo {
    /// Pairs; results are rows `0..pairs`.
    pub pairs: usize,
    /// One more than the largest input row.
    pub input_end: usize,
    /// One more than the largest slot.
    pub experts_end: usize,
}
