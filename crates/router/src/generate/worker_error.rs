//! The one place where a worker's gRPC status becomes a request's error (the table of codes is in
//! cadre-worker's `status` module).

use cadre_types::MemberId;
use tonic::{Code, Status};

use crate::error::RequestError;

/// What a worker's status means for the request.
pub(super) fn worker_error(
    worker: &MemberId,
    operation: &'static str,
    status: &Status,
    retry_after_s: u32,
) -> RequestError {
    let worker = worker.clone();
    match status.code() {
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
