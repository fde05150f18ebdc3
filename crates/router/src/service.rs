//! The request path behind every front door, stage by stage (crate header).

mod compute;

use std::{
    hash::{BuildHasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use compute::{Compute, Stop};

use crate::{
    admission::{Admission, Ticket},
    error::{RequestError, RequestResult},
    generate::{self, Generation},
    metrics::{Api, RouterMetrics},
    model::ServedModel,
    options::Limits,
    ready::Outage,
    request::{self, Context, PreparedSequence, Submission},
    workers::WorkerPool,
};

/// Everything a front door needs. Clones share it.
#[derive(Clone, Debug)]
pub struct Service {
    pub(crate) model: Arc<ServedModel>,
    pub(crate) admission: Admission,
    pub(crate) pool: WorkerPool,
    pub(crate) metrics: RouterMetrics,
    pub(crate) limits: Arc<Limits>,
    outage: Outage,
    ids: Arc<Ids>,
    compute: Compute,
}

/// A request whose head has come.
#[derive(Clone, Debug)]
pub struct Arrived {
    pub(crate) tracked: Arc<Tracked>,
    /// The router's name for it, in answers and logs.
    pub request_id: String,
    /// Its times.
    pub clock: Clock,
}

/// A request that has its place in the router.
#[derive(Clone, Debug)]
pub struct Admitted {
    pub(crate) ticket: Arc<Ticket>,
    pub(crate) tracked: Arc<Tracked>,
    /// Its share of the bytes of text, until the text is tokens.
    text: Arc<Mutex<Option<OwnedSemaphorePermit>>>,
    /// The router's name for it, in answers and logs.
    pub request_id: String,
    /// Its times.
    pub clock: Clock,
}

/// When a request came and when it ends at the latest.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// When it came.
    pub arrival: Instant,
    /// When it fails.
    pub deadline: Instant,
    /// The time between.
    pub after: Duration,
}

impl Clock {
    fn new(limits: &Limits, timeout: Option<Duration>) -> Self {
        let arrival = Instant::now();
        let after = timeout.unwrap_or(limits.default_timeout).min(limits.max_timeout);
        Self { arrival, deadline: arrival + after, after }
    }

    /// The failure of a stage that ran into the deadline.
    pub fn passed(&self, stage: &'static str) -> RequestError {
        RequestError::Deadline { after: self.after, stage }
    }

    /// Bounds a wait by the deadline.
    pub async fn bound<T>(&self, stage: &'static str, wait: impl Future<Output = T>) -> RequestResult<T> {
        tokio::time::timeout_at(self.deadline, wait).await.map_err(|_| self.passed(stage))
    }
}

impl Service {
    /// A service over a pool of workers.
    pub fn new(
        model: Arc<ServedModel>,
        admission: Admission,
        pool: WorkerPool,
        metrics: RouterMetrics,
        limits: Limits,
    ) -> Self {
        let compute = Compute::new(limits.text_budget_bytes());
        Self {
            model,
            admission,
            pool,
            metrics,
            limits: Arc::new(limits),
            outage: Outage::default(),
            ids: Arc::new(Ids::new()),
            compute,
        }
    }

    /// Refuses requests while this says that nothing can serve them.
    #[must_use]
    pub(crate) fn refusing_during(self, outage: Outage) -> Self {
        Self { outage, ..self }
    }

    /// A name for a request, unlike any other's.
    pub fn request_id(&self) -> String {
        self.ids.request_id()
    }

    /// Stage 0: the head has come. The clock starts here; nothing is held yet, and what the router has no
    /// place for is refused before its body is read.
    pub fn arrive(&self, api: Api, request_id: String, timeout: Option<Duration>) -> RequestResult<Arrived> {
        let tracked = Tracked::new(api, self.metrics.clone());
        if let Some(missing) = self.outage.lasting(Instant::now()) {
            tracked.note::<()>(Err(RequestError::NoWorker { missing }))?;
        }
        tracked.note(self.admission.check())?;
        Ok(Arrived { tracked, request_id, clock: Clock::new(&self.limits, timeout) })
    }

    /// Stage 1: the whole request is there, so many bytes of it, and takes its place in the router.
    pub fn admit(&self, arrived: Arrived, bytes: usize) -> RequestResult<Admitted> {
        let Arrived { tracked, request_id, clock } = arrived;
        let text = tracked.note(self.compute.hold(bytes))?;
        let ticket = tracked.note(self.admission.ticket())?;
        Ok(Admitted { ticket, tracked, text: Arc::new(Mutex::new(Some(text))), request_id, clock })
    }

    /// The longest sequence, prompt and answer, that is served: the model's context, or less where no ready
    /// worker's cache holds as much. What /v1/models says, prompts are refused by and answers are cut to.
    pub fn limit_tokens(&self) -> usize {
        request::limit_tokens(&self.model, self.pool.capacity_tokens())
    }

    /// Work on a request's text ([`Compute::run`]).
    pub(crate) async fn compute<T: Send + 'static>(
        &self,
        clock: &Clock,
        stage: &'static str,
        bytes: usize,
        work: impl FnOnce(&Stop) -> RequestResult<T> + Send + 'static,
    ) -> RequestResult<T> {
        self.compute.run(clock, stage, bytes, work).await
    }

    /// Stage 2: validate, render, tokenize.
    pub async fn prepare(
        &self,
        admitted: &Admitted,
        submission: Submission,
    ) -> RequestResult<Vec<PreparedSequence>> {
        admitted.tracked.note(self.prepare_inner(admitted, submission).await)
    }

    async fn prepare_inner(
        &self,
        admitted: &Admitted,
        submission: Submission,
    ) -> RequestResult<Vec<PreparedSequence>> {
        let text = admitted.text.lock().take();
        let context = Context {
            request_id: admitted.request_id.clone(),
            drawn_seed: self.ids.seed(),
            limit_tokens: request::limit_tokens(&self.model, Some(self.capacity(admitted).await?)),
            max_sequences: self.admission.max_sequences(),
            deadline: Some(admitted.clock.deadline.into_std()),
        };
        request::refuse_by_length(&self.model, &submission, context.limit_tokens)?;
        let model = Arc::clone(&self.model);
        let bytes = submission.text_bytes();
        let clock = admitted.clock;
        self.compute(&clock, TOKENIZING, bytes, move |stop| {
            let _text = text;
            request::prepare(&model, submission, &context, &|| stop.requested())
        })
        .await
    }

    /// What a worker's cache holds; before the first one is ready, this waits for it as a reservation would.
    async fn capacity(&self, admitted: &Admitted) -> RequestResult<u64> {
        let until = admitted.clock.deadline.min(Instant::now() + self.limits.reserve_timeout);
        loop {
            let changed = self.pool.changed();
            if let Some(capacity) = self.pool.capacity_tokens() {
                return Ok(capacity);
            }
            if tokio::time::timeout_at(until, changed).await.is_err() {
                // Somebody may have come at the last moment, and is waited for by the reservation then.
                self.pool.candidates(1, &[])?;
            }
        }
    }

    /// Stages 3 and 4: wait for the turn, then start every sequence on workers. If one cannot start, none
    /// goes on.
    pub async fn start(
        &self,
        admitted: &Admitted,
        sequences: Vec<PreparedSequence>,
    ) -> RequestResult<Vec<Generation>> {
        admitted.tracked.note(self.start_inner(admitted, sequences).await)
    }

    async fn start_inner(
        &self,
        admitted: &Admitted,
        sequences: Vec<PreparedSequence>,
    ) -> RequestResult<Vec<Generation>> {
        let count = u32::try_from(sequences.len()).unwrap_or(u32::MAX);
        let Clock { deadline, after, .. } = admitted.clock;
        let mut turn = admitted.ticket.turn(count, deadline, after).await?;
        admitted.tracked.expect(count);
        let starts = sequences.into_iter().map(|sequence| {
            let turn = turn.split();
            async {
                let turn = turn.ok_or_else(|| RequestError::Internal {
                    problem: "a turn with fewer permits than sequences".into(),
                })?;
                generate::start(self, admitted, sequence, turn).await
            }
        });
        futures::future::try_join_all(starts.collect::<Vec<_>>()).await
    }
}

/// The stage of [`Service::prepare`], in errors.
const TOKENIZING: &str = "tokenizing the prompt";

/// Counts a request once, with its outcome, when the last of its parts is gone: `ok` if every sequence
/// ended well, the first error if there was one, else the client cancelled.
#[derive(Debug)]
pub(crate) struct Tracked {
    api: Api,
    metrics: RouterMetrics,
    error: Mutex<Option<&'static str>>,
    expected: AtomicU32,
    ended: AtomicU32,
    started: AtomicBool,
}

impl Tracked {
    fn new(api: Api, metrics: RouterMetrics) -> Arc<Self> {
        Arc::new(Self {
            api,
            metrics,
            error: Mutex::new(None),
            expected: AtomicU32::new(0),
            ended: AtomicU32::new(0),
            started: AtomicBool::new(false),
        })
    }

    pub(crate) fn api(&self) -> Api {
        self.api
    }

    /// Passes a result on and remembers its error.
    pub(crate) fn note<T>(&self, result: RequestResult<T>) -> RequestResult<T> {
        if let Err(error) = &result {
            self.error.lock().get_or_insert(error.outcome());
        }
        result
    }

    fn expect(&self, sequences: u32) {
        self.expected.store(sequences, Ordering::Relaxed);
        self.started.store(true, Ordering::Relaxed);
    }

    /// A sequence ended well.
    pub(crate) fn sequence_ok(&self) {
        self.ended.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        let all_ended = *self.started.get_mut() && *self.ended.get_mut() >= *self.expected.get_mut();
        let outcome = match *self.error.get_mut() {
            Some(error) => error,
            None if all_ended => "ok",
            None => "cancelled",
        };
        self.metrics.ended(self.api, outcome);
    }
}

/// Names and seeds. The hasher's keys come from the system's randomness, so two routers, or one before
/// and after a restart, draw differently.
#[derive(Debug)]
struct Ids {
    process: u64,
    random: RandomState,
    count: AtomicU64,
}

impl Ids {
    fn new() -> Self {
        let random = RandomState::new();
        Self { process: random.hash_one("process"), random, count: AtomicU64::new(0) }
    }

    fn next(&self) -> u64 {
        self.count.fetch_add(1, Ordering::Relaxed)
    }

    fn request_id(&self) -> String {
        format!("{:08x}{:08x}", self.process as u32, self.next())
    }

    /// Below 2^53, so that a client that reads JSON numbers as doubles can repeat it.
    fn seed(&self) -> u64 {
        self.random.hash_one(self.next()) >> 11
    }
}
