//! The one logging set-up of a process: text for people, one JSON object per line for collectors.
//!
//! Both go to standard error (standard output belongs to a command's result) and both name the role,
//! because `cadre up` and a cluster's collector interleave lines of many processes. The filter is an
//! `env_filter` expression given by the caller; nothing here reads the environment.
//!
//! One event is one line, whatever is in it: names, addresses and errors come from peers, and a control
//! character among them could begin a line of its own. Every such character is written as an escape here,
//! where all lines pass, and not where they are made.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    str::FromStr,
};

use serde_json::Value;
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields,
        format::{Compact, Format, Writer},
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// One compact line for people.
    #[default]
    Text,
    /// One JSON object per line: `timestamp`, `level`, `role`, `target`, `message`, `spans` and the
    /// event's fields under `fields`.
    Json,
}

impl FromStr for LogFormat {
    type Err = LoggingError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(LoggingError::Format { given: s.to_owned() }),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// No such format.
    #[error("log format {given:?}: expected text or json")]
    Format {
        /// What was given.
        given: String,
    },
    /// The filter expression does not parse.
    #[error("log filter {given:?}: {problem}")]
    Filter {
        /// What was given.
        given: String,
        /// The parser's words.
        problem: String,
    },
    /// A global subscriber is set already.
    #[error("logging was set up twice in one process")]
    Twice,
}

/// Installs the process's subscriber. `filter` is an `env_filter` expression such as
/// `info,cadre_router=debug`.
pub fn init_logging(format: LogFormat, role: &str, filter: &str) -> Result<(), LoggingError> {
    let filter = EnvFilter::builder()
        .parse(filter)
        .map_err(|error| LoggingError::Filter { given: filter.to_owned(), problem: error.to_string() })?;
    let builder = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter);
    let role = role.to_owned();
    let result = match format {
        LogFormat::Text => builder.event_format(TextLine::new(role)).try_init(),
        LogFormat::Json => builder.event_format(JsonLine { role }).try_init(),
    };
    result.map_err(|_| LoggingError::Twice)
}

/// The compact text line with the role in front.
struct TextLine {
    role: String,
    inner: Format<Compact, SystemTime>,
}

impl TextLine {
    fn new(role: String) -> Self {
        // Colours are left out: lines of a cluster end in files more often than on a terminal.
        Self { role, inner: Format::default().compact().with_ansi(false) }
    }
}

impl<S, N> FormatEvent<S, N> for TextLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::new();
        self.inner.format_event(ctx, Writer::new(&mut line), event)?;
        writeln!(writer, "[{}] {}", self.role, one_line(line.strip_suffix('\n').unwrap_or(&line)))
    }
}

/// A text without the characters that a terminal or a collector obeys: what is written to standard error or a
/// file of lines, and holds words of peers.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            obeyed if is_obeyed(obeyed) => {
                // Writing to a string does not fail.
                let _ = write!(line, "\\u{{{:x}}}", u32::from(obeyed));
            }
            shown => line.push(shown),
        }
    }
    line
}

/// Control characters (C0, DEL, C1), Unicode's line and paragraph separators, and those that change the
/// direction of what follows.
fn is_obeyed(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// JSON with those characters escaped that its own rules leave as they are.
fn one_json_line(json: &str) -> String {
    let mut line = String::with_capacity(json.len());
    for character in json.chars() {
        // All of them are in the basic plane, so one escape holds each.
        match is_obeyed(character) {
            true => {
                let _ = write!(line, "\\u{:04x}", u32::from(character));
            }
            false => line.push(character),
        }
    }
    line
}

/// One JSON object per line.
struct JsonLine {
    role: String,
}

impl<S, N> FormatEvent<S, N> for JsonLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = FieldMap::default();
        event.record(&mut fields);
        let message = fields.0.remove("message").unwrap_or_else(|| Value::from(""));
        let mut timestamp = String::new();
        SystemTime.format_time(&mut Writer::new(&mut timestamp))?;
        let spans: Vec<Value> = ctx
            .event_scope()
            .map(|scope| scope.from_root().map(|span| span_value::<S, N>(&span)).collect())
            .unwrap_or_default();
        let line = serde_json::json!({
            "timestamp": timestamp,
            "level": event.metadata().level().as_str(),
            "role": self.role,
            "target": event.metadata().target(),
            "message": message,
            "fields": fields.0,
            "spans": spans,
        });
        writeln!(writer, "{}", one_json_line(&line.to_string()))
    }
}

fn span_value<S, N>(span: &tracing_subscriber::registry::SpanRef<'_, S>) -> Value
where
    S: for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    let extensions = span.extensions();
    let fields = extensions.get::<FormattedFields<N>>().map_or("", |fields| fields.fields.as_str());
    serde_json::json!({ "name": span.name(), "fields": fields })
}

/// Collects an event's fields in name order.
#[derive(Default)]
struct FieldMap(BTreeMap<&'static str, Value>);

impl Visit for FieldMap {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name(), Value::from(format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), Value::from(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name(), Value::from(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name(), Value::from(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name(), Value::from(value));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.insert(field.name(), Value::from(value));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Buffer {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    fn text(buffer: &Buffer) -> String {
        String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_json_line_is_one_object_with_role_message_fields_and_spans() {
        let buffer = Buffer::default();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(buffer.clone())
            .event_format(JsonLine { role: "router".into() })
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            let _span = tracing::info_span!("request", id = 7).entered();
            tracing::warn!(worker = "w-1", pages = 3_u64, ok = false, "lost \"it\"\nagain");
        });
        let line = text(&buffer);
        assert_eq!(line.lines().count(), 1, "{line}");
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["role"], "router");
        assert_eq!(value["level"], "WARN");
        assert_eq!(value["message"], "lost \"it\"\nagain");
        assert_eq!(value["fields"]["worker"], "w-1");
        assert_eq!(value["fields"]["pages"], 3);
        assert_eq!(value["fields"]["ok"], false);
        assert_eq!(value["spans"][0]["name"], "request");
        assert!(value["timestamp"].as_str().is_some_and(|stamp| stamp.contains('T')));
    }

    #[test]
    fn a_text_line_begins_with_the_role() {
        let buffer = Buffer::default();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(buffer.clone())
            .event_format(TextLine::new("expert 3".into()))
            .finish();
        tracing::subscriber::with_default(subscriber, || tracing::info!("loaded"));
        let line = text(&buffer);
        assert!(line.starts_with("[expert 3] "), "{line}");
        assert!(line.contains("loaded"), "{line}");
    }

    /// Ids, addresses, header values, model names and paths: wherever it stands, it stays in its line.
    #[test]
    fn an_event_is_one_line_whatever_peers_put_into_it() {
        let hostile = "w-1\n[router] 2026 INFO forged\r\u{1b}[2J\u{7f}\u{9b}31m\u{85}\u{2028}\u{202e}x";
        let tell = || {
            let _span = tracing::info_span!("request", id = %hostile).entered();
            tracing::info!(member = %hostile, path = hostile, address = ?hostile, "joined: {hostile}");
        };
        let (text_lines, json_lines) = (Buffer::default(), Buffer::default());
        let builder = || tracing_subscriber::fmt().with_ansi(false);
        let subscriber =
            builder().with_writer(text_lines.clone()).event_format(TextLine::new("router".into())).finish();
        tracing::subscriber::with_default(subscriber, tell);
        let subscriber = builder()
            .with_writer(json_lines.clone())
            .event_format(JsonLine { role: "router".into() })
            .finish();
        tracing::subscriber::with_default(subscriber, tell);
        for written in [text(&text_lines), text(&json_lines)] {
            let line = written.strip_suffix('\n').unwrap();
            let raw: Vec<char> = line.chars().filter(|&character| is_obeyed(character)).collect();
            assert!(raw.is_empty(), "{raw:?} in {line:?}");
            assert!(line.contains("joined: w-1\\n[router]"), "{line}");
        }
        let value: Value = serde_json::from_str(&text(&json_lines)).unwrap();
        assert_eq!(value["fields"]["member"], hostile, "a collector gets what came");
    }

    #[test]
    fn a_bad_filter_and_a_bad_format_are_named() {
        let error = init_logging(LogFormat::Text, "x", "info,=[[").unwrap_err();
        assert!(error.to_string().contains("info,=[["), "{error}");
        assert!("yaml".parse::<LogFormat>().unwrap_err().to_string().contains("yaml"));
        assert_eq!("json".parse::<LogFormat>().unwrap(), LogFormat::Json);
    }
}
