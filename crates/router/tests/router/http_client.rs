//! A small HTTP client: one connection per request, so that a test can break it off.

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, client::conn::http1, header::HeaderMap};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, task::JoinHandle};

/// An answer whose body is not read yet. Dropping it closes the connection.
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    body: Incoming,
    connection: JoinHandle<()>,
    buffer: String,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

pub async fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Answer {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(async move {
        // A connection that a test breaks off ends with an error.
        let _ = connection.await;
    });
    let mut request = Request::builder().method(method).uri(path).header("host", "router");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(body.into())).unwrap();
    let response: Response<Incoming> = sender.send_request(request).await.unwrap();
    let (parts, body) = response.into_parts();
    // The sender is dropped here; the connection lives until the body ends or the answer is dropped.
    Answer { status: parts.status.as_u16(), headers: parts.headers, body, connection, buffer: String::new() }
}

pub async fn post(address: SocketAddr, path: &str, body: &Value) -> Answer {
    send(address, "POST", path, &[("content-type", "application/json")], body.to_string()).await
}

/// Status and JSON of a POST.
pub async fn post_json(address: SocketAddr, path: &str, body: &Value) -> (u16, Value) {
    post(address, path, body).await.json().await
}

/// Status and text of a GET.
pub async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let answer = send(address, "GET", path, &[], "").await;
    let status = answer.status;
    (status, answer.text().await)
}

impl Answer {
    pub async fn text(mut self) -> String {
        let mut text = std::mem::take(&mut self.buffer);
        while let Some(more) = self.frame().await {
            text.push_str(&more);
        }
        text
    }

    pub async fn json(self) -> (u16, Value) {
        let status = self.status;
        let text = self.text().await;
        (status, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")))
    }

    /// The next event's data; `None` when the stream has ended.
    pub async fn event(&mut self) -> Option<String> {
        loop {
            while let Some(end) = self.buffer.find("\n\n") {
                let block: String = self.buffer.drain(..end + 2).collect();
                if let Some(data) = block.trim_end().strip_prefix("data: ") {
                    return Some(data.to_owned());
                }
                assert!(block.starts_with(':'), "an event that is neither data nor comment: {block:?}");
            }
            let more = self.frame().await?;
            self.buffer.push_str(&more);
        }
    }

    /// All events to the end.
    pub async fn events(mut self) -> Vec<String> {
        let mut events = Vec::new();
        while let Some(event) = self.event().await {
            events.push(event);
        }
        events
    }

    /// Raw text of the next frame, comments included.
    pub async fn frame(&mut self) -> Option<String> {
        loop {
            let frame = self.body.frame().await?.unwrap();
            if let Ok(data) = frame.into_data() {
                return Some(String::from_utf8(data.to_vec()).unwrap());
            }
        }
    }
}
