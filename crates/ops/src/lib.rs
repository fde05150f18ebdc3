//! The backend trait and its plain scalar reference.
//!
//! A [`Backend`] owns device memory (a buffer type per kind of values, [`Backend::Weight`],
//! [`Backend::KvCache`]) and runs operations in order on a [`Backend::Queue`]. Nothing above this trait sees a
//! slice of device memory. What a step is (ids, positions, segments, block tables) goes to the device once, as
//! a [`Backend::Step`], and every operation of the step takes that. Transfers go to and from memory that the
//! backend owns and that sockets use as well; they end in events. A CPU backend may run every operation at
//! once; a CUDA backend enqueues. The trait speaks in the operations of the network (a linear, a latent append,
//! an attention over pages), not in loops, so that each backend fuses as it likes, as long as it gives the
//! bits that docs/numerics.md specifies for its numerics class.
//!
//! [`mod@reference`] is that specification as code: scalar, slow, and what every fast path is compared
//! with bit for bit.

#![forbid(unsafe_code)]

pub mod backend;
pub mod check;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod drawn;
pub mod error;
pub mod exchange;
pub mod gate;
pub mod host;
pub mod plan;
pub mod reference;
pub mod resident;
pub mod shape;
pub mod step;

pub use backend::{Backend, Ffn};
pub use drawn::{DrawnElements, DrawnMatrix};
pub use error::OpsError;
pub use exchange::{DispatchBatch, ExchangeError, ExchangeTicket, ExpertChunk, ExpertExchange, ExpertRows};
pub use host::{
    ElementType, EncodedRows, HostMatrix, HostMemory, HostRows, HostVector, MatrixData, RowFormat, RowLayout,
};
pub use plan::{Allocation, DeviceIdentity, DeviceMemory, PassLimits, Sizes};
pub use reference::ReferenceBackend;
pub use shape::{AttentionShape, GateShape, GroupScore, KvLayout, Scoring};
pub use step::{AttentionForm, PassInfo, PassRows, RowGroup, SampleRow, StepInfo, StepRows, StepSegment};
