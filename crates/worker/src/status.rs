//! The one place where an engine's errors become gRPC codes.
//!
//! | code | meaning for the router |
//! | --- | --- |
//! | `INVALID_ARGUMENT` | the request is impossible, here or anywhere |
//! | `RESOURCE_EXHAUSTED` | this worker is full: another one, or later |
//! | `FAILED_PRECONDITION` | other weights, numerics or role: never on this worker |
//! | `ABORTED` | the hand-off failed: the whole request may be tried again |
//! | `UNAVAILABLE` | starting, draining or stopped, or experts without a live copy |
//! | `INTERNAL` | a defect of this process |

use cadre_engine::{EngineError, HandoffError, SubmitError};
use cadre_model::ModelError;
use cadre_ops::ExchangeError;
use cadre_proto::UNCOVERED;
use cadre_scheduler::SchedulerError;
use tonic::{Code, Status, metadata::MetadataValue};

/// A refused submission as a status.
pub(crate) fn of_submit(error: &SubmitError) -> Status {
    let code = match error {
        SubmitError::Overloaded { .. } | SubmitError::Unread { .. } => Code::ResourceExhausted,
        SubmitError::Invalid { .. } | SubmitError::PromptTooLong { .. } => Code::InvalidArgument,
        SubmitError::Stopped { .. } => Code::Unavailable,
    };
    Status::new(code, error.to_string())
}

/// A failed sequence as a status.
pub(crate) fn of_engine(error: &EngineError) -> Status {
    let code = match error {
        EngineError::Refused(refused) => of_scheduler(refused),
        EngineError::Duplicate { .. } => Code::AlreadyExists,
        EngineError::Step { source, .. } => of_model(source),
        EngineError::Sample { .. } => Code::Internal,
        EngineError::Handoff(handoff) => code_of_handoff(handoff),
        EngineError::Stopped => Code::Unavailable,
    };
    let mut status = Status::new(code, error.to_string());
    if let EngineError::Step { source, .. } = error
        && let ModelError::Exchange(ExchangeError::Uncovered { .. }) = **source
    {
        // The exchange has waited as long as it may; asking another worker would only wait again.
        status.metadata_mut().insert(UNCOVERED, MetadataValue::from_static("1"));
    }
    status
}

/// A refused or failed hand-off as a status.
pub(crate) fn of_handoff(error: &HandoffError) -> Status {
    Status::new(code_of_handoff(error), error.to_string())
}

fn code_of_handoff(error: &HandoffError) -> Code {
    match error {
        HandoffError::Unknown { .. } => Code::NotFound,
        HandoffError::NotReserved { .. }
        | HandoffError::AlreadyBegun { .. }
        | HandoffError::Mismatch { .. } => Code::FailedPrecondition,
        HandoffError::UnknownLayer { .. }
        | HandoffError::OutOfOrder { .. }
        | HandoffError::OutOfRange { .. }
        | HandoffError::WrongSize { .. }
        | HandoffError::Incomplete { .. }
        | HandoffError::FirstToken { .. } => Code::InvalidArgument,
        HandoffError::Aborted { .. } | HandoffError::Stalled { .. } | HandoffError::NeverBegun { .. } => {
            Code::Aborted
        }
        HandoffError::Cache { .. } => Code::Internal,
        HandoffError::Stopped => Code::Unavailable,
    }
}

/// The code of a sequence whose hand-off failed, for the router: whatever was wrong with the frames, the
/// client's request was not, so it is `ABORTED` and may be tried again.
pub(crate) fn of_receiving_sequence(error: &EngineError) -> Status {
    match error {
        EngineError::Handoff(handoff) if code_of_handoff(handoff) != Code::Internal => {
            Status::aborted(error.to_string())
        }
        other => of_engine(other),
    }
}

fn of_scheduler(error: &SchedulerError) -> Code {
    match error {
        SchedulerError::QueueFull { .. } => Code::ResourceExhausted,
        SchedulerError::EmptyPrompt | SchedulerError::NoOutput | SchedulerError::NeverFits { .. } => {
            Code::InvalidArgument
        }
        SchedulerError::Config { .. }
        | SchedulerError::Unknown { .. }
        | SchedulerError::WrongState { .. }
        | SchedulerError::NotPlanned { .. } => Code::Internal,
    }
}

fn of_model(error: &ModelError) -> Code {
    match error {
        ModelError::Exchange(
            ExchangeError::Uncovered { .. }
            | ExchangeError::NoPlacement { .. }
            | ExchangeError::Closed { .. },
        ) => Code::Unavailable,
        ModelError::Exchange(ExchangeError::Generation { .. }) => Code::FailedPrecondition,
        _ => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cadre_types::{LayerId, LogicalExpert, PlacementEpoch};

    use super::*;

    #[test]
    fn an_uncovered_expert_is_unavailable_and_named() {
        let source = ModelError::Exchange(ExchangeError::Uncovered {
            layer: LayerId(12),
            expert: LogicalExpert(37),
            epoch: PlacementEpoch(9),
            waited_ms: 5000,
            causes: "connection refused".into(),
        });
        let status = of_engine(&EngineError::Step { position: 4, source: Arc::new(source) });
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.metadata().contains_key(UNCOVERED), "whoever asks elsewhere waits again");
        for words in ["expert 37", "layer 12", "epoch 9"] {
            assert!(status.message().contains(words), "{} lacks {words}", status.message());
        }
    }

    #[test]
    fn a_bad_frame_is_the_senders_fault_and_not_the_clients() {
        let error = HandoffError::UnknownLayer { layer: LayerId(99), layers: 6 };
        assert_eq!(of_handoff(&error).code(), Code::InvalidArgument);
        assert_eq!(of_receiving_sequence(&EngineError::Handoff(error)).code(), Code::Aborted);
    }

    #[test]
    fn a_full_queue_and_an_impossible_request_differ() {
        let full = EngineError::Refused(SchedulerError::QueueFull { waiting: 4, bound: 4 });
        let never = EngineError::Refused(SchedulerError::NeverFits { tokens: 9, pages: 9, total: 1 });
        assert_eq!(of_engine(&full).code(), Code::ResourceExhausted);
        assert_eq!(of_engine(&never).code(), Code::InvalidArgument);
    }
}
