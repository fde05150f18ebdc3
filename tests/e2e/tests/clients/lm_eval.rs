//! lm-eval: a task of generate_until by both of its models for servers, judged by its own score.

use std::fs;

use cadre_e2e::{
    binary::pocket,
    clients::{self, Client},
    golden,
};
use serde_json::{Value, json};

use crate::{CLUSTER, MODEL, nothing_is_left};

/// The first sentence of every golden answer is the right answer.
fn score(model: &str, path: &str) {
    let client = Client::python("lm_eval");
    let folder = tempfile::tempdir().unwrap();
    fs::copy(client.source("pods.yaml"), folder.path().join("pods.yaml")).unwrap();
    let questions = golden::all().iter().map(|golden| {
        let answer = golden.greedy_text.split('.').next();
        json!({"question": golden.prompt, "answer": answer}).to_string() + "\n"
    });
    fs::write(folder.path().join("pods.jsonl"), questions.collect::<String>()).unwrap();
    let base_url = format!("http://{}/v1/{path}", CLUSTER.http());
    let tokenizer = pocket();
    let arguments = format!(
        "model={MODEL},base_url={base_url},tokenizer={},num_concurrent=2,max_retries=1",
        tokenizer.display()
    );
    clients::finish(
        client
            .command("lm_eval")
            .current_dir(folder.path())
            .env("HF_HOME", folder.path().join("hf"))
            .env("HF_HUB_OFFLINE", "1")
            .args(["run", "--model", model, "--model_args", &arguments, "--apply_chat_template"])
            .args(["--tasks", "cadre_pods", "--include_path", ".", "--output_path", "report"]),
    );
    let report =
        fs::read_dir(folder.path().join("report").join(MODEL)).unwrap().next().unwrap().unwrap().path();
    let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    let results = &report["results"]["cadre_pods"];
    assert_eq!(results["exact_match,none"], 1.0, "{results}");
    assert_eq!(report["n-samples"]["cadre_pods"]["effective"], golden::all().len(), "{report}");
    nothing_is_left();
}

#[test]
fn lm_eval_completions() {
    score("local-completions", "completions");
}

#[test]
fn lm_eval_chat() {
    score("local-chat-completions", "chat/completions");
}
