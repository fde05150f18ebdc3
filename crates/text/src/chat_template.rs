//! The checkpoint's chat template: messages to one prompt text.
//!
//! Jinja with Hugging Face's settings: blocks trimmed, `break` and `continue`, `tojson` that writes
//! JSON as Python does and escapes nothing for HTML, `raise_exception`, `strftime_now`, Python's
//! string and dict methods, keys in the order in which they were given. The variables are `messages`,
//! `tools` (none if there are none), `add_generation_prompt`, the special tokens, and what the
//! request adds.
//!
//! A template comes with the checkpoint and its input with the request, so both are bounded: the source
//! before it is parsed (`source`), work and memory of one rendering by fuel (the engine's, and `bounded`
//! where it does not count), the output by a limit of its own that ends the rendering as soon as it is
//! reached, and the wait for all of it (`renderer`). Messages are checked before the template sees them;
//! their text is not (see the crate's header on special tokens).
//!
//! What a template asks for and this server lacks is looked for when it is compiled
//! ([`ChatTemplate::gaps`], [`ChatTemplate::trial`]), and is told apart from a mistake in the messages
//! ([`TemplateError::is_the_servers`]).

mod bounded;
mod filters;
mod message;
mod methods;
mod python_json;
mod renderer;
mod source;
mod strftime;
#[cfg(test)]
mod tests;
mod text_wrap;

use std::{
    collections::BTreeMap,
    error::Error as _,
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

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
    compiled: Arc<Compiled>,
    has_tool_use: bool,
    special: SpecialTokens,
    gaps: Vec<String>,
}

/// What a rendering's thread needs.
#[derive(Clone, Debug)]
struct Compiled {
    environment: Environment<'static>,
    limits: RenderLimits,
}

/// Bounds of one rendering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RenderLimits {
    /// Instructions, plus one per 64 bytes of text handled.
    pub fuel: u64,
    /// Longest output, and longest input text, in bytes.
    pub text_bytes: usize,
    /// Longest wait for a rendering.
    pub time: Duration,
}

impl Default for RenderLimits {
    /// 8 MiB is 51 bytes for each of the 163,840 positions of DeepSeek-V3, ten times what text needs.
    /// The fuel lets a template copy a text of that size some fifteen times and stays under 128 MiB
    /// (64 bytes per unit) and about a tenth of a second; a hundred times that is a template that hangs.
    fn default() -> Self {
        Self { fuel: 2_000_000, text_bytes: 8 << 20, time: Duration::from_secs(10) }
    }
}

impl ChatTemplate {
    /// Compiles a template's source.
    pub fn new(source: String, special: SpecialTokens) -> Result<Self, TemplateError> {
        let limits = RenderLimits::default();
        let mut environment = environment()?;
        environment.set_fuel(Some(limits.fuel));
        let mut template = Self {
            compiled: Arc::new(Compiled { environment, limits }),
            has_tool_use: false,
            special,
            gaps: Vec::new(),
        };
        template.add(DEFAULT, &source)?;
        Ok(template)
    }

    /// Adds the template used when a request brings tools.
    pub fn with_tool_use(mut self, source: String) -> Result<Self, TemplateError> {
        self.add(TOOL_USE, &source)?;
        self.has_tool_use = true;
        Ok(self)
    }

    fn add(&mut self, name: &'static str, source: &str) -> Result<(), TemplateError> {
        let prepared = source::prepare(source).map_err(|reason| TemplateError::Syntax { reason })?;
        let (text, after) = (prepared.text, self.compiled.limits.time);
        let mut environment = self.compiled.environment.clone();
        // The parser and the code generator need the deep stack.
        environment = renderer::run(after, Instant::now() + after, move || {
            environment.add_template_owned(name, text).map_err(syntax_error)?;
            Ok(environment)
        })?;
        self.gaps.extend(gaps(&environment, &prepared.names));
        self.change(|compiled| compiled.environment = environment);
        Ok(())
    }

    fn change(&mut self, change: impl FnOnce(&mut Compiled)) {
        change(Arc::make_mut(&mut self.compiled));
    }

    /// Replaces the bounds.
    #[must_use]
    pub fn with_limits(mut self, limits: RenderLimits) -> Self {
        self.change(|compiled| {
            compiled.environment.set_fuel(Some(limits.fuel));
            compiled.limits = limits;
        });
        self
    }

    /// Replaces the clock that `strftime_now` reads.
    #[must_use]
    pub fn with_clock(mut self, now: fn() -> SystemTime) -> Self {
        self.change(|compiled| {
            let clock = move |format: &str| strftime::format(now(), format);
            compiled.environment.add_function("strftime_now", clock);
        });
        self
    }

    /// Filters, tests, functions and methods that the template uses and this server does not have. A
    /// conversation that reaches one of them fails; others are served.
    pub fn gaps(&self) -> &[String] {
        &self.gaps
    }

    /// Renders the smallest conversations. An error means that no conversation can be expected to render;
    /// otherwise the result is what failed of the longer ones. A template that refuses a conversation by
    /// `raise_exception` is in order.
    pub fn trial(&self) -> Result<Vec<String>, TemplateError> {
        let turns = |roles: &[&str]| -> Vec<ChatMessage> {
            roles.iter().map(|role| ChatMessage::text(*role, "Hello")).collect()
        };
        let try_one = |roles: &[&str]| match self.render(&turns(roles), None, true, &Map::new()) {
            Ok(_) | Err(TemplateError::Raised { .. }) => Ok(()),
            Err(error) => Err(error),
        };
        try_one(&["user"])?;
        let longer: [&[&str]; 2] = [&["system", "user"], &["user", "assistant", "user"]];
        let failed = longer.into_iter().filter_map(|roles| {
            let error = try_one(roles).err()?;
            Some(format!("a conversation of {} fails: {error}", roles.join(", ")))
        });
        Ok(failed.collect())
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
        self.render_until(messages, tools, add_generation_prompt, extra, None)
    }

    /// [`Self::render`], given up at `deadline` if that comes before the time limit.
    pub fn render_until(
        &self,
        messages: &[ChatMessage],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
        extra: &Map<String, serde_json::Value>,
        deadline: Option<Instant>,
    ) -> Result<String, TemplateError> {
        if let Some(name) = RESERVED.iter().find(|name| extra.contains_key(**name)) {
            return Err(TemplateError::Reserved { name });
        }
        let messages = message::to_values(messages, self.compiled.limits.text_bytes)?;
        let mut variables: BTreeMap<String, Value> =
            extra.iter().filter_map(|(name, value)| Some((name.clone(), message::present(value)?))).collect();
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
        let compiled = Arc::clone(&self.compiled);
        let now = Instant::now();
        let latest = now + compiled.limits.time;
        let until = deadline.map_or(latest, |deadline| deadline.min(latest));
        renderer::run(until.saturating_duration_since(now), until, move || {
            compiled.write(name, Value::from_pairs(variables))
        })
    }
}

impl Compiled {
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
            if let Some(gap) = error.downcast_ref::<Gap>() {
                return TemplateError::Gap { reason: format!("{} is not known", gap.0) };
            }
            if let Some(error) = error.downcast_ref::<minijinja::Error>() {
                innermost = error;
            }
            cause = error.source();
        }
        match innermost.kind() {
            ErrorKind::OutOfFuel => TemplateError::OutOfFuel { fuel: self.limits.fuel },
            ErrorKind::WriteFailure => TemplateError::TooLong { limit: self.limits.text_bytes },
            ErrorKind::UnknownFilter | ErrorKind::UnknownTest | ErrorKind::UnknownFunction => {
                TemplateError::Gap { reason: with_causes(error) }
            }
            _ => TemplateError::Render { reason: with_causes(error) },
        }
    }
}

/// What of the names that a template uses is not in the environment.
fn gaps(environment: &Environment<'_>, names: &source::Names) -> Vec<String> {
    let has = |kind: &str, name: &str| {
        let asked = environment.render_str(&format!("{{{{ {name:?} is {kind} }}}}"), ());
        asked.is_ok_and(|answer| answer == "True" || answer == "true")
    };
    let globals: std::collections::BTreeSet<&str> = environment.globals().map(|(name, _)| name).collect();
    let unknown = |what: &'static str, list: &[(String, usize)], known: &dyn Fn(&str) -> bool| {
        let lacking = list.iter().filter(|(name, _)| !known(name));
        lacking.map(|(name, line)| format!("{what} {name:?} (line {line})")).collect::<Vec<_>>()
    };
    [
        unknown("filter", &names.filters, &|name| has("filter", name)),
        unknown("test", &names.tests, &|name| has("test", name)),
        unknown("method", &names.methods, &methods::is_known),
        unknown("function", &names.functions, &|name| {
            globals.contains(name) || ["caller", "super", "self", "loop"].contains(&name)
        }),
    ]
    .concat()
}

/// The environment that Hugging Face gives a template.
fn environment() -> Result<Environment<'static>, TemplateError> {
    let mut environment = Environment::new();
    let syntax =
        SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(syntax_error)?;
    environment.set_syntax(syntax);
    environment.set_unknown_method_callback(methods::call);
    filters::add_to(&mut environment);
    environment.add_filter("tojson", python_json::tojson);
    environment.add_function("raise_exception", |state: &mut minijinja::State<'_, '_>, message: &Value| {
        bounded::check(state, message)?;
        raise_exception(message.to_string())
    });
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

/// Something that Jinja or Python has and this server does not.
#[derive(Debug, thiserror::Error)]
#[error("{0} is not known")]
struct Gap(String);

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

/// Why a conversation gives no prompt; [`Self::is_the_servers`] says whose fault it is.
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
    /// The checkpoint's template cannot be used; found when it was loaded.
    #[error("the checkpoint's chat template cannot be used, raw completions can: {reason}")]
    Unusable {
        /// What was found.
        reason: String,
    },
    /// The template needs something that this server does not have.
    #[error("the chat template needs something that this server does not have: {reason}")]
    Gap {
        /// What is missing.
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
    /// The rendering did not end in time and was given up.
    #[error("rendering the chat template on these messages takes more than {after:?}")]
    TooSlow {
        /// The limit.
        after: Duration,
    },
    /// Other renderings, some of them given up, take all the threads there are for them.
    #[error("no thread to render the chat template came free within {after:?}")]
    Busy {
        /// How long it was waited for.
        after: Duration,
    },
    /// The rendering's thread failed.
    #[error("the thread that renders the chat template: {reason}")]
    Thread {
        /// What happened.
        reason: String,
    },
    /// The template failed on these messages.
    #[error("rendering the chat template: {reason}")]
    Render {
        /// Place and mistake.
        reason: String,
    },
}

impl TemplateError {
    /// Whether another request would fare no better: the checkpoint or this server is at fault, and not
    /// the messages.
    pub fn is_the_servers(&self) -> bool {
        matches!(
            self,
            Self::Missing
                | Self::Syntax { .. }
                | Self::Unusable { .. }
                | Self::Gap { .. }
                | Self::Busy { .. }
                | Self::Thread { .. }
        )
    }
}
