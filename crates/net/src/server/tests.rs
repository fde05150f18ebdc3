//! Real sockets on ephemeral ports; waits are for what the server does, bounded by its own short times.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::SocketAddr;

use axum::routing::{get, post};
use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
};

use super::*;
use crate::{IntakeOptions, OwnError};

struct Served {
    at: SocketAddr,
    _stop: oneshot::Sender<()>,
}

async fn serving(change: impl FnOnce(&mut ServerOptions)) -> Served {
    let mut options = ServerOptions::http("test", IntakeOptions::new(1 << 20));
    change(&mut options);
    let routes = Router::new()
        .route("/", get(|| async { "here" }))
        .route("/", post(|body: String| async move { body }));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(serve(listener, routes, options, async move { drop(stopped.await) }));
    Served { at, _stop: stop }
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";

async fn ask(stream: &mut TcpStream) -> String {
    stream.write_all(GET).await.unwrap();
    let mut buffer = vec![0; 4096];
    let mut answer = String::new();
    while !answer.ends_with("here") {
        let read = stream.read(&mut buffer).await.unwrap();
        assert!(read > 0, "closed after {answer:?}");
        answer.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
    }
    answer
}

async fn to_end(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    // A connection may be reset instead of closed; both are its end.
    let _ = stream.read_to_string(&mut text).await;
    text
}

#[tokio::test]
async fn who_says_nothing_or_half_a_head_is_closed_and_who_asks_is_kept_longer() {
    for protocol in [Protocol::Any, Protocol::Http2] {
        let served = serving(|options| {
            options.protocol = protocol;
            options.first_request = Duration::from_millis(150);
        })
        .await;
        for said in
            [&b""[..], b"GET / HTTP/1.1\r\nhost:", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"]
        {
            let mut stream = TcpStream::connect(served.at).await.unwrap();
            stream.write_all(said).await.unwrap();
            let mut rest = Vec::new();
            let ended = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await;
            assert!(ended.is_ok(), "{protocol:?}: {said:?}");
        }
    }
    let served = serving(|options| {
        options.first_request = Duration::from_millis(100);
        options.idle = Some(Duration::from_millis(700));
    })
    .await;
    let mut stream = TcpStream::connect(served.at).await.unwrap();
    ask(&mut stream).await;
    let began = std::time::Instant::now();
    assert_eq!(to_end(&mut stream).await, "");
    assert!(began.elapsed() >= Duration::from_millis(600), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_full_port_makes_room_of_those_who_ask_nothing_and_of_incomplete_requests() {
    for said in [&b""[..], b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nx"] {
        let served = serving(|options| {
            options.max_connections = 3;
            options.idle_when_full = Duration::from_millis(100);
            options.idle = None;
            options.first_request = Duration::from_secs(600);
            options.intake.timeout = Duration::from_secs(600);
        })
        .await;
        let mut silent = Vec::new();
        for _ in 0..8 {
            let mut stream = TcpStream::connect(served.at).await.unwrap();
            stream.write_all(said).await.unwrap();
            silent.push(stream);
        }
        let mut client = TcpStream::connect(served.at).await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(20), ask(&mut client)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

#[tokio::test]
async fn what_is_no_request_is_answered_in_the_ports_shape() {
    let served = serving(|options| {
        options.own_error = Some(OwnError(Arc::new(|status| {
            Some(Bytes::from(format!(
                "HTTP/1.1 {status} Ours\r\nx-request-id: 1\r\ncontent-length: 2\r\n\r\nno"
            )))
        })));
    })
    .await;
    let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(HEAD_BYTES));
    for (said, status) in [
        ("nonsense\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nbad header\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n", 400),
        (long.as_str(), 431),
    ] {
        let mut stream = TcpStream::connect(served.at).await.unwrap();
        stream.write_all(said.as_bytes()).await.unwrap();
        let answer = to_end(&mut stream).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} Ours")) && answer.ends_with("no"), "{answer}");
    }
}

#[test]
fn pauses_grow_to_a_bound_and_only_the_process_own_failures_pause() {
    let mut pause = Pause::default();
    let pauses: Vec<u128> = (0..8).map(|_| pause.next().as_millis()).collect();
    assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 1000, 1000]);
    assert!(of_the_connection(&io::Error::from(io::ErrorKind::ConnectionAborted)));
    // Out of file descriptors, of the process and of the system.
    for number in [24, 23] {
        assert!(!of_the_connection(&io::Error::from_raw_os_error(number)));
    }
}
