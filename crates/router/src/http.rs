//! The OpenAI-compatible front door. docs/http-api.md lists every field and error.
//!
//! A request takes a place in the router when its body is there; until then it is bounded in bytes and in time
//! by the port's intake ([`cadre_net::intake`]), so that nobody holds a place without having asked. Fields are
//! read by name: what this API cannot do is refused by the field's name (`unsupported`), unknown extras of
//! clients are ignored, every error has OpenAI's shape and every answer the router's name for the request.

mod chat;
mod completions;
mod fields;
mod logprobs;
mod respond;
mod unknown;
mod unsupported;

use std::{any::Any, error::Error, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use cadre_net::{IntakeError, IntakeFault, IntakeOptions, OwnError, ServerOptions};
use cadre_telemetry::Readiness;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowHeaders, AllowOrigin, CorsLayer},
};

use self::fields::{Delivery, Fields};
use crate::{
    error::{RequestError, RequestResult},
    metrics::Api,
    model::ServedModel,
    options::Limits,
    request::{Submission, check_model},
    service::{Admitted, Clock, Service},
};

/// A request's own deadline, in milliseconds.
const TIMEOUT_HEADER: &str = "x-request-timeout-ms";

/// The router's name for a request, in answers.
const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// Bodies from here on are parsed where texts are tokenized, not on a thread that serves.
const LARGE_BODY: usize = 64 << 10;

/// The router's name for a request, drawn when its head comes.
#[derive(Clone, Debug)]
pub struct RequestId(pub String);

/// Serves the routes until `stop` resolves and requests have ended.
pub(crate) async fn serve(
    listener: TcpListener,
    routes: Router,
    service: Service,
    stop: impl Future<Output = ()> + Send,
) {
    let limits = &service.limits;
    let intake =
        IntakeOptions { timeout: limits.body_timeout, ..IntakeOptions::new(limits.text_budget_bytes()) };
    let mut options = ServerOptions::http("HTTP", intake);
    options.first_request = limits.first_request_timeout;
    options.idle = Some(limits.idle_timeout);
    options.own_error = Some(OwnError(Arc::new(move |status| own_error(status, &service.request_id()))));
    cadre_net::serve(listener, routes, options, stop).await;
}

/// The whole answer to what is no HTTP request.
fn own_error(status: u16, request_id: &str) -> Option<Bytes> {
    let status = StatusCode::from_u16(status).ok()?;
    let (message, code) = match status.as_u16() {
        431 => ("the request's head is too large: at most 64 KiB and 100 headers", "headers_too_large"),
        414 => ("the request's path is too long", "uri_too_long"),
        _ => (
            "this is no HTTP/1.1 request: its request line, a header or its framing is malformed",
            "invalid_http",
        ),
    };
    let body = json!({"error": openai_error(message, code)}).to_string();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nx-request-id: \
         {request_id}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    Some(Bytes::from(head + &body))
}

/// Names every request before anything else, and puts the name into its answer.
pub(crate) fn identified(routes: Router, service: &Service) -> Router {
    routes.layer(from_fn_with_state(service.clone(), identify))
}

async fn identify(State(service): State<Service>, mut request: Request, next: Next) -> Response {
    let request_id = service.request_id();
    request.extensions_mut().insert(RequestId(request_id.clone()));
    let mut response = next.run(request).await;
    // Hexadecimal digits are always a valid header.
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(REQUEST_ID_HEADER, value);
    }
    response
}

/// What browsers are told, if the router was given origins.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    let allowed = match origins {
        [] => return None,
        origins if origins.iter().any(|origin| origin == "*") => AllowOrigin::any(),
        // A flag that is no header value was refused at start.
        origins => AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
    };
    Some(
        CorsLayer::new()
            .allow_origin(allowed)
            .allow_methods([Method::GET, Method::POST, Method::OPTIONS])
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers([REQUEST_ID_HEADER, header::RETRY_AFTER])
            .max_age(Duration::from_secs(3600)),
    )
}

/// The routes, with errors in OpenAI's shape everywhere.
pub fn routes(service: Service, readiness: Readiness) -> Router {
    let cors = cors(&service.limits.cors_origins);
    let routes = Router::new()
        .route("/health", get(move || health(readiness.clone())))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/chat/completions", post(chat::handle))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(no_route)
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(service.clone());
    let routes = match cors {
        Some(cors) => routes.layer(cors),
        None => routes,
    };
    identified(routes, &service)
}

/// 200 when a request could be served.
async fn health(readiness: Readiness) -> Response {
    let missing = readiness.missing();
    if missing.is_empty() {
        return Json(json!({"status": "ok"})).into_response();
    }
    let words: Vec<String> =
        missing.iter().map(|unmet| format!("{}: {}", unmet.condition, unmet.reason)).collect();
    error_response(&RequestError::NoWorker { missing: words.join("; ") })
}

async fn models(State(service): State<Service>) -> Response {
    Json(json!({"object": "list", "data": [describe(&service)]})).into_response()
}

async fn model(State(service): State<Service>, id: Result<Path<String>, PathRejection>) -> Response {
    let known = match &id {
        Ok(Path(id)) => check_model(&service.model, Some(id)),
        Err(rejection) => {
            Err(RequestError::invalid("model", format!("the path's name: {}", rejection.body_text())))
        }
    };
    match known {
        Ok(()) => Json(describe(&service)).into_response(),
        Err(error) => error_response(&error),
    }
}

fn describe(service: &Service) -> Value {
    let model: &ServedModel = &service.model;
    let overrides: serde_json::Map<String, Value> =
        model.weights.overrides.iter().map(|change| (change.key.clone(), change.value.clone())).collect();
    json!({
        "id": model.name,
        "object": "model",
        "created": model.created_unix_s,
        "owned_by": "cadre",
        "max_model_len": service.limit_tokens(),
        "weights": model.weights.source.to_string(),
        "overrides": overrides,
    })
}

/// Receives a request and reads its fields: deadline, body, a place in the router, JSON.
async fn receive(
    service: &Service,
    api: Api,
    RequestId(request_id): RequestId,
    headers: &HeaderMap,
    body: Body,
    read_fields: fn(&mut Fields) -> RequestResult<(Submission, Delivery)>,
) -> RequestResult<(Admitted, Submission, Delivery)> {
    let timeout = timeout(headers)?;
    check_encoding(headers)?;
    let arrived = service.arrive(api, request_id, timeout)?;
    let tracked = Arc::clone(&arrived.tracked);
    let bytes = tracked.note(read(&service.limits, &arrived.clock, body).await)?;
    let admitted = service.admit(arrived, bytes.len())?;
    let length = bytes.len();
    let parse = move || {
        let mut fields = Fields::parse(&bytes)?;
        let (submission, delivery) = read_fields(&mut fields)?;
        Ok((submission, delivery, fields.ignored()?))
    };
    let parsed = match length < LARGE_BODY {
        true => parse(),
        false => service.compute(&admitted.clock, "reading the request", length, move |_| parse()).await,
    };
    let (submission, delivery, ignored) = tracked.note(parsed)?;
    for field in &ignored {
        service.metrics.ignored_fields.inc();
        if unknown::is_news(field) {
            tracing::warn!(field, "a field of a request is not known here and ignored; said once");
        }
    }
    Ok((admitted, submission, delivery))
}

fn check_encoding(headers: &HeaderMap) -> RequestResult<()> {
    match headers.get(header::CONTENT_ENCODING) {
        Some(value) if !value.as_bytes().eq_ignore_ascii_case(b"identity") => {
            // A hostile header is not repeated whole.
            let found = String::from_utf8_lossy(value.as_bytes()).chars().take(80).collect();
            Err(RequestError::ContentEncoding { found })
        }
        _ => Ok(()),
    }
}

/// The body. The port's intake bounds its time and what all of them hold; its own size is bounded here.
async fn read(limits: &Limits, clock: &Clock, body: Body) -> RequestResult<Bytes> {
    let limit_bytes = limits.max_body_bytes;
    let bytes = clock.bound("receiving the request", axum::body::to_bytes(body, limit_bytes)).await?;
    bytes.map_err(|error| match (IntakeError::find(&error), error.source()) {
        (Some(IntakeFault::TimedOut { after }), _) => RequestError::BodyTimeout { after: *after },
        (Some(IntakeFault::Budget { budget_bytes }), _) => {
            RequestError::IntakeFull { budget_bytes: *budget_bytes }
        }
        (_, Some(cause)) if cause.is::<http_body_util::LengthLimitError>() => {
            RequestError::BodyTooLarge { limit_bytes }
        }
        _ => RequestError::Malformed { problem: format!("the body broke off: {error}") },
    })
}

fn timeout(headers: &HeaderMap) -> RequestResult<Option<Duration>> {
    let Some(value) = headers.get(TIMEOUT_HEADER) else { return Ok(None) };
    let milliseconds = value.to_str().ok().and_then(|text| text.parse().ok()).filter(|&ms: &u64| ms > 0);
    let milliseconds = milliseconds.ok_or_else(|| {
        RequestError::invalid(TIMEOUT_HEADER, format!("{value:?} is no positive number of milliseconds"))
    })?;
    Ok(Some(Duration::from_millis(milliseconds)))
}

/// An error in OpenAI's shape, with Retry-After where a retry has a chance.
fn error_response(error: &RequestError) -> Response {
    let status = StatusCode::from_u16(error.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, Json(error.openai_body())).into_response();
    if let Some(seconds) = error.retry_after_s() {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

async fn no_route(method: Method, uri: Uri) -> Response {
    let message = format!("there is no {method} {}", uri.path());
    plain_error(StatusCode::NOT_FOUND, &message, "unknown_url")
}

async fn method_not_allowed(method: Method, uri: Uri) -> Response {
    let message = format!("{method} is not allowed on {}", uri.path());
    plain_error(StatusCode::METHOD_NOT_ALLOWED, &message, "method_not_allowed")
}

fn plain_error(status: StatusCode, message: &str, code: &str) -> Response {
    (status, Json(json!({"error": openai_error(message, code)}))).into_response()
}

fn openai_error(message: &str, code: &str) -> Value {
    json!({"message": message, "type": "invalid_request_error", "param": null, "code": code})
}

fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let words = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    tracing::error!(panic = words, "a handler panicked");
    error_response(&RequestError::Internal { problem: "a handler panicked; the log says where".into() })
}
