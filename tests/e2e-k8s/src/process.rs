//! What a process has used, from `/proc`.

use std::{fs, time::Duration};

/// Ticks per second of `/proc/PID/stat`: the kernel shows user space 100, whatever it counts in.
const TICKS: u64 = 100;

/// CPU time and memory of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// User and system time.
    pub cpu: Duration,
    /// Resident now, in bytes.
    pub resident: u64,
    /// Most that was resident at a time, in bytes.
    pub most_resident: u64,
}

impl Usage {
    /// Of a running process.
    pub fn of(pid: u32) -> std::io::Result<Self> {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
        let (stat, status) = (read("stat")?, read("status")?);
        Self::parse(&stat, &status)
            .ok_or_else(|| std::io::Error::other(format!("/proc/{pid} reads otherwise")))
    }

    fn parse(stat: &str, status: &str) -> Option<Self> {
        // Fields are counted from after the command, which may contain anything; utime and stime are 14 and 15.
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
        let kilobytes = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix(" kB")?.parse().ok()
        };
        Some(Self {
            cpu: Duration::from_millis(ticks * 1000 / TICKS),
            resident: kilobytes("VmRSS:")? * 1024,
            most_resident: kilobytes("VmHWM:")? * 1024,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 1 0 5 6 7";
        let status = "Name:\ta\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        let usage = Usage::parse(stat, status).expect("the kernel's format");
        assert_eq!(usage, Usage { cpu: Duration::from_secs(2), resident: 1 << 20, most_resident: 2 << 20 });
        let own = Usage::of(std::process::id()).expect("our own");
        assert!(own.resident > 0 && own.resident <= own.most_resident, "{own:?}");
    }
}
