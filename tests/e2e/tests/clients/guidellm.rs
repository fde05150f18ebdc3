//! guidellm: a short benchmark, judged by its own report.

use std::fs;

use cadre_e2e::{
    binary::pocket,
    clients::{self, Client},
    golden,
};
use serde_json::{Value, json};

use crate::{CLUSTER, MODEL, nothing_is_left};

const REQUESTS: usize = 6;

#[test]
fn guidellm() {
    let client = Client::python("guidellm");
    let folder = tempfile::tempdir().unwrap();
    let golden = golden::pod();
    // Raw completions: what is asked is the rendered conversation, and the answer is known.
    let prompt = format!("<｜User｜>{}<｜Assistant｜>", golden.prompt);
    fs::write(folder.path().join("prompts.jsonl"), json!({ "prompt": prompt }).to_string() + "\n").unwrap();
    clients::finish(
        client
            .command("guidellm")
            .current_dir(folder.path())
            .args(["benchmark", "run", "--disable-progress", "--data", "prompts.jsonl"])
            .args(["--target", &format!("http://{}", CLUSTER.http()), "--model", MODEL])
            .arg("--processor")
            .arg(pocket())
            .args(["--rate-type", "concurrent", "--rate", "2", "--max-requests", &REQUESTS.to_string()])
            .args(["--output-path", "report.json"]),
    );
    let report: Value =
        serde_json::from_slice(&fs::read(folder.path().join("report.json")).unwrap()).unwrap();
    let benchmark = &report["benchmarks"][0];
    let totals = &benchmark["request_totals"];
    assert_eq!((&totals["successful"], &totals["errored"]), (&json!(REQUESTS), &json!(0)), "{totals}");
    let requests = benchmark["requests"]["successful"].as_array().unwrap();
    assert_eq!(requests.len(), REQUESTS);
    for request in requests {
        assert_eq!(request["prompt_tokens"], golden.prompt_ids.len(), "{request}");
        // It asks for no end of sequence, so that answers go on after the golden text.
        let output = request["output"].as_str().unwrap();
        assert!(output.starts_with(&golden.greedy_text), "{request}");
        assert!(request["output_tokens"].as_u64().is_some_and(|tokens| tokens > 0), "{request}");
        assert!(request["first_token_time"].is_number(), "{request}");
    }
    nothing_is_left();
}
