//! GET of one page over plain HTTP: all that `up` and `probe` need of it.

use std::time::Duration;

use anyhow::{Context, Result};
use http_body_util::{BodyExt, Empty};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

/// An admin server answers from memory; one that does not within this is not well.
const LIMIT: Duration = Duration::from_secs(2);

/// Status and body of `GET http://address/path` of an admin server on loopback.
pub(crate) async fn get(address: &str, path: &str) -> Result<(StatusCode, String)> {
    get_within(LIMIT, address, path).await
}

/// Status and body of `GET http://address/path`, connecting and reading within `limit`.
pub(crate) async fn get_within(limit: Duration, address: &str, path: &str) -> Result<(StatusCode, String)> {
    timeout(limit, get_unbounded(address, path))
        .await
        .with_context(|| format!("no answer from {address} within {} s", limit.as_secs_f64()))?
        .with_context(|| format!("GET http://{address}{path}"))
}

async fn get_unbounded(address: &str, path: &str) -> Result<(StatusCode, String)> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::get(path).header("host", address).body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    drop(sender);
    connection.abort();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}
