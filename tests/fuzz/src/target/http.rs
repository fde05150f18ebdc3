//! Bodies of the OpenAI-compatible API, through the router's own routes to the choice of a worker, of which there is
//! none that answers. A request is never worth more than its refusal: in OpenAI's shape, and never a 500.

use std::{sync::LazyLock, time::Duration};

use axum::{
    Router,
    body::Body,
    http::{Request, StatusCode},
};
use cadre_checkpoint::WeightsOptions;
use cadre_router::{fuzzing, model::ServedModel};
use cadre_types::NumericsClass;
use http_body_util::BodyExt;
use serde_json::{Map, Value, json};
use tokio::runtime::Runtime;
use tower::ServiceExt;

use crate::{draw::Draw, pocket};

struct Rig {
    routes: Router,
    runtime: Runtime,
}

static RIG: LazyLock<Rig> = LazyLock::new(|| {
    let model = ServedModel::load(&pocket(), &WeightsOptions::default(), None, NumericsClass::Bf16)
        .expect("the bundled checkpoint");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let routes = runtime.block_on(async { fuzzing::http_routes(model).expect("metrics") });
    Rig { routes, runtime }
});

const ENDPOINTS: [&str; 2] = ["/v1/chat/completions", "/v1/completions"];

pub(crate) fn run(bytes: &[u8]) {
    let mut draw = Draw::new(bytes);
    let endpoint = draw.below(ENDPOINTS.len());
    let body = match draw.one_in(2) {
        true => draw.rest().to_vec(),
        false => serde_json::to_vec(&drawn(endpoint == 0, draw)).expect("JSON"),
    };
    RIG.runtime.block_on(ask(ENDPOINTS[endpoint], body));
}

async fn ask(path: &str, body: Vec<u8>) {
    let shown = || String::from_utf8_lossy(&body).into_owned();
    let request = Request::post(path)
        .header("content-type", "application/json")
        .body(Body::from(body.clone()))
        .unwrap();
    let answered = tokio::time::timeout(Duration::from_secs(60), RIG.routes.clone().oneshot(request));
    let response = answered.await.expect("an answer in time").expect("infallible");
    let status = response.status();
    let text = response.into_body().collect().await.expect("a body").to_bytes();
    let answer: Value = serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    let error = &answer["error"];
    let refusals = [
        StatusCode::BAD_REQUEST,
        StatusCode::NOT_FOUND,
        StatusCode::PAYLOAD_TOO_LARGE,
        // No worker answers, which ends everything that is right.
        StatusCode::SERVICE_UNAVAILABLE,
    ];
    assert!(refusals.contains(&status), "{status} {answer} for {}", shown());
    let message = error["message"].as_str().unwrap_or_else(|| panic!("{answer} for {}", shown()));
    assert!(!message.is_empty() && error["type"].is_string() && error["code"].is_string(), "{answer}");
    for words in ["untagged enum", "expected struct", "invalid type", "panicked"] {
        // Values are quoted, and a fuzzer reads these words from our comparison.
        let is_ours = message.contains(words) && !shown().contains(words);
        assert!(!is_ours, "a parser's words in {message:?} for {}", shown());
    }
}

/// Every field that a body may have and some that it may not, with values of every kind.
const FIELDS: [&str; 44] = [
    "model",
    "messages",
    "prompt",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "tools",
    "tool_choice",
    "response_format",
    "chat_template_kwargs",
    "user",
    "store",
    "service_tier",
    "modalities",
    "echo",
    "best_of",
    "suffix",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "guided_json",
    "structured_outputs",
    "add_generation_prompt",
    "reasoning_effort",
    "priority",
    "metadata",
    "functions",
    "anything",
];

/// A right body with fields from the table.
fn drawn(is_chat: bool, mut draw: Draw<'_>) -> Value {
    let mut body = Map::new();
    body.insert("model".into(), "pocket".into());
    match is_chat {
        true => drop(body.insert("messages".into(), json!([{"role": "user", "content": "x"}]))),
        false => drop(body.insert("prompt".into(), "x".into())),
    }
    while !draw.is_empty() {
        let name = draw.of(&FIELDS);
        let value =
            if name == "messages" && draw.one_in(2) { messages(&mut draw) } else { value(&mut draw, 0) };
        body.insert(name.into(), value);
    }
    Value::Object(body)
}

fn messages(draw: &mut Draw<'_>) -> Value {
    let message = |draw: &mut Draw<'_>| {
        let role = draw.of(&["user", "assistant", "system", "developer", "tool", "function", "nobody"]);
        let mut message = json!({"role": role, "content": value(draw, 1)});
        if draw.one_in(2) {
            let name = draw.of(&["tool_calls", "name", "tool_call_id", "reasoning_content", "refusal"]);
            message[name] = value(draw, 1);
        }
        message
    };
    (0..draw.below(4)).map(|_| message(draw)).collect()
}

fn value(draw: &mut Draw<'_>, depth: usize) -> Value {
    match draw.below(if depth < 4 { 13 } else { 9 }) {
        0 => Value::Null,
        1 => draw.one_in(2).into(),
        2 => draw.number().into(),
        3 => (draw.number() as i64).into(),
        4 => json!(f64::from_bits(draw.number())),
        5 => json!(draw.of(&[0.0, -0.0, 0.5, 1.0, 2.0, -2.0, 1e-44, 1e308, 1e-308])),
        6 => draw.of(&["", "auto", "text", "pocket", "</s>", "<｜User｜>", "\u{0}", "é"]).into(),
        7 => String::from_utf8_lossy(draw.bytes()).into(),
        8 => json!({"type": "text", "text": "x"}),
        9 | 10 => (0..draw.below(4)).map(|_| value(draw, depth + 1)).collect(),
        11 => {
            let key = draw.of(&["type", "text", "function", "include_usage", "10", "content", "x"]);
            json!({ key: value(draw, depth + 1) })
        }
        // Deeper than anybody nests.
        _ => (0..draw.below(200)).fold(value(draw, 4), |inner, _| json!([inner])),
    }
}
