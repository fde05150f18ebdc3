//! Waiting for conditions, with a bound and with the last thing seen.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Within so much the operator says what is wrong (issue: bad input).
pub const SAID: Duration = Duration::from_secs(15);

/// For what a cluster does within seconds when it has its cores for itself.
pub const LIMIT: Duration = Duration::from_secs(120);

/// For what takes several pods' starts, drains or a node's silence.
pub const LONG: Duration = Duration::from_secs(300);

/// Pause between two looks; a look starts a kubectl, which takes about as long.
const LOOK: Duration = Duration::from_millis(250);

/// Looks until there is a value; fails with `what` and the last refusal after `limit`.
#[track_caller]
pub fn until<T>(what: &str, limit: Duration, look: impl FnMut() -> Result<T, String>) -> T {
    attempt(limit, look).unwrap_or_else(|seen| {
        panic!("waited {} s in vain: {what}\nlast seen: {seen}", limit.as_secs());
    })
}

/// Looks until there is a value; returns the last refusal after `limit`.
pub fn attempt<T>(limit: Duration, mut look: impl FnMut() -> Result<T, String>) -> Result<T, String> {
    let begun = Instant::now();
    loop {
        match look() {
            Err(_) if begun.elapsed() < limit => thread::sleep(LOOK),
            last => return last,
        }
    }
}

/// `Ok` if it holds, else what was seen instead.
pub fn holds(condition: bool, seen: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(seen()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_until_it_holds() {
        let mut looks = 0;
        let value = until("three", LIMIT, || {
            looks += 1;
            holds(looks == 3, || format!("{looks}")).map(|()| looks)
        });
        assert_eq!(value, 3);
    }

    #[test]
    #[should_panic(expected = "waited 0 s in vain: the end\nlast seen: nothing")]
    fn says_what_it_saw_last() {
        until::<()>("the end", Duration::ZERO, || Err("nothing".into()));
    }
}
