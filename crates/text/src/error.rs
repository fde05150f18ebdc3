//! Why a tokenizer could not be loaded or used.

use std::{fmt, io, path::PathBuf};

/// Loading names the file and the fix; encoding names the size of the text.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file that is needed could not be read.
    #[error("{}: cannot be read ({source}); {fix}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What to do about it.
        fix: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not what its name promises.
    #[error("{}: {reason}; {fix}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The field and the value found.
        reason: String,
        /// What to do about it.
        fix: &'static str,
    },
    /// Files of the checkpoint contradict each other.
    #[error("the files of checkpoint {} contradict each other:\n{}", dir.display(), lines(findings))]
    Contradictions {
        /// The folder.
        dir: PathBuf,
        /// What contradicts what.
        findings: Vec<Finding>,
    },
    /// The tokenizer refused a text.
    #[error("encoding a text of {bytes} bytes: {reason}")]
    Encode {
        /// Length of the text.
        bytes: usize,
        /// What the tokenizer said.
        reason: String,
    },
}

/// Something that two files of a checkpoint do not agree on, or that one of them says and is not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The file at fault, as far as one is.
    pub file: PathBuf,
    /// The field or part of it.
    pub subject: String,
    /// What should be there.
    pub expected: String,
    /// What is there.
    pub found: String,
    /// What to do, or what is done without.
    pub fix: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, subject, expected, found, fix } = self;
        write!(f, "{}: {subject}: expected {expected}, found {found}; fix: {fix}", file.display())
    }
}

fn lines(findings: &[Finding]) -> String {
    findings.iter().map(Finding::to_string).collect::<Vec<_>>().join("\n")
}
