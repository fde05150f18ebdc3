//! `cadre up` as a command: what it prints, what it leaves behind, what it refuses.

use std::{
    fs,
    net::TcpListener,
    process::{Command, Output, Stdio},
};

use cadre_e2e::{
    Cluster,
    binary::{cadre, pocket, root},
    checkpoints, golden, grpc, process, wait,
};
use serde_json::json;

fn run(args: &[&str]) -> Output {
    Command::new(cadre()).args(args).current_dir(root()).stdin(Stdio::null()).output().expect("cadre starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn exit_after_prints_the_text_alone_and_stops() {
    let output =
        run(&["up", "--exit-after", "What is a Pod?", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), format!("{}\n", golden::pod().greedy_text));
}

#[test]
fn chat_streams_an_answer() {
    let cluster = Cluster::start(&["--experts=1", "--prefill=0"]);
    let grpc = cluster.grpc();
    let output = run(&["chat", "What is a Pod?", "--grpc", &grpc, "--temperature", "0"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), format!("{}\n", golden::pod().greedy_text));
    assert!(
        text(&output.stderr).contains("tiny"),
        "says what the bundled model is: {}",
        text(&output.stderr)
    );

    let bench =
        run(&["bench", "--grpc", &grpc, "-p", "16", "-n", "4", "-c", "1,2", "--repeat", "1", "--json"]);
    assert!(bench.status.success(), "{}", text(&bench.stderr));
    let report: serde_json::Value = serde_json::from_slice(&bench.stdout).expect("JSON");
    assert_eq!(report["runs"][1]["streams"], 2);
    assert!(
        report["runs"][1]["decode_tokens_per_second"].as_f64().is_some_and(|rate| rate > 0.0),
        "{report}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ctrl_c_lets_requests_finish_and_leaves_no_process() {
    let mut cluster = Cluster::start(&["--experts=2"]);
    let mut client = grpc::connect(&cluster.grpc()).await;
    let mut chunks =
        client.generate_stream(grpc::endless("What is a Pod?", 60)).await.expect("a stream").into_inner();
    let mut tokens = chunks.message().await.expect("a chunk").map_or(0, |chunk| chunk.tokens.len());
    let ending = std::thread::spawn(move || {
        let status = cluster.interrupt();
        (cluster, status)
    });
    while let Some(chunk) = chunks.message().await.expect("the stream is not cut") {
        tokens += chunk.tokens.len();
    }
    assert_eq!(tokens, 60, "the request in flight finished");
    drop(client);
    let (cluster, status) =
        tokio::task::spawn_blocking(|| ending.join().expect("the thread")).await.expect("joined");
    assert!(status.success(), "{status}\n{}", cluster.log());
    assert_eq!(cluster.pids().len(), 6, "up, router, prefill, decode and two shards were seen");
    cluster.all_gone();
    assert!(!cluster.log().contains("killed"), "{}", cluster.log());
}

/// `timeout` sends its signal to the process and to its group, which is twice to the process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_that_comes_twice_at_once_is_one_request_and_drains() {
    let mut cluster = Cluster::start(&["--experts=1", "--prefill=0"]);
    let mut client = grpc::connect(&cluster.grpc()).await;
    let mut chunks =
        client.generate_stream(grpc::endless("What is a Pod?", 60)).await.expect("a stream").into_inner();
    let mut tokens = chunks.message().await.expect("a chunk").map_or(0, |chunk| chunk.tokens.len());
    let (up, script) = (cluster.up_pid(), "kill -s TERM $0; kill -s TERM $0");
    assert!(Command::new("sh").args(["-c", script, &up.to_string()]).status().expect("sh").success());
    while let Some(chunk) = chunks.message().await.expect("the stream is not cut") {
        tokens += chunk.tokens.len();
    }
    assert_eq!(tokens, 60, "the request in flight finished");
    drop(client);
    let cluster = tokio::task::spawn_blocking(move || {
        assert!(cluster.wait().success());
        cluster
    });
    let cluster = cluster.await.expect("joined");
    assert!(!cluster.log().contains("stopping at once"), "{}", cluster.log());
    cluster.all_gone();
}

#[test]
fn a_second_ctrl_c_stops_at_once() {
    let mut cluster = Cluster::start(&["--experts=2"]);
    // It cannot drain.
    cluster.signal("expert 1", "STOP");
    process::signal(cluster.up_pid(), "INT");
    wait::until("the drain begins", || cluster.log().contains("stopping (SIGINT)").then_some(()));
    // Again until it counts: a signal that follows at once is the same request.
    wait::until("up stops", || {
        if process::runs(cluster.up_pid()) {
            process::signal(cluster.up_pid(), "INT");
            return None;
        }
        Some(())
    });
    cluster.wait();
    assert!(cluster.log().contains("stopping at once"), "{}", cluster.log());
    cluster.all_gone();
}

#[test]
fn killing_up_leaves_no_process() {
    let mut cluster = Cluster::start(&["--experts=2"]);
    process::signal(cluster.up_pid(), "KILL");
    cluster.wait();
    cluster.all_gone();
}

#[test]
fn a_busy_port_is_named_with_its_flag() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    for (flag, other) in [("--grpc", "--http"), ("--http", "--grpc")] {
        let output = run(&["up", flag, &address, other, "127.0.0.1:0"]);
        assert!(!output.status.success());
        let message = text(&output.stderr);
        assert!(message.contains(&address) && message.contains(flag), "{message}");
    }
}

#[test]
fn a_role_that_cannot_start_fails_the_start_by_name() {
    let mut cluster = Cluster::spawn(&[
        "--model",
        pocket().to_str().expect("UTF-8"),
        "--experts=1",
        "--prefill=0",
        "--worker-arg=--kv-bytes=1",
    ]);
    let status = cluster.wait();
    assert!(!status.success());
    cluster.all_gone();
    assert!(cluster.log().contains("decode 0 ended"), "{}", cluster.log());
    assert!(cluster.log().contains("kv-bytes"), "the reason is there: {}", cluster.log());
}

/// One way to damage a checkpoint and the words that the refusal must have.
struct Damage {
    what: &'static str,
    words: &'static [&'static str],
    harm: fn(&std::path::Path),
}

const SHARD: &str = "model-00001-of-000002.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const GATE: &str = "model.layers.3.mlp.gate.weight";
const SCALE: &str = "model.layers.2.mlp.experts.5.up_proj.weight_scale_inv";

const DAMAGES: [Damage; 9] = [
    Damage {
        what: "an end of sequence that no token is",
        words: &["generation_config.json", "eos_token_id", "4096"],
        harm: |folder| {
            checkpoints::edit_json(folder, "generation_config.json", |config| {
                config["eos_token_id"] = json!(4096);
            });
        },
    },
    Damage {
        what: "an added token without an embedding",
        words: &["tokenizer.json", "vocab_size = 4096", "<|new|>"],
        harm: |folder| {
            checkpoints::edit_json(folder, "tokenizer.json", |tokenizer| {
                let tokens = tokenizer["added_tokens"].as_array_mut().expect("a list");
                let mut token = tokens[0].clone();
                token["id"] = json!(4096);
                token["content"] = json!("<|new|>");
                tokens.push(token);
            });
        },
    },
    Damage {
        what: "truncated shard",
        words: &[SHARD],
        harm: |folder| checkpoints::truncate(folder, SHARD, 1000),
    },
    Damage {
        what: "missing tensor",
        words: &[GATE],
        harm: |folder| {
            for file in [SHARD, "model-00002-of-000002.safetensors"] {
                checkpoints::edit_header(folder, file, |header| {
                    header.as_object_mut().expect("a table").shift_remove(GATE);
                });
            }
            checkpoints::edit_json(folder, INDEX, |index| {
                index["weight_map"].as_object_mut().expect("a table").shift_remove(GATE);
            });
        },
    },
    Damage {
        what: "wrong shape",
        words: &["kv_a_proj_with_mqa", "expected"],
        harm: |folder| {
            for file in [SHARD, "model-00002-of-000002.safetensors"] {
                checkpoints::edit_header(folder, file, |header| {
                    let name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight";
                    if let Some(tensor) = header.get_mut(name) {
                        tensor["shape"] = json!([256, 160]);
                    }
                });
            }
        },
    },
    Damage {
        what: "scale that is not a number",
        words: &[SCALE],
        harm: |folder| checkpoints::overwrite(folder, SCALE, &f32::NAN.to_le_bytes()),
    },
    Damage {
        what: "index that points nowhere",
        words: &["index", "model-00009"],
        harm: |folder| {
            checkpoints::edit_json(folder, INDEX, |index| {
                index["weight_map"][GATE] = json!("model-00009-of-000002.safetensors");
            });
        },
    },
    Damage {
        what: "unknown gate",
        words: &["config.json", "topk_method", "greedy_plus"],
        harm: |folder| {
            checkpoints::edit_json(folder, "config.json", |config| {
                config["topk_method"] = json!("greedy_plus")
            })
        },
    },
    Damage {
        what: "missing field",
        words: &["config.json", "kv_lora_rank"],
        harm: |folder| {
            checkpoints::edit_json(folder, "config.json", |config| {
                config.as_object_mut().expect("a table").shift_remove("kv_lora_rank");
            });
        },
    },
];

#[test]
fn a_bad_checkpoint_is_refused_by_name() {
    for Damage { what, words, harm } in DAMAGES {
        let folder = checkpoints::copy();
        harm(folder.path());
        let model = folder.path().to_str().expect("UTF-8");
        let up = run(&[
            "up",
            "--model",
            model,
            "--exit-after",
            "x",
            "--grpc",
            "127.0.0.1:0",
            "--http",
            "127.0.0.1:0",
        ]);
        let inspect = run(&["inspect", model, "--verify"]);
        for (command, output) in [("up", up), ("inspect", inspect)] {
            let said = text(&output.stderr) + &text(&output.stdout);
            assert!(!output.status.success(), "{what}, {command}: {said}");
            assert!(output.status.code().is_some(), "{what}, {command}: ended by a signal: {said}");
            assert!(!said.contains("panicked"), "{what}, {command}: {said}");
            for word in words {
                assert!(said.contains(word), "{what}, {command}: {word:?} is not in: {said}");
            }
        }
    }
}

#[test]
fn a_folder_that_is_no_checkpoint_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join("readme.txt"), "nothing").expect("a file");
    let model = folder.path().to_str().expect("UTF-8");
    let output = run(&["up", "--model", model, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("config.json"), "{}", text(&output.stderr));
}

#[test]
fn a_synthetic_checkpoint_is_inspected_and_served_by_token_ids() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("tiny");
    let path = out.to_str().expect("UTF-8");
    let bundled = pocket();
    let tokenizer = bundled.to_str().expect("UTF-8");
    let synth =
        run(&["synth", path, "--preset", "tiny", "--dtype", "bf16", "--seed", "3", "--tokenizer", tokenizer]);
    assert!(synth.status.success(), "{}", text(&synth.stderr));
    let inspect = run(&["inspect", path, "--shards", "2", "--json", "--verify"]);
    assert!(inspect.status.success(), "{}", text(&inspect.stderr));
    let report: serde_json::Value = serde_json::from_slice(&inspect.stdout).expect("JSON");
    assert_eq!(report["verified"], true);
    assert_eq!(report["layout"]["shards"].as_array().map(Vec::len), Some(2), "{report}");
    let up = run(&[
        "up",
        "--model",
        path,
        "--experts",
        "2",
        "--exit-after",
        "hello",
        "--grpc",
        "127.0.0.1:0",
        "--http",
        "127.0.0.1:0",
        "--max-tokens",
        "8",
    ]);
    assert!(up.status.success(), "{}", text(&up.stderr));
    assert!(!up.stdout.is_empty());
}
