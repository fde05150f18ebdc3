//! One exchange under way: its frames, its stranded pairs and the rows that have arrived.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use cadre_ops::{
    DispatchBatch, EncodedRows, ExchangeError, ExchangeTicket, ExpertChunk, ExpertRows, RowFormat,
};
use cadre_types::{LayerId, LogicalExpert, PlacementEpoch, ShardIndex};

use crate::{
    frame::DispatchFrame,
    plan::{Pair, gather},
};

/// How far a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Sent, no answer yet.
    Waiting,
    /// Its rows have arrived.
    Arrived,
    /// Failed; its pairs went elsewhere or are stranded.
    Failed,
    /// Given up, but an answer would still be right for pairs that are stranded.
    Late,
}

/// A frame that was sent. The frame is kept for a retry; its payload is shared with the link.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) shard: ShardIndex,
    pub(super) frame: DispatchFrame,
    pub(super) targets: Vec<u32>,
    /// Tokens that count as outstanding on the shard: all, and none once answered or given up.
    pub(super) outstanding: usize,
    pub(super) sent: Instant,
    /// After how long without an answer the shard is slow; `None` if that cannot be said, or was said.
    pub(super) slow_after: Option<Duration>,
    pub(super) progress: Progress,
}

impl InFlight {
    pub(super) fn new(shard: ShardIndex, frame: DispatchFrame, targets: Vec<u32>, sent: Instant) -> Self {
        let outstanding = targets.len();
        Self { shard, frame, targets, outstanding, sent, slow_after: None, progress: Progress::Waiting }
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.progress == Progress::Waiting
    }
}

/// Pairs without a usable copy, with the rows they need.
#[derive(Debug)]
pub(super) struct Stranded {
    pub(super) rows: EncodedRows,
    /// Indices of `rows`.
    pub(super) pairs: Vec<Pair>,
    /// A frame whose late answer has these pairs.
    pub(super) late: Option<u64>,
}

impl Stranded {
    /// Copies the rows that `pairs` need: stranding is rare, and keeping a whole frame for one row is not.
    pub(super) fn new(rows: &EncodedRows, pairs: &[Pair], late: Option<u64>) -> Self {
        let mut wanted: Vec<u32> = pairs.iter().map(|pair| pair.row).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let (mut data, mut scales) = (Vec::new(), Vec::new());
        gather(rows.as_host_rows(), &wanted, &mut data, &mut scales);
        let local = |row: u32| wanted.partition_point(|&other| other < row) as u32;
        let pairs = pairs.iter().map(|pair| Pair { row: local(pair.row), ..*pair }).collect();
        let (count, data, scales) = (wanted.len(), data.into(), scales.into());
        let rows = EncodedRows { rows: count, data, scales, ..rows.clone() };
        Self { rows, pairs, late }
    }
}

/// One exchange.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) ticket: ExchangeTicket,
    pub(super) layer: LayerId,
    pub(super) hidden: usize,
    pub(super) combine: RowFormat,
    pub(super) topk_idx: Vec<u16>,
    /// Ascending by sequence number.
    pub(super) frames: Vec<InFlight>,
    pub(super) stranded: Vec<Stranded>,
    pub(super) fatal: Option<ExchangeError>,
    /// The first failure and the last one, in words; the causes of an error.
    first_cause: Option<String>,
    last_failure: String,
    first_failure: Option<Instant>,
    /// Since when its owner waits for answers: before that, nobody may have looked at the sockets.
    awaited: Option<Instant>,
    /// Results that were not finite, and whose.
    not_finite: Vec<(u32, ShardIndex)>,
    /// Rows of answers, not yet handed on.
    arrived: Vec<ExpertChunk>,
}

impl Step {
    pub(super) fn new(ticket: ExchangeTicket, batch: &DispatchBatch<'_>, combine: RowFormat) -> Self {
        Self {
            ticket,
            layer: batch.layer,
            hidden: batch.activations.cols,
            combine,
            topk_idx: batch.topk_idx.to_vec(),
            frames: Vec::new(),
            stranded: Vec::new(),
            fatal: None,
            first_cause: None,
            last_failure: String::new(),
            first_failure: None,
            awaited: None,
            not_finite: Vec::new(),
            arrived: Vec::new(),
        }
    }

    pub(super) fn has_frame(&self, sequence: u64) -> bool {
        self.find(sequence).is_some()
    }

    fn find(&self, sequence: u64) -> Option<usize> {
        self.frames.binary_search_by_key(&sequence, |frame| frame.frame.sequence).ok()
    }

    pub(super) fn frame_mut(&mut self, sequence: u64) -> Option<&mut InFlight> {
        self.find(sequence).map(|at| &mut self.frames[at])
    }

    /// Who has answered one of these results before, and it was not finite either.
    pub(super) fn first_not_finite(&self, targets: &[u32]) -> Option<ShardIndex> {
        let known = self.not_finite.iter().find(|(target, _)| targets.contains(target));
        known.map(|(_, shard)| *shard)
    }

    /// Notes results that were not finite.
    pub(super) fn note_not_finite(&mut self, shard: ShardIndex, targets: Vec<u32>) {
        self.not_finite.extend(targets.into_iter().map(|target| (target, shard)));
    }

    /// Its owner begins to wait.
    pub(super) fn await_answers(&mut self, now: Instant) {
        self.awaited.get_or_insert(now);
    }

    /// From when the wait for a frame that was sent then counts: an answer that came while its owner was busy
    /// elsewhere was not late. `None` while nobody waits.
    pub(super) fn waiting_since(&self, sent: Instant) -> Option<Instant> {
        self.awaited.map(|awaited| awaited.max(sent))
    }

    /// When the next unanswered frame becomes slow.
    pub(super) fn next_slow(&self) -> Option<Instant> {
        let waiting = self.frames.iter().filter(|frame| frame.is_waiting());
        waiting.filter_map(|frame| Some(self.waiting_since(frame.sent)? + frame.slow_after?)).min()
    }

    /// Unanswered frames that are slow while most of the other shards' frames have been answered: when all are
    /// late, it is not this shard that is slow.
    pub(super) fn slow_frames(&self, now: Instant) -> Vec<u64> {
        let is_slow = |frame: &InFlight| {
            let due =
                self.waiting_since(frame.sent).zip(frame.slow_after).map(|(since, after)| since + after);
            due.is_some_and(|due| due <= now)
        };
        let slow = self.waiting(is_slow);
        if slow.is_empty() {
            return slow;
        }
        let shards = |wanted: &dyn Fn(&InFlight) -> bool| {
            let mut shards: Vec<ShardIndex> =
                self.frames.iter().filter(|frame| wanted(frame)).map(|frame| frame.shard).collect();
            shards.sort_unstable();
            shards.dedup();
            shards.len()
        };
        let (asked, silent) = (shards(&|_| true), shards(&InFlight::is_waiting));
        if silent <= (asked / 2).max(1) { slow } else { Vec::new() }
    }

    /// Notes that a frame failed.
    pub(super) fn note_failure(&mut self, now: Instant, what: String) {
        self.first_failure.get_or_insert(now);
        self.first_cause.get_or_insert_with(|| what.clone());
        self.last_failure = what;
    }

    /// What has failed: the first cause, and the last one if it is another.
    pub(super) fn causes(&self) -> Vec<String> {
        let last = Some(&self.last_failure).filter(|last| Some(*last) != self.first_cause.as_ref());
        self.first_cause.iter().chain(last).filter(|cause| !cause.is_empty()).cloned().collect()
    }

    /// Keeps pairs until a copy is usable.
    pub(super) fn strand(&mut self, now: Instant, stranded: Stranded) {
        self.first_failure.get_or_insert(now);
        self.stranded.push(stranded);
    }

    /// When looking for copies began.
    pub(super) fn failing_since(&self) -> Option<Instant> {
        self.first_failure
    }

    /// The pairs of a frame of this step, in terms of the frame's own rows.
    pub(super) fn pairs_of(&self, frame: &DispatchFrame, targets: &[u32]) -> Vec<Pair> {
        let pair = |(&row, &target): (&u32, &u32)| Pair {
            row,
            expert: LogicalExpert(self.topk_idx[target as usize]),
            target,
        };
        frame.pair_tokens.iter().zip(targets).map(pair).collect()
    }

    /// Sequence numbers of unanswered frames that satisfy a condition.
    pub(super) fn waiting(&self, wanted: impl Fn(&InFlight) -> bool) -> Vec<u64> {
        let waiting = self.frames.iter().filter(|frame| frame.progress == Progress::Waiting);
        waiting.filter(|frame| wanted(frame)).map(|frame| frame.frame.sequence).collect()
    }

    /// Whether a frame of an older placement is unanswered.
    pub(super) fn waits_under_older(&self, epoch: PlacementEpoch) -> bool {
        let waiting = self.frames.iter().filter(|frame| frame.progress == Progress::Waiting);
        waiting.map(|frame| frame.frame.generation.epoch).any(|sent_under| sent_under < epoch)
    }

    /// When the oldest unanswered frame was sent.
    pub(super) fn oldest_waiting(&self) -> Option<Instant> {
        let waiting = self.frames.iter().filter(|frame| frame.progress == Progress::Waiting);
        waiting.map(|frame| frame.sent).min()
    }

    /// An expert that waits for a copy, or else (a step that only ever fails) for an answer.
    pub(super) fn missing_expert(&self) -> Option<LogicalExpert> {
        let stranded = self.stranded.iter().flat_map(|stranded| &stranded.pairs);
        let waiting = self.frames.iter().filter(|frame| frame.progress == Progress::Waiting);
        let asked = waiting.flat_map(|frame| &frame.targets);
        stranded
            .map(|pair| pair.expert)
            .next()
            .or_else(|| asked.map(|&target| LogicalExpert(self.topk_idx[target as usize])).next())
    }

    /// Whether every row has arrived.
    pub(super) fn is_done(&self) -> bool {
        self.stranded.is_empty() && self.frames.iter().all(|frame| frame.progress != Progress::Waiting)
    }

    /// Takes a frame's rows.
    pub(super) fn arrive(&mut self, sequence: u64, rows: Bytes) {
        if let Some(frame) = self.frame_mut(sequence) {
            frame.progress = Progress::Arrived;
            let targets = std::mem::take(&mut frame.targets);
            self.arrived.push(ExpertChunk { rows, targets });
        }
    }

    /// Takes from a given-up frame's answer the rows that are stranded; the others were sent again and
    /// come from elsewhere.
    pub(super) fn arrive_late(&mut self, sequence: u64, rows: &Bytes) {
        let width = self.combine.row_bytes(self.hidden);
        let Some(at) = self.find(sequence) else { return };
        let order: HashMap<u32, usize> =
            self.frames[at].targets.iter().enumerate().map(|(row, &target)| (target, row)).collect();
        let (late, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.stranded)
            .into_iter()
            .partition(|stranded| stranded.late == Some(sequence));
        self.stranded = others;
        for pair in late.iter().flat_map(|stranded| &stranded.pairs) {
            if let Some(&row) = order.get(&pair.target) {
                let rows = rows.slice(row * width..(row + 1) * width);
                self.arrived.push(ExpertChunk { rows, targets: vec![pair.target] });
            }
        }
        self.frames[at].progress = Progress::Arrived;
    }

    /// Hands on what has arrived.
    pub(super) fn hand_on(&mut self, out: &mut ExpertRows) {
        out.chunks.append(&mut self.arrived);
    }
}

/// The rows that a frame carries.
pub(super) fn rows_of(frame: &DispatchFrame, hidden: usize) -> EncodedRows {
    EncodedRows {
        format: frame.format,
        rows: frame.tokens,
        cols: hidden,
        data: frame.data.clone(),
        scales: frame.scales.clone(),
    }
}
