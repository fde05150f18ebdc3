//! The checkpoint's chat template: messages to one prompt text.
//!
//! Jinja with Hugging Face's settings: blocks trimmed, `break` and `continue`, `tojson` that writes
//! JSON as Python does and escapes nothing for HTML, `raise_exception`, `strftime_now`, Python's
//! string and dict methods, keys in the order in which they were given. The variables are `messages`,
//! `tools` (none if there are none), `add_generation_prompt`, the special tokens, and what the
//! request adds.
//!
//! A template comes with the checkpoint and its input with the request, so both are bounded: fuel
//! bounds the work and the memory of one rendering, and the output has a limit of its own that ends
//! the rendering as soon as it is reached. Messages are checked before the template sees them; their
//! text is not (see the crate's header on special tokens).

mod message;
mod python_json;
mod strftime;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, error::Error as _, io, time::SystemTime};

use minijinja::{Environment, ErrorKind, Value, syntax::SyntaxConfig, value::Serde};
use serde_json::Map;

pub use message::{ChatMessage, Content, ContentPart};

use crate::tokenizer::SpecialTokens;

/// Names inside the template environment.
const DEFAULT: &str = "chat_template";
const TOOL_USE: &str = "chat_template:tool_use";

/// Variables that a request may not replace.
const RESERVED: [&str; 7] =
    ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"];

/// A compiled template. Immutable, `Send + Sync`; one rendering does not see another.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    has_tool_use: bool,
    special: SpecialTokens,
    limits: RenderLimits,
}

/// Bounds of one rendering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RenderLimits {
    /// Instructions, plus one per 64 bytes of text handled.
    pub fuel: u64,
    /// Longest output, and longest input text, in bytes.
    pub text_bytes: usize,
}

impl Default for RenderLimits {
    /// 8 MiB is 51 bytes for each of the 163,840 positions of DeepSeek-V3, ten times what text needs.
    /// The fuel lets a template copy a text of that size some fifteen times and stays under 128 MiB
    /// (64 bytes per unit) and about a tenth of a second.
    fn default() -> Self {
        Self { fuel: 2_000_000, text_bytes: 8 << 20 }
    }
}

impl ChatTemplate {
    /// Compiles a template's source.
    pub fn new(source: String, special: SpecialTokens) -> Result<Self, TemplateError> {
        let limits = RenderLimits::default();
        let mut environment = environment()?;
        environment.set_fuel(Some(limits.fuel));
        environment.add_template_owned(DEFAULT, source).map_err(syntax_error)?;
        Ok(Self { environment, has_tool_use: false, special, limits })
    }

    /// Adds the template used when a request brings tools.
    pub fn with_tool_use(mut self, source: String) -> Result<Self, TemplateError> {
        self.environment.add_template_owned(TOOL_USE, source).map_err(syntax_error)?;
        self.has_tool_use = true;
        Ok(self)
    }

    /// Replaces the bounds.
    #[must_use]
    pub fn with_limits(mut self, limits: RenderLimits) -> Self {
        self.environment.set_fuel(Some(limits.fuel));
        self.limits = limits;
        self
    }

    /// Replaces the clock that `strftime_now` reads.
    #[must_use]
    pub fn with_clock(mut self, now: fn() -> SystemTime) -> Self {
        self.environment.add_function("strftime_now", move |format: &str| strftime::format(now(), format));
        self
    }

    /// The prompt text of a conversation. `tools` is the request's list of tools; `extra` are further
    /// variables for the template (`thinking: true`), which may not replace its own.
    ///
    /// Encode the result with `add_special = false`: the template writes BOS itself.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
        extra: &Map<String, serde_json::Value>,
    ) -> Result<String, TemplateError> {
        if let Some(name) = RESERVED.iter().find(|name| extra.contains_key(**name)) {
            return Err(TemplateError::Reserved { name });
        }
        let messages = message::to_values(messages, self.limits.text_bytes)?;
        let mut variables: BTreeMap<String, Value> =
            extra.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value)))).collect();
        variables.insert("messages".to_owned(), Value::from(messages));
        let tools_value = tools.map_or(Value::from(()), |tools| Value::from(Serde(tools)));
        variables.insert("tools".to_owned(), tools_value);
        variables.insert("add_generation_prompt".to_owned(), Value::from(add_generation_prompt));
        let special = &self.special;
        for (name, text) in [
            ("bos_token", &special.bos_token),
            ("eos_token", &special.eos_token),
            ("pad_token", &special.pad_token),
            ("unk_token", &special.unk_token),
        ] {
            if let Some(text) = text {
                variables.insert(name.to_owned(), Value::from(text.as_str()));
            }
        }
        let name = if self.has_tool_use && tools.is_some() { TOOL_USE } else { DEFAULT };
        self.write(name, Value::from_pairs(variables))
    }

    fn write(&self, name: &str, variables: Value) -> Result<String, TemplateError> {
        let mut output = Bounded { bytes: Vec::new(), limit: self.limits.text_bytes };
        self.environment
            .get_template(name)
            .and_then(|template| template.render_captured_to(variables, &mut output).map(drop))
            .map_err(|error| self.classify(&error))?;
        String::from_utf8(output.bytes).map_err(|error| TemplateError::Render { reason: error.to_string() })
    }

    /// Finds the cause that a client can act on; the rest is the template's or its input's mistake.
    fn classify(&self, error: &minijinja::Error) -> TemplateError {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        let mut innermost = error;
        while let Some(error) = cause {
            if let Some(raised) = error.downcast_ref::<Raised>() {
                return TemplateError::Raised { message: raised.0.clone() };
            }
            if let Some(error) = error.downcast_ref::<minijinja::Error>() {
                innermost = error;
            }
            cause = error.source();
        }
        match innermost.kind() {
            ErrorKind::OutOfFuel => TemplateError::OutOfFuel { fuel: self.limits.fuel },
            ErrorKind::WriteFailure => TemplateError::TooLong { limit: self.limits.text_bytes },
            _ => TemplateError::Render { reason: with_causes(error) },
        }
    }
}

/// The environment that Hugging Face gives a template.
fn environment() -> Result<Environment<'static>, TemplateError> {
    let mut environment = Environment::new();
    let syntax =
        SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(syntax_error)?;
    environment.set_syntax(syntax);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", python_json::tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", |format: &str| strftime::format(SystemTime::now(), format));
    Ok(environment)
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, "the template raised an exception")
        .with_source(Raised(message)))
}

fn syntax_error(error: minijinja::Error) -> TemplateError {
    TemplateError::Syntax { reason: with_causes(&error) }
}

fn with_causes(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// What `raise_exception` throws.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// Output that refuses to grow beyond its limit.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit - self.bytes.len() {
            return Err(io::Error::other("the output limit is reached"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a conversation gives no prompt. All but `Missing` and `Syntax` are the request's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The checkpoint brings no template.
    #[error("the checkpoint has no chat template: add chat_template.jinja or use raw completions")]
    Missing,
    /// The template is no valid Jinja.
    #[error("{reason}")]
    Syntax {
        /// Place and mistake.
        reason: String,
    },
    /// A role that no template knows; it would be dropped silently.
    #[error("messages[{index}].role: {role:?} is not one of system, developer, user, assistant, tool")]
    Role {
        /// Which message.
        index: usize,
        /// What it said.
        role: String,
    },
    /// A content part that is not text.
    #[error("messages[{index}].content[{part}]: parts of type {kind:?} are not supported, only text")]
    Part {
        /// Which message.
        index: usize,
        /// Which part.
        part: usize,
        /// Its type.
        kind: String,
    },
    /// A text part without text.
    #[error("messages[{index}].content[{part}].text is missing")]
    PartText {
        /// Which message.
        index: usize,
        /// Which part.
        part: usize,
    },
    /// A variable of the request has a name that the template's own variables use.
    #[error("chat_template_kwargs: {name} is set by the server")]
    Reserved {
        /// The name.
        name: &'static str,
    },
    /// The template refused the conversation.
    #[error("the chat template refused the messages: {message}")]
    Raised {
        /// Its words.
        message: String,
    },
    /// Input or output is too long.
    #[error("the conversation exceeds {limit} bytes of text")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// The template works too long on these messages.
    #[error("rendering the chat template takes more than {fuel} steps on these messages")]
    OutOfFuel {
        /// The limit.
        fuel: u64,
    },
    /// The template failed on these messages.
    #[error("rendering the chat template: {reason}")]
    Render {
        /// Place and mistake.
        reason: String,
    },
}
