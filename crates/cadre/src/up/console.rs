//! What `up` tells: people read lines and a progress bar, programs read one JSON object per line.
//!
//! Standard output carries the result of the command (the addresses and the ready line, or the answer of
//! `--exit-after`), standard error everything else.

use std::{
    collections::BTreeSet,
    io::{self, IsTerminal, Write},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::cluster::{Change, Cluster};

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
    seen_ready: BTreeSet<String>,
}

impl Console {
    /// A console; the progress bar hides itself where standard error is no terminal.
    pub(crate) fn new(output: Output, quiet: bool, model: String, processes: usize) -> Self {
        let progress = ProgressBar::new(processes as u64);
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} ready  {wide_msg}") {
            progress.set_style(style);
        }
        Self { output, quiet, model, progress, seen_ready: BTreeSet::new() }
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
                eprintln!("{} is ready ({}/{})", member.name(), self.seen_ready.len(), members.len());
            }
        }
    }

    /// Everything runs.
    pub(crate) fn ready(&self, cluster: &Cluster, took: Duration) {
        self.progress.finish_and_clear();
        let Some(router) = cluster.router() else { return };
        let http = router.http.as_deref().unwrap_or("-");
        match self.output {
            Output::Json => self.event(&json!({
                "event": "ready", "model": self.model, "seconds": took.as_secs_f64(),
                "grpc": router.grpc, "http": http, "admin": router.admin,
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
            Change::Bound { name, pid, .. } if !starting => eprintln!("{name} runs again (process {pid})"),
            Change::Bound { .. } => {}
            Change::Ended { name, status, restart_in } => {
                eprintln!("{name} ended ({status}); restarting in {:.2} s", restart_in.as_secs_f64());
            }
        }
    }

    /// The drain begins.
    pub(crate) fn stopping(&self, reason: &str) {
        self.progress.finish_and_clear();
        eprintln!("stopping ({reason}): requests in flight finish first");
    }

    /// The drain is over.
    pub(crate) fn stopped(&self, killed: &[String]) {
        if !killed.is_empty() {
            eprintln!("killed, because they did not drain in time: {}", killed.join(", "));
        }
    }

    fn event(&self, event: &Value) {
        self.line(&event.to_string());
    }

    /// A reader that went away is no reason to stop serving.
    fn line(&self, line: &str) {
        let _ = if self.quiet {
            writeln!(io::stderr(), "{line}")
        } else {
            let mut out = io::stdout().lock();
            writeln!(out, "{line}").and_then(|()| out.flush())
        };
    }
}
