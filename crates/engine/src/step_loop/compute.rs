//! One step: the plan as a batch, the network, and what came of every row.

use std::{sync::Arc, time::Instant};

use cadre_model::{LogitRows, ModelError, Segment, SegmentKind, StepBatch};
use cadre_ops::{Backend, OpsError, SampleRow};
use cadre_sampler::{History, Sample, SampleError};
use cadre_scheduler::{CommitKind, Scheduler, Sequence, StepPlan};
use cadre_types::{Position, SequenceId};

use crate::{
    error::{EngineError, HandoffError},
    handoff::KvFinish,
    request::{EngineEvent, GeneratedToken},
    stats::{StepSample, add},
};

use super::{Part, StepLoop, banned, handoff_out::StepWatch, nanos};

/// What came of one row of logits.
type Drawn = Result<GeneratedToken, EngineError>;

impl<B: Backend> StepLoop<B> {
    pub(super) fn step(&mut self, plan: &StepPlan) {
        let began = Instant::now();
        let mut handoff_failures = Vec::new();
        let computed = self.forward(plan, &mut handoff_failures);
        let forward = began.elapsed();
        match computed {
            Ok(()) => self.take_results(plan),
            Err(error) => self.fail_step(plan, error),
        }
        for (id, failure) in handoff_failures {
            if let Some(error) = failure {
                self.fail(id, EngineError::Handoff(error));
            }
        }
        let decode_rows = plan.decode.len();
        let sample = StepSample {
            total: began.elapsed(),
            forward,
            decode_rows,
            prefill_rows: plan.rows() - decode_rows,
        };
        add(&self.stats.step_nanos, nanos(sample.total));
        (self.on_step)(&sample);
    }

    fn forward(
        &mut self,
        plan: &StepPlan,
        handoff_failures: &mut Vec<(SequenceId, Option<HandoffError>)>,
    ) -> Result<(), ModelError> {
        let Self { model, workspace, cache, exchange, scheduler, entries, stats, .. } = self;
        let batch = batch(plan, scheduler);
        let mut watch = StepWatch::new(stats, plan, scheduler, entries, handoff_failures);
        model.forward(workspace, &batch, cache, &mut **exchange, &mut watch)
    }

    /// Draws the tokens of a step that succeeded and commits every row, in the order of the batch.
    fn take_results(&mut self, plan: &StepPlan) {
        let mut drawn = match self.draw(plan) {
            Ok(drawn) => drawn.into_iter(),
            Err(error) => return self.fail_step(plan, error),
        };
        add(&self.stats.steps, 1);
        add(&self.stats.decode_tokens, plan.decode.len() as u64);
        add(&self.stats.prefill_tokens, (plan.rows() - plan.decode.len()) as u64);
        for row in &plan.decode {
            self.sampled(row.id, drawn.next());
        }
        for chunk in &plan.prefill {
            let end = chunk.first_position + chunk.len as Position;
            if let Some(entry) = self.entries.get(&chunk.id)
                && matches!(entry.part, Part::Outgoing(_))
            {
                entry.events.send(EngineEvent::Computed(end));
            }
            if chunk.last {
                self.sampled(chunk.id, drawn.next());
            } else if let Err(error) = self.scheduler.commit(chunk.id, CommitKind::Prefilled) {
                self.fail(chunk.id, EngineError::Refused(error));
            }
        }
    }

    /// One token per row of logits.
    fn draw(&mut self, plan: &StepPlan) -> Result<Vec<Drawn>, ModelError> {
        let decode = plan.decode.iter().map(|row| (row.id, row.position + 1));
        let last = plan.prefill.iter().filter(|chunk| chunk.last);
        let prefill = last.map(|chunk| (chunk.id, chunk.first_position + chunk.len as Position));
        let wanted: Vec<(SequenceId, Position)> = decode.chain(prefill).collect();
        let Self { model, workspace, scheduler, entries, .. } = self;
        let eos = &model.config().eos_token_ids;
        let banned_of = |&(id, _): &(SequenceId, Position)| {
            banned(&entries[&id].stop, eos, planned(scheduler, id).output().len())
        };
        let banned: Vec<_> = wanted.iter().map(banned_of).collect();
        let rows: Vec<SampleRow<'_>> = wanted
            .iter()
            .zip(&banned)
            .enumerate()
            .map(|(row, (&(id, position), banned))| {
                let sequence = planned(scheduler, id);
                let history = History { prompt: sequence.prompt(), output: sequence.output(), banned };
                SampleRow { row, params: &entries[&id].sampling, history, position }
            })
            .collect();
        let samples = if rows.is_empty() { Vec::new() } else { model.sample(workspace, &rows)? };
        let token = |(sample, &(_, position)): (Result<Sample, SampleError>, &(SequenceId, Position))| {
            let sample = sample.map_err(|source| EngineError::Sample { position, source })?;
            Ok(GeneratedToken {
                position,
                token: sample.token,
                logprob: sample.logprob.map(|chosen| chosen.logprob),
                top: sample.top.into_iter().map(|likely| (likely.token, likely.logprob)).collect(),
            })
        };
        Ok(samples.into_iter().zip(&wanted).map(token).collect())
    }

    /// Commits a sequence's token. Every sequence that wants one was drawn for.
    fn sampled(&mut self, id: SequenceId, drawn: Option<Drawn>) {
        let Some(drawn) = drawn else { return };
        let token = match drawn {
            Ok(token) => token,
            Err(error) => {
                self.fail(id, error);
                return;
            }
        };
        add(&self.stats.sampled_tokens, 1);
        if let Err(error) = self.scheduler.commit(id, CommitKind::Sampled(token.token)) {
            self.fail(id, EngineError::Refused(error));
            return;
        }
        if let Some(entry) = self.entries.get_mut(&id)
            && let Part::Outgoing(outgoing) = &mut entry.part
        {
            outgoing.finish_with(KvFinish { first_token: token.clone() });
            // The sequence ends when its last row has left, not by this token.
            entry.events.send(EngineEvent::Token(token));
            return;
        }
        self.accept(id, token);
    }

    /// Fails the sequences of a step; of a NaN in the gate only the one whose row it is, because the others
    /// would succeed without it and are planned again.
    fn fail_step(&mut self, plan: &StepPlan, error: ModelError) {
        add(&self.stats.failed_steps, 1);
        tracing::warn!(%error, rows = plan.rows(), "step failed");
        let blamed = blamed(plan, &error);
        let source = Arc::new(error);
        for (id, position) in blamed {
            self.fail(id, EngineError::Step { position, source: Arc::clone(&source) });
        }
    }
}

/// The sequences that a failed step is the end of, with their first positions in it.
fn blamed(plan: &StepPlan, error: &ModelError) -> Vec<(SequenceId, Position)> {
    let culprit = match error {
        ModelError::Backend { source: OpsError::NanGate { row, .. }, .. } => Some(*row),
        _ => None,
    };
    let decode = plan.decode.iter().map(|row| (row.id, row.position, 1));
    let prefill = plan.prefill.iter().map(|chunk| (chunk.id, chunk.first_position, chunk.len));
    let mut next_row = 0;
    let mut blamed = Vec::new();
    for (id, position, rows) in decode.chain(prefill) {
        let mine = next_row..next_row + rows;
        next_row = mine.end;
        if culprit.is_none_or(|row| mine.contains(&row)) {
            blamed.push((id, position));
        }
    }
    blamed
}

/// The plan in the model's terms: decode rows, then chunks.
fn batch<'a>(plan: &'a StepPlan, scheduler: &'a Scheduler) -> StepBatch<'a> {
    let decode = plan.decode.iter().map(|row| Segment {
        kind: SegmentKind::Decode,
        tokens: std::slice::from_ref(&row.token),
        first_position: row.position,
        block_table: planned(scheduler, row.id).block_table(),
        logits: LogitRows::Last,
    });
    let prefill = plan.prefill.iter().map(|chunk| {
        let sequence = planned(scheduler, chunk.id);
        let first = chunk.first_position as usize;
        Segment {
            kind: SegmentKind::Prefill,
            tokens: &sequence.prompt()[first..first + chunk.len],
            first_position: chunk.first_position,
            block_table: sequence.block_table(),
            logits: if chunk.last { LogitRows::Last } else { LogitRows::None },
        }
    });
    StepBatch { segments: decode.chain(prefill).collect() }
}

fn planned(scheduler: &Scheduler, id: SequenceId) -> &Sequence {
    scheduler
        .sequence(id)
        .expect("the plan names this scheduler's sequences, and none ends between plan and use")
}

#[cfg(test)]
mod tests {
    use cadre_scheduler::{DecodeStep, PrefillChunk};
    use cadre_types::LayerId;

    use super::*;

    fn plan() -> StepPlan {
        let row = |id, position| DecodeStep { id: SequenceId(id), token: 1, position };
        let chunk =
            |id, first_position, len| PrefillChunk { id: SequenceId(id), first_position, len, last: false };
        StepPlan {
            decode: vec![row(1, 40), row(2, 50)],
            prefill: vec![chunk(3, 64, 5), chunk(4, 0, 2)],
            ..StepPlan::default()
        }
    }

    fn nan_in(row: usize) -> ModelError {
        let source = OpsError::NanGate { row, expert: 0 };
        ModelError::Backend { layer: LayerId(1), operation: "gate", source }
    }

    #[test]
    fn a_nan_is_blamed_on_the_sequence_of_its_row() {
        // Rows: 0 and 1 decode, 2 to 6 the first chunk, 7 and 8 the second.
        for (row, id, position) in [(0, 1, 40), (1, 2, 50), (2, 3, 64), (6, 3, 64), (7, 4, 0), (8, 4, 0)] {
            assert_eq!(blamed(&plan(), &nan_in(row)), [(SequenceId(id), position)], "row {row}");
        }
    }

    #[test]
    fn any_other_failure_is_everybodys() {
        let error = ModelError::TooManyRows { rows: 9, capacity: 8 };
        let ids: Vec<_> = blamed(&plan(), &error).into_iter().map(|(id, _)| id.0).collect();
        assert_eq!(ids, [1, 2, 3, 4]);
    }
}
