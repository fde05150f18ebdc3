//! A fixed pool of threads for fork-join regions of microseconds.
//!
//! [`Pool::run`] calls a function for every task index; the caller takes part, so one thread means no
//! synchronisation at all. Tasks are claimed from a counter in ascending order. A region is *open* while
//! the caller still has tasks to claim; a worker enters an open region by a compare-and-swap that counts it
//! in, and the caller, once it finds no more tasks, closes the region and waits only for those inside. So a
//! worker that the operating system does not run (other processes share the cores) delays nobody, and the
//! only wait is for tasks that are being computed.
//!
//! Idle workers spin for a bounded time and then sleep; opening a region wakes the sleepers if its cost is
//! worth it. A second thread that calls `run` while a region is open computes its tasks itself: results do
//! not depend on who computes.
//!
//! If a task panics, the region still ends, and the panic goes on in the caller.

use std::{
    cell::UnsafeCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, TryLockError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};

use cadre_ops::OpsError;

/// Bit of `state` that says that a region may be entered.
const OPEN: u64 = 1 << 16;
/// Low bits of `state`: workers inside the region. Bits 32.. count regions.
const INSIDE: u64 = OPEN - 1;
const REGION: u64 = 1 << 32;

/// Regions estimated to be shorter than this run on the caller alone: entering and leaving costs each
/// worker about half a microsecond.
const MIN_NS_AWAKE: u64 = 2_500;
/// The same while every worker sleeps: a wake-up costs the caller a system call of about 2 us and the worker
/// starts 5 to 10 us later.
const MIN_NS_ASLEEP: u64 = 20_000;

type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct Job {
    /// The caller's closure; its lifetime is erased, see the SAFETY notes.
    task: *const Task<'static>,
    tasks: usize,
}

struct Shared {
    state: AtomicU64,
    next: Padded<AtomicUsize>,
    job: UnsafeCell<Job>,
    asleep: Vec<Padded<AtomicBool>>,
    stop: AtomicBool,
    panicked: AtomicBool,
    spin: Duration,
}

#[repr(align(128))]
struct Padded<T>(T);

// SAFETY: `job` is written only by the holder of the `region` lock while the region is closed and nobody is
// inside, and read only by workers inside the region; both are ordered by `state`. The closure it points to
// is `Sync`. Everything else is atomic.
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw pointer is only followed inside a region.
unsafe impl Send for Shared {}

/// The pool; dropping it stops the workers.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    region: Mutex<()>,
    sleepers: Vec<Thread>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// `threads` including the caller, at least 1.
    pub(crate) fn new(threads: usize, spin: Duration) -> Result<Self, OpsError> {
        let threads = threads.clamp(1, INSIDE as usize);
        let nothing: &'static Task<'static> = &|_, _| {};
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: Padded(AtomicUsize::new(0)),
            job: UnsafeCell::new(Job { task: nothing, tasks: 0 }),
            asleep: (1..threads).map(|_| Padded(AtomicBool::new(false))).collect(),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            spin,
        });
        let mut pool = Self { shared, region: Mutex::new(()), sleepers: Vec::new(), workers: Vec::new() };
        for worker in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let handle = thread::Builder::new()
                .name(format!("kernel-{worker}"))
                .spawn(move || shared.work(worker))
                .map_err(|error| OpsError::Device {
                    op: "start threads",
                    message: format!("thread {worker} of {threads}: {error}"),
                })?;
            pool.sleepers.push(handle.thread().clone());
            pool.workers.push(handle);
        }
        Ok(pool)
    }

    /// Threads including the caller.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(index, thread)` for every index below `tasks`, in no particular order and possibly at the
    /// same time; `thread` is below [`Self::threads`] and no two calls at one time share it. `cost_ns`
    /// estimates all tasks together on one thread; it decides where they run, never what they compute.
    pub(crate) fn run(&self, tasks: usize, cost_ns: u64, task: &Task<'_>) {
        let alone = self.workers.is_empty() || tasks < 2 || cost_ns < self.shared.worthwhile();
        let guard = if alone { None } else { self.lock() };
        if guard.is_none() {
            return (0..tasks).for_each(|index| task(index, 0));
        }
        // SAFETY: only the lifetime changes. Workers follow the pointer only while inside the region, and
        // `Region`'s drop returns, also on a panic, only after the last one has left.
        let task_static: &Task<'static> = unsafe { std::mem::transmute(task) };
        let region = self.shared.open(task_static, tasks);
        self.wake(tasks - 1);
        self.shared.claim(task, tasks, 0);
        drop(region);
        if self.shared.panicked.swap(false, Ordering::Relaxed) {
            resume_unwind(Box::new("a kernel task panicked on a worker thread"));
        }
    }

    fn lock(&self) -> Option<std::sync::MutexGuard<'_, ()>> {
        match self.region.try_lock() {
            Ok(guard) => Some(guard),
            // The lock guards no data; a panic inside a region leaves the pool as good as before.
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn wake(&self, at_most: usize) {
        for (asleep, thread) in self.shared.asleep.iter().zip(&self.sleepers).take(at_most) {
            if asleep.0.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.sleepers.iter().for_each(Thread::unpark);
        for worker in self.workers.drain(..) {
            // A worker catches the panics of tasks, so it cannot have died.
            let _ = worker.join();
        }
    }
}

/// An open region; dropping it closes it and waits for the workers inside.
struct Region<'a>(&'a Shared);

impl Drop for Region<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.fetch_and(!OPEN, Ordering::AcqRel) & !OPEN;
        let mut rounds = 0_u32;
        while state & INSIDE != 0 {
            // Those inside compute a task. After some spinning let them have this core if they need it.
            if rounds < 2_000 {
                std::hint::spin_loop();
            } else {
                thread::yield_now();
            }
            rounds = rounds.saturating_add(1);
            state = self.0.state.load(Ordering::Acquire);
        }
    }
}

impl Shared {
    fn worthwhile(&self) -> u64 {
        let all_asleep = self.asleep.iter().all(|asleep| asleep.0.load(Ordering::Relaxed));
        if all_asleep { MIN_NS_ASLEEP } else { MIN_NS_AWAKE }
    }

    fn open(&self, task: &'static Task<'static>, tasks: usize) -> Region<'_> {
        // SAFETY: the caller holds the `region` lock and the previous region is closed and empty (its
        // `Region` was dropped), so nobody reads `job`.
        unsafe { *self.job.get() = Job { task, tasks } };
        self.next.0.store(0, Ordering::Relaxed);
        let state = self.state.load(Ordering::Relaxed);
        // Sequentially consistent with `asleep`: either we see a worker asleep or it sees the region.
        self.state.store((state & !INSIDE & !OPEN).wrapping_add(REGION) | OPEN, Ordering::SeqCst);
        Region(self)
    }

    fn claim(&self, task: &Task<'_>, tasks: usize, thread: usize) {
        loop {
            let index = self.next.0.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                return;
            }
            task(index, thread);
        }
    }

    /// Body of a worker thread.
    fn work(&self, worker: usize) {
        let mut seen = 0;
        let mut idle_since = Instant::now();
        let mut rounds = 0_u32;
        while !self.stop.load(Ordering::Relaxed) {
            let state = self.state.load(Ordering::SeqCst);
            if state / REGION != seen {
                if state & OPEN == 0 {
                    seen = state / REGION;
                } else if self.enter(state) {
                    seen = state / REGION;
                    self.take_part(worker);
                    idle_since = Instant::now();
                }
                continue;
            }
            rounds = rounds.wrapping_add(1);
            if !rounds.is_multiple_of(64) || idle_since.elapsed() < self.spin {
                std::hint::spin_loop();
                continue;
            }
            self.sleep(worker, seen);
            idle_since = Instant::now();
        }
    }

    fn enter(&self, state: u64) -> bool {
        self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn take_part(&self, worker: usize) {
        // SAFETY: we are inside an open region, so `job` was written before it opened and stays until we
        // leave.
        let (task, tasks) = unsafe { ((*self.job.get()).task, (*self.job.get()).tasks) };
        // SAFETY: the closure lives until the region is closed and empty; we are inside.
        let task = unsafe { &*task };
        if catch_unwind(AssertUnwindSafe(|| self.claim(task, tasks, worker))).is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
        self.state.fetch_sub(1, Ordering::Release);
    }

    fn sleep(&self, worker: usize, seen: u64) {
        let asleep = &self.asleep[worker - 1].0;
        asleep.store(true, Ordering::SeqCst);
        // A region opened before the store above is seen here; one opened after it unparks us.
        let state = self.state.load(Ordering::SeqCst);
        if state / REGION == seen && !self.stop.load(Ordering::SeqCst) {
            thread::park();
        }
        asleep.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    const COSTLY: u64 = u64::MAX;

    fn pool(threads: usize) -> Pool {
        Pool::new(threads, Duration::from_micros(5)).unwrap()
    }

    #[test]
    fn every_task_runs_exactly_once() {
        for threads in [1, 2, 3, 8] {
            let pool = pool(threads);
            assert_eq!(pool.threads(), threads);
            for tasks in [0, 1, 2, 5, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, COSTLY, &|index, thread| {
                    assert!(thread < threads);
                    counts[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    /// Every region's writes are visible to the caller, over many regions with sleeps in between.
    #[test]
    fn regions_follow_each_other() {
        let pool = pool(3);
        let mut total = 0;
        for round in 0..3_000 {
            let sum = AtomicUsize::new(0);
            pool.run(7, COSTLY, &|index, _| {
                sum.fetch_add(index + round, Ordering::Relaxed);
            });
            total += sum.into_inner();
        }
        assert_eq!(total, (0..3_000).map(|round| 21 + 7 * round).sum::<usize>());
    }

    /// More than one thread takes part once tasks wait for each other.
    #[test]
    fn workers_take_part() {
        let pool = pool(2);
        let arrived = AtomicUsize::new(0);
        pool.run(2, COSTLY, &|_, _| {
            arrived.fetch_add(1, Ordering::SeqCst);
            while arrived.load(Ordering::SeqCst) < 2 {
                thread::yield_now();
            }
        });
        assert_eq!(arrived.into_inner(), 2);
    }

    #[test]
    fn two_callers_at_once_both_finish() {
        let pool = pool(2);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        let sum = AtomicUsize::new(0);
                        pool.run(5, COSTLY, &|index, _| {
                            sum.fetch_add(index, Ordering::Relaxed);
                        });
                        assert_eq!(sum.into_inner(), 10);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = pool(2);
        for _ in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(4, COSTLY, &|index, _| assert!(index != 2, "task 2 fails"));
            }));
            assert!(result.is_err());
        }
        let sum = AtomicUsize::new(0);
        pool.run(4, COSTLY, &|index, _| {
            sum.fetch_add(index, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 6);
    }

    #[test]
    fn cheap_regions_stay_on_the_caller() {
        let pool = pool(2);
        let caller = thread::current().id();
        pool.run(50, 10, &|_, thread| {
            assert_eq!((thread, std::thread::current().id()), (0, caller));
        });
    }
}
