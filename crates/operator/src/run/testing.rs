//! What the executor's tests share: an API server that is played request by request, and a few objects.
//!
//! Every request is compared with the operator's rights ([`crate::rbac`]): one that no rule allows fails its test, so
//! the chart's roles cannot fall behind the code.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Arc, time::Duration};

use cadre_k8s_api::{MoEModel, names::label};
use cadre_telemetry::Metrics;
use futures::FutureExt;
use http::{Request, Response};
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use kube::{Client, client::Body};
use serde_json::{Value, json};
use tower::ServiceBuilder;
use tower_test::mock;

use super::{
    client::{ApiLayer, Pressure},
    coordinator::Coordinators,
    events::Events,
    gather::Settings,
    lease::Renewals,
    memory::Memories,
    metrics::OperatorMetrics,
    queue::{ModelKey, Queue},
    reconcile::Reconciler,
    stores::Stores,
};
use crate::{observed::Observed, plan::Plan, rbac};

/// Longer than anything here lasts, in virtual time.
const PATIENCE: Duration = Duration::from_secs(600);

/// The other end of a client.
pub(crate) struct Server(mock::Handle<Request<Body>, Response<Body>>);

/// A request that waits for its answer.
pub(crate) struct Call {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) content_type: String,
    pub(crate) body: Value,
    answer: mock::SendResponse<Response<Body>>,
}

/// A client with the operator's layers, and the server that it talks to.
pub(crate) fn api(metrics: &OperatorMetrics, pressure: &Pressure, renewals: &Renewals) -> (Client, Server) {
    let (service, handle) = mock::pair();
    let layer = ApiLayer::new(metrics.api_requests.clone(), pressure.clone());
    let service = ServiceBuilder::new().layer(renewals.clone()).layer(layer).service(service);
    (Client::new(service, "default"), Server(handle))
}

impl Server {
    /// The next request.
    pub(crate) async fn next(&mut self) -> Call {
        let next = tokio::time::timeout(PATIENCE, self.0.next_request()).await;
        let (request, answer) = next.expect("a request comes").expect("the client lives");
        Call::read(request, answer).await
    }

    /// The next request, which must be this one (`PATCH /api/v1/namespaces/ns/pods/p/status`).
    pub(crate) async fn expect(&mut self, request: &str) -> Call {
        let call = self.next().await;
        assert_eq!(call.line(), request);
        call
    }

    /// Nothing is asked.
    pub(crate) fn assert_idle(&mut self) {
        assert!(self.0.next_request().now_or_never().is_none(), "a request nobody expected");
    }
}

impl Call {
    async fn read(request: Request<Body>, answer: mock::SendResponse<Response<Body>>) -> Self {
        let (parts, body) = request.into_parts();
        let bytes = body.collect_bytes().await.unwrap();
        let header = parts.headers.get(http::header::CONTENT_TYPE);
        let call = Self {
            method: parts.method.to_string(),
            path: parts.uri.path().to_owned(),
            query: parts.uri.query().unwrap_or_default().to_owned(),
            content_type: header.map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default(),
            body: if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).unwrap() },
            answer,
        };
        call.assert_allowed();
        call
    }

    /// Method and path.
    pub(crate) fn line(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    /// It asks for a watch.
    pub(crate) fn is_watch(&self) -> bool {
        self.query.contains("watch=true")
    }

    fn assert_allowed(&self) {
        let mut segments: Vec<&str> = self.path.trim_matches('/').split('/').collect();
        let group = match segments.remove(0) {
            "api" => "",
            _ => segments.remove(0),
        };
        segments.remove(0);
        if segments.len() > 2 && segments[0] == "namespaces" {
            segments.drain(..2);
        }
        let resource = [&segments[..1], segments.get(2..).unwrap_or_default()].concat().join("/");
        let applies = self.content_type.contains("apply-patch");
        let verbs: &[&str] = match (self.method.as_str(), segments.len()) {
            ("GET", 1) if self.is_watch() => &["watch"],
            ("GET", 1) => &["list"],
            ("GET", _) => &["get"],
            ("POST", _) => &["create"],
            // An apply creates what is not there.
            ("PATCH", 2) if applies && group != "coordination.k8s.io" => &["patch", "create"],
            ("PATCH", _) => &["patch"],
            ("DELETE", _) => &["delete"],
            other => panic!("no such request: {other:?}"),
        };
        for verb in verbs {
            assert!(
                rbac::allows(group, &resource, verb),
                "no rule allows {verb} {group}/{resource}: {}",
                self.line()
            );
        }
    }

    /// Answers with an object.
    pub(crate) fn ok(self, object: Value) {
        self.send(200, &[], object.to_string().into_bytes());
    }

    /// Answers to an apply or a patch: what was sent, in this version.
    pub(crate) fn applied(self, resource_version: &str) {
        let mut object = self.body.clone();
        object["metadata"]["resourceVersion"] = json!(resource_version);
        self.ok(object);
    }

    /// Answers with a failure.
    pub(crate) fn fail(self, code: u16, reason: &str, message: &str) {
        self.fail_with(code, reason, message, &[], Value::Null);
    }

    /// The same with headers and details.
    pub(crate) fn fail_with(
        self,
        code: u16,
        reason: &str,
        message: &str,
        headers: &[(&'static str, &str)],
        details: Value,
    ) {
        let mut status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
            "reason": reason, "message": message});
        if !details.is_null() {
            status["details"] = details;
        }
        self.send(code, headers, status.to_string().into_bytes());
    }

    /// Answers a watch with these events, and ends it.
    pub(crate) fn events(self, events: &[Value]) {
        let lines: String = events.iter().map(|event| format!("{event}\n")).collect();
        self.send(200, &[], lines.into_bytes());
    }

    /// The connection breaks.
    pub(crate) fn break_off(self) {
        self.answer.send_error(std::io::Error::other("connection reset"));
    }

    fn send(self, code: u16, headers: &[(&'static str, &str)], body: Vec<u8>) {
        let mut response = Response::builder().status(code);
        for (name, value) in headers {
            response = response.header(*name, *value);
        }
        self.answer.send_response(response.body(Body::from(body)).unwrap());
    }
}

/// A reconciler over a played server.
pub(crate) struct Rig {
    pub(crate) reconciler: Arc<Reconciler>,
    pub(crate) server: Server,
    pub(crate) stores: Stores,
    pub(crate) metrics: OperatorMetrics,
}

/// A rig whose plan is this; the store has the model `ns/m` in version 10.
pub(crate) fn rig(planner: impl Fn(&Observed) -> Plan + Send + Sync + 'static) -> Rig {
    let metrics = OperatorMetrics::register(&Metrics::new()).unwrap();
    let pressure = Pressure::default();
    let (client, server) = api(&metrics, &pressure, &Renewals::default());
    let queue = Arc::new(Queue::new(metrics.due.clone()));
    let stores = Stores::new();
    stores.models.apply(model("10"));
    let address = super::CoordinatorAddress::new(|_, _| "127.0.0.1:1".to_owned());
    let reconciler = Reconciler {
        client: client.clone(),
        stores: stores.clone(),
        coordinators: Coordinators::new(address, queue, metrics.streams.clone()),
        events: Events::new(client, "operator-0"),
        pressure,
        metrics: metrics.clone(),
        memories: Memories::default(),
        planner: Arc::new(planner),
        secrets: None,
        settings: Settings { default_image: "image:1".to_owned(), ..Settings::default() },
    };
    Rig { reconciler: Arc::new(reconciler), server, stores, metrics }
}

impl Rig {
    /// Starts a reconcile.
    pub(crate) fn reconcile(&self) -> tokio::task::JoinHandle<Option<Duration>> {
        tokio::spawn(self.reconciler.clone().reconcile(key()))
    }

    /// Reconciles that came out so.
    pub(crate) fn outcomes(&self, result: &str) -> u64 {
        self.metrics.reconciles.with(&[result]).get()
    }
}

/// `ns/m`
pub(crate) fn key() -> ModelKey {
    ModelKey::new("ns", "m")
}

/// A plan of nothing.
pub(crate) fn nothing() -> Plan {
    Plan {
        actions: Vec::new(),
        status: None,
        tier_status: Vec::new(),
        events: Vec::new(),
        operator_view: None,
        requeue: None,
    }
}

/// The model `ns/m`, uid `model-uid`.
pub(crate) fn model(resource_version: &str) -> MoEModel {
    let model = json!({
        "apiVersion": "cadre.dev/v1alpha1",
        "kind": "MoEModel",
        "metadata": {"name": "m", "namespace": "ns", "uid": "model-uid", "resourceVersion": resource_version},
        "spec": {
            "model": {"source": {"persistentVolumeClaim": {"claimName": "weights"}}, "routedExperts": 8},
            "prefill": {"replicas": 1},
            "decode": {"replicas": 1},
            "experts": {"shards": 2},
        },
    });
    serde_json::from_value(model).unwrap()
}

/// A pod of the model, uid `uid-NAME`.
pub(crate) fn pod(name: &str, resource_version: &str) -> Pod {
    let mut pod = Pod::default();
    pod.metadata.name = Some(name.into());
    pod.metadata.namespace = Some("ns".into());
    pod.metadata.uid = Some(format!("uid-{name}"));
    pod.metadata.resource_version = Some(resource_version.into());
    pod.metadata.labels = Some([(label::MODEL.to_owned(), "m".to_owned())].into());
    pod
}

/// A time.
pub(crate) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}
