//! One sequence from reservation to its end.
//!
//! `start` returns once a decode worker has reserved pages, so that everything that can be refused is
//! refused before a front door has sent anything. From then on a task of its own drives the sequence; it
//! ends when the worker says so, at a stop string, at the deadline, when a worker fails, or when the
//! client drops the [`Generation`]. Ending drops the worker streams, which frees their pages. The task
//! does not depend on how fast the client reads: a client that stops reading is ended at the deadline.
//!
//! Workers that fail before the first token are replaced (nothing was said yet, so nothing can differ);
//! after it, the error names the worker. See the crate header for replay. A worker that cannot be reached,
//! or takes nothing new (it was withdrawn between our choice and its answer), is only avoided: with nobody
//! else ready the request waits for a worker, so that a worker's restart costs no request that has not
//! begun.
//!
//! Bounds: waiting for a worker ≤ `reserve_timeout`; reservation ≤ `reserve_timeout`; after its first sign of life, each prefill chunk and each
//! token ≤ `stall_timeout`; waiting in a worker's queue or for a local prefill ≤ the deadline, with
//! HTTP/2 keep-alive noticing a worker that is gone; nothing is tried again later than `reserve_timeout` after the first
//! failing attempt began; all of it ≤ the deadline. An error that ends several attempts has the first cause.

mod prefill;
mod reserve;
mod worker_error;

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use cadre_proto::{
    convert::finish_reason,
    v1::{self, decode_event},
};
use cadre_types::{FinishReason, MemberId};
use tokio::{
    sync::mpsc,
    time::{Duration, Instant, sleep_until},
};
use tokio_stream::Stream;
use tonic::Status;

pub use crate::output::{Chunk, Finish};
use crate::{
    admission::Turn,
    error::{RequestError, RequestResult},
    journal::Journal,
    output::TextOutput,
    request::PreparedSequence,
    service::{Admitted, Service},
};
use prefill::Prefill;
use reserve::Reserved;
use worker_error::worker_error;

/// Chunks that may wait for a slow client. A chunk is a token, so this is a few seconds of decoding;
/// beyond it the worker's stream is not read and flow control holds the worker back.
const CHUNK_QUEUE: usize = 256;

/// Longest wait to hand the last error to a client that does not read.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A sequence that runs. Dropping it cancels.
#[derive(Debug)]
pub struct Generation {
    /// The router's name for it.
    pub request_id: String,
    /// The seed in use.
    pub seed: u64,
    chunks: mpsc::Receiver<RequestResult<Chunk>>,
}

/// A whole sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The router's name for it.
    pub request_id: String,
    /// The seed used.
    pub seed: u64,
    /// All text.
    pub text: String,
    /// All tokens.
    pub tokens: Vec<v1::GeneratedToken>,
    /// Where in the text each token's begins, in characters.
    pub text_offsets: Vec<usize>,
    /// How it ended.
    pub finish: Finish,
}

impl Stream for Generation {
    type Item = RequestResult<Chunk>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.chunks.poll_recv(cx)
    }
}

impl Generation {
    /// The next chunk; `None` after the last one.
    pub async fn next(&mut self) -> Option<RequestResult<Chunk>> {
        self.chunks.recv().await
    }

    /// Everything up to the end.
    pub async fn collect(mut self) -> RequestResult<Completion> {
        let (mut text, mut tokens, mut text_offsets) = (String::new(), Vec::new(), Vec::new());
        while let Some(chunk) = self.next().await {
            let chunk = chunk?;
            text.push_str(&chunk.text);
            tokens.extend(chunk.tokens);
            text_offsets.extend(chunk.text_offsets);
            if let Some(finish) = chunk.finish {
                let Self { request_id, seed, .. } = self;
                return Ok(Completion { request_id, seed, text, tokens, text_offsets, finish });
            }
        }
        Err(RequestError::Internal { problem: "a sequence ended without a last chunk".into() })
    }
}

/// Stage 4: reserves pages on a decode worker and starts the sequence's task.
pub(crate) async fn start(
    service: &Service,
    admitted: &Admitted,
    sequence: PreparedSequence,
    turn: Turn,
) -> RequestResult<Generation> {
    let mut job = Job::new(service.clone(), admitted.clone(), sequence);
    let reserved = job.reserve().await?;
    service.metrics.dispatched(job.sequence.prompt.len());
    let (sender, chunks) = mpsc::channel(CHUNK_QUEUE);
    let generation =
        Generation { request_id: job.sequence.request_id.clone(), seed: job.sequence.sampling.seed, chunks };
    tokio::spawn(job.run(reserved, turn, sender));
    Ok(generation)
}

/// A sequence and everything its task needs.
struct Job {
    service: Service,
    admitted: Admitted,
    sequence: PreparedSequence,
    journal: Journal,
    output: TextOutput,
    /// Workers that failed this sequence.
    excluded: Vec<MemberId>,
    /// Workers that could not be reached or take nothing new; asked again after a pause.
    avoided: Vec<MemberId>,
    /// Since when no worker could be reached, and the first one's words.
    unreached: Option<(Instant, RequestError)>,
    /// When the first attempt that failed had begun, and why it failed.
    failing: Option<(Instant, RequestError)>,
    /// Attempts so far, for their ids.
    attempts: usize,
    failed_attempts: usize,
    last_token: Option<Instant>,
}

impl Job {
    fn new(service: Service, admitted: Admitted, sequence: PreparedSequence) -> Self {
        let journal = Journal::new(
            sequence.request_id.clone(),
            sequence.prompt.clone(),
            sequence.sampling.clone(),
            sequence.max_tokens,
        );
        let prompt_tokens = u32::try_from(sequence.prompt.len()).unwrap_or(u32::MAX);
        let output = TextOutput::new(Arc::clone(&service.model), sequence.stops.clone(), prompt_tokens);
        Self {
            service,
            admitted,
            sequence,
            journal,
            output,
            excluded: Vec::new(),
            avoided: Vec::new(),
            unreached: None,
            failing: None,
            attempts: 0,
            failed_attempts: 0,
            last_token: None,
        }
    }

    // --- the task --------------------------------------------------------------------------------

    async fn run(mut self, reserved: Reserved, turn: Turn, chunks: mpsc::Sender<RequestResult<Chunk>>) {
        let result = tokio::select! {
            biased;
            () = chunks.closed() => Err(RequestError::Cancelled),
            result = self.drive(reserved, &chunks) => result,
        };
        // Worker streams are dropped; the place is free for others before the client hears of it.
        drop(turn);
        let clock = self.admitted.clock;
        self.service.metrics.sequence_ended(clock.arrival.elapsed());
        let tracked = &self.admitted.tracked;
        match tracked.note(result) {
            Ok(()) => {
                tracked.sequence_ok();
                tracing::debug!(
                    request = self.sequence.request_id,
                    tokens = self.journal.emitted().len(),
                    "done"
                );
            }
            Err(RequestError::Cancelled) => {
                tracing::info!(
                    request = self.sequence.request_id,
                    tokens = self.journal.emitted().len(),
                    "cancelled by the client"
                );
            }
            Err(error) => {
                tracing::warn!(
                    request = self.sequence.request_id,
                    tokens = self.journal.emitted().len(),
                    %error,
                    "failed"
                );
                // The client may be gone or not reading; either way there is nobody to tell.
                let _ = tokio::time::timeout(LAST_WORDS, chunks.send(Err(error))).await;
            }
        }
    }

    /// Drives attempts until one ends the sequence.
    async fn drive(
        &mut self,
        mut reserved: Reserved,
        chunks: &mpsc::Sender<RequestResult<Chunk>>,
    ) -> RequestResult<()> {
        loop {
            let began = Instant::now();
            match self.attempt(reserved, chunks).await {
                Err(error) if self.journal.emitted().is_empty() => {
                    // An attempt that went on for long is not part of the same trouble.
                    if began.elapsed() >= self.service.limits.reserve_timeout {
                        self.unreached = None;
                    }
                    self.exclude(error, began)?;
                }
                result => return result,
            }
            reserved = self.reserve().await?;
        }
    }

    async fn attempt(
        &mut self,
        mut reserved: Reserved,
        chunks: &mpsc::Sender<RequestResult<Chunk>>,
    ) -> RequestResult<()> {
        let worker = reserved.member.id.clone();
        let clock = self.admitted.clock;
        let stall = self.service.limits.stall_timeout;
        let handoff = reserved.mode == v1::PrefillMode::Handoff;
        let mut prefill: Pin<Box<dyn Future<Output = RequestResult<()>> + Send>> = match handoff {
            true => Box::pin(Prefill::of(self, &reserved).run(self.service.clone())),
            false => Box::pin(std::future::pending()),
        };
        let mut prefilling = handoff;
        // Until the prompt is computed only the deadline bounds the wait for the first token.
        let mut stalled_at = None;
        if let Some(event) = reserved.early.take() {
            stalled_at = Some(Instant::now() + stall);
            if self.take(event, &worker, chunks).await? {
                return Ok(());
            }
        }
        loop {
            tokio::select! {
                biased;
                event = reserved.events.message() => {
                    let event = event.map_err(|status| self.worker_error(&worker, "decode", &status, true))?;
                    let event = event.ok_or_else(|| {
                        self.broken(&worker, "decode", "the stream ended without a finish reason")
                    })?;
                    if self.take(event, &worker, chunks).await? {
                        return Ok(());
                    }
                    stalled_at = (!prefilling && self.last_token.is_some()).then(|| Instant::now() + stall);
                }
                result = &mut prefill, if prefilling => {
                    result?;
                    prefilling = false;
                    stalled_at = Some(Instant::now() + stall);
                }
                () = until(stalled_at) => {
                    return Err(self.late(&worker, "decode", "generating", stall));
                }
                () = sleep_until(clock.deadline) => {
                    let stage = if self.journal.emitted().is_empty() { "computing the prompt" } else { "generating" };
                    return Err(clock.passed(stage));
                }
            }
        }
    }

    /// Takes one event; true ends the sequence.
    async fn take(
        &mut self,
        event: v1::DecodeEvent,
        worker: &MemberId,
        chunks: &mpsc::Sender<RequestResult<Chunk>>,
    ) -> RequestResult<bool> {
        let chunk = match event.event {
            None | Some(decode_event::Event::Reserved(_)) => return Ok(false),
            Some(decode_event::Event::Token(token)) => {
                let appended = self.journal.append(token.position, token.token);
                appended.map_err(|error| self.broken(worker, "decode", &error.to_string()))?;
                self.time_token();
                self.output.push(token)
            }
            Some(decode_event::Event::Finished(finished)) => {
                let reason = finish_reason(finished.reason);
                match reason.map_err(|error| self.broken(worker, "decode", &error.to_string()))? {
                    reason @ (FinishReason::Stop | FinishReason::Length) => self.output.finish(reason),
                    FinishReason::Deadline => return Err(self.admitted.clock.passed("generating")),
                    FinishReason::Cancelled | FinishReason::Error => {
                        return Err(self.broken(worker, "decode", "the worker cancelled the sequence"));
                    }
                }
            }
        };
        let last = chunk.finish.is_some();
        let clock = self.admitted.clock;
        let sent = clock.bound("waiting for the client to read", chunks.send(Ok(chunk))).await?;
        sent.map_err(|_| RequestError::Cancelled)?;
        Ok(last)
    }

    fn time_token(&mut self) {
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => {
                let since = now - self.admitted.clock.arrival;
                self.service.metrics.first_token(self.admitted.tracked.api(), since);
            }
            Some(last) => self.service.metrics.next_token(now - last),
        }
    }

    // --- errors ----------------------------------------------------------------------------------

    /// A wait ended: by the deadline if that is what passed, else the worker stalled.
    fn late(
        &self,
        worker: &MemberId,
        operation: &'static str,
        stage: &'static str,
        after: Duration,
    ) -> RequestError {
        let clock = &self.admitted.clock;
        if Instant::now() >= clock.deadline {
            return clock.passed(stage);
        }
        RequestError::Stalled { worker: worker.clone(), operation, stage, after }
    }

    fn worker_error(
        &self,
        worker: &MemberId,
        operation: &'static str,
        status: &Status,
        begun: bool,
    ) -> RequestError {
        worker_error(worker, operation, status, begun, self.service.admission.retry_after_s())
    }

    fn broken(&self, worker: &MemberId, operation: &'static str, problem: &str) -> RequestError {
        RequestError::WorkerFailed { worker: worker.clone(), operation, problem: problem.to_owned() }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
