//! Answers, failures and what follows from them: eject, plan again, strand, rescue, give up.

use std::time::{Duration, Instant};

use cadre_ops::{ExchangeError, RowFormat};
use cadre_types::{Generation, LayerId, LogicalExpert, ShardIndex};

use super::{
    Dispatcher,
    step::{Progress, Step, rows_of},
};
use crate::{
    frame::{Answer, CombineFrame, LinkError, RefusalCode, first_not_finite},
    health::{Failure, Sample},
    plan::Pair,
    stats::add,
};

impl Dispatcher {
    pub(super) fn handle_answer(&mut self, sequence: u64, answer: Answer, at: Instant) {
        if let Some((shard, sent)) = self.links.take_probe(sequence) {
            if let Err(error) = &answer {
                tracing::debug!(%shard, %error, "probe failed");
            }
            let passed = answer.is_ok_and(|rows| first_not_finite(rows.format, &rows.rows).is_none());
            self.links.probed(shard, sent, at, passed);
            return;
        }
        let Some(index) = self.steps.iter().position(|step| step.has_frame(sequence)) else {
            add(&self.shared.stats.late_answers, 1);
            return;
        };
        // Out of the queue while `self` works on it, and back to its place.
        let Some(mut step) = self.steps.remove(index) else { return };
        self.settle(&mut step, sequence, answer, at);
        self.steps.insert(index, step);
    }

    /// Books the answer to a frame of this step.
    fn settle(&mut self, step: &mut Step, sequence: u64, answer: Answer, at: Instant) {
        let Some(frame) = step.frame_mut(sequence) else { return };
        let shard = frame.shard;
        match answer {
            Ok(combined) => self.settle_rows(step, sequence, combined, at),
            Err(error) => match failure_of(&error) {
                Some(failure) => {
                    self.fail_frame(step, sequence, failure, format!("{shard}: {error}"), at);
                }
                None => {
                    self.links.release(frame);
                    frame.progress = Progress::Failed;
                    step.fatal = Some(self.fatal(step.layer, shard, &error));
                }
            },
        }
    }

    fn settle_rows(&mut self, step: &mut Step, sequence: u64, combined: CombineFrame, at: Instant) {
        let (combine, hidden) = (step.combine, step.hidden);
        let Some(frame) = step.frame_mut(sequence) else { return };
        let shard = frame.shard;
        let expected = frame.targets.len() * combine.row_bytes(hidden);
        let (found, format) = (combined.rows.len(), combined.format);
        if format != combine || found != expected {
            let what =
                format!("{shard} answered {found} bytes of {format:?}, expected {expected} of {combine:?}");
            self.fail_frame(step, sequence, Failure::BadAnswer, what, at);
            return;
        }
        if let Some(element) = first_not_finite(combine, &combined.rows) {
            self.not_finite(step, sequence, &combined, element, at);
            return;
        }
        self.links.release(frame);
        let (sent, slow_after, tokens) = (frame.sent, frame.slow_after, frame.targets.len());
        let round_trip = at.saturating_duration_since(sent);
        let waited = frame.progress == Progress::Waiting;
        let signals = combined.signals;
        let sample = Sample {
            round_trip,
            queue: Duration::from_micros(signals.queue_micros.into()),
            compute: Duration::from_micros(signals.compute_micros.into()),
            tokens,
            queued: signals.queued_tokens,
        };
        self.links.computed(shard, at, sample);
        // Nobody else could be asked, or it came just before somebody would have been.
        let since = step.waiting_since(sent).filter(|_| waited);
        if let Some((since, after)) = since.zip(slow_after)
            && at.saturating_duration_since(since) >= after
        {
            let what = format!("an answer of {tokens} rows took {} ms", round_trip.as_millis());
            self.links.failed(shard, Failure::Slow, at, &what);
        }
        let stats = &self.shared.stats;
        stats.round_trip.observe(round_trip);
        add(&stats.bytes_in, found);
        add(&stats.queue_micros, signals.queue_micros as usize);
        add(&stats.compute_micros, signals.compute_micros as usize);
        if waited {
            step.arrive(sequence, combined.rows);
        } else {
            add(&stats.late_answers, 1);
            step.arrive_late(sequence, &combined.rows);
        }
    }

    /// Judges an answer with a row that is not finite. The shard is taken out and other copies are asked, unless its
    /// input was not finite already, or another copy (or this one, after it had proven itself) has computed the
    /// same: then it is the model and what it was asked, and nobody is taken out for that.
    fn not_finite(
        &mut self,
        step: &mut Step,
        sequence: u64,
        combined: &CombineFrame,
        element: usize,
        at: Instant,
    ) {
        let (layer, hidden, width) =
            (step.layer, step.hidden.max(1), step.combine.row_bytes(step.hidden).max(1));
        let Some(frame) = step.frame_mut(sequence) else { return };
        let (shard, pair) = (frame.shard, element / hidden);
        let (sent, token) = (&frame.frame, frame.frame.pair_tokens[pair] as usize);
        let target = frame.targets[pair];
        let rows = combined.rows.chunks_exact(width).zip(&frame.targets);
        let bad: Vec<u32> = rows
            .filter(|(row, _)| first_not_finite(combined.format, row).is_some())
            .map(|(_, target)| *target)
            .collect();
        let row_bytes = sent.format.row_bytes(hidden);
        let scales = 4 * sent.format.row_scales(hidden);
        let input_is_finite =
            first_not_finite(sent.format, &sent.data[token * row_bytes..(token + 1) * row_bytes]).is_none()
                && first_not_finite(RowFormat::F32, &sent.scales[token * scales..(token + 1) * scales])
                    .is_none();
        let expert = LogicalExpert(step.topk_idx[target as usize]);
        let what =
            format!("{shard}, {layer}, {expert}: element {} of its row is not finite", element % hidden);
        let before = step.first_not_finite(&bad);
        if input_is_finite && before.is_none() {
            step.note_not_finite(shard, bad);
            self.links.suspect(shard, layer, expert);
            self.fail_frame(step, sequence, Failure::NotFinite, what, at);
            return;
        }
        let message = match before {
            _ if !input_is_finite => format!("{what}, and neither is the row that it was sent"),
            Some(other) => {
                self.links.absolve(other);
                format!("{what}, and {other} has computed the same: the activations overflow")
            }
            None => what,
        };
        if let Some(frame) = step.frame_mut(sequence) {
            self.links.release(frame);
            frame.progress = Progress::Failed;
        }
        step.fatal = Some(ExchangeError::NotFinite { layer, expert, message });
    }

    fn fatal(&self, layer: LayerId, shard: ShardIndex, error: &LinkError) -> ExchangeError {
        match error {
            LinkError::Refused(refusal) if refusal.code == RefusalCode::Generation => {
                let ours = Generation { epoch: self.links.epoch(), ..self.shared.weights };
                ExchangeError::Generation { layer, shard, ours, message: refusal.message.clone() }
            }
            other => ExchangeError::Malformed { layer, message: format!("{shard}: {other}") },
        }
    }

    /// Takes the frame's shard out and plans its pairs again.
    fn fail_frame(&mut self, step: &mut Step, sequence: u64, failure: Failure, what: String, now: Instant) {
        let Some(frame) = step.frame_mut(sequence) else { return };
        let was_waiting = frame.progress == Progress::Waiting;
        self.links.release(frame);
        if !was_waiting && failure == Failure::Refused {
            // It was given up, and may have been under a placement that nobody waits for any more: what its shard
            // refuses now says nothing about new frames.
            frame.progress = Progress::Failed;
            return;
        }
        self.links.failed(frame.shard, failure, now, &what);
        // A hung or unlisted shard may still answer, and the answer would be right; a failed frame is over.
        let may_answer = matches!(failure, Failure::TimedOut | Failure::Expired | Failure::Slow);
        frame.progress = if may_answer { Progress::Late } else { Progress::Failed };
        if !was_waiting {
            // Its pairs were planned again when it was given up.
            return;
        }
        let (frame, targets) = (frame.frame.clone(), frame.targets.clone());
        step.note_failure(now, what);
        let pairs = step.pairs_of(&frame, &targets);
        add(&self.shared.stats.retried_pairs, pairs.len());
        let late = may_answer.then_some(sequence);
        self.place(step, &rows_of(&frame, step.hidden), &pairs, late);
    }

    /// Gives up the frames that a no-longer-listed shard has not answered.
    pub(super) fn expire(&mut self, shard: ShardIndex, now: Instant) {
        let what = format!("{shard} is no longer listed by the coordinator");
        self.links.failed(shard, Failure::Expired, now, &what);
        let mut steps = std::mem::take(&mut self.steps);
        for step in &mut steps {
            for sequence in step.waiting(|frame| frame.shard == shard) {
                self.fail_frame(step, sequence, Failure::Expired, what.clone(), now);
            }
        }
        self.steps = steps;
    }

    /// Gives up frames that are out for too long.
    pub(super) fn time_out(&mut self, step: &mut Step, now: Instant) {
        let bound = self.config.frame_timeout;
        for sequence in step.waiting(|frame| now >= frame.sent + bound) {
            let peer = step.frame_mut(sequence).map(|frame| self.links.name(frame.shard)).unwrap_or_default();
            let (layer, epoch) = (step.layer, self.links.epoch());
            let what = format!("{peer}, {layer}, {epoch}: no answer within {} ms", bound.as_millis());
            self.fail_frame(step, sequence, Failure::TimedOut, what, now);
        }
    }

    /// Asks others for what a slow shard owes, if they have all of it; and avoids it from now on. Every shard can
    /// be left once before it has to prove itself, so this ends.
    pub(super) fn leave_slow(&mut self, step: &mut Step, now: Instant) {
        for sequence in step.slow_frames(now) {
            let Some(frame) = step.frame_mut(sequence) else { continue };
            let (shard, after) = (frame.shard, frame.slow_after.take().unwrap_or_default());
            let (frame, targets) = (frame.frame.clone(), frame.targets.clone());
            let (peer, layer, epoch) = (self.links.name(shard), step.layer, self.links.epoch());
            let ms = after.as_millis();
            let what =
                format!("{peer}, {layer}, {epoch}: no answer within {ms} ms, many times what others take");
            let elsewhere = step.pairs_of(&frame, &targets);
            if elsewhere.iter().all(|pair| self.links.has_other(step.layer, pair.expert, shard)) {
                self.fail_frame(step, sequence, Failure::Slow, what, now);
            } else {
                self.links.failed(shard, Failure::Slow, now, &what);
            }
        }
    }

    /// Plans stranded pairs again if a copy has come back.
    pub(super) fn rescue(&mut self, step: &mut Step) {
        if step.stranded.is_empty() {
            return;
        }
        let Some(placement) = self.links.view().map(|view| view.placement.clone()) else { return };
        for stranded in std::mem::take(&mut step.stranded) {
            let has_copy = |pair: &Pair| {
                let copies = placement.replicas(step.layer, pair.expert);
                copies.iter().any(|copy| self.links.usable(copy.shard.index()))
            };
            if stranded.pairs.iter().any(has_copy) {
                self.place(step, &stranded.rows, &stranded.pairs, stranded.late);
            } else {
                step.stranded.push(stranded);
            }
        }
    }

    /// The next moment at which waiting for this step must be interrupted.
    pub(super) fn deadline(&self, step: &Step, now: Instant) -> Instant {
        let answer = step.oldest_waiting().map(|sent| sent + self.config.frame_timeout);
        let uncovered = step.failing_since().map(|since| since + self.config.uncovered_wait);
        let probe = if step.stranded.is_empty() { None } else { self.links.next_probe() };
        let slow = step.next_slow().filter(|at| *at > now);
        let earliest = [answer, uncovered.filter(|at| *at > now), probe, slow].into_iter().flatten().min();
        earliest.unwrap_or(now + self.config.frame_timeout)
    }

    /// The error of a step that has looked for a live copy for too long, counted from its first failure over all that
    /// was tried since: a step whose pairs always find another copy to fail on ends as well.
    pub(super) fn give_up(&self, step: &Step, now: Instant) -> Option<ExchangeError> {
        let waited = now.saturating_duration_since(step.failing_since()?);
        if waited < self.config.uncovered_wait {
            return None;
        }
        let expert = step.missing_expert()?;
        add(&self.shared.stats.uncovered, 1);
        let mut causes = step.causes();
        causes
            .extend(self.links.copies(step.layer, expert).iter().map(|copy| self.links.describe(*copy, now)));
        Some(ExchangeError::Uncovered {
            layer: step.layer,
            expert,
            epoch: self.links.epoch(),
            waited_ms: waited.as_millis() as u64,
            causes: causes.join("; "),
        })
    }

    /// Drops a step that nobody will combine.
    pub(super) fn forget(&mut self, mut step: Step) {
        for frame in &mut step.frames {
            self.links.release(frame);
        }
    }
}

/// How a failure counts against the shard; `None` if retrying anywhere is pointless.
fn failure_of(error: &LinkError) -> Option<Failure> {
    match error {
        LinkError::Disconnected(_) => Some(Failure::Unreachable),
        LinkError::Backlogged { .. } | LinkError::Dropped => Some(Failure::Refused),
        LinkError::Refused(refusal) => match refusal.code {
            RefusalCode::Epoch
            | RefusalCode::Overloaded
            | RefusalCode::Unavailable
            | RefusalCode::Internal => Some(Failure::Refused),
            RefusalCode::Generation | RefusalCode::Malformed | RefusalCode::Oversize => None,
        },
    }
}
