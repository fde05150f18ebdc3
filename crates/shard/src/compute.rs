//! Frames in, rows out: merge by slot, run the grouped feed-forward in passes that fit the workspace,
//! deal the rows back to their frames.
//!
//! A frame's rows go to the device once, from where they arrived, however many experts want them: an index
//! says which row each pair takes. Results are put in the order of their frames by the device too, so that a
//! frame's part of a pass is one copy into the memory that its answer is sent from.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use cadre_dispatch::{
    CombineFrame, DispatchFrame, Drive, Refusal, RefusalCode, ShardSignals, frame::first_not_finite,
};
use cadre_ops::{Backend, EncodedRows, OpsError, PassLimits, PassRows, RowFormat, RowGroup};

use crate::{
    queue::Job,
    shard::Held,
    stats::{ShardStats, add},
    workspace::Workspace,
};

/// One wanted row: pair `pair` of frame `frame` of the batch.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    slot: u32,
    frame: u32,
    pair: u32,
}

/// The computing half of a shard: one queue and its buffers, used by one thread at a time.
pub(crate) struct Compute<B: Backend> {
    backend: Arc<B>,
    queue: B::Queue,
    hidden: usize,
    limits: PassLimits,
    workspace: Workspace<B>,
    stats: Arc<ShardStats>,
    // Scratch, kept.
    wanted: Vec<Wanted>,
    groups: Vec<RowGroup>,
    input: Vec<u32>,
    output: Vec<u32>,
    shares: Vec<Share>,
}

/// What a frame has in a pass.
#[derive(Clone, Copy, Debug, Default)]
struct Share {
    /// The frame's rows begin here among those received.
    first_row: u32,
    /// Its pairs, which follow each other: a pass takes a range of slots, and a frame's pairs ascend by slot.
    first_pair: u32,
    pairs: u32,
    /// Where its results begin.
    first_result: u32,
}

impl<B: Backend> Compute<B> {
    pub(crate) fn new(backend: Arc<B>, hidden: usize, stats: Arc<ShardStats>) -> Result<Self, OpsError> {
        let workspace = Workspace::new(&*backend, hidden)?;
        Ok(Self {
            queue: backend.queue()?,
            backend,
            hidden,
            limits: workspace.limits,
            workspace,
            stats,
            wanted: Vec::new(),
            groups: Vec::new(),
            input: Vec::new(),
            output: Vec::new(),
            shares: Vec::new(),
        })
    }

    /// Cuts batches into passes of this many rows and pairs.
    #[cfg(test)]
    pub(crate) fn set_max_rows(&mut self, rows: usize) {
        self.limits = PassLimits { rows, pairs: rows };
    }

    /// Computes frames of one layer under one placement and answers each, down to the sockets if it drives
    /// them. `queued` says how many pairs wait when it is done.
    pub(crate) fn run(
        &mut self,
        mut jobs: Vec<Job<B>>,
        queued: impl Fn() -> usize,
        drive: Option<&dyn Drive>,
    ) {
        let accepted = jobs.len();
        jobs.retain(|job| !job.reply.is_cancelled());
        add(&self.stats.cancelled, accepted - jobs.len());
        let Some(first) = jobs.first() else { return };
        let (layer, held) = (first.frame.layer, first.held.clone());
        let started = Instant::now();
        let frames: Vec<&DispatchFrame> = jobs.iter().map(|job| &job.frame).collect();
        let result = self.rows(&frames, &held);
        if let Ok(rows) = &result {
            self.look_for_not_finite(&frames, &held, rows);
        }
        let took = micros(started.elapsed().as_micros());
        add(&self.stats.batches, 1);
        add(&self.stats.compute_micros, took as usize);
        match result {
            Ok(rows) => {
                let queued_tokens = micros(queued() as u128);
                let format = RowFormat::combine(self.backend.class());
                let bytes = rows.iter().map(Bytes::len).sum();
                let mut answers = jobs.into_iter().zip(rows);
                let mut send = || {
                    for (job, rows) in answers.by_ref() {
                        let waited = micros(started.saturating_duration_since(job.accepted).as_micros());
                        add(&self.stats.frames, 1);
                        add(&self.stats.pairs, job.frame.pairs());
                        add(&self.stats.queue_micros, waited as usize);
                        let signals =
                            ShardSignals { queue_micros: waited, compute_micros: took, queued_tokens };
                        job.reply.send(Ok(CombineFrame { format, rows, signals }));
                    }
                };
                match drive {
                    Some(drive) => drive.flush(bytes, &mut send),
                    None => send(),
                }
            }
            Err(error) => {
                let message = format!("{}, {layer}: {error}", held.contract.shard);
                tracing::error!(error = message, "frame failed");
                for job in jobs {
                    self.stats.refuse(RefusalCode::Internal);
                    job.reply.send(Err(Refusal::new(RefusalCode::Internal, message.clone()).into()));
                }
            }
        }
    }

    /// Counts and names results that are not finite although what came was. They are sent all the same: whether it is
    /// this shard or the activations that overflow, only the worker can tell, by another copy.
    fn look_for_not_finite(&self, frames: &[&DispatchFrame], held: &Held<B>, rows: &[Bytes]) {
        let format = RowFormat::combine(self.backend.class());
        for (frame, rows) in frames.iter().zip(rows) {
            let Some(at) = first_not_finite(format, rows) else { continue };
            let sent = [(frame.format, &frame.data), (RowFormat::F32, &frame.scales)];
            if sent.iter().any(|(format, sent)| first_not_finite(*format, sent).is_some()) {
                continue;
            }
            let (pair, element) = (at / self.hidden.max(1), at % self.hidden.max(1));
            let slot = frame.pair_slots[pair];
            let expert = held.expert_at(frame.layer, slot as usize).map(|expert| expert.0);
            add(&self.stats.not_finite, 1);
            tracing::error!(
                shard = %held.contract.shard, layer = frame.layer.0, slot, expert, element,
                "a finite row gave one that is not finite"
            );
        }
    }

    /// The rows of each frame, in its pair order.
    fn rows(&mut self, frames: &[&DispatchFrame], held: &Held<B>) -> Result<Vec<Bytes>, OpsError> {
        let width = RowFormat::combine(self.backend.class()).row_bytes(self.hidden);
        let backend = self.backend.clone();
        let answer = |frame: &&DispatchFrame| backend.staging(frame.pairs() * width);
        let mut answers = frames.iter().map(answer).collect::<Result<Vec<_>, _>>()?;
        let Some(experts) = held.experts(frames[0].layer) else {
            // Only a probe of a layer without experts here: it has no pairs.
            return Ok(answers.into_iter().map(Bytes::from_owner).collect());
        };
        self.order(frames);
        let wanted = std::mem::take(&mut self.wanted);
        let result = self.passes(frames, &wanted, experts, width, &mut answers);
        self.wanted = wanted;
        // Also after a failure: the device must be done with the frames' and the answers' memory.
        let done = backend.synchronize(&mut self.queue);
        result.and(done)?;
        Ok(answers.into_iter().map(Bytes::from_owner).collect())
    }

    /// All pairs, by slot. Those of one frame are in that order already.
    fn order(&mut self, frames: &[&DispatchFrame]) {
        self.wanted.clear();
        for (frame, content) in frames.iter().enumerate() {
            let pairs = content.pair_slots.iter().enumerate();
            self.wanted.extend(pairs.map(|(pair, &slot)| Wanted {
                slot,
                frame: frame as u32,
                pair: pair as u32,
            }));
        }
        if frames.len() > 1 {
            self.wanted.sort_unstable_by_key(|wanted| (wanted.slot, wanted.frame, wanted.pair));
        }
    }

    fn passes(
        &mut self,
        frames: &[&DispatchFrame],
        wanted: &[Wanted],
        experts: &B::ExpertTable,
        width: usize,
        answers: &mut [B::Staging],
    ) -> Result<(), OpsError> {
        let tokens: usize = frames.iter().map(|frame| frame.tokens).sum();
        let whole = tokens <= self.limits.rows;
        self.shares.clear();
        self.shares.resize(frames.len(), Share::default());
        if whole {
            let mut first_row = 0;
            for (index, frame) in frames.iter().enumerate() {
                self.shares[index].first_row = first_row as u32;
                let rows = self.encoded(frame, 0..frame.tokens);
                let received = &mut self.workspace.received;
                self.backend.upload_rows(&mut self.queue, &rows, first_row, received)?;
                first_row += frame.tokens;
            }
        }
        // A pair needs one row at most.
        for pass in wanted.chunks(self.limits.pairs.min(if whole { usize::MAX } else { self.limits.rows })) {
            self.describe(frames, pass);
            if !whole {
                self.upload_wanted(frames, pass)?;
            }
            let Self { backend, queue, workspace, input, output, groups, .. } = self;
            backend.begin_pass(queue, &PassRows { input, output, groups }, &mut workspace.pass)?;
            let (received, results) = (&workspace.received, &mut workspace.results);
            backend.grouped_ffn(queue, &workspace.pass, experts, received, results)?;
            for (share, answer) in self.shares.iter().zip(&mut *answers).filter(|(share, _)| share.pairs > 0)
            {
                let first = share.first_result as usize;
                let rows = first..first + share.pairs as usize;
                let at = share.first_pair as usize * width;
                backend.download_activations(queue, results, rows, answer, at)?;
            }
        }
        Ok(())
    }

    /// Groups, inputs and outputs of a pass. Inputs are rows of all frames together, as if all were received.
    fn describe(&mut self, frames: &[&DispatchFrame], pass: &[Wanted]) {
        self.groups.clear();
        for share in &mut self.shares {
            share.pairs = 0;
        }
        for wanted in pass {
            match self.groups.last_mut() {
                Some(group) if group.expert == wanted.slot as usize => group.rows += 1,
                _ => self.groups.push(RowGroup { expert: wanted.slot as usize, rows: 1 }),
            }
            let share = &mut self.shares[wanted.frame as usize];
            if share.pairs == 0 {
                share.first_pair = wanted.pair;
            }
            share.pairs += 1;
        }
        let mut first_result = 0;
        for share in &mut self.shares {
            share.first_result = first_result;
            first_result += share.pairs;
        }
        self.input.clear();
        self.output.clear();
        for wanted in pass {
            let share = &self.shares[wanted.frame as usize];
            let token = frames[wanted.frame as usize].pair_tokens[wanted.pair as usize];
            self.input.push(share.first_row + token);
            self.output.push(share.first_result + wanted.pair - share.first_pair);
        }
    }

    /// Uploads the rows that a pass wants, each once, when not all can be on the device together; inputs then
    /// number those.
    fn upload_wanted(&mut self, frames: &[&DispatchFrame], pass: &[Wanted]) -> Result<(), OpsError> {
        let token = |wanted: &Wanted| frames[wanted.frame as usize].pair_tokens[wanted.pair as usize];
        let mut rows: Vec<(u32, u32)> = pass.iter().map(|wanted| (wanted.frame, token(wanted))).collect();
        rows.sort_unstable();
        rows.dedup();
        let mut first_row = 0;
        // Rows that follow each other in a frame go together.
        for run in rows.chunk_by(|a, b| a.0 == b.0 && a.1 + 1 == b.1) {
            let (frame, first) = (run[0].0 as usize, run[0].1 as usize);
            let encoded = self.encoded(frames[frame], first..first + run.len());
            let received = &mut self.workspace.received;
            self.backend.upload_rows(&mut self.queue, &encoded, first_row, received)?;
            first_row += run.len();
        }
        for (input, wanted) in self.input.iter_mut().zip(pass) {
            *input = rows.partition_point(|row| *row < (wanted.frame, token(wanted))) as u32;
        }
        Ok(())
    }

    /// Some rows of a frame, where they arrived.
    fn encoded(&self, frame: &DispatchFrame, rows: std::ops::Range<usize>) -> EncodedRows {
        let (format, cols) = (frame.format, self.hidden);
        let cut = |bytes: &Bytes, width: usize| bytes.slice(rows.start * width..rows.end * width);
        let data = cut(&frame.data, format.row_bytes(cols));
        let scales = cut(&frame.scales, 4 * format.row_scales(cols));
        EncodedRows { format, rows: rows.len(), cols, data, scales }
    }
}

fn micros(value: u128) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
