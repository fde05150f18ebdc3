//! Waiting for conditions, with a bound.

use std::{
    future::Future,
    thread,
    time::{Duration, Instant},
};

/// For everything that takes a fraction of a second on an idle machine: two busy cores may take a hundred
/// times as long, a hang takes for ever.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Pause between two looks at a condition.
const LOOK: Duration = Duration::from_millis(20);

/// Looks until there is a value; fails with `what` after [`LIMIT`].
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = look() {
            return value;
        }
        assert!(begun.elapsed() < LIMIT, "waited {} s in vain: {what}", LIMIT.as_secs());
        thread::sleep(LOOK);
    }
}

/// As [`until`], for a look that awaits.
pub async fn until_async<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = look().await {
            return value;
        }
        assert!(begun.elapsed() < LIMIT, "waited {} s in vain: {what}", LIMIT.as_secs());
        tokio::time::sleep(LOOK).await;
    }
}
