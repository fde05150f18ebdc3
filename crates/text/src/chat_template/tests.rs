#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use serde_json::{Value as Json, json};

use super::*;

fn special() -> SpecialTokens {
    SpecialTokens {
        bos_token: Some("<s>".to_owned()),
        eos_token: Some("</s>".to_owned()),
        ..Default::default()
    }
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source.to_owned(), special()).unwrap()
}

fn messages(value: Json) -> Vec<ChatMessage> {
    serde_json::from_value(value).unwrap()
}

fn render(source: &str, conversation: Json) -> Result<String, TemplateError> {
    template(source).render(&messages(conversation), None, false, &Map::new())
}

/// 7 March 2026, 09:05:02, as in tests/templates/render.py.
fn fixed_clock() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_772_874_302)
}

/// What jinja2 rendered in Hugging Face's environment (tests/templates/render.py).
#[test]
fn the_cases_rendered_by_jinja2() {
    let cases: Vec<Json> = serde_json::from_str(include_str!("../../tests/templates/cases.json")).unwrap();
    assert!(cases.len() >= 18);
    for case in cases {
        let extra = case.get("extra").and_then(Json::as_object).cloned().unwrap_or_default();
        let prompt = case.get("add_generation_prompt").and_then(Json::as_bool).unwrap_or(false);
        let rendered = template(case["template"].as_str().unwrap()).with_clock(fixed_clock).render(
            &messages(case["messages"].clone()),
            case.get("tools"),
            prompt,
            &extra,
        );
        let name = &case["name"];
        match case.get("raises").and_then(Json::as_str) {
            Some(message) => {
                assert_eq!(rendered, Err(TemplateError::Raised { message: message.to_owned() }), "{name}")
            }
            None => assert_eq!(rendered.as_deref(), Ok(case["expected"].as_str().unwrap()), "{name}"),
        }
    }
}

/// What Python's methods and Jinja's filters give (tests/templates/render.py).
#[test]
fn methods_filters_and_statements_are_those_of_jinja() {
    let cases: Vec<Json> = serde_json::from_str(include_str!("../../tests/templates/compat.json")).unwrap();
    assert!(cases.len() > 500);
    let extra = json!({"user": {"name": "Ann"}}).as_object().unwrap().clone();
    let conversation = messages(json!([{"role": "user", "content": "hi"}]));
    let mut wrong = Vec::new();
    for case in &cases {
        let source = case["template"].as_str().unwrap();
        let rendered = ChatTemplate::new(source.to_owned(), special())
            .and_then(|template| template.render(&conversation, None, false, &extra));
        if rendered.as_deref() != Ok(case["expected"].as_str().unwrap()) {
            wrong.push(format!("{source}\n  expected {}\n  found    {rendered:?}", case["expected"]));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

/// R1's template asks whether a message has the field.
#[test]
fn nothing_is_absent_at_every_depth() {
    let source = "{% for m in messages %}{{ 'tool_calls' in m }}{{ m.content }}\
                  {% for c in m.tool_calls %}{{ c.function.items()|list }}{{ c.id is defined }}{% endfor %}|{% endfor %}\
                  {{ thinking is defined }}{{ documents is defined }}";
    let conversation = json!([
        {"role": "assistant", "content": "a", "tool_calls": null},
        {"role": "assistant", "content": "b", "tool_calls": []},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": null, "function": {"name": "f", "strict": null, "arguments": {"x": null, "y": []}}}]},
    ]);
    let extra = json!({"thinking": null, "documents": []}).as_object().unwrap().clone();
    assert_eq!(
        template(source).render(&messages(conversation), None, false, &extra).as_deref(),
        Ok("Falsea|Falseb|TrueNone[('name', 'f'), ('arguments', {'x': None, 'y': []})]False|FalseFalse")
    );
}

mod gaps {
    use super::*;

    #[test]
    fn what_is_missing_is_known_before_any_conversation() {
        let source = "{{ 'a'|upper }}{% if x %}{{ y|nofilter }}{% endif %}\n{{ 1 is notest }}{{ x is not defined }}\n\
                      {{ 'a'.nomethod(1) }}{{ nofunction() }}{{ raise_exception('x') if false }}{{ x.strip() }}\
                      {% macro m(f) %}{{ f() }}{% endmacro %}{{ m(range) }}{% filter upper %}{% endfilter %}\
                      {{ 'nofilter() | text' }}{# nofunction2() #}";
        let expected = [
            "filter \"nofilter\" (line 1)",
            "test \"notest\" (line 2)",
            "method \"nomethod\" (line 3)",
            "function \"nofunction\" (line 3)",
        ];
        assert_eq!(template(source).gaps(), expected);
        assert!(crate::tokenizer::tests::pocket().chat_template().unwrap().gaps().is_empty());
    }

    #[test]
    fn a_gap_is_not_the_callers_fault() {
        let hi = || json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": null}]);
        for source in ["{{ 1|nofilter }}", "{{ 1 is notest }}", "{{ nofunction() }}", "{{ 'a'.nomethod() }}"]
        {
            let error = render(source, hi()).unwrap_err();
            assert!(
                matches!(error, TemplateError::Gap { .. }) && error.is_the_servers(),
                "{source}: {error}"
            );
        }
        // A method that strings have, on the content that this message lacks.
        for source in ["{{ messages[1].content.strip() }}", "{{ messages[0].content.x.y }}"] {
            let error = render(source, hi()).unwrap_err();
            assert!(
                matches!(error, TemplateError::Render { .. }) && !error.is_the_servers(),
                "{source}: {error}"
            );
        }
    }

    #[test]
    fn a_trial_tells_a_broken_template_from_a_strict_one() {
        assert_eq!(template("{{ messages[0].content }}").trial(), Ok(vec![]));
        let strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}";
        assert_eq!(template(strict).trial(), Ok(vec![]));
        assert!(matches!(
            template("{{ messages[0].content|nofilter }}").trial(),
            Err(TemplateError::Gap { .. })
        ));
        let some = "{% if messages|length > 2 %}{{ 1|nofilter }}{% endif %}";
        let failed = template(some).trial().unwrap();
        assert!(failed.len() == 1 && failed[0].contains("user, assistant, user fails"), "{failed:?}");
    }
}

#[test]
fn content_in_parts_is_joined() {
    let parts = json!([{"role": "user", "content": [
        {"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}, {"role": "assistant"}]);
    let source = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
    assert_eq!(render(source, parts), Ok("[a b][None]".to_owned()));
    assert_eq!(render(source, json!([{"role": "user", "content": []}])), Ok("[]".to_owned()));
}

#[test]
fn other_parts_are_refused_by_name() {
    let image = json!([{"role": "user", "content": "x"}, {"role": "user", "content": [
        {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "http://x"}}]}]);
    let error = render("", image).unwrap_err();
    assert_eq!(error, TemplateError::Part { index: 1, part: 1, kind: "image_url".to_owned() });
    assert!(error.to_string().starts_with("messages[1].content[1]: parts of type \"image_url\""));
    assert_eq!(
        render("", json!([{"role": "user", "content": [{"type": "text"}]}])),
        Err(TemplateError::PartText { index: 0, part: 0 })
    );
}

#[test]
fn roles_are_known() {
    let developer = json!([{"role": "developer", "content": "x"}]);
    assert_eq!(render("{{ messages[0].role }}", developer), Ok("system".to_owned()));
    assert_eq!(
        render("", json!([{"role": "user", "content": "x"}, {"role": "wizard", "content": "x"}])),
        Err(TemplateError::Role { index: 1, role: "wizard".to_owned() })
    );
}

#[test]
fn other_fields_reach_the_template_in_order_and_replace_nothing() {
    let mut message = ChatMessage::text("assistant", "x");
    for (name, value) in [("zeta", "1"), ("role", "system"), ("alpha", "2"), ("content", "y")] {
        message.extra.insert(name.to_owned(), json!(value));
    }
    let source = "{% for k, v in messages[0].items() %}{{ k }}={{ v }} {% endfor %}";
    assert_eq!(
        template(source).render(&[message], None, false, &Map::new()),
        Ok("role=assistant content=x zeta=1 alpha=2 ".to_owned())
    );
}

#[test]
fn requests_may_add_variables_but_not_replace_them() {
    let source = "{{ thinking }}{{ bos_token }}";
    let extra = json!({"thinking": true}).as_object().unwrap().clone();
    assert_eq!(template(source).render(&[], None, false, &extra), Ok("True<s>".to_owned()));
    for name in ["messages", "bos_token", "tools"] {
        let extra = json!({name: "x"}).as_object().unwrap().clone();
        assert_eq!(template(source).render(&[], None, false, &extra), Err(TemplateError::Reserved { name }));
    }
}

mod bounds {
    use super::*;

    #[test]
    fn endless_work_runs_out_of_fuel() {
        let limits = RenderLimits { fuel: 10_000, ..Default::default() };
        let source = "{% for a in range(1000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}";
        let rendered = template(source).with_limits(limits).render(&[], None, false, &Map::new());
        assert_eq!(rendered, Err(TemplateError::OutOfFuel { fuel: 10_000 }));
        // Also inside a macro, where the error has causes around it.
        let source = format!("{{% macro m() %}}{source}{{% endmacro %}}{{{{ m() }}}}");
        let rendered = template(&source).with_limits(limits).render(&[], None, false, &Map::new());
        assert_eq!(rendered, Err(TemplateError::OutOfFuel { fuel: 10_000 }));
    }

    /// The error of a source that is not even parsed.
    fn refused(source: String) -> String {
        match ChatTemplate::new(source, special()) {
            Err(TemplateError::Syntax { reason }) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_depth_of_a_source_is_bounded_before_it_is_parsed() {
        let most = source::MAX_TAG_TOKENS;
        for part in ["+ 1 ", "~ x ", "|upper ", ".x ", "[0] ", "and y ", "if a else b ", ", (1) "] {
            let reason = refused(format!("\n{{{{ x {}}}}}", part.repeat(50_000)));
            assert!(reason.contains("more than 2048 tokens") && reason.contains(":2)"), "{part}: {reason}");
        }
        for open in ["(", "[", "not ", "-", "{0:"] {
            let reason = refused(format!("{{{{ {}x }}}}", open.repeat(100_000)));
            assert!(reason.contains("more than 2048 tokens"), "{open}: {reason}");
        }
        // What is accepted is also compiled and rendered: the stack is deep enough for the deepest tree.
        let chain = format!("{{{{ 1 {}}}}}", "+ 1 ".repeat(most / 2 - 1));
        assert_eq!(render(&chain, json!([])), Ok((most / 2).to_string()));
        for open in ["not ", "-"] {
            let deep = format!("{{{{ {}1 }}}}", open.repeat(most - 1));
            // Refused by the parser or rendered; either way the stack holds.
            let _ = ChatTemplate::new(deep, special())
                .map(|template| template.render(&[], None, false, &Map::new()));
        }
        let elifs = |count| format!("{{% if x %}}a{}{{% endif %}}", "{% elif x %}b".repeat(count));
        assert_eq!(render(&elifs(source::MAX_ELIFS), json!([])), Ok(String::new()));
        assert!(refused(elifs(source::MAX_ELIFS + 1)).contains("elif"));
        let nested = |depth| format!("{}{}", "{% if 1 %}".repeat(depth), "{% endif %}".repeat(depth));
        assert!(refused(nested(10_000)).contains("recursion"));
        assert!(refused("x".repeat(source::MAX_SOURCE_BYTES + 1)).contains("bytes of source"));
    }

    #[test]
    fn what_is_not_ended_is_a_syntax_error() {
        for source in ["{{ 'a", "{{ a", "{% if x", "{# a", "{% raw %}{{ a }}", "{{ \"\\\" }}", "{%", "{{-"] {
            assert!(refused(source.to_owned()).starts_with("syntax error"), "{source}");
        }
    }

    /// A value that doubles in a loop, by every operator, and everything that makes something of it.
    #[test]
    fn values_that_double_are_bounded() {
        // Less fuel than a conversation gets: there are 120 of them.
        let limits = RenderLimits { fuel: 100_000, time: Duration::from_secs(60), ..Default::default() };
        for grow in [
            "ns.x ~ ns.x",
            "ns.x + ns.x",
            "ns.x * 2",
            "[ns.x, ns.x]",
            "{'a': ns.x, 'b': ns.x}",
            "(ns.x, ns.x)",
        ] {
            for use_it in [
                "ns.x",
                "ns.x|tojson",
                "ns.x|string",
                "ns.x|join(',')",
                "'%s' % ns.x",
                "'{}'.format(ns.x)",
                "ns.x|pprint",
                "ns.x|list|tojson(indent=2)",
                "ns.x|wordcount",
                "{ns.x: 1}|urlencode",
            ] {
                for seed in ["'aa'", "['a']"] {
                    let source = format!(
                        "{{% set ns = namespace(x={seed}) %}}{{% for i in range(64) %}}{{% set ns.x = {grow} %}}{{% endfor %}}\
                         {{% set copy %}}{{{{ {use_it} }}}}{{% endset %}}{{{{ copy|length }}}}"
                    );
                    let rendered =
                        template(&source).with_limits(limits).render(&[], None, false, &Map::new());
                    assert!(
                        matches!(
                            rendered,
                            Err(TemplateError::OutOfFuel { .. } | TemplateError::Render { .. })
                        ),
                        "{source}: {rendered:?}"
                    );
                }
            }
        }
    }

    /// Names that a value could grow by, beside `set`.
    #[test]
    fn values_that_grow_by_any_name_are_bounded() {
        let repeat =
            |part: &str, end: &str, times: usize| format!("{}{}", part.repeat(times), end.repeat(times));
        let sources = [
            "{% macro m(x, n) %}{% if n %}{{ m(x + x, n - 1) }}{% endif %}{% endmacro %}{{ m([1], 100) }}".to_owned(),
            "{% macro m(n) -%} {% if n %}{{ m(n - 1, varargs + varargs) }}{% endif %}\
             {% endmacro %}{{ m(100, 1) }}"
                .to_owned(),
            format!("{{% with x = [1]{} %}}{{{{ x|length }}}}{{% endwith %}}", ", x = x + x".repeat(60)),
            format!("{{% set x = [1] %}}{}", repeat("{% for x in [x + x] %}", "{% endfor %}", 60)),
            format!("{{% set x = [1] %}}{}", repeat("{% set x = x + x %}", "", 60)),
            "{% for x in [[1]] recursive %}{{ loop([x + x]) }}{% endfor %}".to_owned(),
            "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(30) %}{% set ns.x = [ns.x] * 9 %}{% endfor %}".to_owned(),
        ];
        for source in sources {
            let rendered = render(&source, json!([]));
            assert!(
                matches!(rendered, Err(TemplateError::OutOfFuel { .. } | TemplateError::Render { .. })),
                "{source}: {rendered:?}"
            );
        }
    }

    /// What `~` writes out has no name to be bounded by; and what it says stays the same.
    #[test]
    fn operands_of_a_concatenation_are_bounded_and_keep_their_places() {
        for large in ["([s] * 1000000) ~ ''", "'' ~ ([s] * 1000000)", "1 + 2 ~ ([s] * 1000000) ~ 3"] {
            let source = format!("{{% set s = 'x' * 1000 %}}{{{{ ({large})|length }}}}");
            let rendered = render(&source, json!([]));
            assert!(
                matches!(rendered, Err(TemplateError::OutOfFuel { .. } | TemplateError::Render { .. })),
                "{source}: {rendered:?}"
            );
        }
        for (expression, expected) in [
            ("'a' ~ 1 ~ none", "a1None"),
            ("-1 ~ 2", "-12"),
            ("1 ~ -2", "1-2"),
            ("2 * 3 ~ 4 * 5", "620"),
            ("'a' ~ 'b'|upper ~ 'c'", "aBc"),
            ("'a' ~ ('b' ~ 'c')[0] ~ [1 ~ 2]", "ab['12']"),
            ("'x' ~ 'y' if 'a' ~ 'b' == 'ab' else 'z' ~ 1", "xy"),
            ("not 'a' ~ 'b' == 'ab'", "False"),
            ("'b' in 'a' ~ 'b' and 'c' not in 'a' ~ 'b'", "True"),
            ("none is none ~ ''", "True"),
            ("2 * -3 * 4", "-24"),
            ("-2 * 3 + 4 * 5 - 6 / 2", "11.0"),
            ("'ab' * 2 in 'xababx' and 2 * 2 not in [3]", "True"),
            ("('a' in 'ab') ~ ('c' not in 'ab')", "TrueTrue"),
            ("'%s' % 'a' * 2", "aa"),
            ("'%s' % 'a' ~ '%s' % 'b'", "ab"),
            ("{'k': 'a' ~ 1}['k'] ~ 'abc'[(1 ~ '')|length:]", "a1bc"),
        ] {
            let source = format!("{{{{ {expression} }}}}{{% set x = {expression} %}}|{{{{ x }}}}");
            assert_eq!(render(&source, json!([])), Ok(format!("{expected}|{expected}")), "{expression}");
        }
        let tags = "{% macro m(a, b='x' ~ 'y') %}{{ a ~ b }}{% endmacro %}{{ m('p' ~ 'q') }}{{ m(1, b='r' ~ 2) }}\
                    {% for c in 'a' ~ 'b' if c ~ '' != 'b' %}{{ c ~ loop.index }}{% endfor %}\
                    {% if 'a' ~ 'b' == 'ab' %}yes{% elif 'a' ~ 'b' %}no{% endif %}{% with w = 'u' ~ 'v' %}{{ w }}{% endwith %}";
        assert_eq!(render(tags, json!([])), Ok("pqxy1r2a1yesuv".to_owned()));
    }

    /// What collects in a loop is no growth to be refused: a conversation of 1,000 messages.
    #[test]
    fn a_template_may_collect() {
        let source = "{% set ns = namespace(all=[], text='') %}{% for m in messages %}{% set ns.all = ns.all + [m] %}\
                      {% set last = m %}{% endfor %}{{ ns.all|length }}{{ ns.all[999].content }}{{ loop is defined }}\
                      {% for m in ns.all if m.content == '7' %}{{ loop.index }}{% endfor %}";
        let turns: Vec<Json> =
            (0..1000).map(|turn| json!({"role": "user", "content": turn.to_string()})).collect();
        assert_eq!(render(source, json!(turns)), Ok("1000999False1".to_owned()));
    }

    /// As deep as the fuel lets it become: dropping it recurses.
    #[test]
    fn a_value_as_deep_as_the_fuel_allows_is_dropped() {
        for nest in ["[ns.x]", "{'a': ns.x}", "(ns.x,)"] {
            for use_it in ["", "{{ ns.x }}", "{{ ns.x|tojson }}"] {
                let source = format!(
                    "{{% set ns = namespace(x=1) %}}{{% for j in range(10) %}}{{% for i in range(20000) %}}\
                     {{% set ns.x = {nest} %}}{{% endfor %}}{use_it}{{% endfor %}}"
                );
                let rendered = render(&source, json!([]));
                assert!(!matches!(rendered, Err(TemplateError::Thread { .. })), "{source}: {rendered:?}");
            }
        }
    }

    #[test]
    fn the_deadline_of_a_request_ends_the_wait() {
        let template = template("ok");
        let past = Some(Instant::now());
        let rendered = template.render_until(&[], None, false, &Map::new(), past);
        assert!(
            matches!(rendered, Ok(_) | Err(TemplateError::TooSlow { .. } | TemplateError::Busy { .. })),
            "{rendered:?}"
        );
        let later = Some(Instant::now() + Duration::from_secs(60));
        assert_eq!(template.render_until(&[], None, false, &Map::new(), later), Ok("ok".to_owned()));
    }

    #[test]
    fn output_ends_at_its_limit() {
        let limits = RenderLimits { text_bytes: 100, ..Default::default() };
        let at = |count: usize| {
            template("{% for i in range(n) %}x{% endfor %}").with_limits(limits).render(
                &[],
                None,
                false,
                &json!({ "n": count }).as_object().unwrap().clone(),
            )
        };
        assert_eq!(at(100).map(|text| text.len()), Ok(100));
        assert_eq!(at(101), Err(TemplateError::TooLong { limit: 100 }));
    }

    #[test]
    fn input_is_measured_before_it_is_rendered() {
        let limits = RenderLimits { text_bytes: 100, ..Default::default() };
        let message = |bytes| [ChatMessage::text("user", "x".repeat(bytes))];
        let render =
            |bytes| template("ok").with_limits(limits).render(&message(bytes), None, false, &Map::new());
        assert_eq!(render(100), Ok("ok".to_owned()));
        assert_eq!(render(101), Err(TemplateError::TooLong { limit: 100 }));
    }

    #[test]
    fn a_long_conversation_fits_the_default() {
        let turns: Vec<ChatMessage> = (0..4000)
            .map(|turn| {
                let role = if turn % 2 == 0 { "user" } else { "assistant" };
                ChatMessage::text(role, "0123456789".repeat(100))
            })
            .collect();
        let tokenizer = crate::tokenizer::tests::pocket();
        let text = tokenizer.chat_template().unwrap().render(&turns, None, true, &Map::new()).unwrap();
        assert!(text.len() > 4_000_000);
    }
}

/// Over some others the engine's reader of formats panics (found by fuzzing).
#[test]
fn keys_of_formats_are_plain() {
    let asked = |content: &str| json!([{"role": "user", "content": content}]);
    for (source, content) in [
        ("{{ '%(a~b)s' % {'a~b': 1} }}", ""),
        ("{{ '%(a~' % {'a': 1} }}", ""),
        ("{{ '%(a~b)s'|format(1) }}", ""),
        ("{{ '{0[a~b]}'.format({'a~b': 1}) }}", ""),
        ("{{ '{a[b][~'.format(a={'b': 1}) }}", ""),
        // The format may be the client's.
        ("{{ messages[0].content % 1 }}{{ messages[0].content|format(1) }}", "%(a~b)s"),
        ("{{ messages[0].content.format(1) }}", "{0[a~b]}"),
    ] {
        let error = render(source, asked(content)).unwrap_err();
        assert!(matches!(error, TemplateError::Render { .. }), "{source}: {error}");
    }
    for (source, text) in [
        ("{{ '%%(~) %s é' % 'ü' }}", "%(~) ü é"),
        ("{{ '%(a)s é' % {'a': 'ü'} }}", "ü é"),
        ("{{ '{{[~] {0[a]} é [~]'.format({'a': 'ü'}) }}", "{[~] ü é [~]"),
    ] {
        assert_eq!(render(source, asked("")).unwrap(), text, "{source}");
    }
}

#[test]
fn mistakes_name_the_line() {
    let error = ChatTemplate::new("a\nb\n{% for %}".to_owned(), special()).unwrap_err();
    assert!(matches!(&error, TemplateError::Syntax { reason } if reason.contains(":3)")), "{error}");
    let error = render("a\n{{ messages.x.y }}", json!([])).unwrap_err();
    assert!(matches!(&error, TemplateError::Render { reason } if reason.contains(":2)")), "{error}");
    let error = render("{{ 1 | nofilter }}", json!([])).unwrap_err();
    assert!(error.to_string().contains("nofilter"), "{error}");
    let error = render("{{ strftime_now('%Q') }}", json!([])).unwrap_err();
    assert!(error.to_string().contains("%Q is not supported"), "{error}");
    let error = render("{{ strftime_now('%') }}", json!([])).unwrap_err();
    assert!(error.to_string().contains("not supported"), "{error}");
}

#[test]
fn dates_over_leap_years() {
    let at = |seconds, format: &str| {
        strftime::format(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds), format).unwrap()
    };
    assert_eq!(at(0, "%a %F %T %j"), "Thu 1970-01-01 00:00:00 001");
    assert_eq!(at(951_782_400, "%A %d %b %Y %j"), "Tuesday 29 Feb 2000 060");
    assert_eq!(at(1_735_603_200, "%F %j"), "2024-12-31 366");
    assert_eq!(at(1_735_689_600, "%F %-j %-d/%-m %-I%p"), "2025-01-01 1 1/1 12AM");
    assert_eq!(at(4_107_542_400, "%F %a"), "2100-03-01 Mon");
    assert_eq!(at(1_772_874_302, "%H:%M:%S"), "09:05:02");
}

mod hostile {
    use proptest::prelude::*;

    use super::*;

    const PIECES: [&str; 60] = [
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "#}",
        "{%-",
        "-%}",
        "'",
        "\"",
        "\\",
        "\n",
        " ",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ",",
        ".",
        "|",
        "%",
        "=",
        "~",
        "+",
        "-",
        "*",
        ":",
        "if ",
        "elif ",
        "else",
        "endif",
        "for x in ",
        "endfor",
        "set x = ",
        "endset",
        "macro m(",
        "endmacro",
        "varargs",
        "m",
        "generation",
        "endgeneration",
        "raw",
        "endraw",
        "filter ",
        "endfilter",
        "messages",
        "x",
        "upper",
        "tojson",
        "is ",
        "not ",
        "1",
        "'%s' % ",
        "'a'.center(9)",
        "loop",
        "namespace(v=1)",
        "é",
        "percent_format",
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]

        /// Whatever the source: an answer, never a panic, and what is refused is refused with a reason.
        #[test]
        fn any_source_is_answered(pieces in prop::collection::vec(prop::sample::select(&PIECES[..]), 0..40)) {
            let source = pieces.concat();
            let conversation = messages(json!([{"role": "user", "content": "hi"}]));
            let rendered = ChatTemplate::new(source, special())
                .and_then(|template| template.render(&conversation, None, true, &Map::new()));
            prop_assert!(!matches!(rendered, Err(TemplateError::Thread { .. })), "{rendered:?}");
        }

        /// A source without tags is written as it is, and is left alone by the rewriting.
        #[test]
        fn plain_text_is_written_as_it_is(text in "[^{\r]{0,60}") {
            // The engine drops one line break at the end, as Jinja does.
            let expected = text.strip_suffix('\n').unwrap_or(&text).to_owned();
            prop_assert_eq!(render(&text, json!([])), Ok(expected));
        }
    }
}
