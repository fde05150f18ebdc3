//! KV that arrives: checked against the sequence it is for, written into its pages, and the first token
//! taken over once every position of every layer is there. An incomplete cache is never decoded from.

use std::time::{Duration, Instant};

use cadre_ops::Backend;
use cadre_scheduler::{Sequence, SequenceState};
use cadre_types::{Position, SequenceId};
use tokio::sync::{mpsc, oneshot};

use crate::{
    error::{EngineError, HandoffError},
    handle::KvShape,
    handoff::{HandoffOffer, KvFinish, KvMessage, KvRows, MAX_KV_FRAME_BYTES, prompt_hash},
    stats::add,
};

use super::{Entry, Part, StepLoop};

/// Bytes written into the cache between two steps: about 10 ms of copying at 3 GB/s, the order of a step
/// of a small model, so that hand-offs do not hold up the sequences that decode.
const BYTES_PER_TURN: usize = 32 << 20;

/// How far the KV of a sequence is.
pub(super) enum Incoming {
    /// The sequence waits for pages.
    Queued,
    /// It has pages; no prefill worker has come yet.
    Awaited { since: Instant },
    /// Rows are coming.
    Receiving(Receiving),
    /// Everything is there.
    Complete,
}

pub(super) struct Receiving {
    messages: mpsc::Receiver<KvMessage>,
    outcome: oneshot::Sender<Result<u64, HandoffError>>,
    /// Positions received, by layer.
    received: Vec<Position>,
    rows: u64,
    bytes: u64,
    /// When something last arrived.
    progress: Instant,
}

impl Incoming {
    pub(super) fn reserved(&mut self) {
        *self = Self::Awaited { since: Instant::now() };
    }

    pub(super) fn begin(
        &mut self,
        messages: mpsc::Receiver<KvMessage>,
        outcome: oneshot::Sender<Result<u64, HandoffError>>,
        layers: usize,
    ) {
        *self = Self::Receiving(Receiving {
            messages,
            outcome,
            received: vec![0; layers],
            rows: 0,
            bytes: 0,
            progress: Instant::now(),
        });
    }
}

/// Whether an offer is the one that a sequence waits for.
pub(super) fn check_offer<B: Backend>(
    offer: &HandoffOffer,
    shape: KvShape,
    sequence: Option<&Sequence>,
    entry: Option<&Entry<B>>,
) -> Result<(), HandoffError> {
    let request_id = || offer.request_id.clone();
    let unknown = || HandoffError::Unknown { request_id: request_id() };
    let (sequence, entry) = (sequence.ok_or_else(unknown)?, entry.ok_or_else(unknown)?);
    match &entry.part {
        Part::Incoming(Incoming::Awaited { .. }) => {}
        Part::Incoming(Incoming::Queued) => {
            return Err(HandoffError::NotReserved { request_id: request_id() });
        }
        Part::Incoming(Incoming::Receiving(_) | Incoming::Complete) => {
            return Err(HandoffError::AlreadyBegun { request_id: request_id() });
        }
        Part::Local | Part::Outgoing(_) => return Err(unknown()),
    }
    let fields = [
        ("prompt length", sequence.prompt().len() as u64, u64::from(offer.prompt_tokens)),
        ("prompt hash", prompt_hash(sequence.prompt()), offer.prompt_hash),
        ("number of layers", shape.layers as u64, u64::from(offer.layers)),
        ("row width", shape.row_width as u64, u64::from(offer.row_width)),
        (
            "row size in bytes",
            shape.row_bytes() as u64,
            offer.format.row_bytes(offer.row_width as usize) as u64,
        ),
    ];
    match fields.into_iter().find(|(_, ours, theirs)| ours != theirs) {
        Some((what, ours, theirs)) => {
            Err(HandoffError::Mismatch { request_id: request_id(), what, ours, theirs })
        }
        None => Ok(()),
    }
}

/// What taking messages of one hand-off came to.
enum Taken {
    /// Nothing new, or the budget is spent.
    Pending,
    /// The last row and the first token are here.
    Finished(KvFinish),
}

impl Receiving {
    /// Writes what has arrived, up to the budget.
    fn take<B: Backend>(
        &mut self,
        sequence: &Sequence,
        shape: KvShape,
        budget: &mut usize,
        write: &mut CacheWriter<'_, B>,
    ) -> Result<Taken, HandoffError> {
        while *budget > 0 {
            match self.messages.try_recv() {
                Ok(KvMessage::Rows(rows)) => {
                    self.check_rows(&rows, shape, sequence.prompt().len())?;
                    write.rows(sequence, &rows)?;
                    self.progress = Instant::now();
                    self.received[rows.layer.index()] += rows.count;
                    self.rows += u64::from(rows.count);
                    self.bytes += rows.rows.len() as u64;
                    *budget = budget.saturating_sub(rows.rows.len());
                }
                Ok(KvMessage::Finish(finish)) => {
                    self.check_complete(sequence.prompt().len())?;
                    return Ok(Taken::Finished(finish));
                }
                Err(mpsc::error::TryRecvError::Empty) => break,
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    return Err(HandoffError::Aborted { rows: self.rows });
                }
            }
        }
        Ok(Taken::Pending)
    }

    fn check_rows(&self, rows: &KvRows, shape: KvShape, prompt: usize) -> Result<(), HandoffError> {
        let KvRows { layer, first_position: first, count, .. } = *rows;
        let Some(&expected) = self.received.get(layer.index()) else {
            return Err(HandoffError::UnknownLayer { layer, layers: shape.layers });
        };
        if count == 0 || u64::from(first) + u64::from(count) > prompt as u64 {
            return Err(HandoffError::OutOfRange { layer, first, count, prompt_tokens: prompt as u32 });
        }
        if first != expected {
            return Err(HandoffError::OutOfOrder { layer, first, expected });
        }
        let (bytes, expected) = (rows.rows.len(), count as usize * shape.row_bytes());
        if bytes != expected || (bytes > MAX_KV_FRAME_BYTES && count > 1) {
            return Err(HandoffError::WrongSize { layer, bytes, count, expected });
        }
        Ok(())
    }

    fn check_complete(&self, prompt: usize) -> Result<(), HandoffError> {
        match self.received.iter().position(|received| (*received as usize) < prompt) {
            Some(layer) => Err(HandoffError::Incomplete {
                layer: super::handoff_out::layer_id(layer),
                received: self.received[layer],
                prompt_tokens: prompt as u32,
            }),
            None => Ok(()),
        }
    }
}

/// Writes rows into pages.
struct CacheWriter<'a, B: Backend> {
    backend: &'a B,
    queue: &'a mut B::Queue,
    cache: &'a mut B::KvCache,
}

impl<B: Backend> CacheWriter<'_, B> {
    fn rows(&mut self, sequence: &Sequence, rows: &KvRows) -> Result<(), HandoffError> {
        self.backend
            .kv_write(
                self.queue,
                self.cache,
                rows.layer.index(),
                sequence.block_table(),
                rows.first_position,
                rows.count as usize,
                &rows.rows,
            )
            .map_err(|source| HandoffError::Cache { layer: rows.layer, source })
    }
}

impl<B: Backend> StepLoop<B> {
    /// Takes KV that has arrived, oldest sequence first. Returns whether anything moved.
    pub(super) fn receive_kv(&mut self) -> bool {
        let waiting: Vec<SequenceId> = self
            .scheduler
            .sequences()
            .filter(|sequence| sequence.state() == SequenceState::AwaitingKv)
            .map(Sequence::id)
            .collect();
        let mut budget = BYTES_PER_TURN;
        let mut moved = false;
        for id in waiting {
            let before = budget;
            match self.receive_kv_of(id, &mut budget) {
                Ok(Taken::Pending) => moved |= budget != before,
                Ok(Taken::Finished(finish)) => {
                    moved = true;
                    self.complete_handoff(id, finish);
                }
                Err(error) => {
                    moved = true;
                    self.fail_handoff(id, error);
                }
            }
        }
        moved
    }

    fn receive_kv_of(&mut self, id: SequenceId, budget: &mut usize) -> Result<Taken, HandoffError> {
        let Self { model, workspace, cache, scheduler, entries, shape, .. } = self;
        let (Some(Entry { part: Part::Incoming(incoming), .. }), Some(sequence)) =
            (entries.get_mut(&id), scheduler.sequence(id))
        else {
            return Ok(Taken::Pending);
        };
        match incoming {
            Incoming::Queued | Incoming::Complete => Ok(Taken::Pending),
            Incoming::Awaited { since } => {
                let waited = since.elapsed();
                if waited > self.handoff_begin_timeout {
                    return Err(HandoffError::NeverBegun { waited });
                }
                Ok(Taken::Pending)
            }
            Incoming::Receiving(receiving) => {
                let mut writer = CacheWriter { backend: &**model.backend(), queue: workspace.queue(), cache };
                let before = receiving.bytes;
                let taken = receiving.take(sequence, *shape, budget, &mut writer)?;
                add(&self.stats.kv_bytes_received, receiving.bytes - before);
                if matches!(taken, Taken::Pending) {
                    // Judged after taking: what arrived while a step ran is progress.
                    stalled(receiving, self.handoff_timeout)?;
                }
                Ok(taken)
            }
        }
    }

    fn complete_handoff(&mut self, id: SequenceId, finish: KvFinish) {
        if let Err(error) = self.check_finish(id, &finish) {
            self.fail_handoff(id, error);
            return;
        }
        if let Err(error) = self.scheduler.handoff_complete(id, finish.first_token.token) {
            self.fail(id, EngineError::Refused(error));
            return;
        }
        if let Some(Entry { part: Part::Incoming(incoming), .. }) = self.entries.get_mut(&id)
            && let Incoming::Receiving(receiving) = std::mem::replace(incoming, Incoming::Complete)
        {
            add(&self.stats.handoffs_received, 1);
            // If nobody waits for the receipt, the sender is gone after its work was done.
            let _ = receiving.outcome.send(Ok(receiving.bytes));
        }
        self.accept(id, finish.first_token);
    }

    fn check_finish(&self, id: SequenceId, finish: &KvFinish) -> Result<(), HandoffError> {
        let config = self.model.config();
        let expected = self.scheduler.sequence(id).map_or(0, |sequence| sequence.prompt().len()) as Position;
        let (token, position) = (finish.first_token.token, finish.first_token.position);
        if token as usize >= config.vocab_size || position != expected {
            let vocab_size = config.vocab_size;
            return Err(HandoffError::FirstToken { token, position, vocab_size, expected });
        }
        Ok(())
    }

    /// Ends the sequence and tells the sender why.
    fn fail_handoff(&mut self, id: SequenceId, error: HandoffError) {
        if let Some(Entry { part: Part::Incoming(incoming), .. }) = self.entries.get_mut(&id)
            && let Incoming::Receiving(receiving) = std::mem::replace(incoming, Incoming::Complete)
        {
            let _ = receiving.outcome.send(Err(error.clone()));
        }
        self.fail(id, EngineError::Handoff(error));
    }
}

fn stalled(receiving: &Receiving, bound: Duration) -> Result<(), HandoffError> {
    let waited = receiving.progress.elapsed();
    if waited > bound {
        return Err(HandoffError::Stalled { waited, rows: receiving.rows });
    }
    Ok(())
}
