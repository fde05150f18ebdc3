//! YAML as people write it: short maps and lists on one line, comments before fields.

use serde_json::Value;

/// Longest line of a map or list in braces.
const WIDTH: usize = 110;

/// Above this depth everything has its own line: an object's tiers are read one by one.
const OPEN: usize = 2;

/// Appends the lines as a comment.
pub(super) fn comment(text: &mut String, indent: usize, lines: &str) {
    for line in lines.lines() {
        let hash = if line.is_empty() { "#" } else { "# " };
        text.push_str(&format!("{:indent$}{hash}{line}\n", ""));
    }
}

/// Appends an object.
pub(super) fn write(text: &mut String, object: &Value, notes: &[(&str, &str)]) {
    Writer { text, notes }.fields(object, 0, 0, "");
}

struct Writer<'a> {
    text: &'a mut String,
    notes: &'a [(&'a str, &'a str)],
}

impl Writer<'_> {
    /// The fields of a map, each on lines of its own.
    fn fields(&mut self, map: &Value, indent: usize, depth: usize, path: &str) {
        for (key, value) in map.as_object().into_iter().flatten() {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            self.note(&path, indent);
            self.text.push_str(&format!("{:indent$}{}:", "", scalar(key)));
            self.value(value, indent, depth + 1, &path);
        }
    }

    /// What follows a key.
    fn value(&mut self, value: &Value, indent: usize, depth: usize, path: &str) {
        if self.fits(value, indent + path.rsplit('.').next().unwrap_or_default().len() + 2, depth, path) {
            self.text.push_str(&format!(" {}\n", flow(value)));
            return;
        }
        self.text.push('\n');
        match value {
            Value::Array(items) => {
                for (number, item) in items.iter().enumerate() {
                    self.item(item, indent, depth + 1, &format!("{path}.{number}"));
                }
            }
            map => self.fields(map, indent + 2, depth, path),
        }
    }

    /// An element of a list: its first field stands behind the dash.
    fn item(&mut self, item: &Value, indent: usize, depth: usize, path: &str) {
        self.note(path, indent);
        if self.fits(item, indent + 2, depth, path) {
            self.text.push_str(&format!("{:indent$}- {}\n", "", flow(item)));
            return;
        }
        let begin = self.text.len() + indent;
        self.fields(item, indent + 2, depth, path);
        self.text.replace_range(begin..begin + 1, "-");
    }

    fn note(&mut self, path: &str, indent: usize) {
        for (_, lines) in self.notes.iter().filter(|(of, _)| *of == path) {
            comment(self.text, indent, lines);
        }
    }

    /// Whether it goes on the line that has `used` columns already.
    fn fits(&self, value: &Value, used: usize, depth: usize, path: &str) -> bool {
        let is_scalar = !value.is_object() && !value.is_array();
        let below = format!("{path}.");
        let is_noted = self.notes.iter().any(|(of, _)| of.starts_with(&below));
        is_scalar || (depth > OPEN && !is_noted && used + flow(value).len() <= WIDTH)
    }
}

/// On one line.
fn flow(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let fields: Vec<String> =
                map.iter().map(|(key, value)| format!("{}: {}", scalar(key), flow(value))).collect();
            format!("{{{}}}", fields.join(", "))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(flow).collect::<Vec<_>>().join(", ")),
        Value::String(text) => scalar(text),
        number => number.to_string(),
    }
}

/// Words of YAML 1.1 that are no strings.
const WORDS: [&str; 9] = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];

/// A string: plain if every reader takes it for one, else in quotes.
fn scalar(text: &str) -> String {
    let begins = text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '/');
    let letters = text.chars().all(|letter| letter.is_ascii_alphanumeric() || "._/:-".contains(letter));
    let is_word = WORDS.contains(&text.to_lowercase().as_str()) || text.parse::<f64>().is_ok();
    let is_name = begins && letters && !text.ends_with(':') && !is_word;
    match is_name || is_quantity(text) {
        true => text.to_owned(),
        false if text.contains('"') && !text.contains('\'') => format!("'{text}'"),
        false => Value::from(text).to_string(),
    }
}

/// A whole number with a unit, as `4Gi`; one without is a number.
fn is_quantity(text: &str) -> bool {
    let unit = text.trim_start_matches(|digit: char| digit.is_ascii_digit());
    unit.len() < text.len() && ["m", "Ki", "Mi", "Gi", "Ti"].contains(&unit)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn short_values_stay_on_their_line_and_comments_stand_before_fields() {
        let object = json!({"kind": "X", "spec": {
            "a": {"b": {"c": "4", "d": [1, true]}},
            "list": [{"name": "x", "more": {"deep": 1}}, {"key": "yard"}],
        }});
        let mut text = String::new();
        write(&mut text, &object, &[("spec.list", "Two lines,\nwell."), ("spec.list.0.more", "This.")]);
        let expected = "kind: X\nspec:\n  a:\n    b: {c: \"4\", d: [1, true]}\n  # Two lines,\n  # well.\n  list:\n  - \
                        name: x\n    # This.\n    more: {deep: 1}\n  - {key: yard}\n";
        assert_eq!(text, expected);
    }

    fn value() -> impl Strategy<Value = Value> {
        let text = prop_oneof![
            "[a-z0-9.:/-]{0,6}",
            Just("true".to_owned()),
            Just("1e3".to_owned()),
            Just("y".to_owned()),
            "[ -~]{0,6}"
        ];
        let leaf = prop_oneof![text.clone().prop_map(Value::from), any::<i32>().prop_map(Value::from)];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 1..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z]{1,8}", inner, 1..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_reads_the_same(value in value()) {
            let object = json!({"spec": {"value": value}});
            let mut text = String::new();
            write(&mut text, &object, &[]);
            let read: Value = serde_saphyr::from_str(&text).unwrap();
            prop_assert_eq!(read, object, "{}", text);
        }
    }
}
