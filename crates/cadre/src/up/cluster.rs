//! The processes of one local cluster and what is known of each.
//!
//! Owns every child through its [`keep`] task. [`Cluster::stop`] is the only way out: it drains tier by
//! tier within a bound and kills what is left, so that no process survives `up`. Should `up` itself be
//! killed, its ends of the life lines close and the roles drain by themselves.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use futures::future::join_all;
use serde::Deserialize;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};

use super::{
    layout::{Bound, Layout, ProcessSpec, Tier},
    process::{Event, Keeper, What, Wish, keep},
};
use crate::http;

/// Events waiting to be handled: two per process and life (bound, ended), and processes in the tens. A full
/// channel only makes a keeper wait.
const EVENTS: usize = 256;

/// After a kill the kernel needs a moment to reap.
const REAP: Duration = Duration::from_secs(5);

/// A running local cluster.
pub(crate) struct Cluster {
    layout: Arc<Layout>,
    executable: PathBuf,
    members: Vec<Member>,
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
}

/// One process as the cluster sees it.
pub(crate) struct Member {
    process: ProcessSpec,
    wish: watch::Sender<Wish>,
    task: Option<JoinHandle<()>>,
    /// Its addresses and process id in this life, while it runs.
    pub(crate) bound: Option<(u32, Bound)>,
    /// What keeps it from being ready, as of the last look; `None` when ready.
    pub(crate) missing: Option<String>,
}

impl Member {
    /// As shown to the user.
    pub(crate) fn name(&self) -> &str {
        &self.process.name
    }
}

/// A change of a process, for the user.
#[derive(Debug)]
pub(crate) enum Change {
    /// A process listens (again).
    Bound {
        /// Which.
        name: String,
        /// Its process id.
        pid: u32,
        /// Where.
        bound: Bound,
    },
    /// A process ended and will be started again.
    Ended {
        /// Which.
        name: String,
        /// How it ended.
        status: String,
        /// When it will be started again.
        restart_in: Duration,
    },
}

/// The body of `/readyz`.
#[derive(Deserialize)]
struct Readyz {
    missing: Vec<Unmet>,
}

#[derive(Deserialize)]
struct Unmet {
    condition: String,
    reason: String,
}

impl Cluster {
    /// A cluster of which nothing runs yet.
    pub(crate) fn new(layout: Layout, executable: PathBuf) -> Self {
        let (sender, events) = mpsc::channel(EVENTS);
        let members = layout
            .processes()
            .into_iter()
            .map(|process| Member {
                process,
                wish: watch::channel(Wish::Run).0,
                task: None,
                bound: None,
                missing: Some("not started".into()),
            })
            .collect();
        Self { layout: Arc::new(layout), executable, members, events, sender }
    }

    /// Starts the router and, once its coordinator listens, everything else. Returns the news of the router.
    pub(crate) async fn start(&mut self) -> Result<Change> {
        self.spawn(|tier| tier == Tier::Router, None);
        let change = self.changed().await;
        let coordinator = match &change {
            Change::Bound { bound, .. } => {
                bound.coordinator.clone().context("the router announced no coordinator")?
            }
            Change::Ended { name, status, .. } => bail!("{name} ended ({status}) before it listened"),
        };
        self.spawn(|tier| tier != Tier::Router, Some(&coordinator));
        Ok(change)
    }

    fn spawn(&mut self, wanted: impl Fn(Tier) -> bool, coordinator: Option<&str>) {
        for (index, member) in self.members.iter_mut().enumerate() {
            if wanted(member.process.tier) {
                member.task = Some(tokio::spawn(keep(Keeper {
                    index,
                    process: member.process.clone(),
                    layout: Arc::clone(&self.layout),
                    executable: self.executable.clone(),
                    coordinator: coordinator.map(ToOwned::to_owned),
                    events: self.sender.clone(),
                    wish: member.wish.subscribe(),
                })));
            }
        }
    }

    /// The next thing that happens to a process.
    pub(crate) async fn changed(&mut self) -> Change {
        let Some(Event { index, what }) = self.events.recv().await else {
            // Unreachable while we hold a sender ourselves; waiting is the harmless answer.
            return std::future::pending().await;
        };
        let member = &mut self.members[index];
        let name = member.process.name.clone();
        match what {
            What::Bound { pid, bound } => {
                member.bound = Some((pid, bound.clone()));
                Change::Bound { name, pid, bound }
            }
            What::Ended { status, restart_in } => {
                member.bound = None;
                member.missing = Some("restarting".into());
                Change::Ended { name, status, restart_in }
            }
        }
    }

    /// Asks every process whether it is ready; true if all are.
    pub(crate) async fn look(&mut self) -> bool {
        let answers = self.members.iter().map(|member| async {
            match &member.bound {
                None => Some("not listening yet".to_owned()),
                Some((_, bound)) => missing(&bound.admin).await,
            }
        });
        let answers = join_all(answers).await;
        for (member, answer) in self.members.iter_mut().zip(answers) {
            member.missing = answer;
        }
        self.members.iter().all(|member| member.missing.is_none())
    }

    /// Every process.
    pub(crate) fn members(&self) -> &[Member] {
        &self.members
    }

    /// What keeps the cluster from being ready, in words.
    pub(crate) fn unready(&self) -> String {
        let reasons = self.members.iter().filter_map(|member| {
            member.missing.as_ref().map(|reason| format!("{}: {reason}", member.process.name))
        });
        reasons.collect::<Vec<_>>().join("; ")
    }

    /// Where the router listens.
    pub(crate) fn router(&self) -> Option<&Bound> {
        self.members
            .iter()
            .find(|member| member.process.tier == Tier::Router)
            .and_then(|member| member.bound.as_ref().map(|(_, bound)| bound))
    }

    /// Tells every process at once to drain, and none to be restarted.
    pub(crate) fn release(&self) {
        for member in &self.members {
            member.wish.send_replace(Wish::Drain);
        }
    }

    /// Drains router, workers and shards in this order, each tier within `bound`, and kills what is left.
    /// Returns the names of the processes that had to be killed.
    pub(crate) async fn stop(mut self, bound: Duration) -> Vec<String> {
        // Keepers that report while we wait must not block on a full channel.
        self.events.close();
        let mut killed = Vec::new();
        for tier in Tier::ALL {
            let tier: Vec<&mut Member> =
                self.members.iter_mut().filter(|member| member.process.tier == tier).collect();
            for member in &tier {
                member.wish.send_replace(Wish::Drain);
            }
            killed.extend(
                join_all(tier.into_iter().map(|member| end(member, bound))).await.into_iter().flatten(),
            );
        }
        killed
    }
}

/// Joins a member that was told to drain; its name if it had to be killed.
async fn end(member: &mut Member, bound: Duration) -> Option<String> {
    let mut task = member.task.take()?;
    if timeout(bound, &mut task).await.is_ok() {
        return None;
    }
    member.wish.send_replace(Wish::Kill);
    if timeout(REAP, &mut task).await.is_err() {
        // `kill_on_drop` kills it once more.
        task.abort();
    }
    Some(member.process.name.clone())
}

/// Why a process is not ready, in a few words; `None` if it is.
async fn missing(admin: &str) -> Option<String> {
    let (status, body) = match http::get(admin, "/readyz").await {
        Ok(answer) => answer,
        Err(error) => return Some(format!("{error:#}")),
    };
    if status.is_success() {
        return None;
    }
    let reasons = serde_json::from_str::<Readyz>(&body).map(|readyz| {
        readyz
            .missing
            .iter()
            .map(|unmet| format!("{}: {}", unmet.condition, unmet.reason))
            .collect::<Vec<_>>()
    });
    Some(reasons.map_or(body, |reasons| reasons.join("; ")))
}

#[cfg(test)]
mod tests;
