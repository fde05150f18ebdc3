//! What `up` tells: people read lines and a progress bar, programs read one JSON object per line.
//!
//! Standard output carries the result of the command (the addresses and the ready line, or the answer of
//! `--exit-after`), standard error everything else.

use std::{
    collections::BTreeSet,
    io::{self, IsTerminal},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::cluster::{Change, Cluster};
use crate::output;

/// Who reads standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// Lines for people.
    Text,
    /// One JSON object per event, for programs.
    Json,
}

/// The voice of `up`.
pub(crate) struct Console {
    output: Output,
    /// Standard output belongs to the answer of `--exit-after`.
    quiet: bool,
    /// What is served.
    model: String,
    progress: ProgressBar,
    was_ready: bool,
    seen_ready: BTreeSet<String>,
}

impl Console {
    /// A console; the progress bar hides itself where standard error is no terminal.
    pub(crate) fn new(output: Output, quiet: bool, model: String, processes: usize) -> Self {
        let progress = ProgressBar::new(processes as u64);
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} ready  {wide_msg}") {
            progress.set_style(style);
        }
        Self { output, quiet, model, progress, was_ready: false, seen_ready: BTreeSet::new() }
    }

    /// Weights load and peers connect.
    pub(crate) fn waiting(&mut self, cluster: &Cluster) {
        let members = cluster.members();
        self.progress.set_position(members.iter().filter(|member| member.missing.is_none()).count() as u64);
        let slowest = members
            .iter()
            .find_map(|member| member.missing.as_ref().map(|reason| format!("{}: {reason}", member.name())));
        self.progress.set_message(slowest.unwrap_or_default());
        if io::stderr().is_terminal() || self.output == Output::Json {
            return;
        }
        for member in members.iter().filter(|member| member.missing.is_none()) {
            if self.seen_ready.insert(member.name().to_owned()) {
                output::note(&format!(
                    "{} is ready ({}/{})",
                    member.name(),
                    self.seen_ready.len(),
                    members.len()
                ));
            }
        }
    }

    /// Everything runs.
    pub(crate) fn ready(&mut self, cluster: &Cluster, took: Duration) {
        self.was_ready = true;
        self.progress.finish_and_clear();
        let Some(router) = cluster.router() else { return };
        let http = router.http.as_deref().unwrap_or("-");
        match self.output {
            Output::Json => self.event(&json!({
                "event": "ready", "model": self.model, "seconds": took.as_secs_f64(),
                "grpc": router.grpc, "http": http, "admin": router.admin, "coordinator": router.coordinator,
            })),
            Output::Text => self.line(&format!(
                "gRPC   {}\nHTTP   http://{http}/v1\nadmin  http://{}/metrics\nready: {} on {} processes after \
                 {:.1} s; try `cadre chat \"What is a Pod?\"`, Ctrl-C stops",
                router.grpc,
                router.admin,
                self.model,
                cluster.members().len(),
                took.as_secs_f64(),
            )),
        }
    }

    /// Whether the cluster was ever ready.
    pub(crate) fn was_ready(&self) -> bool {
        self.was_ready
    }

    /// A process came or went.
    pub(crate) fn change(&self, change: &Change, starting: bool) {
        if self.output == Output::Json {
            self.event(&match change {
                Change::Bound { name, pid, bound } => {
                    json!({"event": "listening", "process": name, "pid": pid, "grpc": bound.grpc, "admin": bound.admin})
                }
                Change::Ended { name, status, restart_in } => {
                    json!({"event": "ended", "process": name, "status": status, "restart_in_seconds": restart_in.as_secs_f64()})
                }
            });
        }
        match change {
            Change::Bound { name, pid, .. } if !starting => {
                output::note(&format!("{name} runs again (process {pid})"));
            }
            Change::Bound { .. } => {}
            Change::Ended { name, status, .. } if starting => {
                output::note(&format!("{name} ended ({status})"))
            }
            Change::Ended { name, status, restart_in } => {
                let pause = restart_in.as_secs_f64();
                output::note(&format!("{name} ended ({status}); restarting in {pause:.2} s"));
            }
        }
    }

    /// The drain begins.
    pub(crate) fn stopping(&self, reason: &str) {
        self.progress.finish_and_clear();
        output::note(&format!("stopping ({reason}): requests in flight finish first"));
    }

    /// The drain was cut short.
    pub(crate) fn hurried(&self, reason: &str) {
        output::note(&format!("stopping at once (second {reason})"));
    }

    /// The drain is over.
    pub(crate) fn stopped(&self, killed: &[String]) {
        self.progress.finish_and_clear();
        // After a failed start the reason of the failure is what matters.
        if self.was_ready && !killed.is_empty() {
            output::note(&format!("killed, because they did not drain in time: {}", killed.join(", ")));
        }
    }

    fn event(&self, event: &Value) {
        self.line(&event.to_string());
    }

    fn line(&self, line: &str) {
        if self.quiet {
            output::note(line);
        } else {
            output::line(line);
        }
    }
}
