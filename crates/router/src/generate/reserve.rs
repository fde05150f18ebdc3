//! Reservation: decode workers are asked, best first, until one has pages; which failure is followed by another
//! attempt, and for how long.

use cadre_proto::v1::{self, decode_event};
use cadre_types::{Member, Role};
use tokio::time::{Duration, Instant, sleep_until, timeout_at};
use tonic::Streaming;

use super::Job;
use crate::{
    error::{RequestError, RequestResult},
    workers::{Assignment, Candidates},
};

/// Times that a request is tried before it fails.
const MAX_ATTEMPTS: usize = 3;

/// Pause before workers that could not be reached are asked again.
const AVOID: Duration = Duration::from_millis(200);

/// A decode worker with pages for the sequence.
pub(super) struct Reserved {
    pub(super) member: Member,
    pub(super) mode: v1::PrefillMode,
    /// The id under which the worker knows this attempt.
    pub(super) request_id: String,
    pub(super) generation: v1::Generation,
    pub(super) events: Streaming<v1::DecodeEvent>,
    /// A token that came instead of `Reserved` (which it implies).
    pub(super) early: Option<v1::DecodeEvent>,
    _assignment: Assignment,
}

impl Job {
    /// Asks decode workers, best first, until one reserves.
    pub(super) async fn reserve(&mut self) -> RequestResult<Reserved> {
        loop {
            let began = Instant::now();
            let changed = self.service.pool.changed();
            let candidates = match self.candidates() {
                Ok(candidates) => candidates,
                Err(none) => {
                    self.wait_for_worker(none, changed).await?;
                    continue;
                }
            };
            let Some(member) = candidates.decode.first() else {
                return Err(RequestError::NoWorker { missing: "no decode worker".into() });
            };
            match self.reserve_on(member, candidates.generation.into()).await {
                Ok(reserved) => return Ok(reserved),
                Err(error) => self.exclude(error, began)?,
            }
        }
    }

    fn candidates(&self) -> RequestResult<Candidates> {
        let not_these = [self.excluded.as_slice(), &self.avoided].concat();
        self.service.pool.candidates(self.sequence.total_tokens(), &not_these)
    }

    /// Waits until there may be a worker to ask, within the bound; then fails with the words of the first
    /// worker that could not be reached, or with what is missing.
    async fn wait_for_worker(
        &mut self,
        none: RequestError,
        changed: impl Future<Output = ()>,
    ) -> RequestResult<()> {
        let clock = self.admitted.clock;
        let (since, _) = self.unreached.get_or_insert_with(|| (Instant::now(), none.clone()));
        let until = clock.deadline.min(*since + self.service.limits.reserve_timeout);
        let now = Instant::now();
        if now >= until {
            let first = self.failing.take().or(self.unreached.take()).map(|(_, first)| first);
            let passed = now >= clock.deadline;
            let last = if passed { clock.passed("waiting for a worker") } else { none };
            return Err(last.after(first));
        }
        if self.avoided.is_empty() {
            // In vain or not: the caller looks again.
            let _ = timeout_at(until, changed).await;
        } else {
            sleep_until(until.min(now + AVOID)).await;
            self.avoided.clear();
        }
        Ok(())
    }

    /// After the failure of an attempt that has emitted nothing: `Ok` if the request should be tried again, else the
    /// error, with the first cause of the trouble. A worker at fault is not asked again for this request.
    ///
    /// The attempts and waits are bounded in sum, not one by one: nothing is tried again once `reserve_timeout` has
    /// passed since the first failing attempt began, nor what a worker has waited for in vain already.
    pub(super) fn exclude(&mut self, error: RequestError, began: Instant) -> RequestResult<()> {
        let bound = self.service.limits.reserve_timeout;
        match &error {
            RequestError::WorkerUnavailable { worker, begun, .. } => {
                self.failed_attempts += usize::from(*begun);
                self.avoided.push(worker.clone());
                // A worker's words say more than that there was none.
                let first = self
                    .unreached
                    .take()
                    .filter(|(_, first)| !matches!(first, RequestError::NoWorker { .. }));
                self.unreached = Some(first.unwrap_or_else(|| (Instant::now(), error.clone())));
            }
            // The last prefill worker went between our choice and its turn.
            RequestError::NoWorker { .. } => {}
            RequestError::WorkerFailed { worker, .. }
            | RequestError::Stalled { worker, .. }
            | RequestError::Overloaded { worker, .. } => {
                self.failed_attempts += 1;
                self.excluded.push(worker.clone());
                let (since, _) = self.failing.get_or_insert_with(|| (began, error.clone()));
                let over = since.elapsed() >= bound;
                if over || (self.candidates().is_err() && self.avoided.is_empty()) {
                    return Err(self.ended_by(error));
                }
            }
            RequestError::HandoffFailed { .. } => {
                self.failed_attempts += 1;
                let (since, _) = self.failing.get_or_insert_with(|| (began, error.clone()));
                if since.elapsed() >= bound {
                    return Err(self.ended_by(error));
                }
            }
            _ => return Err(self.ended_by(error)),
        }
        if self.failed_attempts >= MAX_ATTEMPTS {
            return Err(self.ended_by(error));
        }
        tracing::warn!(request = self.sequence.request_id, %error, "trying again");
        self.service.metrics.reserve_retries.inc();
        Ok(())
    }

    fn ended_by(&mut self, error: RequestError) -> RequestError {
        error.after(self.failing.take().or(self.unreached.take()).map(|(_, first)| first))
    }

    async fn reserve_on(&mut self, member: &Member, generation: v1::Generation) -> RequestResult<Reserved> {
        let mut chosen = self.service.pool.assign_decode(member, self.sequence.total_tokens())?;
        let mode = match member.role {
            Role::Both => v1::PrefillMode::Local,
            _ => v1::PrefillMode::Handoff,
        };
        let request_id = self.next_attempt_id();
        let request = v1::DecodeRequest {
            generation: Some(generation.clone()),
            request_id: request_id.clone(),
            prompt: self.sequence.prompt.to_vec(),
            sampling: Some((&self.sequence.sampling).into()),
            max_tokens: self.sequence.max_tokens,
            stop_token_ids: self.sequence.stop_token_ids.clone(),
            min_tokens: self.sequence.min_tokens,
            prefill: mode.into(),
        };
        let bound = self.service.limits.reserve_timeout;
        let until = self.admitted.clock.deadline.min(Instant::now() + bound);
        let stage = "reserving KV pages";
        let late = |_| self.late(&member.id, "decode", stage, bound);
        let failed = |status| self.worker_error(&member.id, "decode", &status, false);
        let call = timeout_at(until, chosen.client.decode(request)).await.map_err(late)?;
        let mut events = call.map_err(failed)?.into_inner();
        let first = timeout_at(until, events.message()).await.map_err(late)?.map_err(failed)?;
        let early = match first.map(|event| event.event) {
            Some(Some(decode_event::Event::Reserved(v1::Reserved {}))) => None,
            Some(event) => Some(v1::DecodeEvent { event }),
            None => {
                return Err(self.broken(&member.id, "decode", "the stream ended before pages were reserved"));
            }
        };
        let member = chosen.member;
        Ok(Reserved { member, mode, request_id, generation, events, early, _assignment: chosen.assignment })
    }

    /// A worker may still hold a failed attempt for a moment, so each attempt has its own id.
    fn next_attempt_id(&mut self) -> String {
        let attempt = self.attempts;
        self.attempts += 1;
        match attempt {
            0 => self.sequence.request_id.clone(),
            attempt => format!("{}.{attempt}", self.sequence.request_id),
        }
    }
}
