//! How a port is served, with the defaults of each bound and where they come from.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;

use crate::intake::IntakeOptions;

/// Open connections of a port. One costs some 20 KiB, so a full port costs 80 MiB.
const MAX_CONNECTIONS: usize = 4096;

/// A client that connects has a request: a lossy network needs seconds, nobody needs more than this.
const FIRST_REQUEST: Duration = Duration::from_secs(20);

/// Idle keep-alive of HTTP. Load balancers and client pools keep idle connections for up to 75 s and expect
/// the server to keep them longer, or a request meets a connection that is being closed.
const IDLE: Duration = Duration::from_secs(120);

/// While a port is full, who has not asked for this long makes room.
const IDLE_WHEN_FULL: Duration = Duration::from_secs(1);

/// HTTP/2 pings: a peer that vanished is noticed after their sum.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Streams per HTTP/2 connection; a client with more opens another connection.
const MAX_STREAMS: u32 = 1024;

/// What a port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2 without TLS, as gRPC does.
    Http2,
    /// HTTP/1.1 and HTTP/2, by the first bytes.
    Any,
}

/// HTTP/2 settings; `None` is hyper's default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Http2Options {
    /// Window of a stream, in bytes.
    pub stream_window_bytes: Option<u32>,
    /// Window of a connection, in bytes.
    pub connection_window_bytes: Option<u32>,
    /// Largest frame, in bytes.
    pub frame_bytes: Option<u32>,
    /// Streams at one time per connection.
    pub max_streams: u32,
    /// A ping after this much silence.
    pub ping_interval: Duration,
    /// A connection whose ping is unanswered for this long is dead.
    pub ping_timeout: Duration,
}

impl Default for Http2Options {
    fn default() -> Self {
        Self {
            stream_window_bytes: None,
            connection_window_bytes: None,
            frame_bytes: None,
            max_streams: MAX_STREAMS,
            ping_interval: PING_INTERVAL,
            ping_timeout: PING_TIMEOUT,
        }
    }
}

/// Makes the whole HTTP/1.1 answer, head and body, to what is no request (`431`, `400` of a bad framing):
/// those answers come from the HTTP layer and never reach a route. `None` leaves the layer's own.
#[derive(Clone)]
pub struct OwnError(pub Arc<dyn Fn(u16) -> Option<Bytes> + Send + Sync>);

impl fmt::Debug for OwnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnError")
    }
}

/// How a port is served.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// The port's name in the log.
    pub port: &'static str,
    /// What it speaks.
    pub protocol: Protocol,
    /// Connections at one time, as far as the process has descriptors.
    pub max_connections: usize,
    /// Longest time from the connection to its first complete request head.
    pub first_request: Duration,
    /// Longest time without a request after that; `None` is for ever (members keep their channels; pings
    /// notice those that are gone).
    pub idle: Option<Duration>,
    /// The same while the port is full, for those whose requests are not complete as well.
    pub idle_when_full: Duration,
    /// Bounds of what has come of requests that are not complete.
    pub intake: IntakeOptions,
    /// HTTP/2 settings.
    pub http2: Http2Options,
    /// Answers to what is no HTTP/1.1 request.
    pub own_error: Option<OwnError>,
}

impl ServerOptions {
    /// A port for HTTP clients.
    pub fn http(port: &'static str, intake: IntakeOptions) -> Self {
        Self {
            port,
            protocol: Protocol::Any,
            max_connections: MAX_CONNECTIONS,
            first_request: FIRST_REQUEST,
            idle: Some(IDLE),
            idle_when_full: IDLE_WHEN_FULL,
            intake,
            http2: Http2Options::default(),
            own_error: None,
        }
    }

    /// A gRPC port; its clients keep their channels open.
    pub fn grpc(port: &'static str, intake: IntakeOptions) -> Self {
        Self { protocol: Protocol::Http2, idle: None, ..Self::http(port, intake) }
    }
}
