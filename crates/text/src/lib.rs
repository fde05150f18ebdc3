//! Between text and tokens: tokenizer, chat template, incremental detokenization, stop strings.
//!
//! Everything is read once from the checkpoint's folder ([`Tokenizer::load`]) and is immutable and
//! `Send + Sync` afterwards; what changes per request ([`Detokenizer`], [`StopStrings`]) is a small
//! value that the request owns. The crate knows no HTTP, no gRPC and no async.
//!
//! The way of a request: [`ChatTemplate::render`] → [`Tokenizer::encode`] → (the model) →
//! [`Detokenizer::push`] → [`StopStrings::push`] → the client.
//!
//! **Encoding is CPU work** in proportion to the text (about a megabyte per second) and so is rendering:
//! an async caller moves anything larger than a few kilobytes to a blocking thread.
//!
//! **Text that users write can spell special tokens.** As in Hugging Face, a template is rendered to
//! one string that is then encoded as a whole, so a message that contains `<｜Assistant｜>` becomes
//! that token and can forge a turn. A raw completion prompt relies on the same behaviour. A caller
//! that serves untrusted text inside a fixed conversation has to filter it beforehand;
//! [`Tokenizer::special_texts`] lists what to look for.

mod chat_template;
mod detokenizer;
mod error;
mod generation_config;
mod stop_strings;
mod tokenizer;
mod vocabulary;

pub use chat_template::{ChatMessage, ChatTemplate, Content, ContentPart, RenderLimits, TemplateError};
pub use detokenizer::Detokenizer;
pub use error::{Finding, TextError};
pub use stop_strings::{MAX_STOP_STRING_BYTES, MAX_STOP_STRINGS, StopStrings, StopStringsError};
pub use tokenizer::{EncodeError, SpecialTokens, Survey, Tokenizer, survey};
