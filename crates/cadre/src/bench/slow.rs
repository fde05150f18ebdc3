//! A shard that runs by fits and starts: SIGSTOP and SIGCONT in a duty cycle, so that what a slow copy costs is
//! measured beside the undisturbed cluster, run by run.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;

use super::stats::Figures;

/// Flags of `--slow-shard`.
#[derive(Args, Clone, Debug)]
pub(crate) struct SlowArgs {
    /// Measure every load twice, in turns: undisturbed, and with this expert shard stopped and continued
    /// (SIGSTOP, SIGCONT) all the time. The shard must be a process of this machine and user.
    #[arg(long, value_name = "INDEX", conflicts_with = "in_process")]
    slow_shard: Option<u16>,
    /// Share of the time for which the slow shard is stopped.
    #[arg(long, value_name = "SHARE", default_value_t = 0.8, requires = "slow_shard")]
    slow_duty: f64,
    /// Milliseconds from one stop of the slow shard to the next.
    #[arg(long, value_name = "MS", default_value_t = 75, requires = "slow_shard")]
    slow_period: u64,
}

/// A process and its rhythm.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slow {
    pid: Pid,
    stopped: Duration,
    running: Duration,
}

impl SlowArgs {
    /// What to slow down, if anything.
    pub(crate) fn find(&self) -> Result<Option<Slow>> {
        let Some(shard) = self.slow_shard else { return Ok(None) };
        ensure!(
            self.slow_duty > 0.0 && self.slow_duty < 1.0,
            "--slow-duty: {} is not between 0 and 1",
            self.slow_duty
        );
        ensure!(
            (2..=60_000).contains(&self.slow_period),
            "--slow-period: {} is not in 2..=60000",
            self.slow_period
        );
        let period = Duration::from_millis(self.slow_period);
        let stopped = period.mul_f64(self.slow_duty);
        Ok(Some(Slow { pid: shard_process(shard)?, stopped, running: period - stopped }))
    }
}

impl Slow {
    /// Stops and continues the process until the guard is dropped, which leaves it running.
    pub(crate) fn begin(&self) -> Result<Slowed> {
        let (slow, over) = (*self, Arc::new(AtomicBool::new(false)));
        let ended = Arc::clone(&over);
        let thread = thread::Builder::new()
            .name("slow-shard".to_owned())
            .spawn(move || {
                // Bounded by the process: it cannot be signalled any more once it is gone.
                while !ended.load(Ordering::Acquire) && kill_process(slow.pid, Signal::STOP).is_ok() {
                    thread::sleep(slow.stopped);
                    if kill_process(slow.pid, Signal::CONT).is_err() {
                        return;
                    }
                    thread::sleep(slow.running);
                }
            })
            .context("start the thread that slows the shard")?;
        Ok(Slowed { over, thread: Some(thread) })
    }
}

/// A process that is being slowed down.
#[derive(Debug)]
pub(crate) struct Slowed {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Slowed {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // Its last act was to continue the process; it cannot panic.
            let _ = thread.join();
        }
    }
}

/// One load with and without a slow shard.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Comparison {
    /// Streams at a time.
    pub(crate) streams: usize,
    /// Answers per second, nothing disturbed.
    pub(crate) undisturbed_answers_per_second: f64,
    /// Answers per second with the shard stopped and continued.
    pub(crate) slowed_answers_per_second: f64,
    /// The second over the first.
    pub(crate) ratio: f64,
}

impl Comparison {
    /// Of two figures of the same load.
    pub(crate) fn of(undisturbed: &Figures, slowed: &Figures, runs: usize) -> Self {
        let answers = (undisturbed.streams * runs) as f64;
        Self {
            streams: undisturbed.streams,
            undisturbed_answers_per_second: answers / undisturbed.seconds,
            slowed_answers_per_second: answers / slowed.seconds,
            ratio: undisturbed.seconds / slowed.seconds,
        }
    }

    /// A line for people.
    pub(crate) fn line(&self) -> String {
        format!(
            "{} streams: {:.1} answers/s undisturbed, {:.1} with a slow shard: {:.2} times",
            self.streams, self.undisturbed_answers_per_second, self.slowed_answers_per_second, self.ratio
        )
    }
}

/// The one process of this machine that is `cadre expert --shard INDEX`.
fn shard_process(shard: u16) -> Result<Pid> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("list processes in /proc")? {
        let path = entry.context("list processes in /proc")?.path();
        let pid = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        if let Some(pid) = pid.and_then(Pid::from_raw)
            && command_line(&path).is_some_and(|words| is_shard(&words, shard))
        {
            found.push(pid);
        }
    }
    match found[..] {
        [pid] => Ok(pid),
        [] => bail!("--slow-shard: no process of this machine is `cadre expert --shard {shard}`"),
        _ => bail!(
            "--slow-shard: {} processes of this machine are `cadre expert --shard {shard}`; stop the other clusters",
            found.len()
        ),
    }
}

/// `None` for a process that has ended meanwhile, or has none.
fn command_line(process: &Path) -> Option<Vec<String>> {
    let bytes = fs::read(process.join("cmdline")).ok()?;
    Some(bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect())
}

fn is_shard(words: &[String], shard: u16) -> bool {
    let shard = shard.to_string();
    let named = |pair: &[String]| pair[0] == "--shard" && pair[1] == shard;
    words.get(1).is_some_and(|role| role == "expert")
        && (words.windows(2).any(named) || words.contains(&format!("--shard={shard}")))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn a_shard_is_known_by_its_command_line() {
        assert!(is_shard(&words("/bin/cadre expert --model m --shard 2 --threads 1"), 2));
        assert!(is_shard(&words("cadre expert --shard=2"), 2));
        for other in
            ["cadre expert --shard 12", "cadre up --shard 2", "expert --shard 2", "cadre expert --shards 2"]
        {
            assert!(!is_shard(&words(other), 2), "{other}");
        }
    }

    /// The state letter of a process (`man proc_pid_stat`).
    fn state(pid: u32) -> Option<char> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(')').next()?.trim_start().chars().next()
    }

    #[test]
    fn a_slowed_process_stops_and_runs_in_turns_and_is_left_running() {
        let mut child = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().expect("sleep starts");
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id")).expect("a process id");
        let (stopped, running) = (Duration::from_millis(3), Duration::from_millis(3));
        let slowed = Slow { pid, stopped, running }.begin().expect("it begins");
        let reaches = |wanted: fn(char) -> bool| {
            (0..100_000).any(|_| {
                thread::sleep(Duration::from_micros(100));
                state(child.id()).is_some_and(wanted)
            })
        };
        assert!(
            reaches(|state| state == 'T') && reaches(|state| state != 'T') && reaches(|state| state == 'T')
        );
        drop(slowed);
        assert!(reaches(|state| state != 'T'), "left stopped");
        child.kill().expect("it is ours");
        child.wait().expect("it ends");
    }
}
