//! Programs that people use with servers of this kind, unchanged and of a pinned version, before a real cluster:
//! docs/http-api.md has the table. One file each; a client that cannot be installed fails.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{process::Command, sync::LazyLock, time::Duration};

use cadre_e2e::{Cluster, clients, golden, grpc, http, wait};
use cadre_proto::v1::{GenerateChunk, inference_client::InferenceClient};
use tokio::{runtime::Runtime, task::JoinHandle};
use tonic::{Streaming, transport::Endpoint};

mod ai_sdk;
mod aiperf;
mod grpcio;
mod guidellm;
mod langchain;
mod litellm;
mod lm_eval;
mod openai;

/// Stops with the test process (its standard input ends).
static CLUSTER: LazyLock<Cluster> = LazyLock::new(|| Cluster::start(&[]));

/// One that refuses every request as long as the tests run.
static FULL: LazyLock<Full> = LazyLock::new(Full::start);

const MODEL: &str = "pocket";

/// A script that is content says so.
const PASSED: &str = r#""checks": "passed""#;

/// A cluster whose only two places are taken.
struct Full {
    cluster: Cluster,
    _runtime: Runtime,
    _running: Streaming<GenerateChunk>,
    _waiting: JoinHandle<()>,
}

impl Full {
    fn start() -> Self {
        let limits = ["--router-arg=--max-concurrent=1", "--router-arg=--max-waiting=1"];
        let cluster = Cluster::start(&[&["--experts=1", "--prefill=0"], &limits[..]].concat());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (running, waiting) = runtime.block_on(async {
            // Nobody reads these answers, and the window lets little of them through: they keep their places.
            let endpoint = Endpoint::from_shared(format!("http://{}", cluster.grpc())).unwrap();
            let channel = endpoint.initial_stream_window_size(256).connect().await.unwrap();
            let mut client = InferenceClient::new(channel);
            let endless = || grpc::endless("What is a Pod?", 4000);
            let mut running = client.generate_stream(endless()).await.unwrap().into_inner();
            running.message().await.unwrap();
            let waiting = tokio::spawn(async move {
                let _held = client.generate_stream(endless()).await;
                std::future::pending::<()>().await;
            });
            let admin = cluster.member("router").admin;
            wait::until_async("one waits", || async {
                (http::metric(&admin, "cadre_router_waiting_requests", &[]).await >= 1.0).then_some(())
            })
            .await;
            (running, waiting)
        });
        Self { cluster, _runtime: runtime, _running: running, _waiting: waiting }
    }
}

fn url(cluster: &Cluster) -> String {
    format!("http://{}/v1", cluster.http())
}

/// Runs a script that is told where the server is and what the right answer is.
fn passes(mut command: Command, addresses: &[String]) {
    let golden = golden::pod();
    let said = clients::finish(command.args(addresses).args([MODEL, &golden.prompt, &golden.greedy_text]));
    assert!(said.contains(PASSED) || said.contains(r#""checks":"passed""#), "{said}");
    nothing_is_left();
}

/// What a client has cancelled holds no page any more.
fn nothing_is_left() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(wait::until_async("every page is free", || async {
        for worker in ["prefill 0", "decode 0"] {
            let admin = CLUSTER.member(worker).admin;
            if http::metric(&admin, "cadre_worker_kv_pages", &["state=\"used\""]).await > 0.0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                return None;
            }
        }
        Some(())
    }));
}
