//! Load from inside the cluster: `cadre soak` as a restricted pod beside the model.
//!
//! It compares every answer with the golden text. Its pod is ended by `activeDeadlineSeconds`, which makes the
//! kubelet stop the process as a deletion does and leaves its log to be read.

use std::collections::BTreeMap;

use cadre_k8s_api::names::{grpc_service, port};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use crate::{
    cluster::cluster,
    front::golden_texts,
    model::Model,
    pod::PodView,
    wait::{self, LIMIT, holds},
};

mod report;

pub use report::{Failures, Progress, Summary};

use report::Line;

/// Name of its pod and of what it must be answered.
const NAME: &str = "soak";

/// Streams that ask without a pause.
pub const STREAMS: u64 = 4;

/// Load on a model.
#[derive(Debug)]
pub struct Soak<'m, 'a> {
    model: &'m Model<'a>,
}

impl<'m, 'a> Soak<'m, 'a> {
    /// Starts it anywhere.
    #[track_caller]
    pub fn start(model: &'m Model<'a>) -> Self {
        Self::begin(model, json!({}))
    }

    /// Starts it on a node that the test leaves alone.
    #[track_caller]
    pub fn start_on(model: &'m Model<'a>, node: &str) -> Self {
        Self::begin(model, json!({"kubernetes.io/hostname": node}))
    }

    #[track_caller]
    fn begin(model: &'m Model<'a>, node_selector: Value) -> Self {
        let kubectl = model.namespace().kubectl();
        let expected: BTreeMap<&str, &str> =
            golden_texts().map(|golden| (golden.prompt.as_str(), golden.greedy_text.as_str())).collect();
        let expected = serde_json::to_string(&expected).expect("texts are JSON");
        kubectl.apply(&json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": NAME},
            "data": {"expect.json": expected},
        }));
        kubectl.apply(&pod(model.name(), node_selector));
        let soak = Self { model };
        soak.more(2 * STREAMS);
        soak
    }

    /// Waits until so many more requests were answered rightly.
    #[track_caller]
    pub fn more(&self, answers: u64) {
        let mut wanted = None;
        wait::until(&format!("{answers} more answers"), LIMIT, || {
            let progress = self.progress()?;
            let wanted = *wanted.get_or_insert(progress.ok + answers);
            holds(progress.ok >= wanted, || format!("{wanted} wanted: {progress:?}"))
        });
    }

    /// How far it is.
    pub fn progress(&self) -> Result<Progress, String> {
        let lines = self.lines(&["--tail=3"])?;
        let progress = lines.iter().rev().find_map(|line| match line {
            Line::Progress(progress) => Some(progress.clone()),
            Line::Start {} | Line::Summary(_) => None,
        });
        match (progress, self.pod()?) {
            (Some(progress), pod) if pod.phase == "Running" => Ok(progress),
            (progress, pod) => Err(format!("pod {NAME} is {} ({:?}): {progress:?}", pod.phase, pod.waiting)),
        }
    }

    fn pod(&self) -> Result<PodView, String> {
        let pod: Pod = self.model.namespace().kubectl().get(&["pod", NAME])?;
        Ok(PodView::from(&pod))
    }

    fn lines(&self, args: &[&str]) -> Result<Vec<Line>, String> {
        let text = self.model.namespace().kubectl().run(&[&["logs", NAME], args].concat());
        report::parse(&text.map_err(|error| error.to_string())?)
    }

    /// Ends it and returns what it counted.
    #[track_caller]
    pub fn end(self) -> Summary {
        let kubectl = self.model.namespace().kubectl();
        kubectl.patch(&format!("pod/{NAME}"), &json!({"spec": {"activeDeadlineSeconds": 1}}));
        let summary = wait::until("the load's summary", LIMIT, || {
            match self.lines(&["--tail=3"])?.into_iter().next_back() {
                Some(Line::Summary(summary)) => Ok(summary),
                other => Err(format!("{other:?}")),
            }
        });
        let timeout = format!("--timeout={}s", LIMIT.as_secs());
        kubectl.must(&["delete", &format!("pod/{NAME}"), &format!("configmap/{NAME}"), &timeout]);
        assert_eq!(summary.different, 0, "other texts: {summary:#?}");
        assert!(summary.ok > 0, "nothing was answered: {summary:#?}");
        summary
    }

    /// Ends it; not one request may have failed.
    #[track_caller]
    pub fn end_without_failure(self) -> Summary {
        let summary = self.end();
        assert_eq!(summary.failed, 0, "requests failed: {summary:#?}");
        summary
    }
}

fn pod(model: &str, node_selector: Value) -> Value {
    let address = format!("{}:{}", grpc_service(model), port::GRPC);
    let streams = STREAMS.to_string();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": NAME},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "nodeSelector": node_selector,
            // It must not be evicted from the node where it watches.
            "tolerations": [{"operator": "Exists", "effect": "NoExecute"}],
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "soak",
                "image": cluster().image(),
                "args": ["soak", "--json", "--grpc", address, "--concurrency", streams,
                    "--expect", "/expect/expect.json"],
                "resources": {"requests": {"cpu": "20m", "memory": "32Mi"}},
                "volumeMounts": [{"name": "expect", "mountPath": "/expect", "readOnly": true}],
                "securityContext": {
                    "readOnlyRootFilesystem": true,
                    "allowPrivilegeEscalation": false,
                    "capabilities": {"drop": ["ALL"]},
                },
            }],
            "volumes": [{"name": "expect", "configMap": {"name": NAME}}],
        },
    })
}
