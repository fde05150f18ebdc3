//! The request path behind every front door, stage by stage (crate header).

use std::{
    hash::{BuildHasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Semaphore, time::Instant};

use crate::{
    admission::{Admission, Ticket},
    error::{RequestError, RequestResult},
    generate::{self, Generation},
    metrics::{Api, RouterMetrics},
    model::ServedModel,
    options::Limits,
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
    ids: Arc<Ids>,
    /// Tokenization is CPU work: no more at a time than there are cores, so that a burst of long prompts
    /// does not fill the blocking pool. Waiters hold tickets, so they are bounded.
    tokenizing: Arc<Semaphore>,
}

/// A request that has its place in the router.
#[derive(Clone, Debug)]
pub struct Admitted {
    pub(crate) ticket: Arc<Ticket>,
    pub(crate) tracked: Arc<Tracked>,
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
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            model,
            admission,
            pool,
            metrics,
            limits: Arc::new(limits),
            ids: Arc::new(Ids::new()),
            tokenizing: Arc::new(Semaphore::new(cores)),
        }
    }

    /// Stage 1: a place in the router. The clock starts here.
    pub fn admit(&self, api: Api, timeout: Option<Duration>) -> RequestResult<Admitted> {
        let tracked = Tracked::new(api, self.metrics.clone());
        let ticket = tracked.note(self.admission.ticket())?;
        Ok(Admitted {
            ticket,
            tracked,
            request_id: self.ids.request_id(),
            clock: Clock::new(&self.limits, timeout),
        })
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
        let context = Context {
            request_id: admitted.request_id.clone(),
            drawn_seed: self.ids.seed(),
            capacity_tokens: Some(self.capacity(admitted).await?),
            max_sequences: self.admission.max_sequences(),
        };
        let stage = "tokenizing the prompt";
        let permit = admitted.clock.bound(stage, Arc::clone(&self.tokenizing).acquire_owned()).await?;
        let model = Arc::clone(&self.model);
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            request::prepare(&model, submission, &context)
        });
        let result = admitted.clock.bound(stage, work).await?;
        result.map_err(|error| RequestError::Internal { problem: format!("{stage}: {error}") })?
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
