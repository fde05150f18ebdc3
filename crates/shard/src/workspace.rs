//! Device buffers of the compute step, kept for the life of the shard.

use cadre_ops::{Backend, OpsError, PassLimits};

/// Rows as received, which of them go where, and results.
pub(crate) struct Workspace<B: Backend> {
    /// What the buffers hold.
    pub(crate) limits: PassLimits,
    pub(crate) received: B::Rows,
    pub(crate) pass: B::Pass,
    pub(crate) results: B::Activations,
}

impl<B: Backend> Workspace<B> {
    /// Buffers for passes as large as the backend likes them.
    pub(crate) fn new(backend: &B, hidden: usize) -> Result<Self, OpsError> {
        let limits = backend.pass_limits(hidden);
        Ok(Self {
            limits,
            received: backend.alloc_rows(limits.rows, hidden)?,
            pass: backend.alloc_pass(limits)?,
            results: backend.alloc_activations(limits.pairs, hidden)?,
        })
    }
}
