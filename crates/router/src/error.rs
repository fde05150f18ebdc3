//! Why a request fails, and why a router does not start. One conversion to gRPC status and one to
//! OpenAI's error shape; both keep the message, which names the operation and carries the values.

use std::{borrow::Cow, path::PathBuf, time::Duration};

use cadre_types::MemberId;
use serde_json::{Value, json};
use tonic::{Code, Status};

/// Why a request got no (or not all of its) answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// The model's name is not served here.
    #[error("model {requested:?} does not exist; this router serves {served:?}")]
    UnknownModel {
        /// What the client asked for.
        requested: String,
        /// What there is.
        served: String,
    },
    /// A field has a bad or unsupported value.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field as the client spelled it.
        field: Cow<'static, str>,
        /// What is wrong with it.
        problem: String,
    },
    /// Conversations are not served, or not this one, for a reason that lies in the checkpoint or in this
    /// server and not in the request.
    #[error("{problem}")]
    ChatUnavailable {
        /// The reason.
        problem: String,
    },
    /// The body is no JSON object.
    #[error("the request body is not valid JSON: {problem}")]
    Malformed {
        /// The parser's words.
        problem: String,
    },
    /// The body is larger than allowed, or took too long.
    #[error("the request body exceeds {limit_bytes} bytes")]
    BodyTooLarge {
        /// The bound.
        limit_bytes: usize,
    },
    /// The body did not arrive in time.
    #[error("the request body did not arrive within {after:?}")]
    BodyTimeout {
        /// The bound.
        after: Duration,
    },
    /// The port's bytes for requests that are incomplete, or are not tokens yet, are in use.
    #[error(
        "{budget_bytes} bytes of requests are being received or tokenized, which is all the room; retry in 1 s"
    )]
    IntakeFull {
        /// The bound.
        budget_bytes: usize,
    },
    /// The body is compressed or encoded otherwise.
    #[error("content-encoding: {found:?} is not supported, send the body as it is")]
    ContentEncoding {
        /// The header's value.
        found: String,
    },
    /// The prompt leaves no room for an answer. The first words are OpenAI's: clients know the case by them.
    #[error(
        "this model's maximum context length is {limit_tokens} tokens here (the model's own context is \
         {context_tokens}, the workers' caches may hold less); the prompt has {}{prompt_tokens} tokens, and one is \
         needed for the answer",
        if *at_least { "at least " } else { "" }
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// It was refused by its length in bytes, or its tokens were not counted to the end.
        at_least: bool,
        /// The longest sequence: `max_model_len` of /v1/models.
        limit_tokens: usize,
        /// Context of the model.
        context_tokens: usize,
    },
    /// The queue is full.
    #[error(
        "the queue is full: {in_router} requests in the router, at most {most}; retry in {retry_after_s} s"
    )]
    QueueFull {
        /// Requests waiting and running.
        in_router: u32,
        /// The bound.
        most: u32,
        /// Estimate of when there is room, in seconds.
        retry_after_s: u32,
    },
    /// The router shuts down.
    #[error("the router is draining and takes no new requests")]
    Draining,
    /// No worker can take the request.
    #[error("no worker is ready: {missing}")]
    NoWorker {
        /// What is missing.
        missing: String,
    },
    /// A worker refused the request as invalid; another would too.
    #[error("worker {worker} refused the request: {problem}")]
    Refused {
        /// The worker.
        worker: MemberId,
        /// Its words.
        problem: String,
    },
    /// Every worker asked has no room.
    #[error("worker {worker} has no room: {problem}; retry in {retry_after_s} s")]
    Overloaded {
        /// The last worker asked.
        worker: MemberId,
        /// Its words.
        problem: String,
        /// Estimate of when there is room, in seconds.
        retry_after_s: u32,
    },
    /// A worker failed on the way.
    #[error("{operation} on worker {worker} failed: {problem}")]
    WorkerFailed {
        /// The worker.
        worker: MemberId,
        /// What was asked of it (`decode`, `prefill`).
        operation: &'static str,
        /// Status and words.
        problem: String,
    },
    /// A worker could not be reached, or takes nothing new.
    #[error("{operation} on worker {worker} failed: {problem}")]
    WorkerUnavailable {
        /// The worker.
        worker: MemberId,
        /// What was asked of it.
        operation: &'static str,
        /// Status and words.
        problem: String,
        /// It had taken the work before.
        begun: bool,
    },
    /// Work failed on a worker for want of something that the worker has waited for already: another would wait as
    /// long once more.
    #[error("{operation} on worker {worker} failed: {problem}")]
    Uncovered {
        /// The worker.
        worker: MemberId,
        /// What was asked of it.
        operation: &'static str,
        /// Its words, which name the layer and the expert.
        problem: String,
    },
    /// It was tried more than once; what failed first is kept.
    #[error("{first}; tried again, at last: {last}")]
    TriedAgain {
        /// The first cause.
        first: Box<RequestError>,
        /// What ended it.
        last: Box<RequestError>,
    },
    /// KV did not get from the prefill to the decode worker; neither is known to be at fault.
    #[error("hand-off to worker {worker} failed: {problem}")]
    HandoffFailed {
        /// The decode worker.
        worker: MemberId,
        /// Its words.
        problem: String,
    },
    /// A worker was silent for too long.
    #[error("{operation} on worker {worker}: nothing for {after:?} while {stage}")]
    Stalled {
        /// The worker.
        worker: MemberId,
        /// What was asked of it.
        operation: &'static str,
        /// What the request was waiting for.
        stage: &'static str,
        /// The bound.
        after: Duration,
    },
    /// The request's deadline passed.
    #[error("the deadline of {after:?} passed while {stage}")]
    Deadline {
        /// Length of the deadline.
        after: Duration,
        /// What the request was waiting for.
        stage: &'static str,
    },
    /// The client went away.
    #[error("the client cancelled the request")]
    Cancelled,
    /// A fault of this process.
    #[error("internal error: {problem}")]
    Internal {
        /// What happened.
        problem: String,
    },
}

/// `Result` of a request's stages.
pub type RequestResult<T> = Result<T, RequestError>;

impl RequestError {
    /// A bad value of a field.
    pub fn invalid(field: impl Into<Cow<'static, str>>, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }

    /// With the first cause of the trouble that this error is the end of.
    pub(crate) fn after(self, first: Option<Self>) -> Self {
        match first {
            Some(first) if first != self => Self::TriedAgain { first: Box::new(first), last: Box::new(self) },
            _ => self,
        }
    }

    /// The gRPC code. The only place that chooses one for a request.
    pub fn code(&self) -> Code {
        match self {
            Self::UnknownModel { .. } => Code::NotFound,
            Self::Invalid { .. }
            | Self::Malformed { .. }
            | Self::ContentEncoding { .. }
            | Self::PromptTooLong { .. }
            | Self::Refused { .. } => Code::InvalidArgument,
            Self::QueueFull { .. }
            | Self::Overloaded { .. }
            | Self::IntakeFull { .. }
            | Self::BodyTooLarge { .. } => Code::ResourceExhausted,
            Self::Draining
            | Self::NoWorker { .. }
            | Self::WorkerFailed { .. }
            | Self::WorkerUnavailable { .. }
            | Self::Uncovered { .. }
            | Self::HandoffFailed { .. }
            | Self::Stalled { .. } => Code::Unavailable,
            Self::TriedAgain { last, .. } => last.code(),
            Self::Deadline { .. } | Self::BodyTimeout { .. } => Code::DeadlineExceeded,
            Self::Cancelled => Code::Cancelled,
            Self::ChatUnavailable { .. } => Code::Unimplemented,
            Self::Internal { .. } => Code::Internal,
        }
    }

    /// The HTTP status. The only place that chooses one for a request.
    pub fn http_status(&self) -> u16 {
        match self {
            Self::UnknownModel { .. } => 404,
            Self::Invalid { .. }
            | Self::Malformed { .. }
            | Self::PromptTooLong { .. }
            | Self::Refused { .. } => 400,
            Self::BodyTooLarge { .. } => 413,
            Self::BodyTimeout { .. } => 408,
            Self::ContentEncoding { .. } => 415,
            Self::QueueFull { .. } | Self::Overloaded { .. } | Self::IntakeFull { .. } => 429,
            Self::Draining
            | Self::NoWorker { .. }
            | Self::WorkerFailed { .. }
            | Self::WorkerUnavailable { .. }
            | Self::Uncovered { .. }
            | Self::HandoffFailed { .. }
            | Self::Stalled { .. } => 503,
            Self::TriedAgain { last, .. } => last.http_status(),
            Self::Deadline { .. } => 504,
            // nginx's code for a client that closed; nobody reads it.
            Self::Cancelled => 499,
            Self::ChatUnavailable { .. } => 501,
            Self::Internal { .. } => 500,
        }
    }

    /// Seconds after which a retry has a chance, where one has.
    pub fn retry_after_s(&self) -> Option<u32> {
        match self {
            Self::QueueFull { retry_after_s, .. } | Self::Overloaded { retry_after_s, .. } => {
                Some(*retry_after_s)
            }
            Self::Draining | Self::NoWorker { .. } | Self::IntakeFull { .. } => Some(1),
            Self::TriedAgain { last, .. } => last.retry_after_s(),
            _ => None,
        }
    }

    /// OpenAI's `code`: a word for programs.
    pub fn openai_code(&self) -> &'static str {
        match self {
            Self::UnknownModel { .. } => "model_not_found",
            Self::Invalid { .. } | Self::Refused { .. } => "invalid_value",
            Self::Malformed { .. } => "invalid_json",
            Self::BodyTooLarge { .. } => "body_too_large",
            Self::BodyTimeout { .. } => "body_timeout",
            Self::IntakeFull { .. } => "intake_full",
            Self::ContentEncoding { .. } => "unsupported_content_encoding",
            Self::PromptTooLong { .. } => "context_length_exceeded",
            Self::QueueFull { .. } => "queue_full",
            Self::Overloaded { .. } => "overloaded",
            Self::Draining => "draining",
            Self::NoWorker { .. } => "no_worker",
            Self::WorkerFailed { .. } | Self::WorkerUnavailable { .. } => "worker_failed",
            Self::Uncovered { .. } => "expert_unavailable",
            Self::TriedAgain { last, .. } => last.openai_code(),
            Self::HandoffFailed { .. } => "handoff_failed",
            Self::Stalled { .. } => "worker_stalled",
            Self::Deadline { .. } => "deadline_exceeded",
            Self::Cancelled => "cancelled",
            Self::ChatUnavailable { .. } => "chat_unavailable",
            Self::Internal { .. } => "internal_error",
        }
    }

    /// OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`.
    pub fn openai_body(&self) -> Value {
        let kind = match self.http_status() {
            429 => "rate_limit_error",
            400..500 => "invalid_request_error",
            503 | 504 => "service_unavailable_error",
            _ => "server_error",
        };
        let param = match self {
            Self::Invalid { field, .. } => Value::from(field.as_ref()),
            Self::UnknownModel { .. } => Value::from("model"),
            Self::ContentEncoding { .. } => Value::from("content-encoding"),
            _ => Value::Null,
        };
        json!({"error": {
            "message": self.to_string(),
            "type": kind,
            "param": param,
            "code": self.openai_code(),
        }})
    }

    /// The label of `cadre_router_requests_total`.
    pub fn outcome(&self) -> &'static str {
        match self {
            Self::QueueFull { .. } | Self::Overloaded { .. } | Self::IntakeFull { .. } | Self::Draining => {
                "refused"
            }
            Self::NoWorker { .. } => "no_worker",
            Self::WorkerFailed { .. }
            | Self::WorkerUnavailable { .. }
            | Self::Uncovered { .. }
            | Self::HandoffFailed { .. }
            | Self::Stalled { .. } => "worker_failed",
            Self::TriedAgain { last, .. } => last.outcome(),
            Self::Deadline { .. } | Self::BodyTimeout { .. } => "deadline",
            Self::Cancelled => "cancelled",
            Self::ChatUnavailable { .. } | Self::Internal { .. } => "internal",
            _ => "invalid",
        }
    }
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        let mut status = Self::new(error.code(), error.to_string());
        if let Some(seconds) = error.retry_after_s() {
            // Digits are always valid metadata.
            if let Ok(value) = seconds.to_string().parse() {
                status.metadata_mut().insert("retry-after", value);
            }
        }
        status
    }
}

/// Why a router does not start or stops.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// The checkpoint is not one.
    #[error(transparent)]
    Checkpoint(#[from] cadre_checkpoint::CheckpointError),
    /// The tokenizer is not one.
    #[error(transparent)]
    Text(#[from] cadre_text::TextError),
    /// A file of the checkpoint or a flag could not be read.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the fix.
        problem: String,
    },
    /// The checkpoint is not the one that was meant.
    #[error(
        "{}: the checkpoint has {found} routed experts per layer, {expected} were asked for; is it the \
         right checkpoint?",
        path.display()
    )]
    RoutedExperts {
        /// The checkpoint.
        path: PathBuf,
        /// What it has.
        found: usize,
        /// What was asked for.
        expected: usize,
    },
    /// The experts cannot be placed.
    #[error(transparent)]
    Plan(#[from] cadre_placement::PlanError),
    /// The expert load is of another model.
    #[error("{}: {source}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        source: cadre_placement::LoadError,
    },
    /// A metric table is wrong.
    #[error(transparent)]
    Metrics(#[from] cadre_telemetry::MetricsError),
    /// A port could not be bound.
    #[error("{what} cannot listen on {address}: {source}; choose another port or stop what uses it")]
    Bind {
        /// Which server.
        what: &'static str,
        /// Where.
        address: std::net::SocketAddr,
        /// The system's words.
        source: std::io::Error,
    },
    /// A server stopped by itself.
    #[error("the {what} server stopped: {problem}")]
    Server {
        /// Which server.
        what: &'static str,
        /// Why.
        problem: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_codes_and_hints_agree() {
        let full = RequestError::QueueFull { in_router: 8, most: 8, retry_after_s: 3 };
        let status = Status::from(full.clone());
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.metadata().get("retry-after").and_then(|value| value.to_str().ok()), Some("3"));
        assert_eq!((full.http_status(), full.openai_code()), (429, "queue_full"));

        let body = RequestError::invalid("temperature", "3 is not in 0..=2").openai_body();
        assert_eq!(body["error"]["param"], "temperature");
        assert_eq!(body["error"]["type"], "invalid_request_error");
        assert_eq!(body["error"]["message"], "temperature: 3 is not in 0..=2");

        let long = RequestError::PromptTooLong {
            prompt_tokens: 5000,
            at_least: false,
            limit_tokens: 2048,
            context_tokens: 4096,
        };
        let message = long.to_string();
        assert!(
            ["this model's maximum context length is 2048 tokens", "has 5000", "context is 4096"]
                .iter()
                .all(|words| message.contains(words)),
            "{message}"
        );
        assert_eq!(long.openai_body()["error"]["code"], "context_length_exceeded");
    }
}
