//! The OpenAI-compatible front door. docs/http-api.md lists every field and error.
//!
//! A body is read only after its request has a place in the router, within a size and a time, so what
//! waits here is bounded by the admission queue. Fields are read by name: what this API cannot do is
//! refused by the field's name, unknown extras of clients are ignored, and every error has OpenAI's shape.

mod chat;
mod completions;
mod fields;
mod logprobs;
mod respond;
mod server;

use std::{any::Any, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};
use tower_http::catch_panic::CatchPanicLayer;

pub(crate) use server::serve;

use crate::{
    error::{RequestError, RequestResult},
    metrics::Api,
    model::ServedModel,
    options::Limits,
    request::check_model,
    service::{Admitted, Service},
};

/// A request's own deadline, in milliseconds.
const TIMEOUT_HEADER: &str = "x-request-timeout-ms";

/// The router's name for a request, in answers.
const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// The routes, with errors in OpenAI's shape everywhere.
pub fn routes(service: Service) -> Router {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/chat/completions", post(chat::handle))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(no_route)
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(service)
}

async fn models(State(service): State<Service>) -> Response {
    Json(json!({"object": "list", "data": [describe(&service.model)]})).into_response()
}

async fn model(State(service): State<Service>, Path(id): Path<String>) -> Response {
    match check_model(&service.model, Some(&id)) {
        Ok(()) => Json(describe(&service.model)).into_response(),
        Err(error) => error_response(&error),
    }
}

fn describe(model: &ServedModel) -> Value {
    json!({
        "id": model.name,
        "object": "model",
        "created": model.created_unix_s,
        "owned_by": "cadre",
        "max_model_len": model.context_tokens(),
    })
}

/// Reads a request up to its JSON: a place in the router, the deadline, the body.
async fn receive(
    service: &Service,
    api: Api,
    headers: &HeaderMap,
    body: Body,
) -> RequestResult<(Admitted, fields::Fields)> {
    let admitted = service.admit(api, timeout(headers)?)?;
    let fields = async { fields::Fields::parse(&read(&service.limits, body).await?) };
    let fields = admitted.tracked.note(fields.await)?;
    Ok((admitted, fields))
}

async fn read(limits: &Arc<Limits>, body: Body) -> RequestResult<Bytes> {
    let limit_bytes = limits.max_body_bytes;
    let bytes = tokio::time::timeout(limits.body_timeout, axum::body::to_bytes(body, limit_bytes))
        .await
        .map_err(|_| RequestError::BodyTimeout { after: limits.body_timeout })?;
    bytes.map_err(|error| match std::error::Error::source(&error) {
        Some(cause) if cause.is::<http_body_util::LengthLimitError>() => {
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

fn named(request_id: &str, mut response: Response) -> Response {
    // Hexadecimal digits are always a valid header.
    if let Ok(value) = HeaderValue::from_str(request_id) {
        response.headers_mut().insert(REQUEST_ID_HEADER, value);
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
    let error = json!({"message": message, "type": "invalid_request_error", "param": null, "code": code});
    (status, Json(json!({"error": error}))).into_response()
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
