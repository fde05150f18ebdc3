//! The backend trait and its plain scalar reference.
//!
//! A [`Backend`] owns device memory ([`Backend::Buffer`], [`Backend::Weight`], [`Backend::KvCache`])
//! and runs operations in order on a [`Backend::Queue`]. Nothing above this trait sees a slice of
//! device memory: data enters by `upload_*` and `load_*`, leaves by `download_*`, and a queue is
//! synchronised only where a method says so. A CPU backend may run every operation at once; a CUDA
//! backend enqueues. The trait speaks in the operations of the network (a linear, a latent append, an
//! attention over pages), not in loops, so that each backend fuses as it likes, as long as it gives
//! the bits that docs/numerics.md specifies for its numerics class.
//!
//! [`mod@reference`] is that specification as code: scalar, slow, and what every fast path is compared
//! with bit for bit.

#![forbid(unsafe_code)]

pub mod backend;
pub mod check;
pub mod exchange;
pub mod gate;
pub mod host;
pub mod reference;
pub mod shape;

pub use backend::{Backend, Ffn, OpsError};
pub use exchange::{DispatchBatch, ExchangeError, ExchangeTicket, ExpertExchange, ExpertRows};
pub use host::{HostMatrix, HostRows, HostVector, MatrixData, RowFormat};
pub use reference::ReferenceBackend;
pub use shape::{AttentionShape, DecodeRow, GateShape, KvLayout, PrefillSegment, RowGroup};
