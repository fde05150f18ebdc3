//! aiperf: a short benchmark of streamed chat, judged by its own report.

use std::fs;

use cadre_e2e::{
    binary::pocket,
    clients::{self, Client},
};
use serde_json::{Value, json};

use crate::{CLUSTER, MODEL, nothing_is_left};

const REQUESTS: u32 = 6;
const ANSWER_TOKENS: u32 = 12;

#[test]
fn aiperf() {
    let client = Client::python("aiperf");
    let folder = tempfile::tempdir().unwrap();
    clients::finish(
        client
            .command("aiperf")
            .current_dir(folder.path())
            .args(["profile", "--model", MODEL, "--url", &format!("http://{}", CLUSTER.http())])
            .args(["--endpoint-type", "chat", "--streaming", "--tokenizer"])
            .arg(pocket())
            .args(["--request-count", &REQUESTS.to_string(), "--concurrency", "2", "--random-seed", "1"])
            .args(["--synthetic-input-tokens-mean", "32"])
            .args(["--output-tokens-mean", &ANSWER_TOKENS.to_string(), "--extra-inputs", "ignore_eos:true"])
            .args(["--use-server-token-count", "--ui-type", "none", "--artifact-dir", "report"]),
    );
    let path = folder.path().join("report/profile_export_aiperf.json");
    let report: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert_eq!(report["request_count"]["avg"], f64::from(REQUESTS), "{report}");
    assert_eq!(report["error_summary"], json!([]), "{report}");
    assert_eq!(report["total_output_tokens"]["avg"], f64::from(REQUESTS * ANSWER_TOKENS), "{report}");
    assert_eq!(report["output_sequence_length"]["avg"], f64::from(ANSWER_TOKENS), "{report}");
    assert!(report["input_sequence_length"]["avg"].as_f64().is_some_and(|tokens| tokens > 20.0), "{report}");
    assert!(report["time_to_first_token"]["avg"].as_f64().is_some_and(|time| time > 0.0), "{report}");
    nothing_is_left();
}
