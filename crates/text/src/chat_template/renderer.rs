//! Threads that compile and render, each with a stack of its own size, that can be given up.
//!
//! Fuel bounds what a template does, but some single steps are the engine's own and unpaid (comparing two
//! values that hold themselves many times over). Whoever waits for a rendering therefore waits a bounded
//! time; the thread goes on alone, keeps its slot until it ends, and as there are only so many slots,
//! threads that were given up cannot pile up.

use std::{
    sync::{
        Arc, LazyLock,
        mpsc::{RecvTimeoutError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::TemplateError;

/// Address space of a stack; only what is touched is memory. Two things need depth: the syntax tree of a
/// tag ([`super::source::MAX_TAG_TOKENS`] levels of some KB), and dropping a value that a template nested
/// once per turn of a loop, which the fuel bounds to 250 thousand levels of less than 1 KB.
pub(super) const STACK_BYTES: usize = 256 << 20;

/// Renderings at a time, those given up included: a core each, and as many given up.
static SLOTS: LazyLock<Arc<Slots>> = LazyLock::new(|| {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    Arc::new(Slots { free: Mutex::new(2 * cores.clamp(2, 32)), freed: Condvar::new() })
});

#[derive(Debug)]
struct Slots {
    free: Mutex<usize>,
    freed: Condvar,
}

/// One place; free again when dropped.
#[derive(Debug)]
struct Slot(Arc<Slots>);

impl Slots {
    fn take(self: &Arc<Self>, until: Instant) -> Option<Slot> {
        let mut free = self.free.lock();
        while *free == 0 {
            if self.freed.wait_until(&mut free, until).timed_out() {
                return None;
            }
        }
        *free -= 1;
        Some(Slot(Arc::clone(self)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.free.lock() += 1;
        self.0.freed.notify_one();
    }
}

/// Runs `work` on a thread of its own and waits for it until `until`, which lies `after` away.
pub(super) fn run<T: Send + 'static>(
    after: Duration,
    until: Instant,
    work: impl FnOnce() -> Result<T, TemplateError> + Send + 'static,
) -> Result<T, TemplateError> {
    run_in(&SLOTS, after, until, work)
}

fn run_in<T: Send + 'static>(
    slots: &Arc<Slots>,
    after: Duration,
    until: Instant,
    work: impl FnOnce() -> Result<T, TemplateError> + Send + 'static,
) -> Result<T, TemplateError> {
    let slot = slots.take(until).ok_or(TemplateError::Busy { after })?;
    let (sender, result) = sync_channel(1);
    let body = move || {
        let _slot = slot;
        // Whoever waited may have given up.
        let _ = sender.send(work());
    };
    let spawned = thread::Builder::new().name("template".to_owned()).stack_size(STACK_BYTES).spawn(body);
    spawned.map_err(|error| TemplateError::Thread { reason: error.to_string() })?;
    match result.recv_timeout(until.saturating_duration_since(Instant::now())) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => Err(TemplateError::TooSlow { after }),
        Err(RecvTimeoutError::Disconnected) => {
            Err(TemplateError::Thread { reason: "it panicked; the log says where".to_owned() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_too_long_is_given_up_and_keeps_its_slot_until_it_ends() {
        let slots = Arc::new(Slots { free: Mutex::new(1), freed: Condvar::new() });
        let (go_on, wait) = sync_channel::<()>(0);
        let short = Duration::from_millis(20);
        let stuck = run_in(&slots, short, Instant::now() + short, move || {
            let _ = wait.recv();
            Ok(())
        });
        assert_eq!(stuck, Err(TemplateError::TooSlow { after: short }));
        // The only slot is taken: nobody else begins.
        let second = run_in(&slots, short, Instant::now() + short, || Ok(()));
        assert_eq!(second, Err(TemplateError::Busy { after: short }));
        drop(go_on);
        let long = Duration::from_secs(60);
        assert_eq!(run_in(&slots, long, Instant::now() + long, || Ok(7)), Ok(7));
    }

    #[test]
    fn a_panic_is_an_error_and_frees_its_slot() {
        let slots = Arc::new(Slots { free: Mutex::new(1), freed: Condvar::new() });
        let long = Duration::from_secs(60);
        for _ in 0..2 {
            let failed = run_in::<()>(&slots, long, Instant::now() + long, || panic!("as a test"));
            assert!(matches!(failed, Err(TemplateError::Thread { .. })), "{failed:?}");
        }
    }
}
