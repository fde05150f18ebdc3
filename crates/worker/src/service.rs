//! `cadre.v1.Worker` over an engine.
//!
//! The server runs from the first moment of the process, so that health and peers have something to talk
//! to; until [`WorkerService::serve_with`] brings an engine, every call is `UNAVAILABLE`. A call owns its
//! sequence: dropping the response stream drops the engine's stream, which frees the pages. No handler
//! computes anything.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use cadre_engine::{EngineHandle, KV_ROOM_BYTES, KvRoom};
use cadre_proto::{
    convert::required,
    secret::{Admit, ClusterSecret},
    v1,
};
use cadre_types::{ClusterView, Generation, Role};
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming, service::interceptor::InterceptedService};

mod decode;
mod peers;
mod prefill;
mod receive_kv;

pub use decode::DecodeStream;
pub use prefill::PrefillStream;

/// Most bytes of a message that a worker accepts: a KV frame (1 MiB of rows) or a prompt of 160 Ki tokens
/// (under 1 MiB as varints), with room for the fields around them.
pub const MAX_WORKER_MESSAGE_BYTES: usize = 2 << 20;

/// What a service needs to know of its process.
#[derive(Clone, Debug)]
pub struct ServiceOptions {
    /// Weights and numerics; the epoch is not compared.
    pub generation: Generation,
    /// Which calls are answered.
    pub role: Role,
    /// Bound on every wait for the other side of a hand-off.
    pub handoff_timeout: Duration,
    /// The cluster's secret: asked of callers, shown to decode workers.
    pub secret: Option<ClusterSecret>,
}

/// The service. Clones share it.
#[derive(Clone, Debug)]
pub struct WorkerService {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: ServiceOptions,
    engine: OnceLock<EngineHandle>,
    draining: AtomicBool,
    calls: Arc<AtomicU64>,
    peers: peers::Peers,
    /// For the rows of all hand-offs that come.
    incoming_room: KvRoom,
}

/// A call that has been accepted and has not ended.
#[derive(Debug)]
struct OpenCall(Arc<AtomicU64>);

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl WorkerService {
    /// A service without an engine yet.
    pub fn new(options: ServiceOptions) -> Self {
        let peers = peers::Peers::new(options.secret.as_ref());
        let shared = Shared {
            options,
            engine: OnceLock::new(),
            draining: AtomicBool::new(false),
            calls: Arc::default(),
            peers,
            incoming_room: KvRoom::new(KV_ROOM_BYTES),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Answers calls with this engine from now on. Only the first counts.
    pub fn serve_with(&self, engine: EngineHandle) {
        // A second engine would orphan the first one's sequences.
        let _ = self.shared.engine.set(engine);
    }

    /// From now on prompts are handed to decode workers of these views only. Only the first call counts.
    pub fn hand_off_to_members_of(&self, views: watch::Receiver<Option<Arc<ClusterView>>>) {
        self.shared.peers.limit_to(views);
    }

    /// Whether calls have ever been answered with an engine.
    pub fn has_served(&self) -> bool {
        self.shared.engine.get().is_some()
    }

    /// Takes no new requests; hand-offs of those it has still arrive.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Release);
    }

    /// `Decode` and `Prefill` calls that have not ended: the last token may still be on its way to a slow
    /// reader, or the last rows to a decode worker, when the engine is done with the sequence.
    pub fn open_calls(&self) -> u64 {
        self.shared.calls.load(Ordering::Acquire)
    }

    fn open_call(&self) -> OpenCall {
        self.shared.calls.fetch_add(1, Ordering::AcqRel);
        OpenCall(Arc::clone(&self.shared.calls))
    }

    /// As a tonic service, with its message limits, for callers that show the secret.
    pub fn into_server(self) -> InterceptedService<v1::worker_server::WorkerServer<Self>, Admit> {
        let admit = Admit::new(self.shared.options.secret.clone());
        let server = v1::worker_server::WorkerServer::new(self)
            .max_decoding_message_size(MAX_WORKER_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_WORKER_MESSAGE_BYTES);
        InterceptedService::new(server, admit)
    }

    fn engine(&self) -> Result<&EngineHandle, Status> {
        self.shared.engine.get().ok_or_else(|| Status::unavailable("this worker is loading its weights"))
    }

    /// The engine, if new requests are taken.
    fn admitting(&self) -> Result<&EngineHandle, Status> {
        if self.shared.draining.load(Ordering::Acquire) {
            return Err(Status::unavailable("this worker is draining"));
        }
        self.engine()
    }

    fn check_generation(&self, wire: Option<&v1::Generation>, field: &'static str) -> Result<(), Status> {
        let theirs = Generation::try_from(required(wire, field)?)?;
        self.shared.options.generation.check_weights(&theirs).map_err(|mismatch| {
            tracing::warn!(field, %mismatch, "a call of another generation is refused");
            Status::failed_precondition(mismatch.to_peer())
        })
    }

    fn refuse_role(&self, refused: Role, call: &'static str) -> Result<(), Status> {
        if self.shared.options.role == refused {
            return Err(Status::failed_precondition(format!("{call}: this is a {refused} worker")));
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl v1::worker_server::Worker for WorkerService {
    type DecodeStream = DecodeStream;
    type PrefillStream = PrefillStream;

    async fn decode(&self, request: Request<v1::DecodeRequest>) -> Result<Response<DecodeStream>, Status> {
        self.refuse_role(Role::Prefill, "Decode")?;
        self.start_decode(request).map(Response::new)
    }

    async fn prefill(&self, request: Request<v1::PrefillRequest>) -> Result<Response<PrefillStream>, Status> {
        self.refuse_role(Role::Decode, "Prefill")?;
        self.start_prefill(request).map(Response::new)
    }

    async fn receive_kv(
        &self,
        request: Request<Streaming<v1::KvFrame>>,
    ) -> Result<Response<v1::KvReceipt>, Status> {
        self.refuse_role(Role::Prefill, "ReceiveKv")?;
        self.receive(request.into_inner()).await.map(Response::new)
    }
}
