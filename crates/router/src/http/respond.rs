//! What both endpoints do with running sequences: collect them into one object, or stream them as events.
//! An endpoint brings its shapes through [`Shape`].
//!
//! A stream's events: the opening ones (if the shape has any), one per piece of text, one per end of a
//! choice, the usage if asked for, `[DONE]`. A failure on the way is one event with the error object, and
//! nothing after it: a client that does not see `[DONE]` knows that the answer is incomplete.

use std::{convert::Infallible, sync::Arc};

use axum::{
    Json,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use cadre_types::FinishReason;
use futures::StreamExt;
use serde_json::{Value, json};

use super::{error_response, fields::Delivery};
use crate::{
    error::{RequestError, RequestResult},
    generate::{Chunk, Completion, Finish, Generation},
    model::ServedModel,
    request::Submission,
    service::{Admitted, Service},
};

/// How an endpoint writes its answers.
pub(super) trait Shape: Send + 'static {
    /// `object` of a whole answer and of an event.
    fn objects(&self) -> (&'static str, &'static str);
    /// Beginning of the answer's id.
    fn id_prefix(&self) -> &'static str;
    /// A choice of a whole answer.
    fn choice(&mut self, index: usize, completion: &Completion) -> Value;
    /// The event that opens a choice, if there is one.
    fn opening(&mut self, index: usize) -> Option<Value>;
    /// A choice's piece of text, or nothing if there is nothing to say yet.
    fn piece(&mut self, index: usize, chunk: &Chunk) -> Option<Value>;
    /// The end of a choice.
    fn ending(&mut self, index: usize, reason: &'static str) -> Value;
}

/// Runs a submission and answers in the endpoint's shape.
pub(super) async fn respond<S: Shape>(
    service: &Service,
    admitted: Admitted,
    submission: Submission,
    delivery: Delivery,
    shape: S,
) -> Response {
    match start(service, admitted, submission, shape).await {
        Err(error) => error_response(&error),
        Ok(answer) if delivery.stream => answer.events(delivery, service),
        Ok(answer) => match answer.whole().await {
            Ok(body) => Json(body).into_response(),
            Err(error) => error_response(&error),
        },
    }
}

async fn start<S: Shape>(
    service: &Service,
    admitted: Admitted,
    submission: Submission,
    shape: S,
) -> RequestResult<Answer<S>> {
    let n = submission.n.max(1) as usize;
    let sequences = service.prepare(&admitted, submission).await?;
    let generations = service.start(&admitted, sequences).await?;
    Ok(Answer { model: Arc::clone(&service.model), request_id: admitted.request_id, n, generations, shape })
}

/// Running sequences of one request.
struct Answer<S> {
    model: Arc<ServedModel>,
    request_id: String,
    /// Sequences per prompt.
    n: usize,
    generations: Vec<Generation>,
    shape: S,
}

impl<S: Shape> Answer<S> {
    async fn whole(mut self) -> RequestResult<Value> {
        let generations = std::mem::take(&mut self.generations);
        let completions =
            futures::future::try_join_all(generations.into_iter().map(Generation::collect)).await?;
        let mut usage = Usage::new(self.n);
        let mut choices = Vec::with_capacity(completions.len());
        for (index, completion) in completions.iter().enumerate() {
            usage.add(index, completion.finish);
            choices.push(self.shape.choice(index, completion));
        }
        let mut body = self.envelope(self.shape.objects().0, choices);
        body["usage"] = usage.json();
        Ok(body)
    }

    fn events(self, delivery: Delivery, service: &Service) -> Response {
        let keep_alive = KeepAlive::new().interval(service.limits.sse_keep_alive);
        Sse::new(self.stream(delivery)).keep_alive(keep_alive).into_response()
    }

    fn stream(
        mut self,
        delivery: Delivery,
    ) -> impl futures::Stream<Item = Result<Event, Infallible>> + Send + use<S> {
        let generations = std::mem::take(&mut self.generations);
        let count = generations.len();
        let tagged = generations
            .into_iter()
            .enumerate()
            .map(|(index, generation)| generation.map(move |chunk| (index, chunk)));
        let mut chunks = futures::stream::select_all(tagged);
        async_stream::stream! {
            let mut usage = Usage::new(self.n);
            for index in 0..count {
                if let Some(choice) = self.shape.opening(index) {
                    yield Ok(self.event(choice, delivery));
                }
            }
            while let Some((index, chunk)) = chunks.next().await {
                let chunk = match chunk {
                    Ok(chunk) => chunk,
                    Err(error) => {
                        yield Ok(data(&error.openai_body()));
                        return;
                    }
                };
                if let Some(choice) = self.shape.piece(index, &chunk) {
                    yield Ok(self.event(choice, delivery));
                }
                if let Some(finish) = chunk.finish {
                    usage.add(index, finish);
                    let choice = self.shape.ending(index, reason(finish.reason));
                    yield Ok(self.event(choice, delivery));
                }
            }
            if usage.ended < count {
                let problem = format!("{} of {count} sequences ended without a last chunk", count - usage.ended);
                yield Ok(data(&RequestError::Internal { problem }.openai_body()));
                return;
            }
            if delivery.include_usage {
                let mut last = self.envelope(self.shape.objects().1, Vec::new());
                last["usage"] = usage.json();
                yield Ok(data(&last));
            }
            yield Ok(Event::default().data("[DONE]"));
        }
    }

    fn event(&self, choice: Value, delivery: Delivery) -> Event {
        let mut body = self.envelope(self.shape.objects().1, vec![choice]);
        if delivery.include_usage {
            body["usage"] = Value::Null;
        }
        data(&body)
    }

    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": format!("{}{}", self.shape.id_prefix(), self.request_id),
            "object": object,
            "created": unix_s(),
            "model": self.model.name,
            "system_fingerprint": format!("{}-{}", self.model.hash, self.model.numerics),
            "choices": choices,
        })
    }
}

/// Usage of a request; a prompt counts once, however many answers it has.
struct Usage {
    n: usize,
    prompt_tokens: u64,
    completion_tokens: u64,
    ended: usize,
}

impl Usage {
    fn new(n: usize) -> Self {
        Self { n, prompt_tokens: 0, completion_tokens: 0, ended: 0 }
    }

    fn add(&mut self, index: usize, finish: Finish) {
        if index.is_multiple_of(self.n) {
            self.prompt_tokens += u64::from(finish.prompt_tokens);
        }
        self.completion_tokens += u64::from(finish.completion_tokens);
        self.ended += 1;
    }

    fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }
}

/// OpenAI's word for the end of a choice. The other reasons are errors and never get here.
pub(super) fn reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        _ => "stop",
    }
}

fn data(body: &Value) -> Event {
    Event::default().data(body.to_string())
}

fn unix_s() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
