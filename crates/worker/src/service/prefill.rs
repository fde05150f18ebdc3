//! `Prefill`: computes a prompt and streams its KV to the decode worker while it does.
//!
//! A task of its own forwards rows, because the response stream is polled only as fast as the router
//! reads. It ends with the response stream (the router dropped the call), with the receipt, or with the
//! first failure; in every case the engine's sequence and the call to the decode worker end with it, and
//! no wait in between is longer than the hand-off time-out. A hand-off that is cut off ends without a
//! finish frame, so the decode worker never takes it for whole.

use cadre_engine::{EngineEvent, KvMessage, KvStream, PrefillRequest, SequenceStream, prompt_hash};
use cadre_proto::{
    connection::{ConnectionEnd, with_causes},
    convert::required,
    v1,
};
use cadre_types::{FinishReason, StopConditions};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Duration, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

use crate::{status, wire};

use super::WorkerService;

/// The response stream of `Prefill`. Dropping it aborts the hand-off.
pub type PrefillStream = ReceiverStream<Result<v1::PrefillEvent, Status>>;

/// Events that may wait for the router: progress (left out when there is no room) and the end, which has a
/// place of its own.
const PENDING_EVENTS: usize = 16;

/// Frames between the engine and the connection. The engine's channel buffers already; two let one be
/// encoded while the next is fetched.
const PENDING_FRAMES: usize = 2;

impl WorkerService {
    pub(super) fn start_prefill(
        &self,
        request: Request<v1::PrefillRequest>,
    ) -> Result<PrefillStream, Status> {
        let engine = self.admitting()?;
        let deadline = wire::deadline(request.metadata())?;
        let request = request.into_inner();
        self.check_generation(request.generation.as_ref(), "prefill.generation")?;
        let shape = engine.kv_shape();
        let begin = v1::KvBegin {
            format_version: wire::KV_FORMAT_VERSION,
            generation: Some(self.shared.options.generation.into()),
            request_id: request.request_id.clone(),
            prompt_tokens: u32::try_from(request.prompt.len())
                .map_err(|_| Status::invalid_argument("prefill.prompt: more than 2^32 tokens"))?,
            prompt_hash: prompt_hash(&request.prompt),
            layers: shape.layers as u32,
            row_width: shape.row_width as u32,
            dtype: wire::dtype(shape.format).into(),
        };
        // Dialled lazily; a bad address is refused before anything is computed.
        self.shared.peers.client(&request.decode_address)?;
        let (events, kv) = engine
            .submit_prefill(PrefillRequest {
                request_id: request.request_id,
                prompt: request.prompt,
                sampling: required(request.sampling.as_ref(), "prefill.sampling")?.into(),
                stop: StopConditions {
                    stop_token_ids: request.stop_token_ids,
                    min_tokens: request.min_tokens,
                    // As in `Decode`.
                    ignore_eos: true,
                    ..StopConditions::default()
                },
                deadline,
            })
            .map_err(|error| status::of_submit(&error))?;
        let (sender, receiver) = mpsc::channel(PENDING_EVENTS);
        let handoff = Handoff {
            service: self.clone(),
            begin,
            address: request.decode_address,
            events,
            kv,
            progress: sender.clone(),
        };
        let call = self.open_call();
        tokio::spawn(async move {
            let _call = call;
            // The last event's place is taken before any progress is.
            let Ok(last) = sender.clone().reserve_owned().await else { return };
            let result = tokio::select! {
                result = handoff.run() => result,
                () = sender.closed() => return,
            };
            last.send(result.map(|done| event(v1::prefill_event::Event::HandedOff(done))));
        });
        Ok(ReceiverStream::new(receiver))
    }
}

fn event(event: v1::prefill_event::Event) -> v1::PrefillEvent {
    v1::PrefillEvent { event: Some(event) }
}

/// One prompt on its way to a decode worker.
struct Handoff {
    service: WorkerService,
    begin: v1::KvBegin,
    address: String,
    events: SequenceStream,
    kv: KvStream,
    progress: mpsc::Sender<Result<v1::PrefillEvent, Status>>,
}

impl Handoff {
    async fn run(mut self) -> Result<v1::HandedOff, Status> {
        let mut delivery = None;
        let mut ended = None;
        loop {
            tokio::select! {
                message = self.kv.recv() => match message {
                    Some(message) => {
                        // Opened by the first rows: until then the prompt waits here, and the decode
                        // worker's time-out between frames must not run.
                        let open = match delivery.take() {
                            Some(open) => open,
                            None => self.open().await?,
                        };
                        match message {
                            KvMessage::Rows(rows) => delivery = Some(self.sent(open, wire::rows(rows)).await?),
                            KvMessage::Finish(finish) => {
                                let first_token = finish.first_token.token;
                                let open = self.sent(open, wire::finish(finish)).await?;
                                let receipt = open.receipt().await.map_err(|error| self.lost(error))?;
                                return Ok(v1::HandedOff { first_token, kv_bytes: receipt.kv_bytes });
                            }
                        }
                    }
                    None => return Err(self.why(ended).await),
                },
                event = self.events.recv(), if ended.is_none() => self.note(event, &mut ended),
            }
        }
    }

    /// Passes progress on; keeps the end for when the KV has run out.
    fn note(&self, happened: Option<EngineEvent>, ended: &mut Option<Status>) {
        match happened {
            Some(EngineEvent::Computed(tokens)) => {
                // Progress is only worth telling while somebody keeps up with it.
                let _ = self.progress.try_send(Ok(event(v1::prefill_event::Event::ComputedTokens(tokens))));
            }
            Some(EngineEvent::Reserved | EngineEvent::Token(_)) => {}
            Some(EngineEvent::Finished(reason)) => *ended = Some(of_end(reason)),
            Some(EngineEvent::Failed(error)) => *ended = Some(status::of_engine(&error)),
            None => *ended = Some(Status::internal("the engine ended without an answer")),
        }
    }

    /// Why the KV ended early.
    async fn why(&mut self, mut ended: Option<Status>) -> Status {
        loop {
            if let Some(status) = ended {
                return status;
            }
            let event = self.events.recv().await;
            self.note(event, &mut ended);
        }
    }

    async fn open(&self) -> Result<Delivery, Status> {
        let bound = self.service.shared.options.handoff_timeout;
        let mut client = self.service.shared.peers.client(&self.address)?;
        let (frames, outgoing) = mpsc::channel(PENDING_FRAMES);
        let call = tokio::spawn(async move {
            client.receive_kv(ReceiverStream::new(outgoing)).await.map(tonic::Response::into_inner)
        });
        let delivery = Delivery { frames, call: AbortOnDrop(call), bound };
        self.sent(delivery, wire::frame(v1::kv_frame::Frame::Begin(self.begin.clone()))).await
    }

    async fn sent(&self, mut delivery: Delivery, frame: v1::KvFrame) -> Result<Delivery, Status> {
        match delivery.send(frame).await {
            Ok(()) => Ok(delivery),
            Err(error) => Err(self.lost(error)),
        }
    }

    /// Names the peer in an error of its call.
    fn lost(&self, error: Status) -> Status {
        let end = ConnectionEnd::of_status(&error);
        if end.is_some() {
            self.service.shared.peers.forget(&self.address);
        }
        let message = match end {
            Some(end) => format!("hand-off to {}: {end}: {}", self.address, with_causes(&error)),
            None => format!("hand-off to {}: {}", self.address, error.message()),
        };
        // Whatever the peer called it, for the router it is a hand-off that failed and may be tried again.
        Status::aborted(message)
    }
}

fn of_end(reason: FinishReason) -> Status {
    match reason {
        FinishReason::Deadline => {
            Status::deadline_exceeded("the deadline passed while the prompt was computed")
        }
        FinishReason::Cancelled => Status::cancelled("the prompt was cancelled"),
        FinishReason::Stop | FinishReason::Length | FinishReason::Error => {
            Status::internal("the prompt ended without its last rows")
        }
    }
}

/// A call to `ReceiveKv` in progress. Dropping it resets the stream.
struct Delivery {
    frames: mpsc::Sender<v1::KvFrame>,
    call: AbortOnDrop,
    bound: Duration,
}

struct AbortOnDrop(JoinHandle<Result<v1::KvReceipt, Status>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Delivery {
    async fn send(&mut self, frame: v1::KvFrame) -> Result<(), Status> {
        let bound = self.bound;
        let sending = async {
            tokio::select! {
                // The peer's answer before the end is a refusal, even if there is room for the frame.
                biased;
                answer = &mut self.call.0 => Err(refusal(answer)),
                sent = self.frames.send(frame) => match sent {
                    Ok(()) => Ok(()),
                    Err(_) => Err(refusal((&mut self.call.0).await)),
                },
            }
        };
        timeout(bound, sending).await.unwrap_or_else(|_| Err(late(bound, "to take a frame")))
    }

    /// Ends the frames and waits for the receipt.
    async fn receipt(self) -> Result<v1::KvReceipt, Status> {
        let Self { frames, mut call, bound } = self;
        drop(frames);
        match timeout(bound, &mut call.0).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(join)) => Err(Status::internal(join.to_string())),
            Err(_) => Err(late(bound, "for its receipt")),
        }
    }
}

fn late(bound: Duration, what: &str) -> Status {
    Status::aborted(format!("waited {bound:?} for the decode worker {what}"))
}

fn refusal(answer: Result<Result<v1::KvReceipt, Status>, tokio::task::JoinError>) -> Status {
    match answer {
        Ok(Err(status)) => status,
        Ok(Ok(_)) => Status::internal("the decode worker sent a receipt before the end"),
        Err(join) => Status::internal(join.to_string()),
    }
}
