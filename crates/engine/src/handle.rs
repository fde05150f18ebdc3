//! The engine from outside: its thread, the handle that submits, and the stream of a sequence's events.
//!
//! Nothing here blocks: commands go into a bounded queue and are refused when it is full, and the loop is
//! woken by unparking its thread (an unpark before a park is remembered, so no wake-up is lost). When the
//! last handle is gone, the loop ends its sequences and stops.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    thread::{JoinHandle, Thread},
    time::Duration,
};

use cadre_model::Model;
use cadre_ops::{Backend, ExpertExchange, RowFormat};
use cadre_scheduler::SchedulerConfig;
use cadre_types::{FinishReason, SamplingParams, StopConditions};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    error::{EngineError, EngineStartError, HandoffError, SelfTestError, SubmitError},
    events::{Backlog, EventSink},
    handoff::{HandoffOffer, KV_QUEUE, KvMessage, KvStream, KvWriter},
    request::{EngineEvent, EngineLimits, PrefillPlace, PrefillRequest, SequenceRequest},
    stats::{EngineStats, StepSample},
    step_loop::StepLoop,
};

/// Stack of the loop's thread. Its deepest call is a layer of the network, which keeps its data in
/// buffers; 4 MiB is several times what a debug build of it needs.
const STACK_BYTES: usize = 4 << 20;

/// Commands that may wait beyond submissions: cancellations and hand-offs that begin. One of each for as
/// many sequences as a step decodes by default, twice.
const CONTROL_COMMANDS: usize = 256;

/// Events that may wait for readers before nothing new is taken: a million plain tokens, some thousand whole answers
/// that nobody reads. What runs already may still add to it, each sequence up to its own `max_tokens`.
const MAX_UNREAD_BYTES: u64 = 64 << 20;

/// Prompt of a self-test: more than one row, so that a grouped product has something to group.
const SELF_TEST_PROMPT: u32 = 8;

/// Everything an engine is made of.
pub struct EngineParts<B: Backend> {
    /// The network.
    pub model: Model<B>,
    /// Limits of batching, and the number of KV pages.
    pub scheduler: SchedulerConfig,
    /// Where routed experts are computed.
    pub exchange: Box<dyn ExpertExchange>,
    /// A hand-off that does not move for this long is given up.
    pub handoff_timeout: Duration,
    /// A sequence with pages whose prefill worker has not begun after this long is given up. Longer than
    /// the other: the prompt may wait in the prefill worker's queue.
    pub handoff_begin_timeout: Duration,
    /// While more bytes of events than this wait for readers, nothing new is taken.
    pub max_unread_bytes: u64,
    /// Called after every step, on the loop's thread.
    pub on_step: Box<dyn FnMut(&StepSample) + Send>,
}

impl<B: Backend> EngineParts<B> {
    /// Parts with the default time-outs, observed by nobody.
    pub fn new(model: Model<B>, scheduler: SchedulerConfig, exchange: Box<dyn ExpertExchange>) -> Self {
        Self {
            model,
            scheduler,
            exchange,
            handoff_timeout: Duration::from_secs(10),
            handoff_begin_timeout: Duration::from_secs(60),
            max_unread_bytes: MAX_UNREAD_BYTES,
            on_step: Box::new(|_| {}),
        }
    }
}

/// A running engine: owns the thread. Dropping it stops the engine and waits for the step in progress.
#[derive(Debug)]
pub struct Engine {
    handle: EngineHandle,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Allocates cache and activations and starts the loop.
    pub fn spawn<B: Backend>(parts: EngineParts<B>) -> Result<Self, EngineStartError> {
        let config = parts.model.config();
        let limits =
            EngineLimits { vocab_size: config.vocab_size, max_positions: config.max_position_embeddings };
        let shape = KvShape {
            layers: config.num_hidden_layers,
            row_width: config.kv_width(),
            format: RowFormat::combine(parts.model.backend().class()),
        };
        let bound = parts.scheduler.max_waiting + CONTROL_COMMANDS;
        let stats = Arc::new(EngineStats::default());
        let stopping = Arc::new(AtomicBool::new(false));
        let max_unread_bytes = parts.max_unread_bytes;
        let (commands, receiver) = mpsc::channel(bound);
        let (alive, stopped) = watch::channel(());
        let step_loop = StepLoop::new(parts, shape, receiver, Arc::clone(&stats), Arc::clone(&stopping))?;
        let thread = std::thread::Builder::new().name("cadre-engine".into()).stack_size(STACK_BYTES).spawn(
            move || {
                // Dropped when the loop ends, however it ends: what `stopped` waits for.
                let _alive = alive;
                step_loop.run();
            },
        )?;
        let waker = Waker(thread.thread().clone());
        let inner = Inner {
            commands: Some(commands),
            bound,
            waker,
            limits,
            shape,
            stats,
            in_flight: Arc::default(),
            backlog: Arc::default(),
            max_unread_bytes,
            stopped,
        };
        Ok(Self { handle: EngineHandle(Arc::new(inner)), stopping, thread: Some(thread) })
    }

    /// A handle.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Ends every sequence with [`crate::EngineError::Stopped`] and waits for the thread; at most as long as
    /// the step in progress.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        self.handle.0.waker.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine thread panicked");
        }
    }
}

/// Submits work to an engine. Cheap to clone; never blocks.
#[derive(Clone, Debug)]
pub struct EngineHandle(Arc<Inner>);

struct Inner {
    /// `None` only while dropping.
    commands: Option<mpsc::Sender<Command>>,
    bound: usize,
    waker: Waker,
    limits: EngineLimits,
    shape: KvShape,
    stats: Arc<EngineStats>,
    in_flight: Arc<AtomicU64>,
    backlog: Arc<Backlog>,
    max_unread_bytes: u64,
    stopped: watch::Receiver<()>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHandle").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // First disconnect, then wake, so that the loop sees it.
        self.commands = None;
        self.waker.wake();
    }
}

/// What a hand-off carries per position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers.
    pub layers: usize,
    /// Elements of a row.
    pub row_width: usize,
    /// Encoding of a row.
    pub format: RowFormat,
}

impl KvShape {
    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.format.row_bytes(self.row_width)
    }
}

/// Wakes the loop.
#[derive(Clone, Debug)]
pub(crate) struct Waker(Thread);

impl Waker {
    pub(crate) fn wake(&self) {
        self.0.unpark();
    }
}

/// What the loop is told.
pub(crate) enum Command {
    Submit(Box<Submission>),
    Cancel { request_id: String },
    BeginHandoff { offer: HandoffOffer, begun: Begun },
}

/// The loop's ends of a begun hand-off, given back through `answer`.
pub(crate) struct Begun {
    pub(crate) messages: mpsc::Receiver<KvMessage>,
    pub(crate) outcome: oneshot::Sender<Result<u64, HandoffError>>,
    pub(crate) answer: oneshot::Sender<Result<(), HandoffError>>,
}

/// A checked request.
pub(crate) struct Submission {
    pub(crate) request_id: String,
    pub(crate) prompt: Vec<u32>,
    pub(crate) sampling: SamplingParams,
    pub(crate) stop: StopConditions,
    pub(crate) deadline: Option<std::time::Instant>,
    pub(crate) kind: SubmissionKind,
    pub(crate) events: EventSink,
    pub(crate) in_flight: InFlight,
}

/// One of the sequences that [`EngineHandle::in_flight`] counts, for as long as it lives.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<AtomicU64>);

impl InFlight {
    fn new(count: &Arc<AtomicU64>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(count))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

pub(crate) enum SubmissionKind {
    Local,
    Remote,
    PrefillOnly { sink: mpsc::Sender<KvMessage> },
}

impl EngineHandle {
    /// Submits a sequence. Its events arrive on the stream; dropping the stream cancels it.
    pub fn submit(&self, request: SequenceRequest) -> Result<SequenceStream, SubmitError> {
        let limits = &self.0.limits;
        limits.check_prompt(&request.request_id, &request.prompt, &request.sampling)?;
        limits.check_stop(&request.request_id, &request.stop)?;
        self.check_backlog(&request.request_id)?;
        let mut stop = request.stop;
        stop.max_tokens = limits.max_tokens(request.prompt.len(), stop.max_tokens);
        let kind = match request.prefill {
            PrefillPlace::Local => SubmissionKind::Local,
            PrefillPlace::Remote => SubmissionKind::Remote,
        };
        // Reserved, every token, the end.
        let (events, stream) = self.events(stop.max_tokens as usize + 2);
        self.send(Command::Submit(Box::new(Submission {
            request_id: request.request_id,
            prompt: request.prompt,
            sampling: request.sampling,
            stop,
            deadline: request.deadline,
            kind,
            events,
            in_flight: InFlight::new(&self.0.in_flight),
        })))?;
        Ok(stream)
    }

    /// Submits a prompt to be handed off: its events, and its KV. Dropping either cancels it.
    pub fn submit_prefill(&self, request: PrefillRequest) -> Result<(SequenceStream, KvStream), SubmitError> {
        self.0.limits.check_prompt(&request.request_id, &request.prompt, &request.sampling)?;
        self.check_backlog(&request.request_id)?;
        let stop = StopConditions { max_tokens: 1, ..request.stop };
        self.0.limits.check_stop(&request.request_id, &stop)?;
        // Reserved, one Computed per chunk (a chunk has at least one token), the first token, the end.
        let (events, stream) = self.events(request.prompt.len() + 3);
        let (sink, messages) = mpsc::channel(KV_QUEUE);
        self.send(Command::Submit(Box::new(Submission {
            request_id: request.request_id,
            prompt: request.prompt,
            sampling: request.sampling,
            stop,
            deadline: request.deadline,
            kind: SubmissionKind::PrefillOnly { sink },
            events,
            in_flight: InFlight::new(&self.0.in_flight),
        })))?;
        Ok((stream, KvStream::new(messages, self.0.waker.clone())))
    }

    /// Ends a sequence with [`cadre_types::FinishReason::Cancelled`]; nothing happens if there is none of
    /// that name.
    pub fn cancel(&self, request_id: &str) -> Result<(), SubmitError> {
        self.send(Command::Cancel { request_id: request_id.to_owned() })
    }

    /// Begins the hand-off that a submitted [`PrefillPlace::Remote`] sequence waits for. The caller bounds
    /// the wait, which is a step at most. Refusals leave the sequence waiting: the offer may be a stranger's.
    pub async fn begin_handoff(&self, offer: HandoffOffer) -> Result<KvWriter, HandoffError> {
        let (sender, messages) = mpsc::channel(KV_QUEUE);
        let (outcome_sender, outcome) = oneshot::channel();
        let (answer_sender, answer) = oneshot::channel();
        let request_id = offer.request_id.clone();
        let begun = Begun { messages, outcome: outcome_sender, answer: answer_sender };
        self.send(Command::BeginHandoff { offer, begun }).map_err(|_| HandoffError::Stopped)?;
        answer.await.map_err(|_| HandoffError::Stopped)??;
        Ok(KvWriter::new(request_id, sender, outcome, self.0.waker.clone()))
    }

    /// Runs one short sequence through the whole of the engine: a prefill step, a decode step, every layer
    /// and its experts. `nth` tells one test from the one before.
    pub async fn self_test(&self, nth: u64) -> Result<(), SelfTestError> {
        let prompt = (0..SELF_TEST_PROMPT).map(|at| at % self.0.limits.vocab_size as u32).collect();
        let mut events = self.submit(SequenceRequest {
            request_id: format!("self-test-{nth}"),
            prompt,
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            stop: StopConditions { max_tokens: 2, ignore_eos: true, ..StopConditions::default() },
            prefill: PrefillPlace::Local,
            deadline: None,
        })?;
        loop {
            match events.recv().await {
                Some(EngineEvent::Finished(FinishReason::Length)) => return Ok(()),
                Some(EngineEvent::Finished(reason)) => return Err(SelfTestError::Ended { reason }),
                Some(EngineEvent::Failed(error)) => return Err(error.into()),
                Some(_) => {}
                None => return Err(EngineError::Stopped.into()),
            }
        }
    }

    /// What requests are held against.
    pub fn limits(&self) -> EngineLimits {
        self.0.limits
    }

    /// What a hand-off carries.
    pub fn kv_shape(&self) -> KvShape {
        self.0.shape
    }

    /// Sequences submitted and not ended, from the moment of submission. Gauges in [`Self::stats`] lag by up
    /// to a step; this does not, so 0 means that nothing is left.
    pub fn in_flight(&self) -> u64 {
        self.0.in_flight.load(Ordering::Acquire)
    }

    /// Counters and gauges.
    pub fn stats(&self) -> &Arc<EngineStats> {
        &self.0.stats
    }

    /// Resolves when the loop has ended, by whatever cause.
    pub async fn stopped(&self) {
        let mut stopped = self.0.stopped.clone();
        // Nothing is ever sent: the only change is the sender's end.
        while stopped.changed().await.is_ok() {}
    }

    /// Refuses what is new while too much waits to be read.
    fn check_backlog(&self, request_id: &str) -> Result<(), SubmitError> {
        let (bytes, bound) = (self.0.backlog.bytes(), self.0.max_unread_bytes);
        if bytes <= bound {
            return Ok(());
        }
        Err(SubmitError::Unread { request_id: request_id.to_owned(), bytes, bound })
    }

    fn events(&self, capacity: usize) -> (EventSink, SequenceStream) {
        let (sender, events) = mpsc::channel(capacity);
        let backlog = Arc::clone(&self.0.backlog);
        let stream = SequenceStream { events, backlog: Arc::clone(&backlog), waker: self.0.waker.clone() };
        (EventSink::new(sender, backlog), stream)
    }

    fn send(&self, command: Command) -> Result<(), SubmitError> {
        let Some(commands) = &self.0.commands else {
            return Err(SubmitError::Stopped { request_id: command.into_request_id() });
        };
        match commands.try_send(command) {
            Ok(()) => {
                self.0.waker.wake();
                Ok(())
            }
            Err(mpsc::error::TrySendError::Full(command)) => {
                Err(SubmitError::Overloaded { request_id: command.into_request_id(), bound: self.0.bound })
            }
            Err(mpsc::error::TrySendError::Closed(command)) => {
                Err(SubmitError::Stopped { request_id: command.into_request_id() })
            }
        }
    }
}

impl Command {
    fn into_request_id(self) -> String {
        match self {
            Self::Submit(submission) => submission.request_id,
            Self::Cancel { request_id } => request_id,
            Self::BeginHandoff { offer, .. } => offer.request_id,
        }
    }
}

/// The events of one sequence. Dropping it cancels the sequence and frees its pages.
///
/// The channel behind it holds every event that the sequence can have, so an idle reader costs memory
/// (bounded by its own `max_tokens`, and in sum by refusing new sequences) and delays nobody.
#[derive(Debug)]
pub struct SequenceStream {
    events: mpsc::Receiver<EngineEvent>,
    backlog: Arc<Backlog>,
    waker: Waker,
}

impl SequenceStream {
    /// The next event; `None` after the last.
    pub async fn recv(&mut self) -> Option<EngineEvent> {
        let event = self.events.recv().await;
        self.note(event)
    }

    /// As [`Self::recv`], for streams written by hand.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<EngineEvent>> {
        let event = std::task::ready!(self.events.poll_recv(context));
        Poll::Ready(self.note(event))
    }

    /// As [`Self::recv`], for threads without a runtime.
    pub fn blocking_recv(&mut self) -> Option<EngineEvent> {
        let event = self.events.blocking_recv();
        self.note(event)
    }

    fn note(&self, event: Option<EngineEvent>) -> Option<EngineEvent> {
        event.inspect(|event| self.backlog.read(event))
    }
}

impl Drop for SequenceStream {
    fn drop(&mut self) {
        self.events.close();
        while let Ok(event) = self.events.try_recv() {
            self.backlog.read(&event);
        }
        self.waker.wake();
    }
}
