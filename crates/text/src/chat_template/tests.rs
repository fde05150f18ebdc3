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
