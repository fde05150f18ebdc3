//! Every target over its committed seeds and over as many changed ones as take seconds. The same inputs each time:
//! what fails here fails again. Long runs: `cargo xtask fuzz`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::Instant,
};

use cadre_fuzz::{TARGETS, Target, change::Changes, target};

fn seeds_of(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target.name);
    let mut seeds: Vec<(PathBuf, Vec<u8>)> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{} has no seed", folder.display());
    seeds
}

fn run(name: &str) {
    let target = target(name).unwrap();
    let begun = Instant::now();
    let seeds = seeds_of(target);
    for (path, bytes) in &seeds {
        assert!(
            bytes.len() <= target.longest,
            "{}: {} bytes, at most {}",
            path.display(),
            bytes.len(),
            target.longest
        );
        stands(target, bytes, &path.display().to_string());
    }
    let bytes: Vec<Vec<u8>> = seeds.into_iter().map(|(_, bytes)| bytes).collect();
    let mut changes = Changes::new(0x9E37_79B9_7F4A_7C15);
    for number in 0..target.short {
        stands(target, &changes.of(&bytes, target.longest), &format!("changed seed {number}"));
    }
    let runs = bytes.len() + target.short;
    eprintln!("{name}: {runs} runs in {:.1} s", begun.elapsed().as_secs_f64());
}

fn stands(target: &Target, bytes: &[u8], what: &str) {
    if catch_unwind(AssertUnwindSafe(|| (target.run)(bytes))).is_err() {
        // Commit it under seeds/ with the fix.
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        panic!(
            "{} does not stand {what}; echo {hex} | xxd -r -p > tests/fuzz/seeds/{}/NAME",
            target.name, target.name
        );
    }
}

/// The seeds of the repository are of targets that exist.
#[test]
fn every_folder_of_seeds_is_a_target() {
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(target(&name).is_some(), "seeds/{name} belongs to no target");
    }
}

/// One test for each, so that they fail by name and run side by side.
macro_rules! targets {
    ($($name:ident),*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        #[test]
        fn every_target_has_a_test() {
            let tested = [$(stringify!($name)),*];
            assert_eq!(tested.as_slice(), TARGETS.map(|target| target.name).as_slice());
        }
    };
}

targets!(frames, kv, reports, header, checkpoint, http, templates, specs);
