//! Which checkpoint `up` serves when none is named: the bundled one.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The bundled checkpoint, relative to the root of the repository.
const BUNDLED: &str = "models/pocket";

/// The folder given, or the bundled checkpoint: below the working directory, else below the folders above
/// the executable (a build in `target/release` of a clone finds its own clone).
pub(crate) fn find(given: Option<PathBuf>, working_directory: &Path, executable: &Path) -> Result<PathBuf> {
    if let Some(given) = given {
        if !given.is_dir() {
            bail!("--model {}: no such folder", given.display());
        }
        return Ok(given);
    }
    std::iter::once(working_directory)
        .chain(executable.ancestors().skip(1))
        .map(|folder| folder.join(BUNDLED))
        .find(|candidate| candidate.join("config.json").is_file())
        .map_or_else(
            || {
                bail!(
                    "no {BUNDLED} below {} or beside {}: name a checkpoint with --model DIR",
                    working_directory.display(),
                    executable.display()
                )
            },
            Ok,
        )
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn looks_here_first_and_then_above_the_executable() {
        let clone = tempfile::tempdir().expect("a temporary folder");
        let elsewhere = tempfile::tempdir().expect("a temporary folder");
        let bundled = clone.path().join(BUNDLED);
        fs::create_dir_all(&bundled).expect("a folder");
        fs::write(bundled.join("config.json"), "{}").expect("a file");
        let executable = clone.path().join("target/release/cadre");
        let from_clone = find(None, clone.path(), Path::new("/usr/bin/cadre")).expect("found");
        assert_eq!(from_clone, bundled);
        assert_eq!(find(None, elsewhere.path(), &executable).expect("found"), bundled);
    }

    #[test]
    fn says_where_it_looked() {
        let elsewhere = tempfile::tempdir().expect("a temporary folder");
        let error = find(None, elsewhere.path(), Path::new("/nowhere/cadre")).expect_err("nothing there");
        assert!(error.to_string().contains("--model DIR"), "{error}");
        let error =
            find(Some("/nowhere/model".into()), elsewhere.path(), Path::new("/x")).expect_err("no folder");
        assert_eq!(error.to_string(), "--model /nowhere/model: no such folder");
    }
}
