//! Mapping against real files; residency is read from the kernel's own account.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path};

use super::{Access, Mapping, MappingError};

const MIB: usize = 1 << 20;

/// Resident bytes of this process's mappings of `path`, from /proc/self/smaps.
fn resident_bytes(path: &Path) -> usize {
    let smaps = fs::read_to_string("/proc/self/smaps").expect("Linux has smaps");
    let name = path.to_str().expect("a UTF-8 temporary path");
    let mut inside = false;
    let mut total = 0;
    for line in smaps.lines() {
        if line.ends_with(name) {
            inside = true;
        } else if inside && let Some(rest) = line.strip_prefix("Rss:") {
            let kib: usize = rest.trim().trim_end_matches(" kB").parse().expect("a number of kB");
            total += kib * 1024;
            inside = false;
        }
    }
    total
}

fn touch(bytes: &[u8]) -> u64 {
    bytes.iter().step_by(512).map(|&byte| u64::from(byte)).sum()
}

#[test]
fn released_pages_leave_the_process_and_read_back_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights");
    let data: Vec<u8> = (0..8 * MIB).map(|i| (i / 512) as u8).collect();
    fs::write(&path, &data).unwrap();
    let mapping = Mapping::open(&path).unwrap();
    assert_eq!(mapping.path(), path);

    let sum = touch(mapping.bytes());
    assert!(resident_bytes(&path) >= 8 * MIB - 4096, "touched pages are resident");
    // Unaligned on purpose: a tensor starts anywhere.
    let middle = MIB + 24..7 * MIB + 13;
    mapping.release(middle).unwrap();
    let left = resident_bytes(&path);
    assert!(left <= 2 * MIB, "{left} bytes still resident after releasing 6 of 8 MiB");

    mapping.will_need(MIB..2 * MIB).unwrap();
    assert_eq!(touch(mapping.bytes()), sum);
    assert_eq!(mapping.bytes(), data);
    mapping.release(0..mapping.bytes().len()).unwrap();
    assert_eq!(resident_bytes(&path), 0);
}

#[test]
fn scattered_reads_map_little_more_than_they_ask_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hole");
    // A hole: nothing of it is cached before it is read.
    fs::File::create(&path).unwrap().set_len(64 * MIB as u64).unwrap();
    let mapping = Mapping::open(&path).unwrap();
    mapping.expect(Access::Scattered).unwrap();
    let sum: u64 = (0..16).map(|at| u64::from(mapping.bytes()[at * 4 * MIB + 100])).sum();
    assert_eq!(sum, 0);
    // One page each, or one large page of the cache; a plain read-ahead window is 128 KiB and more.
    let resident = resident_bytes(&path);
    assert!(resident <= 16 * 64 * 1024, "{resident} bytes resident after touching 16 pages");
    mapping.expect(Access::Runs).unwrap();
    assert_eq!(mapping.bytes().len(), 64 * MIB);
}

#[test]
fn empty_files_and_empty_ranges_are_fine() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("empty");
    fs::write(&path, b"").unwrap();
    let mapping = Mapping::open(&path).unwrap();
    assert!(mapping.bytes().is_empty());
    mapping.release(0..0).unwrap();
    mapping.expect(Access::Scattered).unwrap();
    mapping.will_need(0..0).unwrap();
}

#[test]
fn errors_name_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let absent = dir.path().join("absent.safetensors");
    let error = Mapping::open(&absent).expect_err("no such file");
    assert!(matches!(error, MappingError::Open { .. }));
    assert!(error.to_string().contains("absent.safetensors"), "{error}");

    let error = Mapping::open(dir.path()).expect_err("a directory");
    assert!(matches!(error, MappingError::NotAFile { .. }), "{error}");

    let path = dir.path().join("short");
    fs::write(&path, [0; 10]).unwrap();
    let mapping = Mapping::open(&path).unwrap();
    #[expect(clippy::reversed_empty_ranges, reason = "the case under test")]
    for range in [0..11, 11..11, 5..2, usize::MAX - 1..usize::MAX] {
        let error = mapping.release(range.clone()).expect_err("past the end");
        assert!(matches!(error, MappingError::OutOfRange { len: 10, .. }), "{error}");
        assert!(error.to_string().contains("short"), "{error}");
        assert!(mapping.will_need(range).is_err());
    }
}
