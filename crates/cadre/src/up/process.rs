//! One child process for as long as the cluster lives: started, watched, restarted, drained.
//!
//! A [`keep`] task is the only owner of its child. It ends when the child has ended after it was told to
//! stop, and not before, so joining the task means that the process is gone.

use std::{future::Future, path::PathBuf, pin::Pin, process::Stdio, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::{mpsc, watch},
    time::{Instant, sleep},
};

use super::{
    health,
    layout::{Bound, Layout, ProcessSpec},
};

/// What the owner of the cluster wants of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Keep it running.
    Run,
    /// Let it finish what it has and end.
    Drain,
    /// End it now.
    Kill,
}

/// What happened to a process.
#[derive(Debug)]
pub(crate) struct Event {
    /// Index in [`Layout::processes`].
    pub(crate) index: usize,
    /// What.
    pub(crate) what: What,
}

/// See [`Event`].
#[derive(Debug)]
pub(crate) enum What {
    /// It listens.
    Bound {
        /// Its process id.
        pid: u32,
        /// Where.
        bound: Bound,
    },
    /// It ended although it was wanted; it is started again after the pause.
    Ended {
        /// How.
        status: String,
        /// Until it is started again.
        restart_in: Duration,
    },
}

/// First pause before a restart; doubles with every quick death.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A process that lived this long starts with the first pause again.
const HEALTHY: Duration = Duration::from_secs(30);

/// What a [`keep`] task needs.
pub(crate) struct Keeper {
    pub(crate) index: usize,
    pub(crate) process: ProcessSpec,
    pub(crate) layout: Arc<Layout>,
    pub(crate) executable: PathBuf,
    /// Where members register; the router itself has none.
    pub(crate) coordinator: Option<String>,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) wish: watch::Receiver<Wish>,
}

/// Keeps one process running until it is wished otherwise.
pub(crate) async fn keep(mut keeper: Keeper) {
    let mut pause = FIRST_PAUSE;
    let mut before: Option<Bound> = None;
    while *keeper.wish.borrow() == Wish::Run {
        let begun = Instant::now();
        let status = keeper.live(&mut before).await.unwrap_or_else(|error| format!("{error:#}"));
        if *keeper.wish.borrow() != Wish::Run {
            return;
        }
        pause = if begun.elapsed() >= HEALTHY { FIRST_PAUSE } else { pause };
        keeper.tell(What::Ended { status, restart_in: pause }).await;
        tokio::select! {
            () = sleep(pause) => {}
            _ = keeper.wish.wait_for(|wish| *wish != Wish::Run) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

impl Keeper {
    /// One life of the process, from start to end.
    async fn live(&mut self, before: &mut Option<Bound>) -> Result<String> {
        let args = self.layout.command_line(&self.process, self.coordinator.as_deref(), before.as_ref());
        let mut child = Command::new(&self.executable)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C on a terminal reaches the whole group: the order of the drain is ours to choose.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", self.executable.display()))?;
        let pid = child.id().unwrap_or_default();
        let mut life_line = child.stdin.take();
        let mut lines = child.stdout.take().map(|stdout| BufReader::new(stdout).lines());
        let mut watched: Pin<Box<dyn Future<Output = String> + Send>> = Box::pin(std::future::pending());
        let mut hung = None;
        loop {
            tokio::select! {
                status = child.wait() => {
                    let status = status.context("wait for the process")?;
                    return Ok(match hung {
                        Some(why) => format!("{why}; {status}"),
                        None => status.to_string(),
                    });
                }
                why = &mut watched => {
                    hung = Some(why);
                    watched = Box::pin(std::future::pending());
                    // A process that is stopped or stuck does not hear SIGTERM.
                    child.start_kill().context("kill the hung process")?;
                }
                line = next_line(&mut lines) => {
                    if let Some(bound) = line.and_then(|line| serde_json::from_str::<Bound>(&line).ok()) {
                        *before = Some(bound.clone());
                        watched = Box::pin(health::hung(bound.admin.clone()));
                        self.tell(What::Bound { pid, bound }).await;
                    }
                }
                changed = self.wish.changed() => {
                    // A vanished owner means the same as a wish to drain.
                    let wish = if changed.is_ok() { *self.wish.borrow_and_update() } else { Wish::Drain };
                    obey(wish, &mut child, &mut life_line)?;
                    // Whoever drains it bounds that.
                    watched = Box::pin(std::future::pending());
                    if changed.is_err() {
                        return Ok(child.wait().await.context("wait for the process")?.to_string());
                    }
                }
            }
        }
    }

    async fn tell(&self, what: What) {
        // Nobody listening means that the cluster is being stopped.
        let _ = self.events.send(Event { index: self.index, what }).await;
    }
}

fn obey(wish: Wish, child: &mut Child, life_line: &mut Option<ChildStdin>) -> Result<()> {
    match wish {
        Wish::Run => {}
        Wish::Drain => drop(life_line.take()),
        Wish::Kill => child.start_kill().context("kill the process")?,
    }
    Ok(())
}

/// The next line; once the output has ended, never (the exit of the process tells).
async fn next_line(lines: &mut Option<Lines<BufReader<ChildStdout>>>) -> Option<String> {
    if let Some(open) = lines {
        match open.next_line().await {
            Ok(Some(line)) => return Some(line),
            Ok(None) | Err(_) => *lines = None,
        }
    }
    std::future::pending().await
}
