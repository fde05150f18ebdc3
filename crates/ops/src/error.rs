//! Why an operation did not happen.

/// What an operation refuses.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OpsError {
    /// Shapes do not fit together.
    #[error("{op}: {what} is {found}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Which dimension of which argument.
        what: &'static str,
        /// What was given.
        found: usize,
        /// What is needed.
        expected: usize,
    },
    /// An index is out of range.
    #[error("{op}: {what} {index} is out of range (limit {limit})")]
    Range {
        /// The operation.
        op: &'static str,
        /// What the index counts.
        what: &'static str,
        /// The index.
        index: usize,
        /// First index that does not exist.
        limit: usize,
    },
    /// A weight value that no kernel may see.
    #[error("{op}: {what} at element {index} is {value}")]
    BadValue {
        /// The operation.
        op: &'static str,
        /// Which value.
        what: &'static str,
        /// Its flat index.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// The gate met a NaN.
    #[error("gate: logit of expert {expert} in row {row} is NaN")]
    NanGate {
        /// Row of the batch.
        row: usize,
        /// Logical expert.
        expert: usize,
    },
    /// The device has no room.
    #[error("{op}: {bytes} bytes asked of the device{}", free.map(|free| format!(", {free} free")).unwrap_or_default())]
    OutOfMemory {
        /// The operation.
        op: &'static str,
        /// Requested size.
        bytes: usize,
        /// Bytes that were free; `None` where nobody can say, or the size is beyond any machine.
        free: Option<u64>,
    },
    /// The device failed.
    #[error("{op}: {message}")]
    Device {
        /// The operation.
        op: &'static str,
        /// What the device said.
        message: String,
    },
}
