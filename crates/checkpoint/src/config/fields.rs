//! Typed access to the fields of one JSON object: each accessor reports what is wrong and goes on.

use std::{cell::RefCell, collections::BTreeSet};

use cadre_types::TokenId;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::problem::{About, ProblemKind, Problems, quote};

/// A field that was absent and took its published default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DefaultedField {
    /// Dotted path.
    pub field: String,
    /// The default, as JSON.
    pub value: String,
}

/// One object of the configuration, with the place where its findings go. `null` counts as absent.
pub(super) struct Fields<'a> {
    about: &'a About,
    object: &'a Map<String, Value>,
    prefix: &'static str,
    problems: &'a mut Problems,
    defaults: &'a mut Vec<DefaultedField>,
    /// Paths that were looked at, there or not.
    read: &'a RefCell<BTreeSet<String>>,
}

const COPY_IT: &str = "copy the field from the published config.json of this checkpoint";

/// A JSON value as a message quotes it.
pub(super) fn show(value: &Value) -> String {
    quote(&value.to_string())
}

fn one_of(allowed: &[&str]) -> String {
    allowed.iter().map(|value| format!("{value:?}")).collect::<Vec<_>>().join(" or ")
}

impl<'a> Fields<'a> {
    pub(super) fn new(
        about: &'a About,
        object: &'a Map<String, Value>,
        prefix: &'static str,
        problems: &'a mut Problems,
        defaults: &'a mut Vec<DefaultedField>,
        read: &'a RefCell<BTreeSet<String>>,
    ) -> Self {
        Self { about, object, prefix, problems, defaults, read }
    }

    /// The object in field `name`, as fields of their own; `None` if absent or (reported) no object.
    pub(super) fn nested(&mut self, name: &'static str) -> Option<Fields<'_>> {
        let object = match self.get(name)? {
            Value::Object(object) => object,
            other => {
                self.wrong(name, "an object or null", other);
                return None;
            }
        };
        Some(Fields {
            about: self.about,
            object,
            prefix: name,
            problems: self.problems,
            defaults: self.defaults,
            read: self.read,
        })
    }

    pub(super) fn path(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }

    pub(super) fn problem(
        &mut self,
        kind: ProblemKind,
        name: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) {
        let problem = self.about.field(kind, &self.path(name), expected, found, fix);
        self.problems.push(problem);
    }

    /// The value, if present and not null.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(self.path(name));
        self.object.get(name).filter(|value| !value.is_null())
    }

    fn wrong(&mut self, name: &str, expected: &str, found: &Value) {
        self.problem(ProblemKind::BadValue, name, expected, show(found), COPY_IT);
    }

    pub(super) fn missing(&mut self, name: &str, expected: &str) {
        self.problem(ProblemKind::MissingField, name, expected, "no such field", COPY_IT);
    }

    fn defaulted(&mut self, name: &str, value: impl Into<Value>) {
        let value = value.into().to_string();
        self.defaults.push(DefaultedField { field: self.path(name), value });
    }

    fn required<T>(&mut self, name: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Option<T> {
        let Some(value) = self.get(name) else {
            self.missing(name, expected);
            return None;
        };
        let read = read(value);
        if read.is_none() {
            self.wrong(name, expected, value);
        }
        read
    }

    pub(super) fn integer(&mut self, name: &str) -> Option<usize> {
        self.required(name, "a non-negative integer", as_size)
    }

    pub(super) fn integer_or(&mut self, name: &str, default: usize) -> Option<usize> {
        if self.get(name).is_none() {
            self.defaulted(name, default);
            return Some(default);
        }
        self.integer(name)
    }

    /// An integer whose `null` has a meaning of its own; absence is still an error.
    pub(super) fn nullable_integer(&mut self, name: &str) -> Option<Option<usize>> {
        if self.object.get(name) == Some(&Value::Null) {
            return Some(None);
        }
        self.required(name, "a positive integer or null", as_size).map(Some)
    }

    pub(super) fn number(&mut self, name: &str) -> Option<f32> {
        self.required(name, "a number", as_f32)
    }

    pub(super) fn number_or(&mut self, name: &str, default: f32) -> Option<f32> {
        if self.get(name).is_none() {
            self.defaulted(name, default);
            return Some(default);
        }
        self.number(name)
    }

    pub(super) fn flag(&mut self, name: &str) -> Option<bool> {
        self.required(name, "true or false", Value::as_bool)
    }

    pub(super) fn text(&mut self, name: &str) -> Option<&'a str> {
        let value = self.get(name)?;
        if value.as_str().is_none() {
            self.wrong(name, "a string", value);
        }
        value.as_str()
    }

    /// A string of which only some values are computed. `default` is the published one, if any.
    pub(super) fn only_text(&mut self, name: &str, allowed: &[&str], default: Option<&str>) {
        match (self.get(name), default) {
            (None, Some(default)) => self.defaulted(name, default),
            (None, None) => self.missing(name, &one_of(allowed)),
            (Some(value), _) => {
                if !value.as_str().is_some_and(|text| allowed.contains(&text)) {
                    let expected = one_of(allowed);
                    let fix =
                        format!("cadre computes only {name} = {expected}; serve a checkpoint that uses it");
                    self.problem(ProblemKind::Unsupported, name, expected, show(value), fix);
                }
            }
        }
    }

    /// A switch of which only one position is computed, which is also the published default.
    pub(super) fn only_flag(&mut self, name: &str, only: bool) {
        self.only_value(name, Value::Bool(only));
    }

    /// A number of which only one value is computed, which is also the published default.
    pub(super) fn only_integer(&mut self, name: &str, only: u64) {
        self.only_value(name, Value::from(only));
    }

    fn only_value(&mut self, name: &str, only: Value) {
        match self.get(name) {
            None => self.defaulted(name, only),
            Some(value) if *value == only => {}
            Some(value) => {
                let fix = format!("cadre computes only {name} = {only}; serve a checkpoint that uses it");
                self.problem(ProblemKind::Unsupported, name, only.to_string(), show(value), fix);
            }
        }
    }

    pub(super) fn token(&mut self, name: &str) -> Option<TokenId> {
        self.required(name, "a token id", as_token)
    }

    /// One token id or a list of them.
    pub(super) fn tokens(&mut self, name: &str) -> Option<Vec<TokenId>> {
        self.required(name, "a token id or a non-empty list of token ids", |value| match value {
            Value::Array(ids) if !ids.is_empty() => ids.iter().map(as_token).collect(),
            single => as_token(single).map(|id| vec![id]),
        })
    }
}

pub(super) fn as_size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|value| usize::try_from(value).ok())
}

fn as_token(value: &Value) -> Option<TokenId> {
    value.as_u64().and_then(|value| TokenId::try_from(value).ok())
}

/// A number that F32 can hold.
fn as_f32(value: &Value) -> Option<f32> {
    value.as_f64().map(|value| value as f32).filter(|value| value.is_finite())
}
