//! What is wrong with a checkpoint, one finding at a time: which file, what in it, what was expected,
//! what was found, and what to do about it.
//!
//! Findings are collected rather than returned at the first, so that `cadre inspect` shows the whole
//! damage at once. The collection is bounded: a shard cut short can spoil thousands of tensors, and
//! the first few say as much as all of them.

use std::{fmt, path::Path};

use serde::{Deserialize, Serialize};

/// Findings kept; the rest is counted. A screenful, with room for one per kind of tensor.
const MAX_KEPT: usize = 64;
/// Longest quotation of a file's own text in a finding, in characters.
const MAX_QUOTED_CHARS: usize = 80;

/// The class of a finding, for programs; [`Problem`]'s text is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// A file is absent, or cannot be read or mapped.
    Unreadable,
    /// A file is not of its format.
    Malformed,
    /// A file ends before the data that its header announces.
    Truncated,
    /// A file goes on after the data that its header announces.
    TrailingBytes,
    /// A required field of `config.json` is absent.
    MissingField,
    /// A field has the wrong type or a value that makes no model.
    BadValue,
    /// A field names something that cadre does not compute.
    Unsupported,
    /// A tensor of the architecture is in no file.
    MissingTensor,
    /// A tensor is there that the architecture does not have.
    ExtraTensor,
    /// A tensor has another shape than the configuration says.
    WrongShape,
    /// A tensor has another element type than the configuration says.
    WrongDtype,
    /// A block scale is not finite and positive.
    BadScale,
    /// A weight is NaN or infinite.
    NonFinite,
    /// Two things that must be equal are not.
    Mismatch,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Its class.
    pub kind: ProblemKind,
    /// The file.
    pub file: String,
    /// What in the file: "field `n_group`", "tensor `lm_head.weight`"; empty for the file itself.
    pub subject: String,
    /// What should be there.
    pub expected: String,
    /// What is there.
    pub found: String,
    /// What to do.
    pub fix: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind: _, file, subject, expected, found, fix } = self;
        write!(f, "{file}: ")?;
        if !subject.is_empty() {
            write!(f, "{subject}: ")?;
        }
        write!(f, "expected {expected}, found {found}; fix: {fix}")
    }
}

/// Findings in the order in which they were made, bounded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problems {
    kept: Vec<Problem>,
    omitted: usize,
}

impl Problems {
    /// Adds a finding, or counts it once enough are kept.
    pub fn push(&mut self, problem: impl Into<Box<Problem>>) {
        let problem = *problem.into();
        if self.kept.len() < MAX_KEPT {
            self.kept.push(problem);
        } else {
            self.omitted += 1;
        }
    }

    /// Appends another collection.
    pub fn extend(&mut self, other: Self) {
        other.kept.into_iter().for_each(|problem| self.push(problem));
        self.omitted += other.omitted;
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Number of findings, those not kept included.
    pub fn total(&self) -> usize {
        self.kept.len() + self.omitted
    }

    /// The findings that were kept.
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.kept.iter()
    }
}

impl<'a> IntoIterator for &'a Problems {
    type Item = &'a Problem;
    type IntoIter = std::slice::Iter<'a, Problem>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// One line per finding.
impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, problem) in self.kept.iter().enumerate() {
            if at > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        match self.omitted {
            0 => Ok(()),
            omitted => write!(f, "\n… and {omitted} more"),
        }
    }
}

/// Builds findings about one file. Boxed, because they travel in results that are nearly always good.
#[derive(Clone, Debug)]
pub(crate) struct About {
    file: String,
}

impl About {
    pub(crate) fn new(file: &Path) -> Self {
        Self { file: file.display().to_string() }
    }

    /// A finding about the file itself.
    pub(crate) fn file(
        &self,
        kind: ProblemKind,
        expected: impl Into<String>,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Box<Problem> {
        Box::new(Problem {
            kind,
            file: self.file.clone(),
            subject: String::new(),
            expected: expected.into(),
            found: found.into(),
            fix: fix.into(),
        })
    }

    /// A finding about a tensor in the file.
    pub(crate) fn tensor(
        &self,
        kind: ProblemKind,
        name: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Box<Problem> {
        let subject = format!("tensor `{}`", quote(name));
        Box::new(Problem { subject, ..*self.file(kind, expected, found, fix) })
    }

    /// A finding about a field of a JSON file; `path` is dotted.
    pub(crate) fn field(
        &self,
        kind: ProblemKind,
        path: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Box<Problem> {
        let subject = format!("field `{path}`");
        Box::new(Problem { subject, ..*self.file(kind, expected, found, fix) })
    }
}

/// A file's own text, cut to a length that a message can bear.
pub(crate) fn quote(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED_CHARS) {
        None => text.to_owned(),
        Some((cut, _)) => format!("{}…", &text[..cut]),
    }
}
