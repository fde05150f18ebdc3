//! What is printed: JSON for programs, lines for people.

use anyhow::Result;
use serde::Serialize;

use super::tally::{Progress, Summary};
use crate::output;

/// Where the lines go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Printer {
    pub(super) json: bool,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Line<'a> {
    Start { grpc: &'a str, concurrency: u16, prompts: usize },
    Progress(&'a Progress),
    Summary(&'a Summary),
}

impl Printer {
    /// The first line.
    pub(super) fn start(self, grpc: &str, concurrency: u16, prompts: usize) -> Result<()> {
        if self.json {
            return output::json(&Line::Start { grpc, concurrency, prompts });
        }
        output::line(&format!("{grpc}: {concurrency} streams, {prompts} prompts"));
        output::line("    s       ok   failed  different  running   tokens  longest gap ms");
        Ok(())
    }

    /// Once a second.
    pub(super) fn progress(self, progress: &Progress) -> Result<()> {
        if self.json {
            return output::json(&Line::Progress(progress));
        }
        let Progress { at, ok, failed, different, running, tokens, longest_gap_ms } = progress;
        output::line(&format!(
            "{at:>5.0} {ok:>8} {failed:>8} {different:>10} {running:>8} {tokens:>8} {longest_gap_ms:>15.0}"
        ));
        Ok(())
    }

    /// The last line.
    pub(super) fn summary(self, summary: &Summary) -> Result<()> {
        if self.json {
            return output::json(&Line::Summary(summary));
        }
        output::line(&table(summary)?);
        Ok(())
    }
}

fn table(summary: &Summary) -> Result<String> {
    let mut lines = vec![format!(
        "{} ok, {} failed, {} different in {:.1} s, {:.0} tokens/s",
        summary.ok,
        summary.failed,
        summary.different,
        summary.seconds,
        summary.tokens as f64 / summary.seconds.max(f64::MIN_POSITIVE),
    )];
    if let Some(ttft) = &summary.ttft_ms {
        lines.push(format!(
            "first token ms: p50 {:.0}, p99 {:.0}, longest {:.0}; longest request {:.0}",
            ttft.p50, ttft.p99, ttft.most, summary.longest_request_ms
        ));
    }
    // Their fields are for programs; JSON is as good for people here.
    lines.push(format!(
        "longest gap between tokens of a stream: {}",
        serde_json::to_string(&summary.longest_gap)?
    ));
    lines.push(format!(
        "longest time without any token: {}",
        serde_json::to_string(&summary.longest_silence)?
    ));
    for (code, failures) in &summary.failures {
        lines.push(format!("{code}: {}", serde_json::to_string(failures)?));
    }
    for sample in &summary.samples {
        lines.push(format!("different: {}", serde_json::to_string(sample)?));
    }
    Ok(lines.join("\n"))
}
