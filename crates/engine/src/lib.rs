//! The step loop: joins scheduler, model, expert exchange and sampler on one thread.
//!
//! [`Engine::spawn`] takes a loaded model and gives it a std thread of its own. That thread is the single
//! owner of the KV cache, the scheduler and every running sequence; everybody else holds an
//! [`EngineHandle`], which never blocks, and streams of events. The crate refuses to know about gRPC, the
//! cluster, text and Prometheus: it counts in plain atomics ([`EngineStats`]) and names its failures
//! ([`EngineError`], [`SubmitError`], [`HandoffError`]).
//!
//! What holds, whoever calls and however slowly:
//! - **The loop waits for nobody but the experts**, and that wait is bounded by the exchange. Events go
//!   into channels as large as all events that the sequence can still have; KV leaves through a bounded
//!   channel whose being full stalls that hand-off only (the rows stay in the cache) until it is given up.
//! - **Every sequence ends in exactly one event**, [`EngineEvent::Finished`] or [`EngineEvent::Failed`],
//!   and its pages are free by then. Dropping its stream ends it too.
//! - **A failed step fails the sequences that were in it**, each with the cause; the others, and the
//!   engine, go on.
//! - **The text does not depend on the company.** What runs beside a sequence, how its prompt is cut into
//!   chunks and where its prompt was computed change when a token comes, never which one.
//!
//! Read [`request::SequenceRequest`] first, then [`handle::EngineHandle`], then `step_loop`.

pub mod error;
mod events;
pub mod handle;
pub mod handoff;
pub mod request;
pub mod stats;
mod step_loop;

pub use error::{EngineError, EngineStartError, HandoffError, SelfTestError, SubmitError};
pub use handle::{Engine, EngineHandle, EngineParts, KvShape, SequenceStream};
pub use handoff::{
    HandoffOffer, KV_ROOM_BYTES, KvFinish, KvMessage, KvRoom, KvRows, KvStream, KvWriter, MAX_KV_FRAME_BYTES,
    prompt_hash,
};
pub use request::{EngineEvent, EngineLimits, GeneratedToken, PrefillPlace, PrefillRequest, SequenceRequest};
pub use stats::{EngineLoad, EngineStats, StepSample};
