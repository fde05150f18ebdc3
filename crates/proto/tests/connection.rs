//! Every end of a connection has one class, whatever code the transport gives it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_proto::{connection::ConnectionEnd, v1};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tonic::{Code, Status, transport::Channel};

type Client = v1::worker_client::WorkerClient<Channel>;

/// A peer that plays one connection by hand.
async fn peer<P: Future<Output = ()> + Send + 'static>(
    play: impl FnOnce(TcpStream) -> P + Send + 'static,
) -> Client {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        // Nobody else gets in: a second connection is refused.
        drop(listener);
        play(stream).await;
    });
    let endpoint = Channel::from_shared(format!("http://{address}")).unwrap();
    Client::new(endpoint.connect().await.unwrap())
}

/// How a call ends.
async fn end(mut client: Client) -> (Option<ConnectionEnd>, Status) {
    let status = match client.decode(v1::DecodeRequest::default()).await {
        Err(status) => status,
        Ok(events) => match events.into_inner().message().await {
            Err(status) => status,
            Ok(event) => panic!("answered {event:?}"),
        },
    };
    (ConnectionEnd::of_status(&status), status)
}

/// Lets one call come and says by GOAWAY that it, and all before it, are not worked on; by hand, because a library
/// answers what it has let in.
async fn goes_away(mut stream: TcpStream, reason: h2::Reason) {
    /// Frame types of HTTP/2 (RFC 9113, section 6).
    const HEADERS: u8 = 1;
    const SETTINGS: u8 = 4;
    const GOAWAY: u8 = 7;
    let frame = |kind: u8, payload: &[u8]| {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, 0], &[0; 4], payload].concat()
    };
    stream.write_all(&frame(SETTINGS, &[])).await.unwrap();
    let mut preface = [0; 24];
    stream.read_exact(&mut preface).await.unwrap();
    loop {
        let mut header = [0; 9];
        stream.read_exact(&mut header).await.unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        if header[3] == HEADERS {
            break;
        }
    }
    // Last stream worked on: none.
    let payload = [[0; 4], u32::from(reason).to_be_bytes()].concat();
    stream.write_all(&frame(GOAWAY, &payload)).await.unwrap();
    // Until the client has gone.
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
}

#[tokio::test]
async fn a_go_away_without_an_error_is_an_orderly_end() {
    let (end, status) = end(peer(|stream| goes_away(stream, h2::Reason::NO_ERROR)).await).await;
    assert_eq!(end, Some(ConnectionEnd::Closed), "{status:?}");
    assert_ne!(status.code(), Code::Unavailable, "the code says nothing of the kind");
}

#[tokio::test]
async fn a_go_away_with_an_error_is_not() {
    let (end, status) = end(peer(|stream| goes_away(stream, h2::Reason::INTERNAL_ERROR)).await).await;
    assert_eq!(end, Some(ConnectionEnd::Broken), "{status:?}");
}

#[tokio::test]
async fn a_stream_that_is_refused_was_not_worked_on_and_one_that_is_reset_may_have_been() {
    for (reason, expected) in
        [(h2::Reason::REFUSED_STREAM, ConnectionEnd::Closed), (h2::Reason::CANCEL, ConnectionEnd::Broken)]
    {
        let client = peer(move |stream| async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            let (_, mut respond) = connection.accept().await.unwrap().unwrap();
            respond.send_reset(reason);
            let _ = std::future::poll_fn(|cx| connection.poll_closed(cx)).await;
        });
        let (end, status) = end(client.await).await;
        assert_eq!(end, Some(expected), "{status:?}");
    }
}

#[tokio::test]
async fn a_connection_that_is_cut_under_a_call_is_broken() {
    let client = peer(|stream| async move {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let _call = connection.accept().await.unwrap().unwrap();
        // Dropped with everything in it, as a killed process drops it.
    });
    let (end, status) = end(client.await).await;
    assert_eq!(end, Some(ConnectionEnd::Broken), "{status:?}");
}

#[tokio::test]
async fn a_port_where_nobody_listens_makes_no_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let endpoint = Channel::from_shared(format!("http://{address}")).unwrap();
    let (end, status) = end(Client::new(endpoint.connect_lazy())).await;
    assert_eq!(end, Some(ConnectionEnd::NotMade), "{status:?}");
    let error = endpoint.connect().await.unwrap_err();
    assert_eq!(ConnectionEnd::of_error(&error), ConnectionEnd::NotMade);
}

#[test]
fn what_the_peer_says_itself_ends_no_connection() {
    for code in [Code::Unavailable, Code::Internal, Code::Cancelled, Code::Unknown] {
        assert_eq!(ConnectionEnd::of_status(&Status::new(code, "h2 protocol error")), None);
    }
}
