//! Filters, tests and functions of Jinja that the engine does not bring, with Jinja's results
//! (tests/templates/compat.json), and the engine's own where a whole value is converted unpaid.

use minijinja::{
    Environment, Error, ErrorKind, State, Value, filters, tests,
    value::{ArgType, Kwargs, ObjectRepr, Rest, ValueKind, ValueOrKwargs, from_args},
};

use super::{bounded, text_wrap};

/// Adds all of them.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_filter("wordcount", wordcount);
    environment.add_filter("truncate", truncate);
    environment.add_filter("wordwrap", wordwrap);
    environment.add_filter("urlencode", urlencode);
    environment.add_filter("filesizeformat", filesizeformat);
    environment.add_filter("xmlattr", xmlattr);
    environment.add_filter("percent_format", percent_format);
    environment.add_filter("within_bounds", bounded::keep);
    environment.add_test("callable", is_callable);
    // So do these tests.
    environment.add_test("unpaid_startingwith", tests::is_startingwith);
    environment.add_test("unpaid_endingwith", tests::is_endingwith);
    environment.add_test("unpaid_in", tests::is_in);
    environment.add_test("unpaid_lower", tests::is_lower);
    environment.add_test("unpaid_upper", tests::is_upper);
    for (name, unpaid) in [
        ("startingwith", "unpaid_startingwith"),
        ("endingwith", "unpaid_endingwith"),
        ("in", "unpaid_in"),
        ("lower", "unpaid_lower"),
        ("upper", "unpaid_upper"),
    ] {
        environment.add_test(name, move |state: &mut State<'_, '_>, args: Rest<Value>| {
            bounded::check_all(state, args.iter())?;
            state.perform_test(unpaid, &args)
        });
    }
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.set_formatter(bounded::write);
    // The engine pays for these when their result is there.
    environment.add_filter("unpaid_string", filters::string);
    environment.add_filter("unpaid_join", filters::join);
    environment.add_filter("unpaid_format", filters::format);
    environment.add_filter("unpaid_unique", filters::unique);
    environment.add_filter("unpaid_sort", filters::sort);
    environment.add_filter("unpaid_lower", filters::lower);
    environment.add_filter("unpaid_upper", filters::upper);
    environment.add_filter("unpaid_title", filters::title);
    environment.add_filter("unpaid_capitalize", filters::capitalize);
    environment.add_filter("unpaid_replace", filters::replace);
    environment.add_filter("unpaid_trim", filters::trim);
    environment.add_filter("unpaid_split", filters::split);
    environment.add_filter("unpaid_lines", filters::lines);
    environment.add_filter("unpaid_indent", filters::indent);
    environment.add_filter("unpaid_escape", filters::escape);
    environment.add_filter("unpaid_safe", filters::safe);
    environment.add_filter("unpaid_striptags", minijinja_contrib::filters::striptags);
    for (name, unpaid) in [
        ("string", "unpaid_string"),
        ("join", "unpaid_join"),
        ("format", "unpaid_format"),
        ("unique", "unpaid_unique"),
        ("sort", "unpaid_sort"),
        // These write out whatever they are given.
        ("lower", "unpaid_lower"),
        ("upper", "unpaid_upper"),
        ("title", "unpaid_title"),
        ("capitalize", "unpaid_capitalize"),
        ("replace", "unpaid_replace"),
        ("trim", "unpaid_trim"),
        ("split", "unpaid_split"),
        ("lines", "unpaid_lines"),
        ("indent", "unpaid_indent"),
        ("escape", "unpaid_escape"),
        ("e", "unpaid_escape"),
        ("safe", "unpaid_safe"),
        ("striptags", "unpaid_striptags"),
    ] {
        environment.add_filter(name, move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            bounded::check_all(state, &args)?;
            if name == "format"
                && let Some(style) = args.first().and_then(Value::as_str)
            {
                check_percent_keys(style)?;
            }
            state.apply_filter(unpaid, &args)
        });
    }
    environment.add_filter("pprint", |state: &mut State<'_, '_>, value: &Value| {
        bounded::check(state, value)?;
        Ok::<_, Error>(filters::pprint(value))
    });
}

fn invalid(problem: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem.into())
}

/// What a filter of strings makes of any value.
fn text(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    bounded::check(state, value)?;
    let text = value.to_string();
    bounded::pay(state, text.len())?;
    Ok(text)
}

/// Arguments that a filter takes by position or by name.
struct Arguments {
    positional: std::vec::IntoIter<Value>,
    named: Kwargs,
}

impl Arguments {
    /// Those that are written out are paid for before they are.
    fn new(state: &State<'_, '_>, arguments: Rest<ValueOrKwargs>) -> Result<Self, Error> {
        let arguments = arguments.into_values();
        bounded::check_all(state, &arguments)?;
        let (positional, named): (&[Value], Kwargs) = from_args(&arguments)?;
        Ok(Self { positional: Vec::from(positional).into_iter(), named })
    }

    /// The next one; all are taken in the order in which Jinja declares them.
    fn take<T: for<'a> ArgType<'a, Output = T>>(&mut self, name: &str) -> Result<Option<T>, Error> {
        match self.positional.next() {
            Some(value) => T::from_value(Some(&value)).map(Some),
            None => match self.named.get::<Option<Value>>(name)? {
                Some(value) => T::from_value(Some(&value)).map(Some),
                None => Ok(None),
            },
        }
    }

    fn end(mut self) -> Result<(), Error> {
        match self.positional.next() {
            Some(_) => Err(Error::from(ErrorKind::TooManyArguments)),
            None => self.named.assert_all_used(),
        }
    }
}

fn wordcount(state: &State<'_, '_>, value: &Value) -> Result<usize, Error> {
    let mut inside = false;
    let mut words = 0;
    for character in text(state, value)?.chars() {
        let word = text_wrap::is_word(character);
        words += usize::from(word && !inside);
        inside = word;
    }
    Ok(words)
}

fn truncate(state: &State<'_, '_>, value: &Value, arguments: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let mut arguments = Arguments::new(state, arguments)?;
    let length = arguments.take::<usize>("length")?.unwrap_or(255);
    let killwords = arguments.take::<bool>("killwords")?.unwrap_or(false);
    let end = arguments.take::<String>("end")?.unwrap_or_else(|| "...".to_owned());
    let leeway = arguments.take::<usize>("leeway")?.unwrap_or(5);
    arguments.end()?;
    let text = text(state, value)?;
    let ending = end.chars().count();
    let kept = length.checked_sub(ending);
    let kept = kept.ok_or_else(|| invalid(format!("expected length >= {ending}, got {length}")))?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let cut = text.char_indices().nth(kept).map_or(text.len(), |(at, _)| at);
    let mut cut = &text[..cut];
    if !killwords && let Some((words, _)) = cut.rsplit_once(' ') {
        cut = words;
    }
    Ok(format!("{cut}{end}"))
}

fn wordwrap(state: &State<'_, '_>, value: &Value, arguments: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let mut arguments = Arguments::new(state, arguments)?;
    let width = arguments.take::<usize>("width")?.unwrap_or(79);
    let break_long_words = arguments.take::<bool>("break_long_words")?.unwrap_or(true);
    let wrapstring = arguments.take::<String>("wrapstring")?.unwrap_or_else(|| "\n".to_owned());
    let break_on_hyphens = arguments.take::<bool>("break_on_hyphens")?.unwrap_or(true);
    arguments.end()?;
    if width == 0 {
        return Err(invalid("invalid width 0 (must be > 0)"));
    }
    let text = text(state, value)?;
    // No line is shorter than one character, and each may end in a wrapstring.
    bounded::pay(state, text.len().saturating_mul(1 + wrapstring.len()))?;
    let lines = super::methods::lines(&text, false);
    let wrapped: Vec<String> = lines
        .iter()
        .map(|line| text_wrap::wrap(line, width, break_long_words, break_on_hyphens).join(&wrapstring))
        .collect();
    Ok(wrapped.join(&wrapstring))
}

fn urlencode(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    bounded::check(state, value)?;
    let quoted = |value: &Value| quote_url(&value.to_string(), false).replace("%20", "+");
    let pairs: Vec<String> = match value.kind() {
        ValueKind::Map => value
            .try_iter()?
            .map(|key| Ok(format!("{}={}", quoted(&key), quoted(&value.get_item(&key)?))))
            .collect::<Result<_, Error>>()?,
        ValueKind::Seq | ValueKind::Iterable => value
            .try_iter()?
            .map(|pair| {
                let [key, value] = [0, 1].map(|at| pair.get_item_by_index(at));
                Ok(format!("{}={}", quoted(&key?), quoted(&value?)))
            })
            .collect::<Result<_, Error>>()?,
        _ => return Ok(quote_url(&text(state, value)?, true)),
    };
    Ok(pairs.join("&"))
}

fn quote_url(text: &str, keep_slash: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        let plain = byte.is_ascii_alphanumeric() || b"_.-~".contains(&byte) || (keep_slash && byte == b'/');
        if plain {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn filesizeformat(
    state: &State<'_, '_>,
    value: &Value,
    arguments: Rest<ValueOrKwargs>,
) -> Result<String, Error> {
    bounded::check(state, value)?;
    let mut arguments = Arguments::new(state, arguments)?;
    let binary = arguments.take::<bool>("binary")?.unwrap_or(false);
    arguments.end()?;
    let number = value.as_str().map_or_else(|| f64::try_from(value.clone()).ok(), |text| text.parse().ok());
    let bytes = number.ok_or_else(|| invalid(format!("filesizeformat: {value} is no number")))?;
    let (base, mark): (f64, &str) = if binary { (1024.0, "iB") } else { (1000.0, "B") };
    if bytes == 1.0 {
        return Ok("1 Byte".to_owned());
    }
    if bytes < base {
        return Ok(format!("{} Bytes", bytes.trunc()));
    }
    let prefixes = if binary { "KMGTPEZY" } else { "kMGTPEZY" };
    let mut unit = base;
    let mut told = String::new();
    for prefix in prefixes.chars() {
        unit *= base;
        told = format!("{:.1} {prefix}{mark}", base * bytes / unit);
        if bytes < unit {
            break;
        }
    }
    Ok(told)
}

fn xmlattr(state: &State<'_, '_>, value: &Value, arguments: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let mut arguments = Arguments::new(state, arguments)?;
    let autospace = arguments.take::<bool>("autospace")?.unwrap_or(true);
    arguments.end()?;
    bounded::check(state, value)?;
    let mut items = Vec::new();
    for key in value.try_iter()? {
        let attribute = value.get_item(&key)?;
        if attribute.is_none() || attribute.is_undefined() {
            continue;
        }
        let name = key.to_string();
        if name.contains(|c: char| c.is_whitespace() || matches!(c, '/' | '>' | '=')) {
            return Err(invalid(format!("Invalid character in attribute name: {name:?}")));
        }
        items.push(format!("{}=\"{}\"", escape(&name), escape(&attribute.to_string())));
    }
    let items = items.join(" ");
    bounded::pay(state, items.len())?;
    Ok(if autospace && !items.is_empty() { format!(" {items}") } else { items })
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            _ => out.push(character),
        }
    }
    out
}

/// What `'…' % value` is rewritten to: a tuple is several arguments, anything else is one.
fn percent_format(state: &mut State<'_, '_>, style: &str, value: &Value) -> Result<Value, Error> {
    bounded::check(state, value)?;
    check_percent_keys(style)?;
    let mut args: Vec<Value> = match value.is_tuple() {
        true => value.try_iter()?.collect(),
        false => vec![value.clone()],
    };
    let style = without_repr(style, &mut args);
    args.insert(0, Value::from(style));
    state.apply_filter("unpaid_format", &args)
}

/// Refuses `%(…)s` with a name that is not plain: the engine's reader of formats can panic over others.
fn check_percent_keys(style: &str) -> Result<(), Error> {
    let plain = style.replace("%%", "");
    let mut keys = plain.split("%(").skip(1).map(|rest| rest.split(')').next().unwrap_or(rest));
    keys.all(is_plain).then_some(()).ok_or_else(|| invalid(NOT_PLAIN))
}

/// Refuses `{…[…]}` with a key that is not plain, for the same reason.
pub(super) fn check_brace_keys(style: &str) -> Result<(), Error> {
    let plain = style.replace("{{", "");
    let mut fields = plain.split('{').skip(1);
    let all_plain = |field: &str| {
        let mut rest = field;
        loop {
            let name = rest.split(['}', ':', '!']).next().unwrap_or(rest);
            let Some((_, keys)) = name.contains('[').then(|| rest.split_once('[')).flatten() else {
                return true;
            };
            let (key, after) = keys.split_once(']').unwrap_or((keys, ""));
            if !is_plain(key) {
                return false;
            }
            rest = after;
        }
    };
    fields.all(all_plain).then_some(()).ok_or_else(|| invalid(NOT_PLAIN))
}

const NOT_PLAIN: &str = "a format's key has only ASCII letters, digits, spaces, `_`, `-` and `.` here";

fn is_plain(key: &str) -> bool {
    key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, ' ' | '_' | '-' | '.'))
}

/// `%r` as `%s` of the argument's `repr`, which the engine's format does not know.
fn without_repr(style: &str, args: &mut [Value]) -> String {
    let mut out = String::with_capacity(style.len());
    let mut next = 0;
    let mut rest = style.chars();
    while let Some(character) = rest.next() {
        out.push(character);
        if character != '%' {
            continue;
        }
        // Flags, width and precision, then the conversion.
        for part in rest.by_ref() {
            match part {
                '%' => {}
                '*' => next += 1,
                '#' | '-' | '+' | ' ' | '.' | '0'..='9' => {
                    out.push(part);
                    continue;
                }
                'r' => {
                    if let Some(arg) = args.get_mut(next) {
                        *arg = Value::from(repr(arg));
                    }
                    next += 1;
                    out.push('s');
                    break;
                }
                _ => next += 1,
            }
            out.push(part);
            if part != '*' {
                break;
            }
        }
    }
    out
}

/// Python's `repr`, which is how items of a list are written.
fn repr(value: &Value) -> String {
    let listed = Value::from(vec![value.clone()]).to_string();
    listed.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(&listed).to_owned()
}

/// Functions, macros and other objects that can be called; to Jinja what is undefined is one of them.
fn is_callable(value: &Value) -> bool {
    let callable = |object: &minijinja::value::DynObject| {
        let name = object.type_name();
        object.repr() == ObjectRepr::Plain || name.ends_with("::Macro") || name.ends_with("::Loop")
    };
    value.is_undefined() || value.as_object().is_some_and(callable)
}
