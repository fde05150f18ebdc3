//! The admission queue: how many requests are in the router, and whose turn it is.
//!
//! A request first takes a [`Ticket`] (at most `max_concurrent + max_waiting` exist; when none is left the
//! refusal comes at once, with an estimate of when to retry), and later waits for its [`Turn`]: permission
//! to run so many sequences. Turns are given strictly first-in first-out, so a request of many sequences
//! is never starved by small ones behind it. Both are returned by dropping them.
//!
//! Edges: full → [`RequestError::QueueFull`]; draining → [`RequestError::Draining`] for new tickets, while
//! those that have one go on; the wait for a turn ends at the request's deadline.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cadre_telemetry::Gauge;
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use crate::{
    error::{RequestError, RequestResult},
    metrics::RouterMetrics,
    options::Limits,
};

/// Bounds of the estimate in Retry-After, in seconds.
const RETRY_AFTER_S: std::ops::RangeInclusive<f64> = 1.0..=60.0;

/// Weight of the newest request in the mean service time: about the last ten count.
const NEWEST: f64 = 0.1;

/// The queue. Clones share it.
#[derive(Clone, Debug)]
pub struct Admission {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// One permit per request that may be in the router.
    places: Arc<Semaphore>,
    /// One permit per sequence that may run. Tokio's semaphore is first-in first-out, also for several
    /// permits at once.
    turns: Arc<Semaphore>,
    most: u32,
    max_concurrent: u32,
    draining: AtomicBool,
    /// Mean time that a turn is held, in seconds. A std-like mutex: held for two floating-point operations.
    service_s: Mutex<f64>,
    metrics: RouterMetrics,
}

/// A place in the router.
#[derive(Debug)]
pub struct Ticket {
    inner: Arc<Inner>,
    _place: OwnedSemaphorePermit,
}

/// Permission to run sequences, held by the tasks that run them. Keeps the ticket's place.
#[derive(Debug)]
pub struct Turn {
    ticket: Arc<Ticket>,
    since: Instant,
    permit: Option<OwnedSemaphorePermit>,
}

impl Admission {
    /// An empty queue.
    pub fn new(limits: &Limits, metrics: RouterMetrics) -> Self {
        let max_concurrent = limits.max_concurrent.max(1);
        let most = max_concurrent.saturating_add(limits.max_waiting);
        let inner = Inner {
            places: Arc::new(Semaphore::new(most as usize)),
            turns: Arc::new(Semaphore::new(max_concurrent as usize)),
            most,
            max_concurrent,
            draining: AtomicBool::new(false),
            service_s: Mutex::new(1.0),
            metrics,
        };
        Self { inner: Arc::new(inner) }
    }

    /// The refusal that a ticket would be now, without taking one.
    pub fn check(&self) -> RequestResult<()> {
        if self.inner.draining.load(Ordering::Acquire) {
            return Err(RequestError::Draining);
        }
        match self.inner.places.available_permits() {
            0 => Err(self.full()),
            _ => Ok(()),
        }
    }

    /// A place in the router, or the refusal.
    pub fn ticket(&self) -> RequestResult<Arc<Ticket>> {
        self.check()?;
        let place = Arc::clone(&self.inner.places).try_acquire_owned().map_err(|_| self.full())?;
        Ok(Arc::new(Ticket { inner: Arc::clone(&self.inner), _place: place }))
    }

    fn full(&self) -> RequestError {
        RequestError::QueueFull {
            in_router: self.in_router(),
            most: self.inner.most,
            retry_after_s: self.retry_after_s(),
        }
    }

    /// Sequences that one request may have.
    pub fn max_sequences(&self) -> u32 {
        self.inner.max_concurrent
    }

    /// Requests that hold a ticket.
    pub fn in_router(&self) -> u32 {
        self.inner.most - self.inner.places.available_permits() as u32
    }

    /// When a request refused now has a chance: the time to serve all who are before it.
    pub fn retry_after_s(&self) -> u32 {
        let rounds = f64::from(self.in_router()) / f64::from(self.inner.max_concurrent);
        let seconds = *self.inner.service_s.lock() * rounds;
        seconds.ceil().clamp(*RETRY_AFTER_S.start(), *RETRY_AFTER_S.end()) as u32
    }

    /// Refuses new tickets and waits until every one that was given has come back. The caller bounds
    /// the wait.
    pub async fn drain(&self) {
        self.inner.draining.store(true, Ordering::Release);
        // The semaphore is never closed, so this only ends when all permits are here.
        let _ = self.inner.places.acquire_many(self.inner.most).await;
    }
}

impl Ticket {
    /// Waits for permission to run `sequences` sequences, at most until `deadline` (which is `after` from
    /// the request's arrival).
    pub async fn turn(
        self: &Arc<Self>,
        sequences: u32,
        deadline: Instant,
        after: Duration,
    ) -> RequestResult<Turn> {
        if sequences > self.inner.max_concurrent {
            let problem = format!(
                "{sequences} sequences in one request, at most {} may run at a time",
                self.inner.max_concurrent
            );
            return Err(RequestError::invalid("n", problem));
        }
        let asked = Instant::now();
        let waiting = Waiting::enter(&self.inner.metrics.waiting);
        let acquire = Arc::clone(&self.inner.turns).acquire_many_owned(sequences);
        let permit = tokio::time::timeout_at(deadline, acquire)
            .await
            .map_err(|_| RequestError::Deadline { after, stage: "waiting in the queue" })?
            .map_err(|_| RequestError::Draining)?;
        drop(waiting);
        self.inner.metrics.waited(asked.elapsed());
        self.inner.metrics.running.add(f64::from(sequences));
        Ok(Turn { ticket: Arc::clone(self), since: Instant::now(), permit: Some(permit) })
    }
}

impl Turn {
    /// Splits off the permission for one sequence; `None` when none is left.
    pub fn split(&mut self) -> Option<Self> {
        let permit = self.permit.as_mut()?.split(1)?;
        Some(Self { ticket: Arc::clone(&self.ticket), since: self.since, permit: Some(permit) })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(permit) = self.permit.take().filter(|permit| permit.num_permits() > 0) else { return };
        self.ticket.inner.metrics.running.sub(permit.num_permits() as f64);
        let mut mean = self.ticket.inner.service_s.lock();
        *mean += NEWEST * (self.since.elapsed().as_secs_f64() - *mean);
    }
}

/// Counts a waiting request for as long as it lives.
struct Waiting<'a>(&'a Gauge);

impl<'a> Waiting<'a> {
    fn enter(gauge: &'a Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests;
