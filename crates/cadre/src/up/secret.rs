//! The secret of a local cluster: a file of the user's, or one that is drawn and goes with `up`.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use cadre_proto::secret::ClusterSecret;
use tempfile::NamedTempFile;

/// A file that the roles read the secret from.
#[derive(Debug)]
pub(crate) enum SecretFile {
    /// The user's.
    Given(PathBuf),
    /// Readable for this user only, and removed when dropped. A killed `up` leaves it behind; nobody asks for that
    /// secret any more.
    Drawn(NamedTempFile),
}

impl SecretFile {
    /// Checks the given file, or draws a secret.
    pub(crate) fn new(given: Option<PathBuf>) -> Result<Self> {
        if let Some(path) = given {
            ClusterSecret::read(&path)?;
            return Ok(Self::Given(path));
        }
        let secret = ClusterSecret::draw()?;
        let drawn = tempfile::Builder::new().prefix("cadre-secret-").tempfile();
        let mut file = drawn.context("a temporary file for the cluster's secret")?;
        file.write_all(secret.expose().as_bytes()).with_context(|| file.path().display().to_string())?;
        Ok(Self::Drawn(file))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::Drawn(file) => file.path(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_drawn_secret_is_for_this_user_and_goes_away() {
        let file = SecretFile::new(None).expect("a secret");
        let path = file.path().to_owned();
        ClusterSecret::read(&path).expect("it can be read");
        let mode = path.metadata().expect("a file").permissions().mode();
        assert_eq!(mode & 0o077, 0, "{mode:o}");
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_given_file_is_checked_and_left_alone() {
        let file = SecretFile::new(None).expect("a secret");
        let given = SecretFile::new(Some(file.path().to_owned())).expect("the same");
        drop(given);
        assert!(file.path().exists());
        SecretFile::new(Some("/no/such/file".into())).expect_err("nothing to read");
    }
}
