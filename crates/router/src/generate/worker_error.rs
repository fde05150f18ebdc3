//! The one place where a worker's gRPC status becomes a request's error (the table of codes is in
//! cadre-worker's `status` module).

use cadre_proto::connection::{ConnectionEnd, with_causes};
use cadre_types::MemberId;
use tonic::{Code, Status};

use crate::error::RequestError;

/// What a worker's status means for the request. `begun`: the worker had taken the work before. A worker
/// that could not be reached, or that takes nothing new, may be another one's place in a moment; whoever
/// gives up work that it had begun says why, and that is its answer.
pub(super) fn worker_error(
    worker: &MemberId,
    operation: &'static str,
    status: &Status,
    begun: bool,
    retry_after_s: u32,
) -> RequestError {
    let worker = worker.clone();
    if let Some(end) = ConnectionEnd::of_status(status) {
        let problem = format!("{end}: {}", with_causes(status));
        return RequestError::WorkerUnavailable { worker, operation, problem, begun };
    }
    match status.code() {
        code @ Code::Unavailable if !begun => {
            let problem = format!("{code:?}: {}", status.message());
            RequestError::WorkerUnavailable { worker, operation, problem, begun }
        }
        Code::InvalidArgument | Code::OutOfRange => {
            RequestError::Refused { worker, problem: status.message().to_owned() }
        }
        // Its exchange has waited for a live copy as long as it may.
        Code::Unavailable if status.metadata().contains_key(cadre_proto::UNCOVERED) => {
            RequestError::Uncovered { worker, operation, problem: status.message().to_owned() }
        }
        Code::ResourceExhausted => {
            RequestError::Overloaded { worker, problem: status.message().to_owned(), retry_after_s }
        }
        Code::Aborted => RequestError::HandoffFailed { worker, problem: status.message().to_owned() },
        code => {
            let problem = format!("{code:?}: {}", status.message());
            RequestError::WorkerFailed { worker, operation, problem }
        }
    }
}
