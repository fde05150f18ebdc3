//! Frames in, rows out: merge by slot, run the grouped feed-forward in passes that fit the workspace,
//! deal the rows back to their frames.

use std::{sync::Arc, time::Instant};

use cadre_dispatch::{
    CombineFrame, DispatchFrame, Drive, Refusal, RefusalCode, ShardSignals, frame::first_not_finite,
};
use cadre_ops::{Backend, HostRows, OpsError, RowFormat, RowGroup, backend::Ffn};

use crate::{
    pool::BytePool,
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
    max_rows: usize,
    workspace: Workspace<B>,
    pool: BytePool,
    stats: Arc<ShardStats>,
    // Scratch, kept.
    wanted: Vec<Wanted>,
    groups: Vec<RowGroup>,
    gather: Vec<usize>,
    staged: Vec<u8>,
    staged_scales: Vec<u8>,
    scales: Vec<u8>,
}

impl<B: Backend> Compute<B> {
    pub(crate) fn new(backend: Arc<B>, hidden: usize, stats: Arc<ShardStats>) -> Result<Self, OpsError> {
        Ok(Self {
            queue: backend.queue()?,
            backend,
            hidden,
            max_rows: Workspace::<B>::max_rows(hidden),
            workspace: Workspace::new(hidden),
            pool: BytePool::default(),
            stats,
            wanted: Vec::new(),
            groups: Vec::new(),
            gather: Vec::new(),
            staged: Vec::new(),
            staged_scales: Vec::new(),
            scales: Vec::new(),
        })
    }

    /// Cuts batches into passes of this many rows.
    #[cfg(test)]
    pub(crate) fn set_max_rows(&mut self, rows: usize) {
        self.max_rows = rows;
    }

    /// Computes frames of one layer under one placement and answers each, down to the sockets if it drives
    /// them. `queued` says how many pairs wait when it is done.
    pub(crate) fn run(
        &mut self,
        mut jobs: Vec<Job<B::Weight>>,
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
                let bytes = rows.iter().map(Vec::len).sum();
                let mut answers = jobs.into_iter().zip(rows);
                let mut send = || {
                    for (job, rows) in answers.by_ref() {
                        let waited = micros(started.saturating_duration_since(job.accepted).as_micros());
                        add(&self.stats.frames, 1);
                        add(&self.stats.pairs, job.frame.pairs());
                        add(&self.stats.queue_micros, waited as usize);
                        let signals =
                            ShardSignals { queue_micros: waited, compute_micros: took, queued_tokens };
                        let rows = self.pool.lend(rows);
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
    fn look_for_not_finite(&self, frames: &[&DispatchFrame], held: &Held<B::Weight>, rows: &[Vec<u8>]) {
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
    fn rows(&mut self, frames: &[&DispatchFrame], held: &Held<B::Weight>) -> Result<Vec<Vec<u8>>, OpsError> {
        let width = RowFormat::combine(self.backend.class()).row_bytes(self.hidden);
        let mut rows: Vec<Vec<u8>> = frames.iter().map(|_| self.pool.take()).collect();
        let experts = held.experts(frames[0].layer);
        self.order(frames);
        let wanted = std::mem::take(&mut self.wanted);
        let one_pass = wanted.len() <= self.max_rows;
        for pass in wanted.chunks(self.max_rows) {
            let mut results = match &mut rows[..] {
                // The only pass over the only frame: its rows come down in their final order.
                [only] if one_pass => std::mem::take(only),
                _ => self.pool.take(),
            };
            self.pass(frames, pass, experts, &mut results)?;
            match &mut rows[..] {
                [only] if one_pass => *only = results,
                _ => {
                    for (wanted, row) in pass.iter().zip(results.chunks_exact(width.max(1))) {
                        let frame = wanted.frame as usize;
                        rows[frame].resize(frames[frame].pairs() * width, 0);
                        let at = wanted.pair as usize * width;
                        rows[frame][at..at + width].copy_from_slice(row);
                    }
                    self.pool.give_back(results);
                }
            }
        }
        self.wanted = wanted;
        Ok(rows)
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

    /// Computes one pass into `results`.
    fn pass(
        &mut self,
        frames: &[&DispatchFrame],
        pass: &[Wanted],
        experts: &[Arc<Ffn<B::Weight>>],
        results: &mut Vec<u8>,
    ) -> Result<(), OpsError> {
        let mut used: Vec<&Ffn<B::Weight>> = Vec::new();
        self.groups.clear();
        for (row, wanted) in pass.iter().enumerate() {
            let starts = row == 0 || pass[row - 1].slot != wanted.slot;
            if starts {
                self.groups.push(RowGroup { expert: used.len(), first_row: row, rows: 0 });
                used.push(&experts[wanted.slot as usize]);
            }
            if let Some(group) = self.groups.last_mut() {
                group.rows += 1;
            }
        }
        let whole = frames.len() == 1 && pass.len() == frames[0].pairs();
        let direct = whole && frames[0].tokens <= self.max_rows;
        let rows = if direct { pass.len().max(frames[0].tokens) } else { pass.len() };
        if !direct {
            self.stage(frames, pass);
        }
        let backend = self.backend.clone();
        let buffers = self.workspace.buffers(&backend, rows)?;
        let queue = &mut self.queue;
        let format = RowFormat::dispatch(backend.class());
        let cols = self.hidden;
        if direct {
            let frame = frames[0];
            let (data, scales) = (&frame.data[..], &frame.scales[..]);
            let upload = HostRows { format, rows: frame.tokens, cols, data, scales };
            backend.upload_rows(queue, upload, &mut buffers.received)?;
            self.gather.clear();
            self.gather.extend(frames[0].pair_tokens.iter().map(|&token| token as usize));
            backend.gather_rows(queue, &buffers.received, &self.gather, &mut buffers.gathered)?;
        } else {
            let (data, scales) = (&self.staged[..], &self.staged_scales[..]);
            let upload = HostRows { format, rows: pass.len(), cols, data, scales };
            backend.upload_rows(queue, upload, &mut buffers.gathered)?;
        }
        backend.grouped_ffn(queue, &buffers.gathered, &used, &self.groups, &mut buffers.results)?;
        let combine = RowFormat::combine(backend.class());
        backend.download_rows(queue, &buffers.results, pass.len(), combine, results, &mut self.scales)
    }

    /// Copies the encoded rows of a pass together, one per pair: passes over several frames, or over
    /// a part of one.
    fn stage(&mut self, frames: &[&DispatchFrame], pass: &[Wanted]) {
        let format = RowFormat::dispatch(self.backend.class());
        let (width, scale_width) = (format.row_bytes(self.hidden), 4 * format.row_scales(self.hidden));
        self.staged.clear();
        self.staged_scales.clear();
        for wanted in pass {
            let frame = frames[wanted.frame as usize];
            let token = frame.pair_tokens[wanted.pair as usize] as usize;
            self.staged.extend_from_slice(&frame.data[token * width..(token + 1) * width]);
            self.staged_scales
                .extend_from_slice(&frame.scales[token * scale_width..(token + 1) * scale_width]);
        }
    }
}

fn micros(value: u128) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
