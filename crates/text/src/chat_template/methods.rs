//! Python's methods on strings, lists and mappings that minijinja-contrib does not bring, with Python's
//! results (tests/templates/compat.json).

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, Tuple, ValueKind, from_args},
};
use minijinja_contrib::pycompat;

use super::{Gap, bounded, filters};

/// The methods below.
const OURS: [&str; 18] = [
    "rsplit",
    "partition",
    "rpartition",
    "removeprefix",
    "removesuffix",
    "ljust",
    "rjust",
    "center",
    "zfill",
    "casefold",
    "swapcase",
    "index",
    "rindex",
    "expandtabs",
    "istitle",
    "copy",
    "splitlines",
    "find",
];
/// Those of minijinja-contrib, and of the engine's own objects.
const THEIRS: [&str; 33] = [
    "get",
    "items",
    "keys",
    "values",
    "count",
    "capitalize",
    "endswith",
    "format",
    "isalnum",
    "isalpha",
    "isascii",
    "isdigit",
    "islower",
    "isnumeric",
    "isspace",
    "isupper",
    "join",
    "lower",
    "lstrip",
    "replace",
    "rfind",
    "rstrip",
    "split",
    "startswith",
    "strip",
    "title",
    "upper",
    "cycle",
    "changed",
    "append",
    "extend",
    "update",
    "pop",
];

/// Whether some value has the method; one that no value has is a gap of this server.
pub(super) fn is_known(method: &str) -> bool {
    OURS.contains(&method) || THEIRS.contains(&method)
}

/// What a template's `value.method(…)` means where the engine does not know it.
pub(super) fn call(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let ours = match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => string(state, text, method, args)?,
        (ValueKind::Seq, _) => sequence(state, value, method, args)?,
        (ValueKind::Map, _) if method == "copy" => Some(value.clone()),
        _ => None,
    };
    if let Some(result) = ours {
        return Ok(result);
    }
    // Arguments of strings' methods are written out, or compared, as a whole.
    if value.kind() == ValueKind::String {
        bounded::check_all(state, args)?;
        if let Some(style) = value.as_str() {
            filters::check_brace_keys(style)?;
        }
    }
    let theirs = pycompat::unknown_method_callback(state, value, method, args);
    theirs.map_err(|error| match error.kind() {
        ErrorKind::UnknownMethod if !is_known(method) => {
            let detail = format!("{} has no method named {method}", value.kind());
            Error::new(ErrorKind::UnknownMethod, detail).with_source(Gap(format!("the method {method:?}")))
        }
        _ => error,
    })
}

fn invalid(problem: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem.into())
}

fn string(state: &State<'_, '_>, text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let value = match method {
        "rsplit" => rsplit(text, args)?,
        "splitlines" => splitlines(text, args)?,
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            if separator.is_empty() {
                return Err(invalid("empty separator"));
            }
            let last = method == "rpartition";
            let found = if last { text.rsplit_once(separator) } else { text.split_once(separator) };
            let parts = match found {
                Some((head, tail)) => [head, separator, tail],
                None if last => ["", "", text],
                None => [text, "", ""],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (i64, Option<char>) = from_args(args)?;
            Value::from(justify(state, text, method, width, fill.unwrap_or(' '))?)
        }
        "zfill" => {
            let (width,): (i64,) = from_args(args)?;
            let sign = text.len() - text.trim_start_matches(['+', '-']).len();
            let sign = sign.min(1);
            let filled = justify(state, &text[sign..], "rjust", width - sign as i64, '0')?;
            Value::from(format!("{}{filled}", &text[..sign]))
        }
        "casefold" => Value::from(text.chars().map(casefold).collect::<String>()),
        "swapcase" => Value::from(text.chars().map(swapcase).collect::<String>()),
        "index" | "rindex" | "find" => {
            let found = find(text, method, args)?;
            if found < 0 && method != "find" {
                return Err(invalid("substring not found"));
            }
            Value::from(found)
        }
        "expandtabs" => {
            let (size, options): (Option<i64>, Kwargs) = from_args(args)?;
            let size = size.map_or_else(|| options.get::<Option<i64>>("tabsize"), |size| Ok(Some(size)))?;
            Value::from(expandtabs(state, text, size.unwrap_or(8))?)
        }
        "istitle" => Value::from(is_title(text)),
        _ => return Ok(None),
    };
    Ok(Some(value))
}

fn sequence(
    state: &State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    match method {
        "copy" => Ok(Some(value.clone())),
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            bounded::check_all(state, [value, wanted])?;
            let at = value.try_iter()?.position(|item| item == *wanted);
            at.map(|at| Some(Value::from(at))).ok_or_else(|| invalid(format!("{wanted} is not in list")))
        }
        _ => Ok(None),
    }
}

/// Python's notion of white space, which has the four separators 0x1c to 0x1f beside Unicode's.
fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
}

fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, limit, options): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = match separator {
        None => options.get::<Option<Value>>("sep")?,
        given => given,
    };
    let limit = limit.map_or_else(|| options.get::<Option<i64>>("maxsplit"), |limit| Ok(Some(limit)))?;
    options.assert_all_used()?;
    let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = Vec::new();
    match separator.as_ref().filter(|separator| !separator.is_none() && !separator.is_undefined()) {
        Some(separator) => {
            let separator =
                separator.as_str().ok_or_else(|| invalid("rsplit: the separator is no string"))?;
            if separator.is_empty() {
                return Err(invalid("empty separator"));
            }
            parts.extend(text.rsplitn(limit.saturating_add(1), separator));
        }
        None => {
            let mut rest = text.trim_end_matches(is_space);
            while !rest.is_empty() {
                let cut = rest.rfind(is_space).filter(|_| parts.len() < limit);
                let start = cut.map_or(0, |at| at + rest[at..].chars().next().map_or(0, char::len_utf8));
                parts.push(&rest[start..]);
                rest = rest[..start].trim_end_matches(is_space);
            }
        }
    }
    Ok(parts.into_iter().rev().map(Value::from).collect())
}

fn splitlines(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (keep, options): (Option<bool>, Kwargs) = from_args(args)?;
    let keep = keep.map_or_else(|| options.get::<Option<bool>>("keepends"), |keep| Ok(Some(keep)))?;
    options.assert_all_used()?;
    Ok(lines(text, keep == Some(true)).into_iter().map(Value::from).collect())
}

/// The lines of a text, cut at every boundary that Python knows and not only at `\n`.
pub(super) fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let boundary = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(boundary) {
        let two = rest[at..].starts_with("\r\n");
        let end = at + if two { 2 } else { rest[at..].chars().next().map_or(1, char::len_utf8) };
        lines.push(&rest[..if keep_ends { end } else { at }]);
        rest = &rest[end..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

fn justify(state: &State<'_, '_>, text: &str, method: &str, width: i64, fill: char) -> Result<String, Error> {
    let pad = usize::try_from(width).unwrap_or(0).saturating_sub(text.chars().count());
    bounded::pay(state, pad.saturating_mul(fill.len_utf8()))?;
    let left = match method {
        "ljust" => 0,
        "rjust" => pad,
        // Python puts the odd one to the left if the width is odd too.
        _ => pad / 2 + (pad & usize::try_from(width).unwrap_or(0) & 1),
    };
    let mut out: String = std::iter::repeat_n(fill, left).collect();
    out.push_str(text);
    out.extend(std::iter::repeat_n(fill, pad - left));
    Ok(out)
}

fn expandtabs(state: &State<'_, '_>, text: &str, size: i64) -> Result<String, Error> {
    let size = usize::try_from(size).unwrap_or(0);
    bounded::pay(state, size.saturating_mul(text.matches('\t').count()))?;
    let mut out = String::with_capacity(text.len());
    let mut column = 0;
    for character in text.chars() {
        match character {
            '\t' if size > 0 => {
                let pad = size - column % size;
                out.extend(std::iter::repeat_n(' ', pad));
                column += pad;
            }
            '\t' => {}
            _ => {
                out.push(character);
                column = if matches!(character, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(out)
}

/// The place of a substring in characters, or -1, with Python's optional bounds.
fn find(text: &str, method: &str, args: &[Value]) -> Result<i64, Error> {
    let (wanted, from, to): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let length = text.chars().count() as i64;
    let bound = |at: i64| if at < 0 { (at + length).max(0) } else { at.min(length) };
    let (from, to) = (from.map_or(0, bound), to.map_or(length, bound));
    // Beyond the end not even the empty string is found.
    if from > to || args.get(1).is_some_and(|given| given.as_i64().is_some_and(|given| given > length)) {
        return Ok(-1);
    }
    let byte = |at: i64| text.char_indices().nth(at as usize).map_or(text.len(), |(byte, _)| byte);
    let window = &text[byte(from)..byte(to)];
    let found = if method == "rindex" { window.rfind(wanted) } else { window.find(wanted) };
    Ok(found.map_or(-1, |at| from + window[..at].chars().count() as i64))
}

/// Full case folding of one character: the lower case of its upper case, but for the exceptions of
/// Unicode's CaseFolding.txt.
fn casefold(character: char) -> String {
    match character {
        'ı' | '\u{13a0}'..='\u{13f5}' => character.to_string(),
        'ẞ' => "ss".to_owned(),
        '\u{13f8}'..='\u{13fd}' | '\u{ab70}'..='\u{abbf}' => character.to_uppercase().collect(),
        _ => character.to_uppercase().flat_map(char::to_lowercase).collect(),
    }
}

fn swapcase(character: char) -> String {
    match (character.is_uppercase(), character.is_lowercase()) {
        (true, _) => character.to_lowercase().collect(),
        (_, true) => character.to_uppercase().collect(),
        _ => character.to_string(),
    }
}

fn is_title(text: &str) -> bool {
    let (mut inside, mut any) = (false, false);
    for character in text.chars() {
        let (upper, lower) = (character.is_uppercase(), character.is_lowercase());
        if (upper && inside) || (lower && !inside) {
            return false;
        }
        inside = upper || lower;
        any |= inside;
    }
    any
}
