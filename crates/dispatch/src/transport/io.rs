//! The thread and runtime of a process's dispatch streams, and how the thread that waits for frames borrows
//! them.
//!
//! All streams of a worker, or of a shard, run on one single-threaded runtime. Its own thread drives it while
//! nobody else does. While the engine waits for experts, or the compute thread of a shard for frames, that
//! thread drives it instead ([`Drive`]): it reads the sockets itself, and a frame reaches it without waking
//! another thread. The I/O thread gives way when asked, and takes over again when the guest has not driven
//! for `LINGER`, or at once if frames are left that the sockets did not take. Between two drives of the guest,
//! arriving frames wait in the socket; keep-alive pings are answered within `ATTENDED`.
//!
//! **Polling.** A thread that sleeps in the kernel is woken by an interrupt to a halted core, which costs more
//! than the round trip of a small frame (docs/performance.md). So a guest first polls the sockets for up to
//! `POLL`, offering its core to others between two looks. If somebody takes the core, it is needed more
//! elsewhere, and the next waits sleep at once: polling uses only what would be idle.

use std::{
    io,
    pin::{Pin, pin},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    task::Poll,
    thread::{self, Thread},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{runtime, sync::Notify, time::Sleep};

use super::Drive;

/// How long the engine may stay away before the I/O thread takes over: longer than the attention of a
/// decode layer, so that it stays parked through a decode step; far shorter than any time-out.
const LINGER: Duration = Duration::from_millis(5);

/// How often the I/O thread looks whether a guest that drives is still there: the guest does the work, so
/// nothing but keep-alive pings waits for the look, and they have seconds.
const ATTENDED: Duration = Duration::from_millis(50);

/// How long a wait polls before it sleeps: the round trip of a decode frame and its experts on an otherwise
/// idle pair of machines. Longer waits gain little from polling, relative to their length.
const POLL: Duration = Duration::from_micros(100);

/// Two looks further apart than this, and somebody else has used the core in between. An undisturbed look takes
/// one or two microseconds; one that reads a large frame counts as disturbed, which is as well: copying, not
/// waking, is then the cost.
const DISTURBED: Duration = Duration::from_micros(20);

/// After a disturbed wait, so many waits sleep at once; twice as many after each further one, up to
/// [`MAX_SLEEPS`]. At a few waits per layer that is one try in every few steps of a busy machine.
const FIRST_SLEEPS: u32 = 8;
const MAX_SLEEPS: u32 = 256;

/// Frames of one dispatch up to this many bytes are expected to fit the sockets' send buffers; with more,
/// the I/O thread is woken to write them while the engine computes.
const FLUSH_BYTES: usize = 1 << 20;

/// Owns the thread; dropping it ends the thread once its links are gone.
#[derive(Debug)]
pub struct IoThread {
    handle: IoHandle,
}

/// Where links run. Cheap to clone; the runtime lives until the last handle and the thread are gone.
#[derive(Clone, Debug)]
pub struct IoHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// `Some` until dropped.
    runtime: Option<runtime::Runtime>,
    thread: OnceLock<Thread>,
    /// Asks the I/O thread to give way.
    give_way: Notify,
    /// The I/O thread drives, or is about to.
    driving: AtomicBool,
    /// Other threads that drive.
    guests: AtomicUsize,
    /// Times that a guest has driven: unchanged over [`LINGER`], the I/O thread takes over.
    visits: AtomicU64,
    /// The I/O thread should take over without waiting for [`LINGER`].
    wanted: AtomicBool,
    stopped: AtomicBool,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // A runtime may be dropped on a thread that is inside another one only without waiting.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl IoThread {
    /// Starts the thread.
    pub fn start(name: &str) -> io::Result<Self> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let shared = Arc::new(Shared {
            runtime: Some(runtime),
            thread: OnceLock::new(),
            give_way: Notify::new(),
            driving: AtomicBool::new(true),
            guests: AtomicUsize::new(0),
            visits: AtomicU64::new(0),
            wanted: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        });
        let served = shared.clone();
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || served.serve())?;
        // Set once, here, before anybody else has the handle.
        let _ = shared.thread.set(thread.thread().clone());
        Ok(Self { handle: IoHandle { shared } })
    }

    /// Where to connect and to spawn.
    pub fn handle(&self) -> IoHandle {
        self.handle.clone()
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        let shared = &self.handle.shared;
        shared.stopped.store(true, Ordering::Release);
        shared.give_way.notify_one();
        shared.unpark();
    }
}

impl IoHandle {
    /// The runtime, for spawning.
    pub fn runtime(&self) -> runtime::Handle {
        self.shared.runtime().handle().clone()
    }
}

impl Shared {
    fn runtime(&self) -> &runtime::Runtime {
        // Only `drop` takes it, and nobody has a reference by then.
        self.runtime.as_ref().unwrap_or_else(|| unreachable!("the runtime is taken in drop only"))
    }

    /// The I/O thread.
    fn serve(&self) {
        while !self.stopped.load(Ordering::Acquire) {
            self.driving.store(true, Ordering::SeqCst);
            // A guest that came in between has seen `driving` and asked, which is remembered here.
            self.runtime().block_on(self.give_way.notified());
            self.driving.store(false, Ordering::SeqCst);
            self.stay_away();
        }
    }

    /// Waits until guests have been away for [`LINGER`] or want the thread back.
    fn stay_away(&self) {
        let (mut seen, mut since) = (self.visits.load(Ordering::Acquire), Instant::now());
        let mut nap = LINGER;
        while !self.stopped.load(Ordering::Acquire) {
            thread::park_timeout(nap);
            let visits = self.visits.load(Ordering::Acquire);
            let away = self.guests.load(Ordering::SeqCst) == 0;
            nap = if away { LINGER } else { ATTENDED };
            if !away || visits != seen {
                (seen, since) = (visits, Instant::now());
            }
            if away && (self.wanted.swap(false, Ordering::AcqRel) || since.elapsed() >= LINGER) {
                return;
            }
        }
    }

    fn unpark(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Drives a future on this thread; `None` inside another runtime, which forbids it.
    fn drive<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        if runtime::Handle::try_current().is_ok() {
            return None;
        }
        self.guests.fetch_add(1, Ordering::SeqCst);
        if self.driving.load(Ordering::SeqCst) {
            self.give_way.notify_one();
        }
        // If the thread has not given way yet, the future is still polled here and completes there.
        let output = self.runtime().block_on(future);
        self.visits.fetch_add(1, Ordering::Release);
        self.guests.fetch_sub(1, Ordering::SeqCst);
        Some(output)
    }
}

/// Drives an I/O runtime for one thread that waits for frames.
#[derive(Debug)]
pub struct Driver {
    io: IoHandle,
    polling: Polling,
    /// The timer of past and present waits. Deadlines are seconds away and each is a little later than the
    /// last, so a timer armed for an earlier one is left to ring (and the caller to look again) rather
    /// than moved on every wait, which would cost more than the wait's own system call.
    alarm: Mutex<Option<Pin<Box<Sleep>>>>,
}

impl Driver {
    /// A driver for one thread.
    pub fn new(io: IoHandle) -> Self {
        Self { io, polling: Polling::default(), alarm: Mutex::new(None) }
    }

    /// Completes at the deadline or, where an earlier wait left the timer armed, before.
    async fn alarm(&self, deadline: Instant) {
        let deadline = tokio::time::Instant::from_std(deadline);
        let mut alarm = self.alarm.lock().take();
        match &mut alarm {
            Some(sleep) if sleep.is_elapsed() || sleep.deadline() > deadline => {
                sleep.as_mut().reset(deadline);
            }
            Some(_) => {}
            None => alarm = Some(Box::pin(tokio::time::sleep_until(deadline))),
        }
        *self.alarm.lock() = alarm;
        std::future::poll_fn(|cx| match self.alarm.lock().as_mut() {
            Some(sleep) => sleep.as_mut().poll(cx),
            None => Poll::Ready(()),
        })
        .await;
    }
}

impl Drive for Driver {
    fn flush(&self, bytes: usize, send: &mut dyn FnMut()) {
        let shared = &self.io.shared;
        let mut unsent = Some(send);
        let driven = shared.drive(async {
            if let Some(send) = unsent.take() {
                send();
            }
            // Runs every task that became ready, down to the socket, before it comes back.
            tokio::task::yield_now().await;
        });
        if driven.is_none() {
            if let Some(send) = unsent.take() {
                send();
            }
        } else if bytes > FLUSH_BYTES {
            shared.wanted.store(true, Ordering::Release);
            shared.unpark();
        }
    }

    fn wait(&self, event: &Notify, deadline: Instant) -> bool {
        // Which of the two came first makes no difference: the caller looks at its mailbox and its clock.
        let waiting = async {
            let mut notified = pin!(event.notified());
            if self.polling.poll(notified.as_mut(), deadline).await {
                return;
            }
            tokio::select! {
                biased;
                () = notified => {}
                () = self.alarm(deadline) => {}
            }
        };
        self.io.shared.drive(waiting).is_some()
    }
}

/// Whether waiting by polling pays just now.
#[derive(Debug, Default)]
struct Polling {
    /// Waits that are still to sleep at once.
    sleeps: AtomicU32,
    /// What `sleeps` was last set to; 0 after an undisturbed wait.
    penalty: AtomicU32,
}

impl Polling {
    /// Polls the runtime that the caller is on until `event` is ready (true), or polling stops paying.
    async fn poll(&self, mut event: Pin<&mut impl Future<Output = ()>>, deadline: Instant) -> bool {
        if self.sleeps_at_once() {
            return false;
        }
        let begun = Instant::now();
        let mut looked = begun;
        loop {
            let ready = std::future::poll_fn(|cx| Poll::Ready(event.as_mut().poll(cx).is_ready())).await;
            if ready {
                self.undisturbed();
                return true;
            }
            // Runs what is ready and looks at the sockets, without sleeping.
            tokio::task::yield_now().await;
            thread::yield_now();
            let now = Instant::now();
            if now.duration_since(looked) > DISTURBED {
                self.disturbed();
                return false;
            }
            if now.duration_since(begun) > POLL || now >= deadline {
                return false;
            }
            looked = now;
        }
    }

    fn sleeps_at_once(&self) -> bool {
        // One thread waits, so this need not be one atomic step.
        let left = self.sleeps.load(Ordering::Relaxed);
        self.sleeps.store(left.saturating_sub(1), Ordering::Relaxed);
        left > 0
    }

    fn disturbed(&self) {
        let penalty = (2 * self.penalty.load(Ordering::Relaxed)).clamp(FIRST_SLEEPS, MAX_SLEEPS);
        self.penalty.store(penalty, Ordering::Relaxed);
        self.sleeps.store(penalty, Ordering::Relaxed);
    }

    fn undisturbed(&self) {
        self.penalty.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn tasks_run_while_nobody_drives() {
        let io = IoThread::start("io").unwrap();
        let (done, finished) = mpsc::channel();
        io.handle().runtime().spawn(async move { done.send(()).unwrap() });
        finished.recv_timeout(PATIENCE).unwrap();
    }

    #[test]
    fn a_waiting_thread_drives_and_the_thread_takes_over_afterwards() {
        let io = IoThread::start("io").unwrap();
        let handle = io.handle();
        let driver = Driver::new(handle.clone());
        for _ in 0..100 {
            let event = Arc::new(Notify::new());
            let notify = event.clone();
            driver.flush(10, &mut || {
                let notify = notify.clone();
                handle.runtime().spawn(async move { notify.notify_one() });
            });
            let start = Instant::now();
            assert!(driver.wait(&event, start + PATIENCE));
            assert!(start.elapsed() < PATIENCE, "the event ended the wait");
        }
        let (done, finished) = mpsc::channel();
        handle.runtime().spawn(async move { done.send(()).unwrap() });
        finished.recv_timeout(PATIENCE).unwrap();
    }

    #[test]
    fn waits_end_at_their_deadlines_whatever_came_before() {
        let io = IoThread::start("io").unwrap();
        let driver = Driver::new(io.handle());
        for millis in [5, 1, 7, 2] {
            let deadline = Instant::now() + Duration::from_millis(millis);
            while Instant::now() < deadline {
                assert!(driver.wait(&Notify::new(), deadline));
            }
            // An earlier wait, ended by its event, leaves a later timer; it must not delay the next.
            let event = Notify::new();
            event.notify_one();
            assert!(driver.wait(&event, Instant::now() + PATIENCE));
        }
    }

    #[test]
    fn large_frames_are_left_to_the_thread_at_once() {
        let io = IoThread::start("io").unwrap();
        let handle = io.handle();
        let (done, finished) = mpsc::channel();
        Driver::new(handle.clone()).flush(FLUSH_BYTES + 1, &mut || {
            let done = done.clone();
            handle.runtime().spawn(async move {
                tokio::time::sleep(Duration::from_millis(1)).await;
                done.send(()).unwrap();
            });
        });
        finished.recv_timeout(PATIENCE).unwrap();
    }

    #[test]
    fn waits_that_are_disturbed_again_and_again_poll_less_and_less() {
        let polling = Polling::default();
        let slept = || std::iter::repeat_with(|| polling.sleeps_at_once()).take_while(|slept| *slept).count();
        assert_eq!(slept(), 0);
        let after = |disturbances: usize| {
            (0..disturbances).for_each(|_| polling.disturbed());
            slept()
        };
        assert_eq!([after(1), after(1), after(1), after(9)], [8, 16, 32, 256]);
        polling.undisturbed();
        assert_eq!(after(1), 8);
    }

    #[test]
    fn an_event_that_comes_while_polling_ends_it_and_one_that_does_not_leaves_it_bounded() {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let event = Arc::new(Notify::new());
            let notify = event.clone();
            tokio::spawn(async move { notify.notify_one() });
            let polling = Polling::default();
            let deadline = Instant::now() + PATIENCE;
            // False only if this machine took the core away meanwhile.
            let seen = polling.poll(pin!(event.notified()), deadline).await;
            assert!(seen || polling.penalty.load(Ordering::Relaxed) > 0);
            assert!(!Polling::default().poll(pin!(Notify::new().notified()), deadline).await);
        });
    }

    #[test]
    fn inside_another_runtime_sending_works_and_waiting_is_refused() {
        let io = IoThread::start("io").unwrap();
        let other = runtime::Builder::new_current_thread().build().unwrap();
        other.block_on(async {
            let mut sent = false;
            let driver = Driver::new(io.handle());
            driver.flush(1, &mut || sent = true);
            assert!(sent);
            assert!(!driver.wait(&Notify::new(), Instant::now()));
        });
        other.block_on(async move { drop(io) });
    }
}
