//! Signals to processes, and whether they still exist.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

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

/// The number that the next file descriptor gets: a limit of as much leaves none.
pub fn next_descriptor(pid: u32) -> usize {
    let open = |number: &usize| fs::symlink_metadata(format!("/proc/{pid}/fd/{number}")).is_ok();
    (0..).find(|number| !open(number)).unwrap_or(usize::MAX)
}

/// Sets the soft limit of open files of a running process.
pub fn limit_descriptors(pid: u32, soft: &str) {
    let status = Command::new("prlimit")
        .args(["--pid", &pid.to_string(), &format!("--nofile={soft}:")])
        .status()
        .expect("prlimit of util-linux starts");
    assert!(status.success(), "prlimit of {pid} to {soft}");
}

/// The soft limit of open files.
pub fn descriptor_limit(pid: u32) -> String {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("its limits");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("a line");
    line.split_whitespace().nth(3).expect("the soft limit").to_owned()
}

/// The share of a core that a process takes over some time.
pub fn load(pid: u32, over: Duration) -> f64 {
    // Clock ticks are a hundredth of a second on every Linux that this runs on.
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
        let (_, rest) = stat.rsplit_once(") ").expect("its state");
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let tick = |at: usize| fields[at].parse::<f64>().expect("a number");
        tick(11) + tick(12)
    };
    let (begun, before) = (Instant::now(), ticks());
    std::thread::sleep(over);
    (ticks() - before) / 100.0 / begun.elapsed().as_secs_f64()
}

/// Bytes of memory in use.
pub fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a line");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") << 10
}

/// The most bytes of memory that a process has had; 0 once it has ended.
pub fn peak(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).map_or(0, |kib| kib << 10)
}

/// Whether a thread of a process that was started with this argument waits in `open`.
pub fn is_stuck_in_open(argument: &str) -> bool {
    let entries = |path: &str| fs::read_dir(path).into_iter().flatten().filter_map(Result::ok);
    entries("/proc").any(|process| {
        let path = process.path();
        let started = fs::read(path.join("cmdline")).unwrap_or_default();
        let is_one = started.split(|byte| *byte == 0).any(|word| word == argument.as_bytes());
        is_one
            && entries(&path.join("task").display().to_string()).any(|task| {
                // The number of `openat`, by which Rust opens files, and its arguments; "running" if it is in no call.
                let call = fs::read_to_string(task.path().join("syscall")).unwrap_or_default();
                call.starts_with(OPENAT)
            })
    })
}

/// By architecture.
const OPENAT: &str = if cfg!(target_arch = "aarch64") { "56 " } else { "257 " };
