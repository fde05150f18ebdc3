//! What a chat template may take of memory, whatever unnamed value it makes something of. Alone in its process: it
//! reads the process' peak.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use cadre_text::{ChatTemplate, RenderLimits, SpecialTokens, TemplateError};
use serde_json::Map;

/// Most that one rendering may add: text of 64 MiB that a name may hold is copied a few times, and two million units of
/// fuel pay for 128 MiB.
const MOST: u64 = 400 << 20;

/// A million times a string of 1 KiB, and forty million small ones: each too large to be made, both cheap to name.
const HUGE: [&str; 2] = ["([s] * 1000000)", "([1] * 40000000)"];

/// What one that is given up may add: nothing but what it walks over.
const SLOW: u64 = 16 << 20;

fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// The peak becomes what is in use now.
fn reset() {
    fs::write("/proc/self/clear_refs", "5").unwrap();
}

#[test]
fn an_unnamed_value_that_is_too_large_is_refused_before_it_is_made() {
    let operators =
        ["X ~ ''", "'' ~ X", "1 ~ X ~ 2", "('a' if X ~ 'b' == 'c' else 'd')", "-1 + 2 ~ X", "not X ~ 'a'"];
    let filters = [
        "safe",
        "escape",
        "e",
        "lower",
        "upper",
        "title",
        "capitalize",
        "replace('a', 'b')",
        "length",
        "dictsort",
        "reverse",
        "trim",
        "join",
        "join('b')",
        "split",
        "lines",
        "default('')",
        "round",
        "abs",
        "int",
        "float",
        "first",
        "last",
        "min",
        "max",
        "sort",
        "list",
        "string",
        "bool",
        "batch(3)|list",
        "slice(3)|list",
        "sum",
        "indent(2)",
        "select|list",
        "reject|list",
        "map('upper')|list",
        "unique",
        "zip([1])|list",
        "pprint",
        "format",
        "urlencode",
        "tojson",
        "wordcount",
        "truncate",
        "wordwrap",
        "striptags",
        "xmlattr",
        "groupby('a')",
        "map('string')|join",
        "chain([1])|list",
        "items|list",
        "filesizeformat",
        "percent_format(1)",
        "selectattr('a')|list",
        "count",
    ];
    let tests =
        ["startingwith('a')", "endingwith('a')", "lower", "upper", "eq('a')", "in('a')", "containing('a')"];
    let others = [
        "'a'|replace('a', X)",
        "'a'|replace(X, 'a')",
        "'a'|indent(X)",
        "'a'|split(X)",
        "'a'|trim(X)",
        "'a'|join(X)",
        "'a'|default(X, true)|upper",
        "'a'.replace('a', X)",
        "'a'.join(X)",
        "'a'.join([X])",
        "'a'.startswith(X)",
        "'a'.split(X)",
        "'a'.format(X)",
        "'{}'.format(X)",
        "'%s' % X",
        "'%s' % (X,)",
        "raise_exception(X)",
        "strftime_now(X)",
        "{X: 1}|string",
        "dict(a=X)|string",
        "[X, X]|string",
        "joiner(X)()",
        "range(X)",
        "'a' is startingwith(X)",
        "'a' is endingwith(X)",
        "'a' in X",
        "X in 'a'",
        "X == X ~ ''",
        "'a'|center(X)",
        "'a'|truncate(1, true, X)",
        "'a'|wordwrap(1, true, X)",
        "namespace(a=X).a ~ ''",
        "['a', X]|join",
        "[X]|map('upper')|list",
        "['a']|map('replace', 'a', X)|list",
        "X[1:] ~ ''",
        "[X, X][0] ~ ''",
        "(X,)|string",
        "'a'.removeprefix(X)",
        "'a'.ljust(3, X)",
        "[1].count(X)",
        "{'a': 1}.get(X)",
    ];
    let uses = operators
        .iter()
        .map(|use_it| (*use_it).to_owned())
        .chain(filters.iter().map(|filter| format!("X|{filter}")))
        .chain(tests.iter().map(|test| format!("X is {test}")))
        .chain(others.iter().map(|use_it| (*use_it).to_owned()));
    let mut wrong = Vec::new();
    for use_it in uses {
        for huge in HUGE {
            let expression = use_it.replace('X', huge);
            let source = format!("{{% set s = 'x' * 1024 %}}{{% if {expression} %}}a{{% endif %}}");
            let limits = RenderLimits { time: std::time::Duration::from_secs(5), ..RenderLimits::default() };
            let template = ChatTemplate::new(source.clone(), SpecialTokens::default())
                .map(|made| made.with_limits(limits));
            let template = match template {
                Ok(template) => template,
                // A constant that the compiler folds for too long.
                Err(TemplateError::TooSlow { .. }) => continue,
                Err(error) => {
                    wrong.push(format!("{source}: {error}"));
                    continue;
                }
            };
            reset();
            let before = peak();
            let rendered = template.render(&[], None, true, &Map::new());
            let grown = peak().saturating_sub(before);
            // What is compared or hashed as a whole takes time, which is bounded, and next to no memory.
            let (is_slow, is_busy) = (
                matches!(rendered, Err(TemplateError::TooSlow { .. })),
                matches!(rendered, Err(TemplateError::Busy { .. })),
            );
            if grown > MOST || is_busy || (is_slow && grown > SLOW) {
                let words = rendered.as_ref().map(String::len).map_err(ToString::to_string);
                wrong.push(format!("{expression}: {} MiB, {words:.200?}", grown >> 20));
            }
        }
    }
    assert!(wrong.is_empty(), "{}\n{}", wrong.len(), wrong.join("\n"));
}
