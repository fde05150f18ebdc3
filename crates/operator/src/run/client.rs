//! The client of the Kubernetes API, with what the operator adds to every request: a count by verb, kind and code,
//! and respect for a `Retry-After`.
//!
//! kube's own retries are off: they would wait inside a reconcile, out of sight. A request that fails ends the
//! reconcile with a typed reason and the queue tries again later; while the API server has asked for silence
//! ([`Pressure`]), no reconcile starts at all. Watches have their own back-off.

use std::{
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use cadre_telemetry::CounterFamily;
use futures::future::BoxFuture;
use http::{Method, Request, Response, header};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder},
};
use tokio::time::Instant;
use tower::{BoxError, Layer, Service};

use super::lease::{self, Renewals};
use crate::plan::ObjectKind;

/// Longest silence that is granted: an API server that asks for more is asked again after so long.
const MAX_SILENCE: Duration = Duration::from_secs(60);

/// How long a connection to the API server may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest silence of a connection that is waited on. A watch ends after a minute at the latest, so this is longer;
/// without it a list that is never answered would be waited for without end.
const READ_TIMEOUT: Duration = Duration::from_secs(75);

/// When the API server wants to be asked again. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pressure(Arc<Mutex<Option<Instant>>>);

impl Pressure {
    /// How long to be silent from now on, if at all.
    pub(crate) fn silence(&self) -> Option<Duration> {
        let until = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        until.and_then(|until| until.checked_duration_since(Instant::now())).filter(|left| !left.is_zero())
    }

    fn ask(&self, silence: Duration) {
        let until = Instant::now() + silence.min(MAX_SILENCE);
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *held = (*held).max(Some(until));
    }
}

/// Connects as the pod's service account, or as the kubeconfig says.
pub(crate) async fn infer() -> Result<Config, kube::config::InferConfigError> {
    let mut config = Config::infer().await?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    config.reset_reader_on_write = true;
    config.default_retry = false;
    Ok(config)
}

/// A client that counts its requests.
pub(crate) fn client(config: Config, layer: &ApiLayer) -> Result<Client, kube::Error> {
    one_provider();
    Ok(ClientBuilder::try_from(config)?.with_layer(layer).build())
}

/// The client of the lease: connections of its own, so that no burst of writes delays a renewal, and no wait for an
/// answer that comes too late to be of use.
pub(crate) fn lease_client(
    mut config: Config,
    layer: &ApiLayer,
    renewals: &Renewals,
) -> Result<Client, kube::Error> {
    one_provider();
    config.read_timeout = Some(lease::READ_TIMEOUT);
    Ok(ClientBuilder::try_from(config)?.with_layer(layer).with_layer(renewals).build())
}

/// One provider of cryptography in the whole process: ring. Whoever was first is as good.
fn one_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Counts requests and notes `Retry-After`.
#[derive(Clone, Debug)]
pub(crate) struct ApiLayer {
    requests: CounterFamily,
    pressure: Pressure,
}

impl ApiLayer {
    /// A layer over the metric `cadre_operator_api_requests_total`.
    pub(crate) fn new(requests: CounterFamily, pressure: Pressure) -> Self {
        Self { requests, pressure }
    }
}

impl<S> Layer<S> for ApiLayer {
    type Service = ApiService<S>;

    fn layer(&self, inner: S) -> ApiService<S> {
        ApiService { inner, layer: self.clone() }
    }
}

/// See [`ApiLayer`].
#[derive(Clone, Debug)]
pub(crate) struct ApiService<S> {
    inner: S,
    layer: ApiLayer,
}

impl<S, B> Service<Request<Body>> for ApiService<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
{
    type Response = Response<B>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<B>, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (verb, kind) = describe(&request);
        let answer = self.inner.call(request);
        let layer = self.layer.clone();
        Box::pin(async move {
            let answer = answer.await.map_err(Into::into);
            let code = answer.as_ref().map_or("none".into(), |answer| answer.status().as_u16().to_string());
            layer.requests.with(&[verb, kind, &code]).inc();
            if let Some(seconds) = answer.as_ref().ok().and_then(retry_after) {
                layer.pressure.ask(Duration::from_secs(seconds));
            }
            answer
        })
    }
}

/// `Retry-After` of an answer that refuses for now. Kubernetes sends seconds, never a date.
fn retry_after<B>(answer: &Response<B>) -> Option<u64> {
    matches!(answer.status().as_u16(), 429 | 503)
        .then(|| answer.headers().get(header::RETRY_AFTER)?.to_str().ok()?.parse().ok())
        .flatten()
}

/// The plural names that appear as labels beside those of children; anything else is counted as `other`.
const KINDS: &[&str] = &["moemodels", "persistentvolumeclaims", "nodes", "events", "leases", "secrets"];

fn kind_of(plural: &str) -> &'static str {
    let children = ObjectKind::ALL.iter().map(|kind| kind.plural());
    children.chain(KINDS.iter().copied()).find(|known| *known == plural).unwrap_or("other")
}

/// Verb and kind of a request, as in `/apis/GROUP/VERSION/namespaces/NS/KIND/NAME/SUBRESOURCE`.
fn describe(request: &Request<Body>) -> (&'static str, &'static str) {
    let mut segments = request.uri().path().trim_matches('/').split('/');
    match segments.next() {
        Some("api") => drop(segments.next()),
        _ => drop((segments.next(), segments.next())),
    }
    let mut segments: Vec<&str> = segments.collect();
    if segments.len() > 2 && segments[0] == "namespaces" {
        segments.drain(..2);
    }
    let kind = segments.first().map_or("other", |plural| kind_of(plural));
    let watch = request
        .uri()
        .query()
        .is_some_and(|query| query.split('&').any(|pair| matches!(pair, "watch=true" | "watch=1")));
    let apply = || {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        kind.is_some_and(|kind| kind.starts_with("application/apply-patch"))
    };
    let verb = match *request.method() {
        Method::GET if watch => "watch",
        Method::GET if segments.len() > 1 => "get",
        Method::GET => "list",
        Method::POST => "create",
        Method::PATCH if apply() => "apply",
        Method::PATCH => "patch",
        Method::PUT => "update",
        Method::DELETE => "delete",
        _ => "other",
    };
    (verb, kind)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn described(method: Method, uri: &str, content: Option<&str>) -> (&'static str, &'static str) {
        let mut request = Request::builder().method(method).uri(uri);
        if let Some(content) = content {
            request = request.header(header::CONTENT_TYPE, content);
        }
        describe(&request.body(Body::empty()).unwrap())
    }

    #[test]
    fn a_request_is_named_by_verb_and_kind() {
        let apply = Some("application/apply-patch+yaml");
        for (method, uri, content, expected) in [
            (Method::GET, "/api/v1/pods?labelSelector=a", None, ("list", "pods")),
            (Method::GET, "/api/v1/namespaces/ns/pods?watch=true&x=y", None, ("watch", "pods")),
            (Method::GET, "/api/v1/namespaces/ns/services/s", None, ("get", "services")),
            (Method::GET, "/api/v1/namespaces/ns", None, ("get", "other")),
            (Method::PATCH, "/apis/apps/v1/namespaces/ns/deployments/d", apply, ("apply", "deployments")),
            (
                Method::PATCH,
                "/apis/cadre.dev/v1alpha1/namespaces/ns/moemodels/m/status",
                apply,
                ("apply", "moemodels"),
            ),
            (
                Method::PATCH,
                "/api/v1/namespaces/ns/pods/p/status",
                Some("application/strategic-merge-patch+json"),
                ("patch", "pods"),
            ),
            (Method::DELETE, "/api/v1/namespaces/ns/pods/p", None, ("delete", "pods")),
            (Method::POST, "/apis/events.k8s.io/v1/namespaces/ns/events", None, ("create", "events")),
        ] {
            assert_eq!(described(method, uri, content), expected, "{uri}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_retry_after_asks_for_silence_and_a_longer_one_wins() {
        let pressure = Pressure::default();
        assert_eq!(pressure.silence(), None);
        pressure.ask(Duration::from_secs(7));
        pressure.ask(Duration::from_secs(2));
        assert_eq!(pressure.silence(), Some(Duration::from_secs(7)));
        tokio::time::advance(Duration::from_secs(7)).await;
        assert_eq!(pressure.silence(), None);
        pressure.ask(Duration::from_secs(86_400));
        assert_eq!(pressure.silence(), Some(MAX_SILENCE));
    }

    #[test]
    fn only_a_refusal_for_now_has_a_retry_after() {
        let answer = |code: u16, after: &str| {
            Response::builder().status(code).header(header::RETRY_AFTER, after).body(()).unwrap()
        };
        assert_eq!(retry_after(&answer(429, "3")), Some(3));
        assert_eq!(retry_after(&answer(503, "1")), Some(1));
        assert_eq!(retry_after(&answer(429, "Wed, 21 Oct 2026 07:28:00 GMT")), None);
        assert_eq!(retry_after(&answer(500, "3")), None);
    }
}
