//! Memory of this process and of this machine (or container), as the kernel says.

use std::{fs, path::Path};

use cadre_ops::DeviceMemory;

/// Where control groups are mounted.
const GROUPS: &str = "/sys/fs/cgroup";

/// Most levels of control groups that are looked at: systemd and kubelet make six.
const LEVELS: usize = 32;

/// Resident memory; the smaller of the machine's memory and the limits of the control groups over this process (0
/// where the system does not say); and what is left of both.
pub(crate) fn memory() -> DeviceMemory {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let meminfo = read("/proc/meminfo");
    let mut groups = Vec::new();
    // Inside a container its own group is the root; outside, the limits of every level hold.
    for group in ancestors(&read("/proc/self/cgroup")) {
        groups.extend(Group::read(Path::new(&format!("{GROUPS}{group}"))));
    }
    tally(resident(&read("/proc/self/status")), &meminfo, &groups)
}

/// A control group that has a limit.
#[derive(Clone, Copy, Debug)]
struct Group {
    limit: u64,
    /// In use and not to be had back: without the cache of files, which makes way.
    used: u64,
}

impl Group {
    fn read(folder: &Path) -> Option<Self> {
        let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
        let limit = limit(&read("memory.max"))?;
        let current = read("memory.current").trim().parse::<u64>().unwrap_or(0);
        let stat = read("memory.stat");
        let cache = ["inactive_file ", "active_file "].map(|name| number(&stat, name)).iter().sum();
        Some(Self { limit, used: current.saturating_sub(cache) })
    }
}

fn tally(used: u64, meminfo: &str, groups: &[Group]) -> DeviceMemory {
    let [machine, available] = ["MemTotal:", "MemAvailable:"].map(|name| field(meminfo, name));
    let limits = groups.iter().map(|group| group.limit);
    let total = limits.chain((machine > 0).then_some(machine)).min().unwrap_or(0);
    let left = groups.iter().map(|group| group.limit.saturating_sub(group.used));
    let free = left.chain((available > 0).then_some(available)).min();
    DeviceMemory { used, total, free }
}

/// The group of version 2 that a process is in and those above it, the root (an empty path) last.
fn ancestors(cgroup: &str) -> Vec<String> {
    let own = cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").trim_end_matches('/');
    let mut all = Vec::new();
    let mut path = own;
    // A path that leads out of the container's own tree is nothing that can be read here.
    while path.starts_with('/') && !path.contains("..") && all.len() < LEVELS {
        all.push(path.to_owned());
        path = path.rsplit_once('/').map_or("", |(above, _)| above);
    }
    all.push(String::new());
    all
}

fn resident(status: &str) -> u64 {
    field(status, "VmRSS:")
}

/// Bytes of a line `name   123 kB`.
fn field(text: &str, name: &str) -> u64 {
    number(text, name).saturating_mul(1024)
}

/// The number after a name at the beginning of a line.
fn number(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    number.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0)
}

/// A control group's limit; `None` for `max` and where there is none.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_limits() {
        assert_eq!(field("MemFree: 1 kB\nMemTotal:  2048 kB\n", "MemTotal:"), 2048 << 10);
        assert_eq!(field("MemFree: 1 kB\n", "MemTotal:"), 0);
        assert_eq!(limit("1073741824\n"), Some(1 << 30));
        assert_eq!(limit("max\n"), None);
    }

    #[test]
    fn every_group_above_a_process_counts() {
        assert_eq!(ancestors("0::/\n"), [""]);
        assert_eq!(ancestors(""), [""]);
        assert_eq!(ancestors("1:memory:/x\n0::/a/b.scope\n"), ["/a/b.scope", "/a", ""]);
        assert_eq!(ancestors("0::/../../other\n"), [""]);
    }

    #[test]
    fn the_tightest_limit_is_what_there_is() {
        let meminfo = "MemTotal: 1000 kB\nMemAvailable: 600 kB\n";
        let all = |groups: &[Group]| {
            let memory = tally(7, meminfo, groups);
            (memory.used, memory.total >> 10, memory.free.map(|free| free >> 10))
        };
        assert_eq!(all(&[]), (7, 1000, Some(600)));
        let (wide, tight) =
            (Group { limit: 900 << 10, used: 100 << 10 }, Group { limit: 500 << 10, used: 450 << 10 });
        assert_eq!(all(&[wide]), (7, 900, Some(600)));
        assert_eq!(all(&[wide, tight]), (7, 500, Some(50)));
        assert_eq!(all(&[Group { limit: 1 << 10, used: 2 << 10 }]), (7, 1, Some(0)));
        assert_eq!(tally(0, "", &[]), DeviceMemory::default());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_uses_memory_of_this_machine() {
        let memory = memory();
        assert!(memory.used > 0 && memory.used < memory.total, "{memory:?}");
        assert!(memory.free.is_some_and(|free| free > 0 && free <= memory.total), "{memory:?}");
    }
}
