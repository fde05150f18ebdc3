//! Requests that are not complete, and connections that ask nothing: what they may hold, on every port.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use cadre_proto::v1::FinishReason;
use http_body_util::StreamBody;
use hyper::{Request, Response, body::Frame, body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
};

use crate::{
    cluster::{Cluster, MODEL, options, text_request, tokens},
    fake_worker::{FakeWorker, Script},
    http_client::post_json,
};

async fn worker() -> FakeWorker {
    FakeWorker::start(Script::tokens(&tokens("fine"), FinishReason::Stop)).await
}

#[tokio::test]
async fn incomplete_bodies_take_no_place_in_the_queue() {
    let worker = worker().await;
    let mut options = options();
    (options.limits.max_concurrent, options.limits.max_waiting) = (1, 0);
    options.limits.body_timeout = Duration::from_secs(2);
    let cluster = Cluster::with_worker(options, &worker).await;
    let mut halves = Vec::new();
    for _ in 0..30 {
        let mut stream = TcpStream::connect(cluster.at.http).await.unwrap();
        let half = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{";
        stream.write_all(half.as_bytes()).await.unwrap();
        halves.push(stream);
    }
    let request = json!({"model": MODEL, "prompt": "a"});
    assert_eq!(post_json(cluster.at.http, "/v1/completions", &request).await.0, 200);
    for mut half in halves {
        let mut answer = String::new();
        half.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("body_timeout"), "{answer}");
        assert!(answer.contains("x-request-id: "), "{answer}");
    }
}

type Half = JoinHandle<Response<Incoming>>;

/// A call that announces `announced` bytes and sends `sent` of them, and never ends.
async fn half_call(at: std::net::SocketAddr, announced: u32, sent: usize) -> Half {
    let stream = TcpStream::connect(at).await.unwrap();
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    let mut message = vec![0];
    message.extend(announced.to_be_bytes());
    message.resize(5 + sent, 0);
    let first = futures::stream::iter([Ok::<_, Infallible>(Frame::data(Bytes::from(message)))]);
    let body = StreamBody::new(futures::StreamExt::chain(first, futures::stream::pending()));
    let request = Request::post(format!("http://{at}/cadre.v1.Inference/Generate"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .unwrap();
    tokio::spawn(async move { sender.send_request(request).await.unwrap() })
}

#[tokio::test]
async fn incomplete_messages_are_bounded_in_bytes_and_in_time() {
    let worker = worker().await;
    let mut options = options();
    // The budget is 16 of these: 1 MiB.
    options.limits.max_body_bytes = 64 << 10;
    options.limits.body_timeout = Duration::from_secs(3);
    let cluster = Cluster::with_worker(options, &worker).await;
    let mut calls = Vec::new();
    for _ in 0..40 {
        calls.push(half_call(cluster.at.grpc, 64 << 10, 60 << 10).await);
    }
    // Complete in bytes but not ended: as incomplete.
    calls.push(half_call(cluster.at.grpc, 0, 0).await);
    cluster.grpc().await.generate(text_request("a")).await.unwrap();
    let (mut for_room, mut for_time) = (0, 0);
    for call in calls {
        let answer = call.await.unwrap();
        match answer.headers()["grpc-status"].to_str().unwrap() {
            "8" => for_room += 1,
            "4" => for_time += 1,
            other => panic!("{other}: {answer:?}"),
        }
    }
    assert!(for_room >= 40 - 17, "{for_room} made room, {for_time} ran out of time");
    assert!(for_time >= 1 && for_room + for_time == 41, "{for_room} made room, {for_time} ran out of time");
}

#[tokio::test]
async fn who_connects_and_asks_nothing_is_closed_on_every_front_port() {
    let mut options = options();
    options.limits.first_request_timeout = Duration::from_millis(300);
    let cluster = Cluster::bare(options).await;
    for at in [cluster.at.grpc, cluster.at.http, cluster.at.coordinator] {
        for said in [&b""[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"] {
            let mut stream = TcpStream::connect(at).await.unwrap();
            stream.write_all(said).await.unwrap();
            let mut rest = Vec::new();
            let ended = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest)).await;
            assert!(ended.is_ok(), "{at} keeps a connection that said {said:?}");
        }
    }
}
