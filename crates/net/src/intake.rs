//! The intake of requests: what has come of requests that are not complete is bounded in bytes and in time.
//!
//! One rule for every door. A request (HTTP, and gRPC calls of one message) must be complete within a time
//! from its head on; where calls stream ([`IntakeOptions::whole`]), each message must be complete within that
//! time from its first byte on. The bytes of all that is incomplete share the port's budget. Only what has
//! come counts, not what was announced, and when the budget is exceeded the request that has held most for
//! longest (bytes × age) is refused, so that stalled giants make room for everybody else.
//!
//! Edges: a message larger than [`IntakeOptions::max_message_bytes`] is refused when its length has come; a
//! refused request gets an [`IntakeError`], which gRPC services see as a status (`RESOURCE_EXHAUSTED`,
//! `DEADLINE_EXCEEDED`) and HTTP handlers find with [`IntakeError::find`].
//!
//! Owner: one mutex per port around the table of incomplete requests, held for map operations; a message
//! that comes in one piece never touches it.

use std::{
    collections::BTreeMap,
    error::Error,
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::task::AtomicWaker;
use hyper::{
    body::{Body, Frame, SizeHint},
    header::CONTENT_TYPE,
    http::request::Parts,
};
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};
use tonic::Status;

use crate::connection::Activity;

/// What an incomplete request costs beside its bytes: stream, task and table entry.
const BASE_BYTES: usize = 4 << 10;

/// A request is complete within this: 8 MiB over 2.2 Mbit/s.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Bounds of a port's intake.
#[derive(Clone, Debug)]
pub struct IntakeOptions {
    /// Bytes of all incomplete requests together.
    pub budget_bytes: usize,
    /// Longest time from a request's head, or a message's first byte, to its end.
    pub timeout: Duration,
    /// Largest gRPC message.
    pub max_message_bytes: usize,
    /// By path: whether a request ends before it is answered. The others stream messages.
    pub whole: fn(&str) -> bool,
}

impl IntakeOptions {
    /// For a port whose requests end before they are answered.
    pub fn new(budget_bytes: usize) -> Self {
        Self { budget_bytes, timeout: TIMEOUT, max_message_bytes: usize::MAX, whole: |_| true }
    }

    /// For a gRPC port whose calls may stream messages to us.
    pub fn streams(budget_bytes: usize, max_message_bytes: usize) -> Self {
        Self { max_message_bytes, whole: |_| false, ..Self::new(budget_bytes) }
    }
}

/// Why a request was not received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IntakeFault {
    /// It did not end in time.
    TimedOut {
        /// The bound.
        after: Duration,
    },
    /// It held most when the budget was exceeded.
    Budget {
        /// The bound.
        budget_bytes: usize,
    },
    /// A gRPC message is too large.
    TooLarge {
        /// Its announced length.
        bytes: u64,
        /// The bound.
        limit_bytes: usize,
    },
    /// The connection broke, or the peer reset the stream.
    Broken {
        /// The HTTP layer's words.
        problem: String,
    },
}

impl fmt::Display for IntakeFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimedOut { after } => write!(f, "the request was not complete within {after:?}"),
            Self::Budget { budget_bytes } => {
                write!(f, "the port's {budget_bytes} bytes for incomplete requests are in use; retry in 1 s")
            }
            Self::TooLarge { bytes, limit_bytes } => {
                write!(f, "the message has {bytes} bytes, at most {limit_bytes} are allowed")
            }
            Self::Broken { problem } => write!(f, "the request broke off: {problem}"),
        }
    }
}

/// An [`IntakeFault`] as the error of a body. Its source is what gRPC makes its status of.
#[derive(Debug)]
pub struct IntakeError {
    fault: IntakeFault,
    source: Box<dyn Error + Send + Sync>,
}

impl IntakeError {
    fn refused(fault: IntakeFault) -> Self {
        let words = fault.to_string();
        let status = match fault {
            IntakeFault::TimedOut { .. } => Status::deadline_exceeded(words),
            IntakeFault::Budget { .. } | IntakeFault::TooLarge { .. } => Status::resource_exhausted(words),
            IntakeFault::Broken { .. } => Status::cancelled(words),
        };
        Self { fault, source: Box::new(status) }
    }

    fn broken(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let source = error.into();
        Self { fault: IntakeFault::Broken { problem: source.to_string() }, source }
    }

    /// The fault among an error's causes.
    pub fn find<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a IntakeFault> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(found) = error.downcast_ref::<Self>() {
                return Some(&found.fault);
            }
            cause = error.source();
        }
        None
    }
}

impl fmt::Display for IntakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fault.fmt(f)
    }
}

impl Error for IntakeError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.source)
    }
}

/// The incomplete requests of a port.
#[derive(Debug)]
pub(crate) struct Intake {
    options: IntakeOptions,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    used: usize,
    next: u64,
    incomplete: BTreeMap<u64, Incomplete>,
}

#[derive(Debug)]
struct Incomplete {
    bytes: usize,
    since: Instant,
    refusal: Arc<Refusal>,
}

/// How a request learns that it was chosen to make room.
#[derive(Debug, Default)]
struct Refusal {
    refused: AtomicBool,
    waker: AtomicWaker,
}

impl Refusal {
    fn refuse(&self) {
        self.refused.store(true, Ordering::Release);
        self.waker.wake();
    }

    fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Acquire)
    }
}

impl Intake {
    pub(crate) fn new(options: IntakeOptions) -> Arc<Self> {
        Arc::new(Self { options, table: Mutex::default() })
    }

    fn open(self: &Arc<Self>) -> Entry {
        let refusal = Arc::new(Refusal::default());
        let mut table = self.table.lock();
        let id = table.next;
        table.next += 1;
        let incomplete = Incomplete { bytes: 0, since: Instant::now(), refusal: Arc::clone(&refusal) };
        table.incomplete.insert(id, incomplete);
        drop(table);
        Entry { id, refusal, intake: Arc::clone(self) }
    }

    #[cfg(test)]
    fn used(&self) -> usize {
        self.table.lock().used
    }
}

impl Table {
    /// Refuses those who have held most for longest until the rest fits.
    fn make_room(&mut self, budget_bytes: usize) {
        let now = Instant::now();
        while self.used > budget_bytes {
            let held = |entry: &Incomplete| entry.bytes as u128 * ((now - entry.since).as_millis() + 1);
            // Of equals the first that came.
            let most = self.incomplete.iter().rev().max_by_key(|(_, entry)| held(entry)).map(|(id, _)| *id);
            let Some(entry) = most.and_then(|id| self.incomplete.remove(&id)) else { return };
            self.used -= entry.bytes;
            entry.refusal.refuse();
        }
    }
}

/// A place in the table.
#[derive(Debug)]
struct Entry {
    id: u64,
    refusal: Arc<Refusal>,
    intake: Arc<Intake>,
}

impl Entry {
    /// What is held now. The refusal shows in [`Refusal::is_refused`].
    fn set(&self, bytes: usize) {
        let mut table = self.intake.table.lock();
        let Some(entry) = table.incomplete.get_mut(&self.id) else { return };
        let before = std::mem::replace(&mut entry.bytes, bytes + BASE_BYTES);
        table.used = table.used - before + bytes + BASE_BYTES;
        table.make_room(self.intake.options.budget_bytes);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut table = self.intake.table.lock();
        if let Some(entry) = table.incomplete.remove(&self.id) {
            table.used -= entry.bytes;
        }
    }
}

/// Where messages begin and end in the bytes of a gRPC request: each is one byte of flags, four of length,
/// and the message.
#[derive(Debug, Default)]
struct Messages {
    head: [u8; 5],
    head_bytes: usize,
    /// Bytes of the message still to come.
    missing: u64,
    /// Bytes of the incomplete message that have come.
    held: usize,
}

impl Messages {
    fn is_incomplete(&self) -> bool {
        self.held > 0
    }

    fn feed(&mut self, mut data: &[u8], limit_bytes: usize) -> Result<(), IntakeFault> {
        while !data.is_empty() {
            if self.head_bytes < self.head.len() {
                let take = data.len().min(self.head.len() - self.head_bytes);
                let (head, rest) = data.split_at(take);
                self.head[self.head_bytes..self.head_bytes + take].copy_from_slice(head);
                self.head_bytes += take;
                self.held += take;
                data = rest;
                if self.head_bytes < self.head.len() {
                    return Ok(());
                }
                let [_, a, b, c, d] = self.head;
                self.missing = u64::from(u32::from_be_bytes([a, b, c, d]));
                if self.missing > limit_bytes as u64 {
                    return Err(IntakeFault::TooLarge { bytes: self.missing, limit_bytes });
                }
            } else {
                let take =
                    usize::try_from(self.missing).map_or(data.len(), |missing| missing.min(data.len()));
                self.missing -= take as u64;
                self.held += take;
                data = &data[take..];
            }
            if self.missing == 0 {
                (self.head_bytes, self.held) = (0, 0);
            }
        }
        Ok(())
    }
}

/// A request's body under the rule.
#[derive(Debug)]
pub(crate) struct Metered<B> {
    inner: B,
    intake: Arc<Intake>,
    /// The request ends before it is answered.
    whole: bool,
    messages: Option<Messages>,
    /// Bytes of a whole request so far.
    received: usize,
    /// When the request, or its incomplete message, began.
    began: Instant,
    entry: Option<Entry>,
    timer: Option<Pin<Box<Sleep>>>,
    /// Told when the request is complete; then gone.
    activity: Option<Arc<Activity>>,
    over: bool,
}

impl<B: Body<Data = Bytes> + Unpin> Metered<B> {
    pub(crate) fn new(inner: B, parts: &Parts, intake: Arc<Intake>, activity: Arc<Activity>) -> Self {
        let is_grpc = parts
            .headers
            .get(CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
        let whole = !is_grpc || (intake.options.whole)(parts.uri.path());
        let mut body = Self {
            whole,
            messages: is_grpc.then(Messages::default),
            received: 0,
            began: Instant::now(),
            entry: None,
            timer: None,
            activity: Some(activity),
            over: inner.is_end_stream(),
            inner,
            intake,
        };
        if body.over || !whole {
            body.complete();
        }
        body
    }

    fn is_incomplete(&self) -> bool {
        match (self.whole, &self.messages) {
            (true, _) => !self.over,
            (false, messages) => messages.as_ref().is_some_and(Messages::is_incomplete),
        }
    }

    /// Counts what has come.
    fn take(&mut self, data: &[u8]) -> Result<(), IntakeFault> {
        let was_incomplete = self.is_incomplete();
        if let Some(messages) = &mut self.messages {
            messages.feed(data, self.intake.options.max_message_bytes)?;
        }
        self.received += data.len();
        if !self.is_incomplete() {
            (self.entry, self.timer) = (None, None);
            return Ok(());
        }
        if !was_incomplete {
            self.began = Instant::now();
            self.timer = None;
        }
        let held = match (self.whole, &self.messages) {
            (false, Some(messages)) => messages.held,
            _ => self.received,
        };
        self.entry.get_or_insert_with(|| self.intake.open()).set(held);
        self.check()
    }

    /// Whether the bounds hold.
    fn check(&self) -> Result<(), IntakeFault> {
        let IntakeOptions { budget_bytes, timeout, .. } = self.intake.options;
        if self.entry.as_ref().is_some_and(|entry| entry.refusal.is_refused()) {
            return Err(IntakeFault::Budget { budget_bytes });
        }
        match self.is_incomplete() && self.began.elapsed() >= timeout {
            true => Err(IntakeFault::TimedOut { after: timeout }),
            false => Ok(()),
        }
    }

    /// Waits for a refusal and for the end of the time.
    fn watch(&mut self, cx: &mut Context<'_>) -> Result<(), IntakeFault> {
        if !self.is_incomplete() {
            return Ok(());
        }
        let entry = self.entry.get_or_insert_with(|| {
            let entry = self.intake.open();
            entry.set(0);
            entry
        });
        entry.refusal.waker.register(cx.waker());
        let until = self.began + self.intake.options.timeout;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        // Its end shows in the check.
        let _ = timer.as_mut().poll(cx);
        self.check()
    }

    fn complete(&mut self) {
        (self.entry, self.timer) = (None, None);
        if let Some(activity) = self.activity.take() {
            activity.received();
        }
    }

    fn fail(&mut self, fault: IntakeFault) -> Poll<Option<Result<Frame<Bytes>, IntakeError>>> {
        self.over = true;
        self.complete();
        Poll::Ready(Some(Err(IntakeError::refused(fault))))
    }
}

impl<B> Body for Metered<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = IntakeError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, IntakeError>>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        match Pin::new(&mut this.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref()
                    && let Err(fault) = this.take(data)
                {
                    return this.fail(fault);
                }
                if frame.is_trailers() || this.inner.is_end_stream() {
                    this.over = true;
                    this.complete();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.over = true;
                this.complete();
                Poll::Ready(Some(Err(IntakeError::broken(error))))
            }
            Poll::Ready(None) => {
                this.over = true;
                this.complete();
                Poll::Ready(None)
            }
            Poll::Pending => match this.watch(cx) {
                Ok(()) => Poll::Pending,
                Err(fault) => this.fail(fault),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl<B> Drop for Metered<B> {
    fn drop(&mut self) {
        // Whoever took the body wants no more of it.
        if let Some(activity) = self.activity.take() {
            activity.received();
        }
    }
}

#[cfg(test)]
mod tests;
