//! `cadre.v1.Expert` over any [`ShardService`].
//!
//! The stream's reader decodes frames and submits them; answers leave in any order. A frame that cannot
//! be decoded is refused as malformed and the stream goes on, because the sequence number still names it.
//! At most [`MAX_STREAM_FRAMES`] frames of a stream are inside at once; more are refused as overloaded.
//! When the worker goes away its queued frames are cancelled, not computed.
//!
//! **Bytes.** A frame is inside from the moment it is read until the transport takes its answer, and holds room for
//! its own payload and for the answer all the while, of its stream and of the process ([`Limits`]). Without room the
//! stream is not read, and HTTP/2 holds the worker back. So a worker that does not read its answers costs a bounded
//! share, and after a while of taking none it loses the stream, with all that waits for it, so that several of
//! them do not hold back the others.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use cadre_ops::RowFormat;
use cadre_proto::{MAX_MESSAGE_BYTES, v1};
use cadre_types::NumericsClass;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::{AnswerSink, MAX_LINK_FRAMES, Reply, ShardService};
use crate::{
    frame::{Answer, DispatchFrame, MAX_FRAME_BYTES, Refusal, RefusalCode},
    plan::FrameLimits,
    wire,
};

/// Frames of one stream without an answer: what a well-behaved link sends, so only another kind of
/// client meets the bound.
pub const MAX_STREAM_FRAMES: usize = MAX_LINK_FRAMES;

/// What frames and answers may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes under way on one stream: the largest frame and its answer, which is twice what two micro-batches of 256
    /// tokens have at once.
    pub stream_bytes: usize,
    /// Bytes under way in the process: four streams that read nothing, and the others still get on.
    pub process_bytes: usize,
    /// A stream of which no waiting answer was taken for this long ends. Twice the bound on a frame: nobody waits for
    /// these answers any more.
    pub unread: Duration,
}

impl Limits {
    /// Those of a model that sends each token to so many experts: no more than its largest frame and answer take.
    pub fn of_model(numerics: NumericsClass, hidden: usize, experts_per_token: usize) -> Self {
        let frame = FrameLimits::of(RowFormat::dispatch(numerics), RowFormat::combine(numerics), hidden);
        let stream_bytes = frame.largest_frame() + frame.largest_answer(experts_per_token);
        Self { stream_bytes, process_bytes: 4 * stream_bytes, ..Self::default() }
    }
}

impl Default for Limits {
    fn default() -> Self {
        let stream_bytes = 2 * MAX_FRAME_BYTES;
        Self { stream_bytes, process_bytes: 4 * stream_bytes, unread: Duration::from_secs(10) }
    }
}

/// Bytes of a permit: semaphores count in `u32`.
const UNIT: usize = 1024;

fn units(bytes: usize) -> usize {
    bytes.div_ceil(UNIT)
}

/// The tonic service.
#[derive(Clone)]
pub struct ExpertServer {
    service: Arc<dyn ShardService>,
    limits: Limits,
    /// Room of the process, shared by its streams; who waits first gets it first.
    room: Arc<Semaphore>,
}

impl ExpertServer {
    /// Serves a shard.
    pub fn new(service: Arc<dyn ShardService>) -> Self {
        Self::with_limits(service, Limits::default())
    }

    /// Serves a shard within other limits.
    pub fn with_limits(service: Arc<dyn ShardService>, limits: Limits) -> Self {
        Self { service, limits, room: Arc::new(Semaphore::new(units(limits.process_bytes))) }
    }

    /// The service for a tonic router, with the message limits of the wire.
    pub fn into_service(self) -> v1::expert_server::ExpertServer<Self> {
        v1::expert_server::ExpertServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    fn open(&self) -> (Arc<StreamState>, Answers) {
        // Refusals of frames beyond the bound also pass this channel, one per frame read: the reader waits
        // for room before it reads on, so twice the bound is never exceeded.
        let (answers, outgoing) = mpsc::channel(2 * MAX_STREAM_FRAMES);
        let outgoing = Arc::new(Mutex::new(Some(outgoing)));
        let state = Arc::new(StreamState {
            answers,
            outgoing: Arc::clone(&outgoing),
            limits: self.limits,
            room: Arc::new(Semaphore::new(units(self.limits.stream_bytes))),
            process_room: Arc::clone(&self.room),
            inside: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
            taken: Arc::new(Mutex::new(Instant::now())),
        });
        let taken = Arc::clone(&state.taken);
        (state, Answers { outgoing, taken })
    }
}

impl std::fmt::Debug for ExpertServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExpertServer").field("limits", &self.limits).finish_non_exhaustive()
    }
}

#[tonic::async_trait]
impl v1::expert_server::Expert for ExpertServer {
    type DispatchStream = Answers;

    async fn dispatch(
        &self,
        request: Request<Streaming<v1::DispatchFrame>>,
    ) -> Result<Response<Answers>, Status> {
        let (state, answers) = self.open();
        tokio::spawn(serve(self.service.clone(), request.into_inner(), state));
        Ok(Response::new(answers))
    }
}

/// Reads a stream to its end, and ends it if its answers are not read.
async fn serve(
    service: Arc<dyn ShardService>,
    frames: Streaming<v1::DispatchFrame>,
    state: Arc<StreamState>,
) {
    let reading = async {
        read(service.as_ref(), frames, &state).await;
        // The worker sends nothing more but may still take answers.
        while !state.ended.load(Ordering::Relaxed) && !state.answers.is_closed() && state.inside() > 0 {
            tokio::time::sleep(state.limits.unread).await;
        }
    };
    tokio::select! {
        () = reading => {}
        () = state.neglected() => {
            tracing::warn!(
                unread = ?state.limits.unread, frames = state.inside(),
                "a worker takes no answers: its dispatch stream ends"
            );
            state.cut();
        }
    }
}

async fn read(
    service: &dyn ShardService,
    mut frames: Streaming<v1::DispatchFrame>,
    state: &Arc<StreamState>,
) {
    loop {
        match frames.message().await {
            Ok(Some(wire)) => state.accept(service, wire).await,
            Ok(None) => return,
            Err(status) => {
                tracing::debug!(%status, "dispatch stream broke");
                state.ended.store(true, Ordering::Relaxed);
                return;
            }
        }
    }
}

/// What the two directions of one stream share.
struct StreamState {
    answers: mpsc::Sender<Outgoing>,
    /// The queue of answers; whoever takes it out ends the stream.
    outgoing: Arc<Mutex<Option<mpsc::Receiver<Outgoing>>>>,
    limits: Limits,
    room: Arc<Semaphore>,
    process_room: Arc<Semaphore>,
    inside: AtomicUsize,
    ended: AtomicBool,
    /// When the transport last took an answer, or found none to take.
    taken: Arc<Mutex<Instant>>,
}

/// An answer, and the room that it and its frame take.
struct Outgoing {
    message: v1::CombineFrame,
    _place: Option<Place>,
}

/// A frame's place and room on its stream.
struct Place {
    state: Arc<StreamState>,
    _room: [OwnedSemaphorePermit; 2],
}

impl Drop for Place {
    fn drop(&mut self) {
        self.state.inside.fetch_sub(1, Ordering::AcqRel);
    }
}

impl StreamState {
    fn inside(&self) -> usize {
        self.inside.load(Ordering::Acquire)
    }

    /// Submits a frame once there is room for it, or refuses it.
    async fn accept(self: &Arc<Self>, service: &dyn ShardService, wire: v1::DispatchFrame) {
        let sequence = wire.sequence;
        let refusal = match DispatchFrame::try_from(wire) {
            Ok(frame) if self.inside() < MAX_STREAM_FRAMES => match self.place(bytes_under_way(&frame)).await
            {
                Some(place) => {
                    let sink = FrameSink { state: Arc::clone(self), place: Mutex::new(Some(place)) };
                    service.submit(frame, Reply::new(Arc::new(sink), sequence));
                    return;
                }
                None => return,
            },
            Ok(frame) => {
                let what = format!("{}: {MAX_STREAM_FRAMES} frames of this stream are inside", frame.layer);
                Refusal::new(RefusalCode::Overloaded, what)
            }
            Err(error) => Refusal::new(RefusalCode::Malformed, error.to_string()),
        };
        let message = wire::encode_answer(sequence, Err(refusal.into()));
        // Waiting here is back-pressure on a sender that breaks the bound; the stream's end wakes it.
        if self.answers.send(Outgoing { message, _place: None }).await.is_err() {
            self.ended.store(true, Ordering::Relaxed);
        }
    }

    /// Waits for room; `None` if the stream ends first.
    async fn place(self: &Arc<Self>, bytes: usize) -> Option<Place> {
        // More than the whole room is what a frame beyond the limits announces; it is refused when it is looked at.
        let most = units(self.limits.stream_bytes.min(self.limits.process_bytes));
        let wanted = u32::try_from(units(bytes).min(most)).unwrap_or(u32::MAX);
        let waiting = async {
            // Its own stream first: who waits for that must not stand in the way of others.
            let own = Arc::clone(&self.room).acquire_many_owned(wanted).await.ok()?;
            let process = Arc::clone(&self.process_room).acquire_many_owned(wanted).await.ok()?;
            Some([own, process])
        };
        let room = tokio::select! {
            room = waiting => room?,
            () = self.answers.closed() => return None,
        };
        self.inside.fetch_add(1, Ordering::AcqRel);
        Some(Place { state: Arc::clone(self), _room: room })
    }

    /// Resolves when answers wait and none was taken for too long.
    async fn neglected(&self) {
        loop {
            let since = *self.taken.lock();
            let waits = self.answers.capacity() < self.answers.max_capacity();
            if waits && since.elapsed() >= self.limits.unread {
                return;
            }
            let rest =
                if waits { self.limits.unread.saturating_sub(since.elapsed()) } else { self.limits.unread };
            // At least a tick of the timer, whatever the clocks say.
            tokio::time::sleep(rest.max(Duration::from_millis(1))).await;
        }
    }

    /// Ends the stream and lets its answers go.
    fn cut(&self) {
        self.ended.store(true, Ordering::Relaxed);
        let queue = self.outgoing.lock().take();
        drop(queue);
    }
}

/// Payload of a frame and of its answer: a row of the combine format for each pair, as wide as the frame's own rows.
fn bytes_under_way(frame: &DispatchFrame) -> usize {
    let element = frame.format.row_bytes(1).max(1);
    let hidden = frame.data.len() / frame.tokens.max(1) / element;
    let row = RowFormat::combine(frame.generation.numerics).row_bytes(hidden);
    frame.payload_bytes().saturating_add(frame.pairs().saturating_mul(row))
}

/// Where the answer to one frame goes.
struct FrameSink {
    state: Arc<StreamState>,
    place: Mutex<Option<Place>>,
}

impl AnswerSink for FrameSink {
    fn deliver(&self, sequence: u64, answer: Answer) {
        let message = wire::encode_answer(sequence, answer);
        let outgoing = Outgoing { message, _place: self.place.lock().take() };
        let state = &self.state;
        if state.answers.capacity() == state.answers.max_capacity() {
            // The first to wait; the clock runs from here.
            *state.taken.lock() = Instant::now();
        }
        // Full only if refusals of a misbehaving sender fill the channel; it then misses this answer and
        // times out, which is its own doing.
        if state.answers.try_send(outgoing).is_err() {
            tracing::debug!(sequence, "answer dropped: the stream is gone or flooded");
        }
    }

    fn is_cancelled(&self) -> bool {
        self.state.ended.load(Ordering::Relaxed) || self.state.answers.is_closed()
    }
}

/// The answer side of one stream.
pub struct Answers {
    outgoing: Arc<Mutex<Option<mpsc::Receiver<Outgoing>>>>,
    taken: Arc<Mutex<Instant>>,
}

impl std::fmt::Debug for Answers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answers").finish_non_exhaustive()
    }
}

impl Stream for Answers {
    type Item = Result<v1::CombineFrame, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut queue = self.outgoing.lock();
        let Some(outgoing) = queue.as_mut() else {
            return Poll::Ready(Some(Err(Status::resource_exhausted("answers were not read in time"))));
        };
        let next = ready!(outgoing.poll_recv(cx));
        *self.taken.lock() = Instant::now();
        Poll::Ready(next.map(|outgoing| Ok(outgoing.message)))
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        // The transport has let the stream go: what waits for it is nobody's.
        let queue = self.outgoing.lock().take();
        drop(queue);
    }
}

#[cfg(test)]
mod tests;
