//! KV that leaves: read out of the cache as soon as a layer of a chunk is computed, and never waited for.
//!
//! Per layer two marks move over the prompt: `available` (in the cache) and `sent` (in the channel). What
//! lies between stays in the cache when the channel is full, and goes out on a later turn; if the channel
//! stays full for the time-out, the hand-off has failed. The pages are freed once the last row is in the
//! channel: whoever retries computes the prompt again.

use std::time::{Duration, Instant};

use cadre_model::{ModelError, StepObserver};
use cadre_ops::Backend;
use cadre_scheduler::StepPlan;
use cadre_types::{FinishReason, LayerId, PageId, Position, SequenceId};
use tokio::sync::mpsc;

use crate::{
    error::{EngineError, HandoffError},
    handle::KvShape,
    handoff::{KvFinish, KvMessage, KvRows, rows_per_message},
    stats::{EngineStats, add},
};

use super::{Entry, Part, StepLoop};

/// The outgoing side of one sequence.
pub(super) struct Outgoing {
    sink: mpsc::Sender<KvMessage>,
    prompt: Position,
    row_bytes: usize,
    /// Positions in the cache, by layer.
    available: Vec<Position>,
    /// Positions in the channel, by layer.
    sent: Vec<Position>,
    /// Known once the prompt is computed; sent after the last row.
    finish: Option<KvFinish>,
    rows: u64,
    /// Since when the channel is full.
    full_since: Option<Instant>,
}

/// Reads rows out of a cache.
pub(super) struct CacheReader<'a, B: Backend> {
    pub(super) backend: &'a B,
    pub(super) queue: &'a mut B::Queue,
    pub(super) cache: &'a B::KvCache,
}

impl Outgoing {
    pub(super) fn new(sink: mpsc::Sender<KvMessage>, shape: KvShape, prompt: usize) -> Self {
        Self {
            sink,
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

    /// Moves rows of one layer into the channel while it has room. Returns the bytes moved.
    fn pump<B: Backend>(
        &mut self,
        layer: usize,
        table: &[PageId],
        reader: &mut CacheReader<'_, B>,
    ) -> Result<u64, HandoffError> {
        let mut bytes = 0;
        while self.sent[layer] < self.available[layer] {
            let permit = match self.sink.try_reserve() {
                Ok(permit) => permit,
                Err(mpsc::error::TrySendError::Full(())) => {
                    self.full_since.get_or_insert_with(Instant::now);
                    break;
                }
                Err(mpsc::error::TrySendError::Closed(())) => {
                    return Err(HandoffError::Aborted { rows: self.rows });
                }
            };
            self.full_since = None;
            let first = self.sent[layer];
            let count = (self.available[layer] - first).min(rows_per_message(self.row_bytes));
            let mut rows = Vec::with_capacity(count as usize * self.row_bytes);
            let id = layer_id(layer);
            reader
                .backend
                .kv_read(reader.queue, reader.cache, layer, table, first, count as usize, &mut rows)
                .map_err(|source| HandoffError::Cache { layer: id, source })?;
            bytes += rows.len() as u64;
            permit.send(KvMessage::Rows(KvRows {
                layer: id,
                first_position: first,
                count,
                rows: rows.into(),
            }));
            self.sent[layer] += count;
            self.rows += u64::from(count);
        }
        Ok(bytes)
    }

    /// Moves what is in the cache, and the end if everything has gone. Returns whether it has ended.
    fn pump_all<B: Backend>(
        &mut self,
        table: &[PageId],
        reader: &mut CacheReader<'_, B>,
        moved: &mut u64,
    ) -> Result<bool, HandoffError> {
        if self.sink.is_closed() {
            return Err(HandoffError::Aborted { rows: self.rows });
        }
        for layer in 0..self.sent.len() {
            *moved += self.pump(layer, table, reader)?;
        }
        if self.finish.is_none() || self.sent.iter().any(|sent| *sent < self.prompt) {
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

/// The index of a cache layer as an id; a config has fewer than 2^16 layers.
pub(super) fn layer_id(layer: usize) -> LayerId {
    LayerId(u16::try_from(layer).unwrap_or(u16::MAX))
}

/// Watches a step and sends the KV of prompts that are handed off.
pub(super) struct StepWatch<'a> {
    stats: &'a EngineStats,
    sending: Vec<Sending<'a>>,
}

struct Sending<'a> {
    outgoing: &'a mut Outgoing,
    table: &'a [PageId],
    /// Positions of the prompt in a layer's cache once that layer of this step is computed.
    end: Position,
    failure: &'a mut Option<HandoffError>,
}

impl<'a> StepWatch<'a> {
    pub(super) fn new(
        stats: &'a EngineStats,
        plan: &StepPlan,
        scheduler: &'a cadre_scheduler::Scheduler,
        entries: &'a mut std::collections::BTreeMap<SequenceId, Entry>,
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

impl<B: Backend> StepObserver<B> for StepWatch<'_> {
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
            match sending.outgoing.pump(layer.index(), sending.table, &mut reader) {
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
        let mut ended = false;
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
                Ok(false) => {}
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
        moved > 0 || ended
    }
}
