//! A whole cluster from a folder that has no weights yet.

use std::{
    fs,
    process::{Command, Output, Stdio},
};

use cadre_e2e::{
    Cluster,
    binary::{cadre, pocket, root},
    http,
};
use serde_json::json;
use tempfile::TempDir;

/// What a user has before the download.
fn config_only() -> TempDir {
    let folder = TempDir::new().expect("a temporary folder");
    for file in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(pocket().join(file), folder.path().join(file)).expect("copied");
    }
    folder
}

fn up(folder: &TempDir, args: &[&str]) -> Output {
    let model = folder.path().to_str().expect("UTF-8");
    let common = ["up", "--model", model, "--weights", "random:1", "--override", "n_routed_experts=16"];
    let prompt = ["--exit-after", "What is a Pod?", "--max-tokens", "12"];
    Command::new(cadre())
        .args(common)
        .args(prompt)
        .args(["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"])
        .args(args)
        .current_dir(root())
        .stdin(Stdio::null())
        .output()
        .expect("cadre starts")
}

#[test]
fn the_text_is_the_same_for_any_number_of_processes() {
    let folder = config_only();
    let one = up(&folder, &["--experts=1", "--prefill=0"]);
    let log = String::from_utf8_lossy(&one.stderr);
    assert!(one.status.success(), "{log}");
    assert!(log.contains("weights random:1 with n_routed_experts=16"), "it is said aloud: {log}");
    assert!(!one.stdout.trim_ascii().is_empty());
    let many = up(&folder, &["--experts=2", "--redundant-slots=16"]);
    assert_eq!(String::from_utf8_lossy(&one.stdout), String::from_utf8_lossy(&many.stdout));
}

#[test]
fn a_process_with_other_weights_is_refused_by_name() {
    let folder = config_only();
    let args = ["--experts=1", "--prefill=0", "--ready-timeout=15", "--expert-arg=--override=topk_group=1"];
    let refused = up(&folder, &args);
    assert!(!refused.status.success());
    let log = String::from_utf8_lossy(&refused.stderr);
    for words in [
        "member: weights random:1 with n_routed_experts=16, topk_group=1",
        "router: weights random:1 with n_routed_experts=16)",
    ] {
        assert!(log.contains(words), "{words} not in {log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_are_told() {
    let cluster = Cluster::start(&["--weights=random:7", "--override=num_experts_per_tok=2", "--experts=1"]);
    let models = http::get(&cluster.http(), "/v1/models").await.json();
    assert_eq!(models["data"][0]["weights"], "random:7");
    assert_eq!(models["data"][0]["overrides"], json!({"num_experts_per_tok": 2}));
}
