#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use futures::{channel::mpsc, future::poll_fn};
use http_body_util::StreamBody;
use hyper::Request;
use tonic::Code;

use super::*;

type Sender = mpsc::UnboundedSender<Result<Frame<Bytes>, std::io::Error>>;
type Sent = Metered<StreamBody<mpsc::UnboundedReceiver<Result<Frame<Bytes>, std::io::Error>>>>;

fn body(intake: &Arc<Intake>, kind: &str) -> (Sender, Sent) {
    let (sender, receiver) = mpsc::unbounded();
    let (parts, ()) =
        Request::builder().uri("/a/b").header(CONTENT_TYPE, kind).body(()).unwrap().into_parts();
    (sender, Metered::new(StreamBody::new(receiver), &parts, Arc::clone(intake), Activity::new()))
}

fn send(sender: &Sender, bytes: usize) {
    sender.unbounded_send(Ok(Frame::data(Bytes::from(vec![0; bytes])))).unwrap();
}

/// The next frame's length, `Ok(None)` at the end.
async fn next(body: &mut Sent) -> Result<Option<usize>, IntakeFault> {
    match poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await {
        None => Ok(None),
        Some(Ok(frame)) => Ok(Some(frame.data_ref().map_or(0, Bytes::len))),
        Some(Err(error)) => Err(error.fault),
    }
}

const JSON: &str = "application/json";
const GRPC: &str = "application/grpc+proto";

#[tokio::test(start_paused = true)]
async fn a_request_that_does_not_end_in_time_is_refused_however_it_trickles() {
    let intake =
        Intake::new(IntakeOptions { timeout: Duration::from_secs(5), ..IntakeOptions::new(1 << 20) });
    for kind in [JSON, GRPC] {
        let (sender, mut stalled) = body(&intake, kind);
        send(&sender, 3);
        assert_eq!(next(&mut stalled).await, Ok(Some(3)));
        let fault = next(&mut stalled).await.unwrap_err();
        assert_eq!(fault, IntakeFault::TimedOut { after: Duration::from_secs(5) });
        assert_eq!(next(&mut stalled).await, Ok(None), "nothing comes after it");

        let (sender, mut trickling) = body(&intake, kind);
        let mut pieces = 0;
        let fault = loop {
            send(&sender, 1);
            match next(&mut trickling).await {
                Ok(_) => pieces += 1,
                Err(fault) => break fault,
            }
            tokio::time::advance(Duration::from_secs(1)).await;
        };
        assert_eq!((pieces, fault), (5, IntakeFault::TimedOut { after: Duration::from_secs(5) }));
    }
    assert_eq!(intake.used(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_largest_and_oldest_makes_room_and_what_was_only_announced_costs_nothing() {
    let budget_bytes = 4 * BASE_BYTES + 10_000;
    let intake = Intake::new(IntakeOptions::new(budget_bytes));
    let (large, mut giant) = body(&intake, GRPC);
    // A message of 2 GiB, of which 9,000 bytes come.
    let mut head = vec![0, 0x7f, 0xff, 0xff, 0xff];
    head.resize(9_000, 0);
    large.unbounded_send(Ok(Frame::data(Bytes::from(head)))).unwrap();
    assert_eq!(next(&mut giant).await, Ok(Some(9_000)));
    tokio::time::advance(Duration::from_secs(1)).await;
    let mut small = Vec::new();
    for _ in 0..3 {
        let (sender, mut one) = body(&intake, JSON);
        send(&sender, 300);
        assert_eq!(next(&mut one).await, Ok(Some(300)));
        small.push((sender, one));
    }
    assert_eq!(intake.used(), 4 * BASE_BYTES + 9_900);
    // One more, and the giant goes although the newcomer asks; it is woken for it.
    let waiting = tokio::spawn(async move { next(&mut giant).await });
    tokio::task::yield_now().await;
    let (sender, mut newcomer) = body(&intake, JSON);
    send(&sender, 300);
    assert_eq!(next(&mut newcomer).await, Ok(Some(300)));
    assert_eq!(waiting.await.unwrap(), Err(IntakeFault::Budget { budget_bytes }));
    for (sender, mut one) in small {
        drop(sender);
        assert_eq!(next(&mut one).await, Ok(None));
    }
    drop(newcomer);
    assert_eq!(intake.used(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_stream_may_wait_between_messages_but_not_within_one() {
    let intake = Intake::new(IntakeOptions {
        timeout: Duration::from_secs(5),
        ..IntakeOptions::streams(1 << 20, 1000)
    });
    let (sender, mut stream) = body(&intake, GRPC);
    let message =
        |bytes: &[u8]| sender.unbounded_send(Ok(Frame::data(Bytes::copy_from_slice(bytes)))).unwrap();
    tokio::time::advance(Duration::from_secs(60)).await;
    // Two messages and the head of a third, in pieces that end anywhere.
    message(&[0, 0, 0, 0, 2, 7, 7, 0, 0]);
    next(&mut stream).await.unwrap();
    message(&[0, 0, 1, 9]);
    next(&mut stream).await.unwrap();
    assert_eq!(intake.used(), 0);
    tokio::time::advance(Duration::from_secs(60)).await;
    message(&[0, 0, 0, 0, 3, 1]);
    next(&mut stream).await.unwrap();
    assert_eq!(intake.used(), BASE_BYTES + 6);
    assert_eq!(next(&mut stream).await, Err(IntakeFault::TimedOut { after: Duration::from_secs(5) }));

    let (sender, mut stream) = body(&intake, GRPC);
    sender.unbounded_send(Ok(Frame::data(Bytes::from_static(&[0, 0, 0, 4, 0])))).unwrap();
    let fault = next(&mut stream).await.unwrap_err();
    assert_eq!(fault, IntakeFault::TooLarge { bytes: 1024, limit_bytes: 1000 });
    let status = Status::from_error(Box::new(IntakeError::refused(fault)));
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("1024"), "{status}");
}
