//! File descriptors: the soft limit is raised to the hard one, and ports take their share of it.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors for everything that is no accepted connection: files, logs, connections to members.
const RESERVE: u64 = 256;

/// Most ports of one process (the router's).
const PORTS: u64 = 4;

/// However few descriptors there are, a port takes so many connections.
const LEAST: u64 = 16;

/// Raises the soft limit of open files to the hard one; shells and container runtimes often start processes
/// with a soft limit of 1024. Returns the limit before and after; `None` is none.
pub fn raise() -> io::Result<(Option<u64>, Option<u64>)> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    }
    Ok((current, maximum))
}

/// Connections that one port may hold: what it wants, or its share of the descriptors.
pub(crate) fn share(wanted: usize) -> usize {
    share_of(getrlimit(Resource::Nofile).current, wanted)
}

fn share_of(limit: Option<u64>, wanted: usize) -> usize {
    let Some(limit) = limit else { return wanted };
    let share = (limit.saturating_sub(RESERVE) / PORTS).max(LEAST);
    usize::try_from(share).map_or(wanted, |share| wanted.min(share))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_takes_what_it_wants_or_its_share() {
        assert_eq!(share_of(None, 4096), 4096);
        assert_eq!(share_of(Some(1 << 20), 4096), 4096);
        assert_eq!(share_of(Some(1024), 4096), 192);
        assert_eq!(share_of(Some(64), 4096), 16);
    }

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let (_, hard) = raise().expect("raising a soft limit needs no right");
        assert_eq!(getrlimit(Resource::Nofile).current, hard);
    }
}
