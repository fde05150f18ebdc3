//! Why a tokenizer could not be loaded or used.

use std::{io, path::PathBuf};

use crate::chat_template::TemplateError;

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
    /// The chat template does not compile.
    #[error("{}: chat template: {source}; the template must be Jinja as Hugging Face accepts it", path.display())]
    Template {
        /// The file that holds the template.
        path: PathBuf,
        /// The place and the mistake.
        source: TemplateError,
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
