//! The one place where a worker's gRPC status becomes a request's error (the table of codes is in
//! cadre-worker's `status` module).

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
    // Only a status that was made on our side, of a broken connection, has causes.
    let broken = std::error::Error::source(status).is_some();
    match status.code() {
        code if broken || (!begun && code == Code::Unavailable) => {
            let problem = format!("{code:?}: {}", with_causes(status));
            RequestError::WorkerUnavailable { worker, operation, problem, begun }
        }
        Code::InvalidArgument | Code::OutOfRange => {
            RequestError::Refused { worker, problem: status.message().to_owned() }
        }
        Code::ResourceExhausted => {
            RequestError::Overloaded { worker, problem: status.message().to_owned(), retry_after_s }
        }
        Code::Aborted => RequestError::HandoffFailed { worker, problem: status.message().to_owned() },
        code => {
            let problem = format!("{code:?}: {}", with_causes(status));
            RequestError::WorkerFailed { worker, operation, problem }
        }
    }
}

/// A transport error says "transport error" and hides the reason in its causes.
fn with_causes(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}
