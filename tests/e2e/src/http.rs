//! HTTP requests to the front door and to admin ports.

use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Request, StatusCode, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    /// Status code.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}", self.body))
    }
}

/// One request on a connection of its own; an error if the server cannot be reached or hangs up.
pub async fn send(method: &str, address: &str, path: &str, body: &str) -> anyhow::Result<Answer> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", address)
        .header("content-type", "application/json")
        .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))?;
    let response = sender.send_request(request).await?;
    let (parts, body) = response.into_parts();
    let body = String::from_utf8(body.collect().await?.to_bytes().to_vec())?;
    connection.abort();
    Ok(Answer { status: parts.status, headers: parts.headers, body })
}

/// GET that must be answered.
pub async fn get(address: &str, path: &str) -> Answer {
    send("GET", address, path, "").await.unwrap_or_else(|error| panic!("GET {address}{path}: {error:#}"))
}

/// POST that must be answered.
pub async fn post(address: &str, path: &str, body: &Value) -> Answer {
    let answer = send("POST", address, path, &body.to_string()).await;
    answer.unwrap_or_else(|error| panic!("POST {address}{path}: {error:#}"))
}

/// Sum over the series of one metric whose labels contain all of `labels` (`state="running"`).
pub async fn metric(admin: &str, name: &str, labels: &[&str]) -> f64 {
    let text = get(admin, "/metrics").await.body;
    let series: Vec<f64> = text
        .lines()
        .filter(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
                && labels.iter().all(|label| line.contains(label))
        })
        .filter_map(|line| line.rsplit_once(' ').and_then(|(_, value)| value.parse().ok()))
        .collect();
    assert!(!series.is_empty(), "no series of {name} with {labels:?} at {admin}:\n{text}");
    series.iter().sum()
}
