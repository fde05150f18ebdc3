//! Ctrl-C and termination as a question that may be asked, so that what was set up is taken down.
//!
//! A task that leaves something behind when it dies (a cluster) calls [`watch`] first. From then on the signals
//! only raise a flag, and every wait for a child goes through [`wait`], which looks at it. In a terminal the
//! child gets the signal as well and is given a moment to end by itself.

use std::{
    process::{Child, Command, ExitStatus},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use signal_hook::{consts, flag};

use crate::command;

static RAISED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// How often a running child is looked at.
const POLL: Duration = Duration::from_millis(50);

/// How long a child may take to end after an interrupt, before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// Takes over SIGINT, SIGTERM and SIGHUP; once is enough.
pub(crate) fn watch() -> Result<()> {
    if RAISED.get().is_none() {
        let raised = Arc::new(AtomicBool::new(false));
        for signal in [consts::SIGINT, consts::SIGTERM, consts::SIGHUP] {
            flag::register(signal, Arc::clone(&raised)).context("take over a signal")?;
        }
        // A second caller's flag stays unused, which is harmless: the signals raise both.
        drop(RAISED.set(raised));
    }
    Ok(())
}

/// Fails once somebody wants us to stop.
pub(crate) fn check() -> Result<()> {
    ensure!(!is_raised(), "interrupted");
    Ok(())
}

fn is_raised() -> bool {
    RAISED.get().is_some_and(|raised| raised.load(Ordering::Relaxed))
}

/// Waits for a child, at most `limit`; `None` means that it ran longer and was killed.
pub(crate) fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let begun = Instant::now();
    let mut interrupted: Option<Instant> = None;
    loop {
        if let Some(status) = child.try_wait()? {
            check()?;
            return Ok(Some(status));
        }
        if interrupted.is_none() && is_raised() {
            interrupted = Some(Instant::now());
        }
        if interrupted.is_some_and(|at| at.elapsed() > GRACE) {
            kill(child)?;
            bail!("interrupted");
        }
        if begun.elapsed() > limit {
            kill(child)?;
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

fn kill(child: &mut Child) -> Result<()> {
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// Like [`command::run`], but heeds interrupts and a limit.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<()> {
    check()?;
    let shown = command::show(command);
    let mut child =
        command.current_dir(command::root()?).spawn().with_context(|| format!("start `{shown}`"))?;
    match wait(&mut child, limit)? {
        Some(status) => ensure!(status.success(), "`{shown}` ended with {status}"),
        None => bail!("`{shown}` still ran after {} s and was killed", limit.as_secs()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_outlives_its_limit_is_killed() {
        let mut child = Command::new("sleep").arg("600").spawn().expect("sleep starts");
        assert!(wait(&mut child, Duration::ZERO).expect("a wait").is_none());
        assert!(child.try_wait().expect("a look").is_some(), "it is gone");
    }

    #[test]
    fn a_failing_command_is_named() {
        let error = run(Command::new("sh").args(["-c", "exit 7"]), Duration::from_secs(60)).expect_err("7");
        assert!(error.to_string().contains("sh -c exit 7"), "{error}");
    }
}
