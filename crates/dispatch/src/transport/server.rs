//! `cadre.v1.Expert` over any [`ShardService`].
//!
//! The stream's reader decodes frames and submits them; answers leave in any order. A frame that cannot
//! be decoded is refused as malformed and the stream goes on, because the sequence number still names it.
//! At most [`MAX_STREAM_FRAMES`] frames of a stream are inside at once; more are refused as overloaded.
//! When the worker goes away its queued frames are cancelled, not computed.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use cadre_proto::{MAX_MESSAGE_BYTES, v1};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::{AnswerSink, MAX_LINK_FRAMES, Reply, ShardService};
use crate::{
    frame::{Answer, DispatchFrame, Refusal, RefusalCode},
    wire,
};

/// Frames of one stream without an answer: what a well-behaved link sends, so only another kind of
/// client meets the bound.
pub const MAX_STREAM_FRAMES: usize = MAX_LINK_FRAMES;

/// The tonic service.
#[derive(Clone)]
pub struct ExpertServer {
    service: Arc<dyn ShardService>,
}

impl ExpertServer {
    /// Serves a shard.
    pub fn new(service: Arc<dyn ShardService>) -> Self {
        Self { service }
    }

    /// The service for a tonic router, with the message limits of the wire.
    pub fn into_service(self) -> v1::expert_server::ExpertServer<Self> {
        v1::expert_server::ExpertServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }
}

impl std::fmt::Debug for ExpertServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExpertServer").finish_non_exhaustive()
    }
}

#[tonic::async_trait]
impl v1::expert_server::Expert for ExpertServer {
    type DispatchStream = Answers;

    async fn dispatch(
        &self,
        request: Request<Streaming<v1::DispatchFrame>>,
    ) -> Result<Response<Answers>, Status> {
        // Refusals of frames beyond the bound also pass this channel, one per frame read: the reader waits
        // for room before it reads on, so twice the bound is never exceeded.
        let (answers, outgoing) = mpsc::channel(2 * MAX_STREAM_FRAMES);
        let sink =
            Arc::new(StreamSink { answers, inside: AtomicUsize::new(0), ended: AtomicBool::new(false) });
        tokio::spawn(read(self.service.clone(), request.into_inner(), sink));
        Ok(Response::new(Answers { outgoing }))
    }
}

async fn read(
    service: Arc<dyn ShardService>,
    mut frames: Streaming<v1::DispatchFrame>,
    sink: Arc<StreamSink>,
) {
    loop {
        match frames.message().await {
            Ok(Some(wire)) => accept(service.as_ref(), wire, &sink).await,
            // The worker sends nothing more but still takes answers.
            Ok(None) => return,
            Err(status) => {
                tracing::debug!(%status, "dispatch stream broke");
                sink.ended.store(true, Ordering::Relaxed);
                return;
            }
        }
    }
}

async fn accept(service: &dyn ShardService, wire: v1::DispatchFrame, sink: &Arc<StreamSink>) {
    let sequence = wire.sequence;
    let refusal = match DispatchFrame::try_from(wire) {
        Ok(frame) => {
            if sink.inside.fetch_add(1, Ordering::Relaxed) < MAX_STREAM_FRAMES {
                service.submit(frame, Reply::new(sink.clone(), sequence));
                return;
            }
            sink.inside.fetch_sub(1, Ordering::Relaxed);
            let what = format!("{}: {MAX_STREAM_FRAMES} frames of this stream are inside", frame.layer);
            Refusal::new(RefusalCode::Overloaded, what)
        }
        Err(error) => Refusal::new(RefusalCode::Malformed, error.to_string()),
    };
    let message = wire::encode_answer(sequence, Err(refusal.into()));
    // Waiting here is back-pressure on a sender that breaks the bound; the stream's end wakes it.
    if sink.answers.send(message).await.is_err() {
        sink.ended.store(true, Ordering::Relaxed);
    }
}

/// Answers on their way out of one stream.
struct StreamSink {
    answers: mpsc::Sender<v1::CombineFrame>,
    inside: AtomicUsize,
    ended: AtomicBool,
}

impl AnswerSink for StreamSink {
    fn deliver(&self, sequence: u64, answer: Answer) {
        self.inside.fetch_sub(1, Ordering::Relaxed);
        // Full only if refusals of a misbehaving sender fill the channel; it then misses this answer and
        // times out, which is its own doing.
        if self.answers.try_send(wire::encode_answer(sequence, answer)).is_err() {
            tracing::debug!(sequence, "answer dropped: the stream is gone or flooded");
        }
    }

    fn is_cancelled(&self) -> bool {
        self.ended.load(Ordering::Relaxed) || self.answers.is_closed()
    }
}

/// The answer side of one stream.
#[derive(Debug)]
pub struct Answers {
    outgoing: mpsc::Receiver<v1::CombineFrame>,
}

impl Stream for Answers {
    type Item = Result<v1::CombineFrame, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.outgoing.poll_recv(cx).map(|message| message.map(Ok))
    }
}
