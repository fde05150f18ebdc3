//! KV that leaves: read out of the cache as soon as a layer of a chunk is computed, and never waited for.
//!
//! Per layer two marks move over the prompt: `available` (in the cache) and `sent` (in the channel). What
//! lies between stays in the cache when the channel is full, and goes out on a later turn; if the channel
//! stays full for the time-out, the hand-off has failed. The device copies rows into memory that they are
//! sent from, and a message leaves when its copy is done: the step does not wait for it. The pages are freed
//! once the last row is in the channel: whoever retries computes the prompt again.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use cadre_model::{ModelError, StepObserver};
use cadre_ops::{Backend, OpsError};
use cadre_scheduler::StepPlan;
use cadre_types::{FinishReason, LayerId, PageId, Position, SequenceId};
use tokio::sync::mpsc;

use crate::{
    error::{EngineError, HandoffError},
    handle::KvShape,
    handoff::{Held, KvFinish, KvMessage, KvRoom, KvRows, rows_per_message},
    stats::{EngineStats, add},
};

use super::{Entry, Part, StepLoop};

/// The outgoing side of one sequence.
pub(super) struct Outgoing<B: Backend> {
    sink: mpsc::Sender<KvMessage>,
    room: KvRoom,
    /// Copies under way, oldest first; each has its place in the channel, so there are never more than
    /// [`KV_QUEUE`](crate::handoff::KV_QUEUE).
    copies: VecDeque<RowCopy<B>>,
    prompt: Position,
    row_bytes: usize,
    /// Positions in the cache, by layer.
    available: Vec<Position>,
    /// Positions in the channel or being copied, by layer.
    sent: Vec<Position>,
    /// Known once the prompt is computed; sent after the last row.
    finish: Option<KvFinish>,
    rows: u64,
    /// Since when the channel is full.
    full_since: Option<Instant>,
}

/// Rows that the device copies.
struct RowCopy<B: Backend> {
    place: mpsc::OwnedPermit<KvMessage>,
    layer: LayerId,
    first_position: Position,
    count: u32,
    memory: B::Staging,
    held: Held,
    done: B::Event,
}

/// Reads rows out of a cache.
pub(super) struct CacheReader<'a, B: Backend> {
    pub(super) backend: &'a B,
    pub(super) queue: &'a mut B::Queue,
    pub(super) cache: &'a B::KvCache,
}

impl<B: Backend> Outgoing<B> {
    pub(super) fn new(sink: mpsc::Sender<KvMessage>, room: KvRoom, shape: KvShape, prompt: usize) -> Self {
        Self {
            sink,
            room,
            copies: VecDeque::new(),
            prompt: Position::try_from(prompt).unwrap_or(Position::MAX),
            row_bytes: shape.row_bytes(),
            available: vec![0; shape.layers],
            sent: vec![0; shape.layers],
            finish: None,
            rows: 0,
            full_since: None,
        }
    }

    pub(super) fn finish_with(&mut self, finish: KvFinish) {
        self.finish = Some(finish);
    }

    /// Starts copies of rows of one layer while the channel has room, and sends those that are done. Returns
    /// the bytes of the rows.
    fn pump(
        &mut self,
        layer: usize,
        table: &[PageId],
        reader: &mut CacheReader<'_, B>,
    ) -> Result<u64, HandoffError> {
        let mut bytes = 0;
        while self.sent[layer] < self.available[layer] {
            let place = match self.sink.clone().try_reserve_owned() {
                Ok(place) => place,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    self.full_since.get_or_insert_with(Instant::now);
                    break;
                }
                Err(mpsc::error::TrySendError::Closed(_)) => {
                    return Err(HandoffError::Aborted { rows: self.rows });
                }
            };
            let first = self.sent[layer];
            let count = (self.available[layer] - first).min(rows_per_message(self.row_bytes));
            let Some(held) = self.hold(count as usize * self.row_bytes) else {
                self.full_since.get_or_insert_with(Instant::now);
                break;
            };
            self.full_since = None;
            let copied = reader.copy(layer, table, first, count as usize, self.row_bytes);
            let layer_id = layer_id(layer);
            let (memory, done) = copied.map_err(|source| HandoffError::Cache { layer: layer_id, source })?;
            self.copies.push_back(RowCopy {
                place,
                layer: layer_id,
                first_position: first,
                count,
                memory,
                held,
                done,
            });
            bytes += u64::from(count) * self.row_bytes as u64;
            self.sent[layer] += count;
            self.rows += u64::from(count);
            self.send_copied(reader.backend)?;
        }
        Ok(bytes)
    }

    /// Room for rows. A hand-off that has nothing under way gets it in any case.
    fn hold(&self, bytes: usize) -> Option<Held> {
        // One place is the one just reserved.
        let is_idle = self.copies.is_empty() && self.sink.capacity() + 1 >= self.sink.max_capacity();
        self.room.try_take(bytes).or_else(|| is_idle.then(Held::outside))
    }

    /// Sends what the device has copied.
    fn send_copied(&mut self, backend: &B) -> Result<(), HandoffError> {
        while let Some(copy) = self.copies.front() {
            let layer = copy.layer;
            let done = backend.is_done(&copy.done);
            if !done.map_err(|source| HandoffError::Cache { layer, source })? {
                break;
            }
            if let Some(RowCopy { place, layer, first_position, count, memory, held, .. }) =
                self.copies.pop_front()
            {
                let rows = held.over(memory);
                place.send(KvMessage::Rows(KvRows { layer, first_position, count, rows }));
            }
        }
        Ok(())
    }

    /// Moves what is in the cache, and the end if everything has gone. Returns whether it has ended.
    fn pump_all(
        &mut self,
        table: &[PageId],
        reader: &mut CacheReader<'_, B>,
        moved: &mut u64,
    ) -> Result<bool, HandoffError> {
        if self.sink.is_closed() {
            return Err(HandoffError::Aborted { rows: self.rows });
        }
        self.send_copied(reader.backend)?;
        for layer in 0..self.sent.len() {
            *moved += self.pump(layer, table, reader)?;
        }
        let unsent = !self.copies.is_empty() || self.sent.iter().any(|sent| *sent < self.prompt);
        if self.finish.is_none() || unsent {
            return Ok(false);
        }
        match self.sink.try_reserve() {
            Ok(permit) => {
                if let Some(finish) = self.finish.take() {
                    permit.send(KvMessage::Finish(finish));
                }
                Ok(true)
            }
            Err(mpsc::error::TrySendError::Full(())) => {
                self.full_since.get_or_insert_with(Instant::now);
                Ok(false)
            }
            Err(mpsc::error::TrySendError::Closed(())) => Err(HandoffError::Aborted { rows: self.rows }),
        }
    }

    fn check_stall(&self, bound: Duration) -> Result<(), HandoffError> {
        match self.full_since.map(|since| since.elapsed()) {
            Some(waited) if waited > bound => Err(HandoffError::Stalled { waited, rows: self.rows }),
            _ => Ok(()),
        }
    }
}

impl<B: Backend> CacheReader<'_, B> {
    /// Starts copying rows into memory of their own.
    fn copy(
        &mut self,
        layer: usize,
        table: &[PageId],
        first: Position,
        count: usize,
        row_bytes: usize,
    ) -> Result<(B::Staging, B::Event), OpsError> {
        let mut memory = self.backend.staging(count * row_bytes)?;
        self.backend.kv_read(self.queue, self.cache, layer, table, first, count, &mut memory, 0)?;
        Ok((memory, self.backend.record(self.queue)?))
    }
}

/// The index of a cache layer as an id; a config has fewer than 2^16 layers.
pub(super) fn layer_id(layer: usize) -> LayerId {
    LayerId(u16::try_from(layer).unwrap_or(u16::MAX))
}

/// Watches a step and sends the KV of prompts that are handed off.
pub(super) struct StepWatch<'a, B: Backend> {
    stats: &'a EngineStats,
    sending: Vec<Sending<'a, B>>,
}

struct Sending<'a, B: Backend> {
    outgoing: &'a mut Outgoing<B>,
    table: &'a [PageId],
    /// Positions of the prompt in a layer's cache once that layer of this step is computed.
    end: Position,
    failure: &'a mut Option<HandoffError>,
}

impl<'a, B: Backend> StepWatch<'a, B> {
    pub(super) fn new(
        stats: &'a EngineStats,
        plan: &StepPlan,
        scheduler: &'a cadre_scheduler::Scheduler,
        entries: &'a mut std::collections::BTreeMap<SequenceId, Entry<B>>,
        failures: &'a mut Vec<(SequenceId, Option<HandoffError>)>,
    ) -> Self {
        failures.clear();
        failures.extend(plan.prefill.iter().map(|chunk| (chunk.id, None)));
        // Chunks are ordered by id, as the entries are.
        let mut chunks = plan.prefill.iter().zip(failures.iter_mut()).peekable();
        let mut sending = Vec::new();
        for (&id, entry) in entries.iter_mut() {
            let Some((chunk, (_, failure))) = chunks.next_if(|(chunk, _)| chunk.id == id) else { continue };
            if let (Part::Outgoing(outgoing), Some(sequence)) = (&mut entry.part, scheduler.sequence(id)) {
                let end = chunk.first_position + chunk.len as Position;
                sending.push(Sending { outgoing, table: sequence.block_table(), end, failure });
            }
        }
        Self { stats, sending }
    }
}

impl<B: Backend> StepObserver<B> for StepWatch<'_, B> {
    fn kv_ready(
        &mut self,
        backend: &B,
        queue: &mut B::Queue,
        layer: LayerId,
        cache: &B::KvCache,
    ) -> Result<(), ModelError> {
        for sending in self.sending.iter_mut().filter(|sending| sending.failure.is_none()) {
            let Some(available) = sending.outgoing.available.get_mut(layer.index()) else { continue };
            *available = sending.end;
            let mut reader = CacheReader { backend, queue: &mut *queue, cache };
            // What earlier layers have copied goes out while this one computes.
            let pumped = sending
                .outgoing
                .send_copied(backend)
                .and_then(|()| sending.outgoing.pump(layer.index(), sending.table, &mut reader));
            match pumped {
                Ok(bytes) => add(&self.stats.kv_bytes_sent, bytes),
                // One hand-off's trouble is not the step's: the sequence is failed after it.
                Err(error) => *sending.failure = Some(error),
            }
        }
        Ok(())
    }
}

impl<B: Backend> StepLoop<B> {
    /// Sends what earlier steps left behind. Returns whether anything moved.
    pub(super) fn send_kv(&mut self) -> bool {
        let ids: Vec<SequenceId> = self
            .entries
            .iter()
            .filter(|(_, entry)| matches!(entry.part, Part::Outgoing(_)))
            .map(|(&id, _)| id)
            .collect();
        let mut moved = 0;
        let (mut ended, mut copying) = (false, false);
        for id in ids {
            let Self { model, workspace, cache, scheduler, entries, .. } = self;
            let (Some(Entry { part: Part::Outgoing(outgoing), .. }), Some(sequence)) =
                (entries.get_mut(&id), scheduler.sequence(id))
            else {
                continue;
            };
            let mut reader = CacheReader { backend: &**model.backend(), queue: workspace.queue(), cache };
            let pumped = outgoing
                .pump_all(sequence.block_table(), &mut reader, &mut moved)
                .and_then(|done| outgoing.check_stall(self.handoff_timeout).map(|()| done));
            match pumped {
                // A copy that is under way is done within a turn or two of the loop.
                Ok(false) => copying |= !outgoing.copies.is_empty(),
                Ok(true) => {
                    ended = true;
                    add(&self.stats.handoffs_sent, 1);
                    self.finish(id, FinishReason::Length);
                }
                Err(error) => {
                    ended = true;
                    self.fail(id, EngineError::Handoff(error));
                }
            }
        }
        add(&self.stats.kv_bytes_sent, moved);
        moved > 0 || ended || copying
    }
}
