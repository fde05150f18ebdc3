//! CPU work on the texts of requests: parsing large bodies, rendering, tokenizing. Off the threads that serve,
//! bounded in number and bytes, fair between small and large, and told to stop when nobody waits for it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use super::Clock;
use crate::error::{RequestError, RequestResult};

/// Texts from here on are large: their work is measured in milliseconds per piece and seconds in all.
const LARGE_BYTES: usize = 256 << 10;

/// Turns for work on texts, and the bytes of text that wait for it.
///
/// No more texts are worked on at a time than there are cores, and one, so that a burst of them does not fill
/// the blocking pool; large ones may have half of the turns (rounded up), so that small ones pass them.
/// Waiters hold tickets and bytes, so they are bounded.
#[derive(Clone, Debug)]
pub(super) struct Compute {
    turns: Arc<Semaphore>,
    large: Arc<Semaphore>,
    /// In units of [`TEXT_UNIT`].
    texts: Arc<Semaphore>,
    text_budget_bytes: usize,
}

/// A turn, and one among the large where the text is.
type Turns = (Option<OwnedSemaphorePermit>, Option<OwnedSemaphorePermit>);

/// Granularity of the count of text, in bytes.
const TEXT_UNIT: usize = 1024;

impl Compute {
    pub(super) fn new(text_budget_bytes: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            turns: Arc::new(Semaphore::new(cores + 1)),
            large: Arc::new(Semaphore::new(cores.div_ceil(2))),
            texts: Arc::new(Semaphore::new((text_budget_bytes / TEXT_UNIT).clamp(1, Semaphore::MAX_PERMITS))),
            text_budget_bytes,
        }
    }

    /// The bytes of a request that has come, until its text is tokens.
    pub(super) fn hold(&self, bytes: usize) -> RequestResult<OwnedSemaphorePermit> {
        let units = u32::try_from(bytes.div_ceil(TEXT_UNIT)).unwrap_or(u32::MAX);
        Arc::clone(&self.texts)
            .try_acquire_many_owned(units)
            .map_err(|_| RequestError::IntakeFull { budget_bytes: self.text_budget_bytes })
    }

    /// Runs work on a text off the threads that serve. It is told to stop at the deadline and when the caller
    /// has gone, ends then with [`RequestError::Cancelled`], and keeps its turn until it has.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        clock: &Clock,
        stage: &'static str,
        bytes: usize,
        work: impl FnOnce(&Stop) -> RequestResult<T> + Send + 'static,
    ) -> RequestResult<T> {
        let permits = clock.bound(stage, self.turn(bytes)).await?;
        let stop = Stop { deadline: clock.deadline, gone: Arc::default() };
        let _gone = Gone(Arc::clone(&stop.gone));
        let work = tokio::task::spawn_blocking(move || {
            let _permits = permits;
            work(&stop)
        });
        match clock.bound(stage, work).await? {
            // It noticed the deadline before we did.
            Ok(Err(RequestError::Cancelled)) => Err(clock.passed(stage)),
            Ok(result) => result,
            Err(error) => Err(RequestError::Internal { problem: format!("{stage}: {error}") }),
        }
    }

    async fn turn(&self, bytes: usize) -> Turns {
        // First the rarer, so that no turn is held while waiting. The semaphores are never closed.
        let large = match bytes >= LARGE_BYTES {
            true => Arc::clone(&self.large).acquire_owned().await.ok(),
            false => None,
        };
        (Arc::clone(&self.turns).acquire_owned().await.ok(), large)
    }
}

/// Asked by long work whether to go on.
#[derive(Debug)]
pub(crate) struct Stop {
    deadline: Instant,
    gone: Arc<AtomicBool>,
}

impl Stop {
    pub(crate) fn requested(&self) -> bool {
        self.gone.load(Ordering::Relaxed) || Instant::now() >= self.deadline
    }
}

/// Says, when dropped, that nobody waits for the work any more.
struct Gone(Arc<AtomicBool>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;
    use crate::options::Limits;

    const LARGE: usize = LARGE_BYTES;

    fn clock(after: Duration) -> Clock {
        Clock::new(&Limits::default(), Some(after))
    }

    /// Work that goes on until it is told to stop, and says when it began and when it ended.
    fn endless() -> (
        impl FnOnce(&Stop) -> RequestResult<()> + Send + 'static,
        oneshot::Receiver<()>,
        oneshot::Receiver<()>,
    ) {
        let ((begin, begun), (end, ended)) = (oneshot::channel(), oneshot::channel());
        let work = move |stop: &Stop| {
            begin.send(()).unwrap();
            while !stop.requested() {
                std::thread::yield_now();
            }
            // The test may have seen enough.
            let _ = end.send(());
            Err(RequestError::Cancelled)
        };
        (work, begun, ended)
    }

    #[tokio::test]
    async fn work_ends_when_the_client_has_gone_and_at_the_deadline() {
        let compute = Compute::new(1 << 20);
        let (work, begun, ended) = endless();
        let running = tokio::spawn({
            let compute = compute.clone();
            async move { compute.run(&clock(Duration::from_secs(600)), "working", LARGE, work).await }
        });
        begun.await.unwrap();
        // As a front door does when its client disconnects.
        running.abort();
        ended.await.unwrap();

        let (work, _begun, ended) = endless();
        let error = compute.run(&clock(Duration::from_millis(50)), "working", LARGE, work).await.unwrap_err();
        assert_eq!(error, RequestError::Deadline { after: Duration::from_millis(50), stage: "working" });
        ended.await.unwrap();
    }

    #[tokio::test]
    async fn small_texts_pass_large_ones() {
        let compute = Compute::new(1 << 20);
        let mut large = Vec::new();
        for _ in 0..64 {
            let (work, begun, _) = endless();
            let compute = compute.clone();
            let run =
                async move { compute.run(&clock(Duration::from_secs(600)), "large", LARGE, work).await };
            large.push((tokio::spawn(run), begun));
        }
        // One of them at least has its turn; the others wait for it.
        let (first, begun) = large.remove(0);
        begun.await.unwrap();
        let small = compute.run(&clock(Duration::from_secs(60)), "small", 10, |_| Ok(7)).await;
        assert_eq!(small, Ok(7));
        first.abort();
        for (running, _) in large {
            running.abort();
        }
    }

    #[tokio::test]
    async fn bytes_that_wait_are_bounded() {
        let compute = Compute::new(4 * TEXT_UNIT);
        let held = [compute.hold(TEXT_UNIT).unwrap(), compute.hold(2 * TEXT_UNIT + 1).unwrap()];
        let full = compute.hold(1).unwrap_err();
        assert_eq!(full, RequestError::IntakeFull { budget_bytes: 4 * TEXT_UNIT });
        drop(held);
        assert!(compute.hold(4 * TEXT_UNIT).is_ok());
    }
}
