//! How every gRPC connection between cadre processes is set up, in one place, because each setting only
//! helps if both ends have it: windows and frame size that fit a dispatch frame, no Nagle delay, and
//! keep-alive pings, so that a silent partition is noticed without waiting for a request to time out.

use std::{future::Future, time::Duration};

use cadre_net::{Http2Options, IntakeOptions, ServerOptions};
use tonic::{
    service::Routes,
    transport::{Endpoint, Server, server::TcpIncoming},
};

/// HTTP/2 stream and connection window. A frame of `MAX_FRAME_BYTES` fits without a window update.
pub const WINDOW_BYTES: u32 = 64 << 20;

/// HTTP/2 frame size: a 229 KB dispatch frame is one DATA frame.
pub const HTTP2_FRAME_BYTES: u32 = 1 << 20;

/// A ping after this much silence.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// A connection whose ping is unanswered this long is dead. Longer than a scheduling hiccup of a machine
/// whose cores are all computing; requests have their own, shorter bounds.
pub const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Bound on establishing a connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Bytes of incomplete messages of a port: KV and frames of many peers come at one time.
const INTAKE_BYTES: usize = 8 * cadre_proto::MAX_MESSAGE_BYTES;

/// A client endpoint for `host:port` or a full URI.
pub fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    let uri = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    Ok(Endpoint::from_shared(uri)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(HTTP2_FRAME_BYTES)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// Serves a member's port with the same settings until `stop` resolves, with the bounds that every port has
/// ([`cadre_net`]). Dropped, it cuts the connections.
pub async fn serve(
    port: &'static str,
    listener: tokio::net::TcpListener,
    services: Routes,
    stop: impl Future<Output = ()> + Send,
) {
    let intake = IntakeOptions::streams(INTAKE_BYTES, cadre_proto::MAX_MESSAGE_BYTES);
    let mut options = ServerOptions::grpc(port, intake);
    options.http2 = Http2Options {
        stream_window_bytes: Some(WINDOW_BYTES),
        connection_window_bytes: Some(WINDOW_BYTES),
        frame_bytes: Some(HTTP2_FRAME_BYTES),
        ping_interval: KEEP_ALIVE_INTERVAL,
        ping_timeout: KEEP_ALIVE_TIMEOUT,
        ..Http2Options::default()
    };
    cadre_net::serve(listener, services.into_axum_router(), options, stop).await;
}

/// A server builder with the same settings and no bounds, for tests and benches. Serve it over [`incoming`],
/// which sets TCP_NODELAY.
pub fn server() -> Server {
    Server::builder()
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(HTTP2_FRAME_BYTES)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
}

/// Connections of a listener, each with TCP_NODELAY (tonic sets it only on listeners that it binds itself).
pub fn incoming(listener: tokio::net::TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use tokio::io::AsyncReadExt;

    use super::*;

    /// The paused clock goes on when nobody has anything to do.
    #[tokio::test(start_paused = true)]
    async fn who_connects_to_a_member_and_says_nothing_is_closed() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve("worker", listener, Routes::default(), std::future::pending()));
        let mut silent = tokio::net::TcpStream::connect(address).await.unwrap();
        let mut rest = Vec::new();
        silent.read_to_end(&mut rest).await.unwrap();
    }
}
