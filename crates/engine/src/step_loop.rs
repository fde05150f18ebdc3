//! The loop: commands → deadlines → KV that arrived → plan → compute → sample → KV that leaves.
//!
//! One thread owns all of it. A turn without anything to compute parks the thread until a command, a
//! hand-off message or the next deadline; nothing else blocks but the exchange inside a step, whose waits
//! are bounded by its own configuration. While a step waits there, commands queue up and are refused when
//! their queue is full.
//!
//! `compute` is a step, `handoff_in` and `handoff_out` are the two directions of KV; this file is the life
//! of sequences around them. Invariant: `entries` and the scheduler hold the same ids, and an id leaves
//! both together with its last event ([`StepLoop::end`]).

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cadre_model::{Model, Workspace};
use cadre_ops::{Backend, ExpertExchange};
use cadre_scheduler::{NewSequence, Scheduler, SequenceKind};
use cadre_types::{FinishReason, SamplingParams, SequenceId, StopConditions, TokenId};
use tokio::sync::mpsc;

use crate::{
    error::{EngineError, EngineStartError, HandoffError},
    events::EventSink,
    handle::{Begun, Command, EngineParts, InFlight, KvShape, Submission, SubmissionKind},
    handoff::{HandoffOffer, KV_ROOM_BYTES, KvRoom},
    request::{EngineEvent, GeneratedToken},
    stats::{EngineStats, StepSample, add},
};

mod compute;
mod handoff_in;
mod handoff_out;

use handoff_in::Incoming;
use handoff_out::Outgoing;

/// Longest sleep of an idle loop that has sequences: how late a hand-off's time-out may be noticed.
const IDLE_WITH_SEQUENCES: Duration = Duration::from_millis(50);
/// Longest sleep of an empty loop; every reason to wake up earlier unparks it.
const IDLE_EMPTY: Duration = Duration::from_secs(1);

pub(crate) struct StepLoop<B: Backend> {
    model: Model<B>,
    workspace: Workspace<B>,
    cache: B::KvCache,
    exchange: Box<dyn ExpertExchange>,
    scheduler: Scheduler,
    entries: BTreeMap<SequenceId, Entry<B>>,
    by_request: HashMap<String, SequenceId>,
    commands: mpsc::Receiver<Command>,
    stopping: Arc<AtomicBool>,
    stats: Arc<EngineStats>,
    on_step: Box<dyn FnMut(&StepSample) + Send>,
    shape: KvShape,
    handoff_timeout: Duration,
    handoff_begin_timeout: Duration,
    /// For the rows of all prompts that are handed off.
    outgoing_room: KvRoom,
    /// Zero of the scheduler's clock.
    started: Instant,
}

/// What the scheduler does not know of a sequence.
struct Entry<B: Backend> {
    request_id: String,
    sampling: SamplingParams,
    stop: StopConditions,
    events: EventSink,
    part: Part<B>,
    _in_flight: InFlight,
}

/// Which side of a hand-off a sequence is on.
enum Part<B: Backend> {
    Local,
    Outgoing(Outgoing<B>),
    Incoming(Incoming),
}

impl<B: Backend> StepLoop<B> {
    pub(crate) fn new(
        parts: EngineParts<B>,
        shape: KvShape,
        commands: mpsc::Receiver<Command>,
        stats: Arc<EngineStats>,
        stopping: Arc<AtomicBool>,
    ) -> Result<Self, EngineStartError> {
        let scheduler = Scheduler::new(parts.scheduler)?;
        let config = scheduler.config();
        let cache = parts
            .model
            .new_cache(config.pages as usize)
            .map_err(|source| EngineStartError::Backend { what: "the KV cache", source })?;
        let workspace = Workspace::new(&parts.model, config.max_step_tokens, config.max_step_tokens)
            .map_err(|source| EngineStartError::Backend { what: "activations", source })?;
        stats.publish(&scheduler.stats());
        Ok(Self {
            model: parts.model,
            workspace,
            cache,
            exchange: parts.exchange,
            scheduler,
            entries: BTreeMap::new(),
            by_request: HashMap::new(),
            commands,
            stopping,
            stats,
            on_step: parts.on_step,
            shape,
            handoff_timeout: parts.handoff_timeout,
            handoff_begin_timeout: parts.handoff_begin_timeout,
            outgoing_room: KvRoom::new(KV_ROOM_BYTES),
            started: Instant::now(),
        })
    }

    /// Runs until the engine is told to stop or nobody can submit any more.
    pub(crate) fn run(mut self) {
        while self.take_commands() {
            self.end_abandoned_and_expired();
            let received = self.receive_kv();
            let plan = self.scheduler.plan();
            for &id in &plan.admitted {
                self.reserved(id);
            }
            if !plan.is_empty() {
                self.step(&plan);
            }
            let sent = self.send_kv();
            self.stats.publish(&self.scheduler.stats());
            if plan.is_empty() && !received && !sent {
                std::thread::park_timeout(self.idle_time());
            }
        }
        self.end_everything();
    }

    /// Ends what runs, and what was commanded and not taken any more.
    fn end_everything(&mut self) {
        for id in self.scheduler.sequences().map(|sequence| sequence.id()).collect::<Vec<_>>() {
            self.fail(id, EngineError::Stopped);
        }
        // Closed first: what is sent from here on is refused at its sender.
        self.commands.close();
        while let Some(command) = self.commands.blocking_recv() {
            match command {
                Command::Submit(submission) => self.refuse(&submission.events, EngineError::Stopped),
                Command::BeginHandoff { begun, .. } => {
                    // If nobody waits for the answer, nobody is left waiting.
                    let _ = begun.answer.send(Err(HandoffError::Stopped));
                }
                Command::Cancel { .. } => {}
            }
        }
    }

    /// Takes what has been commanded so far; at most one queue's worth, so that a flood of commands cannot
    /// keep the loop from computing. `false` ends the loop.
    fn take_commands(&mut self) -> bool {
        if self.stopping.load(Ordering::Acquire) {
            return false;
        }
        for _ in 0..self.commands.max_capacity() {
            match self.commands.try_recv() {
                Ok(Command::Submit(submission)) => self.submit(*submission),
                Ok(Command::Cancel { request_id }) => {
                    if let Some(&id) = self.by_request.get(&request_id) {
                        self.finish(id, FinishReason::Cancelled);
                    }
                }
                Ok(Command::BeginHandoff { offer, begun }) => self.begin_handoff(offer, begun),
                Err(mpsc::error::TryRecvError::Empty) => return true,
                Err(mpsc::error::TryRecvError::Disconnected) => return false,
            }
        }
        true
    }

    fn idle_time(&self) -> Duration {
        if self.entries.is_empty() {
            return IDLE_EMPTY;
        }
        let until_deadline = self.scheduler.next_deadline().map(|deadline| {
            // One nanosecond more: a deadline counts as passed when it is reached.
            Duration::from_nanos(deadline.saturating_sub(self.now()).saturating_add(1))
        });
        until_deadline.map_or(IDLE_WITH_SEQUENCES, |wait| wait.min(IDLE_WITH_SEQUENCES))
    }

    /// Nanoseconds of the scheduler's clock.
    fn now(&self) -> u64 {
        nanos(self.started.elapsed())
    }

    // --- arrivals ----------------------------------------------------------------------------------

    fn submit(&mut self, submission: Submission) {
        let Submission { request_id, prompt, sampling, stop, deadline, kind, events, in_flight } = submission;
        if let Some(&id) = self.by_request.get(&request_id) {
            if !self.entries.get(&id).is_some_and(|entry| entry.events.is_closed()) {
                self.refuse(&events, EngineError::Duplicate { request_id });
                return;
            }
            // Its owner has let go of it and tries again.
            self.finish(id, FinishReason::Cancelled);
        }
        let (kind, part) = match kind {
            SubmissionKind::Local => (SequenceKind::Local, Part::Local),
            SubmissionKind::Remote => (SequenceKind::AwaitHandoff, Part::Incoming(Incoming::Queued)),
            SubmissionKind::PrefillOnly { sink } => {
                let outgoing = Outgoing::new(sink, self.outgoing_room.clone(), self.shape, prompt.len());
                (SequenceKind::PrefillOnly, Part::Outgoing(outgoing))
            }
        };
        let deadline = deadline.map(|deadline| nanos(deadline.saturating_duration_since(self.started)));
        let max_tokens = stop.max_tokens;
        match self.scheduler.submit(NewSequence { prompt, max_tokens, kind, deadline }) {
            Ok(id) => {
                add(&self.stats.submitted, 1);
                self.by_request.insert(request_id.clone(), id);
                self.entries
                    .insert(id, Entry { request_id, sampling, stop, events, part, _in_flight: in_flight });
            }
            Err(refused) => self.refuse(&events, EngineError::Refused(refused)),
        }
    }

    fn refuse(&self, events: &EventSink, error: EngineError) {
        self.stats.end(FinishReason::Error);
        // A receiver that is gone does not want to know.
        events.send(EngineEvent::Failed(error));
    }

    fn reserved(&mut self, id: SequenceId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            if let Part::Incoming(incoming) = &mut entry.part {
                incoming.reserved();
            }
            // If the receiver is gone, the next turn ends the sequence.
            entry.events.send(EngineEvent::Reserved);
        }
    }

    fn begin_handoff(&mut self, offer: HandoffOffer, begun: Begun) {
        let Begun { messages, outcome, answer } = begun;
        let id = self.by_request.get(&offer.request_id).copied();
        let (sequence, entry) =
            (id.and_then(|id| self.scheduler.sequence(id)), id.and_then(|id| self.entries.get_mut(&id)));
        let result = handoff_in::check_offer(&offer, self.shape, sequence, entry.as_deref());
        if result.is_ok()
            && let Some(Entry { part: Part::Incoming(incoming), .. }) = entry
        {
            incoming.begin(messages, outcome, self.shape.layers);
        }
        // If nobody waits for the answer, the channel closes behind it: an abort, seen on the next turn.
        let _ = answer.send(result);
    }

    // --- departures ----------------------------------------------------------------------------------

    fn end_abandoned_and_expired(&mut self) {
        let abandoned: Vec<SequenceId> =
            self.entries.iter().filter(|(_, entry)| entry.events.is_closed()).map(|(&id, _)| id).collect();
        for id in abandoned {
            self.finish(id, FinishReason::Cancelled);
        }
        for id in self.scheduler.expired(self.now()) {
            self.finish(id, FinishReason::Deadline);
        }
    }

    /// A token of a sequence is known: reports it, or ends the sequence. The scheduler has it already.
    fn accept(&mut self, id: SequenceId, token: GeneratedToken) {
        let Some(sequence) = self.scheduler.sequence(id) else { return };
        let (generated, max_tokens) = (sequence.output().len(), sequence.max_tokens());
        let Some(entry) = self.entries.get(&id) else { return };
        let eos = &self.model.config().eos_token_ids;
        if is_stop(&entry.stop, eos, token.token, generated) {
            self.finish(id, FinishReason::Stop);
            return;
        }
        // If the receiver is gone, the next turn ends the sequence; full it cannot be.
        entry.events.send(EngineEvent::Token(token));
        if generated >= max_tokens {
            self.finish(id, FinishReason::Length);
        }
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        self.end(id, reason, EngineEvent::Finished(reason));
    }

    fn fail(&mut self, id: SequenceId, error: EngineError) {
        if let Some(entry) = self.entries.get(&id) {
            tracing::warn!(request_id = entry.request_id, %error, "sequence failed");
        }
        if matches!(error, EngineError::Handoff(_)) {
            add(&self.stats.handoffs_failed, 1);
        }
        self.end(id, FinishReason::Error, EngineEvent::Failed(error));
    }

    /// Frees the pages, then tells: whoever hears of the end finds the pages free.
    fn end(&mut self, id: SequenceId, reason: FinishReason, event: EngineEvent) {
        self.scheduler.end(id);
        if let Some(entry) = self.entries.remove(&id) {
            self.by_request.remove(&entry.request_id);
            self.stats.end(reason);
            self.stats.publish(&self.scheduler.stats());
            entry.events.send(event);
        }
    }
}

/// What the next token must not be: until `min_tokens` are there, nothing that would end the sequence.
/// Such a token would be hidden from the client and conditioned on all the same.
fn banned(stop: &StopConditions, eos: &[TokenId], generated: usize) -> Vec<TokenId> {
    if generated >= stop.min_tokens as usize {
        return Vec::new();
    }
    let eos = if stop.ignore_eos { &[] } else { eos };
    [&stop.stop_token_ids, eos].concat()
}

/// Whether `token`, the `generated`-th of its sequence, ends it.
fn is_stop(stop: &StopConditions, eos: &[TokenId], token: TokenId, generated: usize) -> bool {
    let counts = generated > stop.min_tokens as usize;
    counts && (stop.stop_token_ids.contains(&token) || (!stop.ignore_eos && eos.contains(&token)))
}

fn nanos(duration: Duration) -> u64 {
    // 584 years of uptime.
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_ids_count_after_min_tokens() {
        let stop =
            StopConditions { max_tokens: 9, stop_token_ids: vec![7], min_tokens: 2, ignore_eos: false };
        assert!(!is_stop(&stop, &[1], 7, 1), "the first token is within the minimum");
        assert!(!is_stop(&stop, &[1], 7, 2), "so is the second");
        assert!(is_stop(&stop, &[1], 7, 3));
        assert!(is_stop(&stop, &[1], 1, 3), "EOS of the model");
        assert!(!is_stop(&stop, &[1], 5, 3));
    }

    #[test]
    fn what_would_end_the_text_is_banned_within_the_minimum() {
        let stop =
            StopConditions { max_tokens: 9, stop_token_ids: vec![7], min_tokens: 2, ignore_eos: false };
        for generated in 0..4 {
            let banned = banned(&stop, &[1], generated);
            // What may be chosen ends the sequence exactly if it counts.
            for token in [1, 7] {
                assert_eq!(
                    !banned.contains(&token),
                    is_stop(&stop, &[1], token, generated + 1),
                    "{generated}"
                );
            }
            assert!(!banned.contains(&5));
        }
        let ignoring = StopConditions { ignore_eos: true, ..stop };
        assert_eq!(banned(&ignoring, &[1], 0), [7], "EOS is text like any other");
    }

    #[test]
    fn ignored_eos_leaves_the_clients_own_ids() {
        let stop = StopConditions { ignore_eos: true, stop_token_ids: vec![7], ..StopConditions::default() };
        assert!(!is_stop(&stop, &[1], 1, 1));
        assert!(is_stop(&stop, &[1], 7, 1));
    }
}
