//! Grouping, as a pure function: chosen experts + placement + a chooser of copies → one frame per shard,
//! and the map that says which pair each answer row is of.
//!
//! Invariants (property-tested): every pair is in exactly one frame or in `unplaced`; a frame holds each
//! token row once however many of its slots want it; pairs ascend by (slot, token); no frame exceeds its
//! limits. Which copy computes a pair never changes its bits, so the chooser is free.

use cadre_ops::{EncodedRows, HostRows, RowFormat};
use cadre_types::{LayerId, LogicalExpert, Placement, ShardIndex, placement::Replica};

use crate::frame::{MAX_FRAME_BYTES, MAX_FRAME_TOKENS};

/// Tokens of one expert that stay together when copies share its load. An expert's weights are read once
/// per grouped GEMM, whatever the rows: below some 4 rows (CPU, 15 GB/s beside 100 GFLOP/s) to 200 rows
/// (H200, 4.8 TB/s beside 2 PFLOP/s) the read dominates, and a second copy would only double it. 64 keeps
/// decode batches whole and still spreads a prefill chunk.
pub const RUN_TOKENS: usize = 64;

/// A row that wants an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Row of the activations at hand.
    pub row: u32,
    /// Logical expert.
    pub expert: LogicalExpert,
    /// Row of the result.
    pub target: u32,
}

/// Row sizes of one exchange, which decide where a frame is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLimits {
    /// Bytes of one dispatched row, scales included.
    pub row_bytes: usize,
    /// Bytes of one answer row.
    pub answer_bytes: usize,
    /// Most tokens.
    pub max_tokens: usize,
    /// Most bytes of a frame, and of its answer.
    pub max_bytes: usize,
}

impl FrameLimits {
    /// The limits of the wire for rows of these formats.
    pub fn of(dispatch: RowFormat, combine: RowFormat, hidden: usize) -> Self {
        Self {
            row_bytes: dispatch.row_bytes(hidden) + 4 * dispatch.row_scales(hidden),
            answer_bytes: combine.row_bytes(hidden),
            max_tokens: MAX_FRAME_TOKENS,
            max_bytes: MAX_FRAME_BYTES,
        }
    }

    fn most_tokens(&self) -> usize {
        self.max_tokens.min(self.max_bytes / self.row_bytes.max(1))
    }

    /// Bytes of the rows of the largest frame.
    pub fn largest_frame(&self) -> usize {
        self.most_tokens() * self.row_bytes
    }

    /// Bytes of the largest answer to a model that sends each token to so many experts.
    pub fn largest_answer(&self, experts_per_token: usize) -> usize {
        self.max_bytes.min(self.most_tokens() * experts_per_token * self.answer_bytes)
    }

    /// Bytes of the largest message with such a frame: its rows, two integers of at most five bytes for each pair,
    /// and the rest.
    pub fn largest_message(&self, experts_per_token: usize) -> usize {
        /// Stamp, lengths and numbers.
        const REST: usize = 4 << 10;
        self.largest_frame() + 10 * self.most_tokens() * experts_per_token + REST
    }

    /// Whether a frame of this many tokens and pairs fits. A frame of one token always does.
    fn fits(&self, tokens: usize, pairs: usize) -> bool {
        tokens <= 1
            || (tokens <= self.max_tokens
                && tokens * self.row_bytes + 8 * pairs <= self.max_bytes
                && pairs * self.answer_bytes <= self.max_bytes)
    }
}

/// One frame to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedFrame {
    /// Where it goes.
    pub shard: ShardIndex,
    /// Rows of the activations to gather, ascending, each once.
    pub rows: Vec<u32>,
    /// Index into `rows` of each pair.
    pub pair_tokens: Vec<u32>,
    /// Slot of each pair.
    pub pair_slots: Vec<u32>,
    /// Result row of each pair.
    pub targets: Vec<u32>,
}

/// All frames of one exchange.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// By ascending shard; a shard has more than one only where a limit splits it.
    pub frames: Vec<PlannedFrame>,
    /// Pairs whose expert has no usable copy.
    pub unplaced: Vec<Pair>,
}

/// A pair that has its slot.
#[derive(Clone, Copy, Debug)]
struct Placed {
    slot: u16,
    row: u32,
    target: u32,
}

/// Scratch of [`Planner::plan`], kept from step to step.
#[derive(Debug, Default)]
pub struct Planner {
    /// Pairs of each expert, then their first position in `by_expert`.
    counts: Vec<u32>,
    by_expert: Vec<Pair>,
    by_shard: Vec<Vec<Placed>>,
    /// Per row: its index among the gathered rows of the frame being built.
    local: Vec<u32>,
}

/// No index.
const ABSENT: u32 = u32::MAX;

impl Planner {
    /// Plans one exchange. An expert that the placement does not know has no copies. `choose` is asked once
    /// per (expert, run of at most [`RUN_TOKENS`] tokens) and names one of the copies, or none.
    pub fn plan(
        &mut self,
        layer: LayerId,
        placement: &Placement,
        pairs: &[Pair],
        limits: FrameLimits,
        mut choose: impl FnMut(LogicalExpert, &[Replica], usize) -> Option<usize>,
    ) -> Plan {
        let mut plan = Plan::default();
        self.sort_by_expert(pairs);
        self.by_shard.iter_mut().for_each(Vec::clear);
        self.by_shard.resize_with(placement.num_shards(), Vec::new);

        let mut rest = self.by_expert.as_slice();
        while let Some(first) = rest.first() {
            let expert = first.expert;
            let (mut of_expert, others) =
                rest.split_at(rest.iter().take_while(|pair| pair.expert == expert).count());
            rest = others;
            let replicas = placement.replicas(layer, expert);
            // One copy computes everything anyway; several get even runs, so that none has a stub.
            let runs = if replicas.len() > 1 { of_expert.len().div_ceil(RUN_TOKENS) } else { 1 };
            for run in (1..=runs).rev() {
                let (now, later) = of_expert.split_at(of_expert.len().div_ceil(run));
                of_expert = later;
                let chosen = choose(expert, replicas, now.len()).and_then(|at| replicas.get(at));
                match chosen {
                    Some(replica) => {
                        self.by_shard[replica.shard.index()].extend(now.iter().map(|pair| Placed {
                            slot: replica.slot.0,
                            row: pair.row,
                            target: pair.target,
                        }))
                    }
                    None => plan.unplaced.extend_from_slice(now),
                }
            }
        }

        let rows = pairs.iter().map(|pair| pair.row as usize + 1).max().unwrap_or(0);
        self.local.clear();
        self.local.resize(rows, ABSENT);
        for (shard, placed) in self.by_shard.iter_mut().enumerate() {
            if !placed.is_empty() {
                placed.sort_unstable_by_key(|pair| (pair.slot, pair.row));
                let shard = ShardIndex(shard as u16);
                frames_of(shard, placed, &mut self.local, limits, &mut plan.frames);
            }
        }
        plan
    }

    /// Stable counting sort: pairs of an expert stay in token order.
    fn sort_by_expert(&mut self, pairs: &[Pair]) {
        let experts = pairs.iter().map(|pair| pair.expert.index() + 1).max().unwrap_or(0);
        self.counts.clear();
        self.counts.resize(experts + 1, 0);
        for pair in pairs {
            self.counts[pair.expert.index() + 1] += 1;
        }
        for at in 0..experts {
            self.counts[at + 1] += self.counts[at];
        }
        let filler = Pair { row: 0, expert: LogicalExpert(0), target: 0 };
        self.by_expert.clear();
        self.by_expert.resize(pairs.len(), filler);
        for pair in pairs {
            let next = &mut self.counts[pair.expert.index()];
            self.by_expert[*next as usize] = *pair;
            *next += 1;
        }
    }
}

/// Cuts one shard's pairs (sorted by slot, row) into frames by ranges of rows. `local` is all
/// [`ABSENT`] before and after.
fn frames_of(
    shard: ShardIndex,
    placed: &[Placed],
    local: &mut [u32],
    limits: FrameLimits,
    frames: &mut Vec<PlannedFrame>,
) {
    // First pass: pairs per row, so that rows can be dealt to frames in ascending order.
    for pair in placed {
        let count = &mut local[pair.row as usize];
        *count = if *count == ABSENT { 1 } else { *count + 1 };
    }
    let first = frames.len();
    let open = |frames: &mut Vec<PlannedFrame>| {
        frames.push(PlannedFrame {
            shard,
            rows: Vec::new(),
            pair_tokens: Vec::new(),
            pair_slots: Vec::new(),
            targets: Vec::new(),
        });
    };
    open(frames);
    let mut pairs = 0;
    for (row, count) in local.iter_mut().enumerate().filter(|(_, count)| **count != ABSENT) {
        let tokens = frames.last().map_or(0, |frame| frame.rows.len());
        pairs += *count as usize;
        if !limits.fits(tokens + 1, pairs) {
            pairs = *count as usize;
            open(frames);
        }
        if let Some(frame) = frames.last_mut() {
            *count = frame.rows.len() as u32;
            frame.rows.push(row as u32);
        }
    }
    // Second pass: pairs to the frame that has their row. Frames hold ascending, disjoint ranges of rows.
    let starts: Vec<u32> = frames[first..].iter().map(|frame| frame.rows[0]).collect();
    for pair in placed {
        let at = first + starts.partition_point(|&start| start <= pair.row) - 1;
        let frame = &mut frames[at];
        frame.pair_tokens.push(local[pair.row as usize]);
        frame.pair_slots.push(u32::from(pair.slot));
        frame.targets.push(pair.target);
    }
    for pair in placed {
        local[pair.row as usize] = ABSENT;
    }
}

/// Rows that follow each other, as slices: nothing is copied. `None` if there are gaps.
pub fn slice(source: &EncodedRows, rows: &[u32]) -> Option<EncodedRows> {
    let (&first, &last) = (rows.first()?, rows.last()?);
    if (last - first) as usize + 1 != rows.len() {
        return None;
    }
    let cut =
        |bytes: &bytes::Bytes, width: usize| bytes.slice(first as usize * width..(last as usize + 1) * width);
    let (format, cols) = (source.format, source.cols);
    let data = cut(&source.data, format.row_bytes(cols));
    let scales = cut(&source.scales, 4 * format.row_scales(cols));
    Some(EncodedRows { format, rows: rows.len(), cols, data, scales })
}

/// Appends the given rows of `source` to `data` and `scales`.
pub fn gather(
    source: HostRows<'_>,
    rows: &[u32],
    data: &mut impl bytes::BufMut,
    scales: &mut impl bytes::BufMut,
) {
    let width = source.format.row_bytes(source.cols);
    let scale_width = 4 * source.format.row_scales(source.cols);
    gather_width(source.data, width, rows, data);
    gather_width(source.scales, scale_width, rows, scales);
}

fn gather_width(source: &[u8], width: usize, rows: &[u32], out: &mut impl bytes::BufMut) {
    for &row in rows {
        let start = row as usize * width;
        out.put_slice(&source[start..start + width]);
    }
}

#[cfg(test)]
mod tests;
