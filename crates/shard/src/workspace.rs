//! Device buffers of the compute step, kept for the life of the shard and grown in powers of two.

use cadre_ops::{Backend, OpsError};

/// Device memory of the three activation buffers together, in F32: bounds the rows of one pass. At hidden
/// 7168 a pass has 128 rows, of which each expert's weights are read once; at hidden 2048 it has 512. Rows are
/// ordered by expert, so of a larger batch at most one expert per pass is read again.
pub const WORKSPACE_BYTES: usize = 12 << 20;

/// Passes have at least this many rows, however wide they are.
const MIN_ROWS: usize = 64;

/// Rows as received, rows by slot, and results.
pub(crate) struct Workspace<B: Backend> {
    hidden: usize,
    rows: usize,
    buffers: Option<Buffers<B>>,
}

/// The three buffers.
pub(crate) struct Buffers<B: Backend> {
    pub(crate) received: B::Buffer,
    pub(crate) gathered: B::Buffer,
    pub(crate) results: B::Buffer,
}

impl<B: Backend> Workspace<B> {
    pub(crate) fn new(hidden: usize) -> Self {
        Self { hidden, rows: 0, buffers: None }
    }

    /// Most rows of one pass.
    pub(crate) fn max_rows(hidden: usize) -> usize {
        let fitting = (WORKSPACE_BYTES / (3 * 4 * hidden.max(1))).max(MIN_ROWS);
        // The largest power of two not above it.
        1 << fitting.ilog2()
    }

    /// Buffers for this many rows, at most [`Workspace::max_rows`].
    pub(crate) fn buffers(&mut self, backend: &B, rows: usize) -> Result<&mut Buffers<B>, OpsError> {
        if rows > self.rows {
            // The old ones go first: growing must not need both.
            self.buffers = None;
            self.rows = rows.next_power_of_two();
        }
        let alloc = || backend.alloc(self.rows, self.hidden);
        match &mut self.buffers {
            Some(buffers) => Ok(buffers),
            empty => Ok(empty.insert(Buffers { received: alloc()?, gathered: alloc()?, results: alloc()? })),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use cadre_ops::reference::ReferenceBackend;
    use cadre_types::NumericsClass;

    use super::*;

    #[test]
    fn a_pass_fits_the_workspace() {
        let rows = Workspace::<ReferenceBackend>::max_rows;
        assert_eq!((rows(7168), rows(2048), rows(512)), (128, 512, 2048));
        for hidden in [1, 130, 512, 7168, 1 << 17] {
            let bytes = 3 * 4 * hidden * rows(hidden);
            assert!(bytes <= WORKSPACE_BYTES || rows(hidden) == MIN_ROWS, "hidden {hidden}");
        }
    }

    #[test]
    fn buffers_grow_in_powers_of_two_and_stay() {
        let backend = ReferenceBackend::new(NumericsClass::F32);
        let mut workspace = Workspace::new(8);
        workspace.buffers(&backend, 3).unwrap();
        assert_eq!(workspace.rows, 4);
        workspace.buffers(&backend, 2).unwrap();
        assert_eq!(workspace.rows, 4);
        workspace.buffers(&backend, 5).unwrap();
        assert_eq!(workspace.rows, 8);
    }
}
