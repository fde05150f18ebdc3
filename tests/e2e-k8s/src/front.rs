//! The front doors of a model, through port-forwards, and the texts that must come out of them.

use cadre_e2e::{Golden, golden, grpc, http};
use cadre_k8s_api::names::{grpc_service, http_service, port};
use serde_json::json;
use tokio::runtime::{Builder, Runtime};

use crate::{forward::PortForward, model::Model};

/// Below this distance between the first and the second token another numerics class may choose the other one.
const CLEAR: f32 = 1.0;

/// Golden texts that are the same in every numerics class, each complete with its end.
pub fn golden_texts() -> impl Iterator<Item = &'static Golden> {
    golden::all().iter().filter(|golden| golden.margins.iter().all(|margin| *margin > CLEAR))
}

/// gRPC and HTTP clients of a model.
#[derive(Debug)]
pub struct Front {
    grpc: PortForward,
    http: PortForward,
    model: String,
    runtime: Runtime,
}

impl Front {
    /// Opens both Services.
    #[track_caller]
    pub fn open(model: &Model<'_>) -> Self {
        let kubectl = model.namespace().kubectl();
        let service = |name: String| format!("service/{name}");
        Self {
            grpc: PortForward::open(kubectl, &service(grpc_service(model.name())), port::GRPC),
            http: PortForward::open(kubectl, &service(http_service(model.name())), port::HTTP),
            model: model.name().to_owned(),
            runtime: Builder::new_current_thread().enable_all().build().expect("a runtime"),
        }
    }

    /// The greedy answer over gRPC.
    #[track_caller]
    pub fn grpc(&self, prompt: &str) -> String {
        let answer = self.runtime.block_on(async {
            let mut client = grpc::connect(self.grpc.address()).await;
            client.generate(grpc::chat(prompt)).await
        });
        answer.unwrap_or_else(|status| panic!("{prompt:?}: {status}")).into_inner().text
    }

    /// The greedy answer over OpenAI's API.
    #[track_caller]
    pub fn http(&self, prompt: &str) -> String {
        let body = json!({
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
        });
        let answer = self.runtime.block_on(http::post(self.http.address(), "/v1/chat/completions", &body));
        assert!(answer.status.is_success(), "{prompt:?}: {} {}", answer.status, answer.body);
        let text = answer.json()["choices"][0]["message"]["content"].as_str().map(str::to_owned);
        text.unwrap_or_else(|| panic!("{prompt:?}: {}", answer.body))
    }

    /// Both answer with the golden texts.
    #[track_caller]
    pub fn assert_golden(&self) {
        let mut asked = 0;
        for golden in golden_texts() {
            assert_eq!(self.grpc(&golden.prompt), golden.greedy_text, "gRPC: {}", golden.prompt);
            assert_eq!(self.http(&golden.prompt), golden.greedy_text, "HTTP: {}", golden.prompt);
            asked += 1;
        }
        assert!(asked >= 3, "{asked} golden texts are clear");
    }
}

/// The model answers with the golden texts on both front doors.
#[track_caller]
pub fn assert_golden(model: &Model<'_>) {
    Front::open(model).assert_golden();
}
