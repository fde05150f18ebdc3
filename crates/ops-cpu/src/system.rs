//! Memory of this process and of this machine (or container), as the kernel says.

use cadre_ops::DeviceMemory;

/// Resident memory, and the smaller of the machine's memory and the container's limit; 0 where the system
/// does not say.
pub(crate) fn memory() -> DeviceMemory {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let used = resident(&read("/proc/self/status"));
    let machine = field(&read("/proc/meminfo"), "MemTotal:");
    let limit = limit(&read("/sys/fs/cgroup/memory.max"));
    let total = match (machine, limit) {
        (0, limit) => limit.unwrap_or(0),
        (machine, limit) => limit.map_or(machine, |limit| limit.min(machine)),
    };
    DeviceMemory { used, total }
}

fn resident(status: &str) -> u64 {
    field(status, "VmRSS:")
}

/// Bytes of a line `name   123 kB`.
fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    number.and_then(|number| number.parse::<u64>().ok()).map_or(0, |kib| kib.saturating_mul(1024))
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

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_uses_memory_of_this_machine() {
        let memory = memory();
        assert!(memory.used > 0 && memory.used < memory.total, "{memory:?}");
    }
}
