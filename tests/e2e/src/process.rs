//! Signals to processes, and whether they still exist.

use std::{fs, process::Command};

/// Sends a signal by name (`KILL`, `STOP`, `CONT`, `INT`, `TERM`).
pub fn signal(pid: u32, name: &str) {
    // The shell's own `kill`: no unsafe code, and no package that has the program.
    let status =
        Command::new("sh").args(["-c", &format!("kill -s {name} {pid}")]).status().expect("sh starts");
    assert!(status.success(), "kill -s {name} {pid}");
}

/// Whether a process runs; one that has ended and was not reaped yet does not.
pub fn runs(pid: u32) -> bool {
    // After the command in parentheses comes the state; Z is a zombie, X is dead.
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(") ").map(|(_, rest)| !rest.starts_with(['Z', 'X'])))
        .unwrap_or(false)
}
