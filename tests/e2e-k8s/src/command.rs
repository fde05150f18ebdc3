//! Child processes that end: every call has a bound, and a failure carries the command line and both outputs.

use std::{
    io::{Read, Write},
    process::{Child, Command, ExitStatus, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use thiserror::Error;

/// Pause between two looks at a process: a hundredth of what kubectl takes to start.
const LOOK: Duration = Duration::from_millis(5);

/// Why a command gave nothing.
#[derive(Debug, Error)]
pub enum CommandError {
    /// It could not be started or fed.
    #[error("start `{command}`: {source}")]
    Start {
        /// As it would be typed.
        command: String,
        /// Why.
        source: std::io::Error,
    },
    /// It ended with an error.
    #[error("`{command}` ended with {status}: {}", said(.stderr, .stdout))]
    Failed {
        /// As it would be typed.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// Its standard error.
        stderr: String,
        /// Its standard output.
        stdout: String,
    },
    /// It did not end, and was killed.
    #[error("`{command}` still ran after {} s: {}", .limit.as_secs(), said(.stderr, .stdout))]
    TimedOut {
        /// As it would be typed.
        command: String,
        /// How long it was given.
        limit: Duration,
        /// Its standard error.
        stderr: String,
        /// Its standard output.
        stdout: String,
    },
}

fn said(stderr: &str, stdout: &str) -> String {
    let words = [stderr.trim(), stdout.trim()].into_iter().filter(|text| !text.is_empty());
    words.collect::<Vec<_>>().join("\n")
}

impl CommandError {
    /// What the program said about it.
    pub fn words(&self) -> &str {
        match self {
            Self::Start { .. } => "",
            Self::Failed { stderr, .. } | Self::TimedOut { stderr, .. } => stderr.trim(),
        }
    }
}

/// Runs a command to its end and returns its standard output.
pub fn run(command: &mut Command, input: Option<&str>, limit: Duration) -> Result<String, CommandError> {
    let shown = show(command);
    let start = |source| CommandError::Start { command: shown.clone(), source };
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child =
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(start)?;
    let (stdout, stderr) = (read(child.stdout.take()), read(child.stderr.take()));
    if let (Some(text), Some(mut pipe)) = (input, child.stdin.take()) {
        // A program that ends before it has read everything says itself why.
        let _ = pipe.write_all(text.as_bytes());
    }
    let status = wait(&mut child, limit).map_err(start)?;
    let [stdout, stderr] = [stdout, stderr].map(|reader| reader.join().unwrap_or_default());
    match status {
        Some(status) if status.success() => Ok(stdout),
        Some(status) => Err(CommandError::Failed { command: shown, status, stderr, stdout }),
        None => Err(CommandError::TimedOut { command: shown, limit, stderr, stdout }),
    }
}

/// Waits for the end; kills and returns `None` after `limit`.
fn wait(child: &mut Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if begun.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(LOOK);
    }
}

/// Pipes are read while the program runs, or it would wait for us to read them.
fn read(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is what there is.
        let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The command line as a reader would type it.
pub fn show(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(line: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", line]);
        command
    }

    #[test]
    fn what_a_program_says_and_how_it_ends() {
        let limit = Duration::from_secs(30);
        assert_eq!(run(&mut sh("cat"), Some("text"), limit).expect("cat"), "text");
        // More than a pipe holds.
        let long = "x".repeat(300_000);
        assert_eq!(run(&mut sh("cat"), Some(&long), limit).expect("cat").len(), long.len());
        let error = run(&mut sh("echo why >&2; exit 3"), None, limit).expect_err("a failure");
        assert_eq!(error.words(), "why");
        assert!(error.to_string().contains("exit status: 3"), "{error}");
        let error = run(&mut Command::new("/nonexistent/cadre"), None, limit).expect_err("no program");
        assert!(error.to_string().starts_with("start `/nonexistent/cadre`"), "{error}");
    }

    #[test]
    fn one_that_hangs_is_killed() {
        let error = run(&mut sh("echo begun; exec sleep 600"), None, Duration::from_millis(300));
        let error = error.expect_err("it hangs");
        assert!(matches!(&error, CommandError::TimedOut { stdout, .. } if stdout == "begun\n"), "{error}");
    }
}
