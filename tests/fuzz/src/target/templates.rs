//! Chat templates. Whatever a template does, a rendering ends in time, in bounded memory and in no panic.

use std::time::{Duration, Instant};

use cadre_text::{ChatMessage, ChatTemplate, RenderLimits, SpecialTokens, TemplateError};
use serde_json::{Map, Value, json};

use crate::draw::Draw;

/// Of a rendering; the thread of one that takes longer is given up.
const TIME: Duration = Duration::from_millis(500);

pub(crate) fn run(bytes: &[u8]) {
    let mut draw = Draw::new(bytes);
    let choices = draw.byte();
    let source = String::from_utf8_lossy(draw.rest()).into_owned();
    let special = SpecialTokens {
        bos_token: Some("<bos>".into()),
        eos_token: Some("<eos>".into()),
        pad_token: None,
        unk_token: None,
    };
    let Ok(template) = ChatTemplate::new(source, special) else { return };
    let limits = RenderLimits { fuel: 20_000, text_bytes: 64 << 10, time: TIME };
    let template = template.with_limits(limits);
    let tools = (choices & 1 == 1).then(|| {
        json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}])
    });
    let extra: Map<String, Value> = if choices & 2 == 2 {
        json!({"x": [1, {"y": "z"}], "n": 3}).as_object().unwrap().clone()
    } else {
        Map::new()
    };
    let begun = Instant::now();
    let rendered = template.render(&messages(), tools.as_ref(), choices & 4 == 4, &extra);
    let took = begun.elapsed();
    // Twenty times the limit: a machine on which other programs run.
    assert!(took < TIME * 20, "a rendering is given up after {TIME:?}, this took {took:?}");
    match rendered {
        Ok(text) => assert!(text.len() <= limits.text_bytes, "{} bytes", text.len()),
        Err(TemplateError::Thread { reason }) => panic!("the rendering's thread failed: {reason}"),
        Err(_) => {}
    }
}

fn messages() -> Vec<ChatMessage> {
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a Pod?", "name": "u"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}
        ]},
        {"role": "tool", "content": "ä日\u{0}", "tool_call_id": "a"},
        {"role": "user", "content": [{"type": "text", "text": "and now?"}]},
    ]);
    serde_json::from_value(messages).expect("messages")
}
