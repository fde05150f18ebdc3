//! How every gRPC connection between cadre processes is set up, in one place, because each setting only
//! helps if both ends have it: windows and frame size that fit a dispatch frame, no Nagle delay, and
//! keep-alive pings, so that a silent partition is noticed without waiting for a request to time out.

use std::{future::Future, time::Duration};

use cadre_net::{Http2Options, IntakeOptions, ServerOptions};
use cadre_ops::RowFormat;
use cadre_types::NumericsClass;
use tonic::{
    service::Routes,
    transport::{Endpoint, Server, server::TcpIncoming},
};

use crate::plan::FrameLimits;

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

/// The intake of a shard's port: a message is at most twice the largest frame of the model, and as much may be
/// incomplete at a time as four of them, which is what the frames and answers of four streams may take.
pub fn shard_intake(numerics: NumericsClass, hidden: usize, experts_per_token: usize) -> IntakeOptions {
    let limits = FrameLimits::of(RowFormat::dispatch(numerics), RowFormat::combine(numerics), hidden);
    intake(2 * limits.largest_message(experts_per_token), 4)
}

/// The intake of a worker's port: a message is a prompt of so many tokens (of at most five bytes each) or rows of a
/// hand-off, each with what else it says; 64 hand-offs may have one under way.
pub fn worker_intake(positions: usize, kv_frame_bytes: usize) -> IntakeOptions {
    /// Stop ids, names, stamp.
    const REST: usize = 256 << 10;
    intake(kv_frame_bytes.max(5 * positions) + REST, 64)
}

fn intake(largest_message_bytes: usize, at_a_time: usize) -> IntakeOptions {
    let largest = largest_message_bytes.min(cadre_proto::MAX_MESSAGE_BYTES);
    IntakeOptions::streams(largest.saturating_mul(at_a_time), largest)
}

/// Serves a member's port with the same settings until `stop` resolves, with the bounds that every port has
/// ([`cadre_net`]). Dropped, it cuts the connections.
pub async fn serve(
    port: &'static str,
    listener: tokio::net::TcpListener,
    services: Routes,
    intake: IntakeOptions,
    stop: impl Future<Output = ()> + Send,
) {
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

    #[test]
    fn what_is_incomplete_follows_from_the_largest_message() {
        let small = intake(3 << 20, 4);
        assert_eq!((small.max_message_bytes, small.budget_bytes), (3 << 20, 12 << 20));
        let most = intake(usize::MAX, 2);
        assert_eq!(most.max_message_bytes, cadre_proto::MAX_MESSAGE_BYTES);
        assert_eq!(most.budget_bytes, 2 * cadre_proto::MAX_MESSAGE_BYTES);
        // DeepSeek-V3: frames of 4096 tokens of 14 KB; the bundled checkpoint's have 512 bytes.
        let v3 = shard_intake(NumericsClass::Bf16, 7168, 8);
        assert_eq!((v3.max_message_bytes >> 20, v3.budget_bytes >> 20), (112, 450));
        let pocket = shard_intake(NumericsClass::Bf16, 256, 4);
        assert!(pocket.budget_bytes < 20 << 20, "{} bytes", pocket.budget_bytes);
        let worker = worker_intake(163_840, 1 << 20);
        assert_eq!((worker.max_message_bytes, worker.budget_bytes), (5 << 18, 80 << 20));
    }

    /// The paused clock goes on when nobody has anything to do.
    #[tokio::test(start_paused = true)]
    async fn who_connects_to_a_member_and_says_nothing_is_closed() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let intake = intake(1 << 20, 4);
        tokio::spawn(serve("worker", listener, Routes::default(), intake, std::future::pending()));
        let mut silent = tokio::net::TcpStream::connect(address).await.unwrap();
        let mut rest = Vec::new();
        silent.read_to_end(&mut rest).await.unwrap();
    }
}
