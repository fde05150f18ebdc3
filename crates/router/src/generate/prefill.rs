//! The prefill side of one attempt: asks a prefill worker to compute the prompt and hand it to the decode
//! worker that has reserved pages for it. Dropping the future aborts the hand-off.

use cadre_proto::v1::{self, prefill_event};
use cadre_types::MemberId;
use tokio::time::{Duration, Instant, timeout_at};
use tonic::Status;

use super::{Job, Reserved, worker_error};
use crate::{
    error::{RequestError, RequestResult},
    service::{Clock, Service},
};

/// The prefill of one attempt, as a future that ends when the decode worker has everything.
pub(super) struct Prefill {
    request: v1::PrefillRequest,
    clock: Clock,
    stall: Duration,
    excluded: Vec<MemberId>,
    retry_after_s: u32,
}

impl Prefill {
    pub(super) fn of(job: &Job, reserved: &Reserved) -> Self {
        Self {
            request: v1::PrefillRequest {
                generation: Some(reserved.generation.clone()),
                request_id: reserved.request_id.clone(),
                prompt: job.sequence.prompt.to_vec(),
                sampling: Some((&job.sequence.sampling).into()),
                decode_address: reserved.member.address.clone(),
                stop_token_ids: job.sequence.stop_token_ids.clone(),
                min_tokens: job.sequence.min_tokens,
            },
            clock: job.admitted.clock,
            stall: job.service.limits.stall_timeout,
            excluded: [job.excluded.as_slice(), &job.avoided].concat(),
            retry_after_s: job.service.admission.retry_after_s(),
        }
    }

    pub(super) async fn run(self, service: Service) -> RequestResult<()> {
        let Self { request, clock, stall, excluded, retry_after_s } = self;
        let mut chosen = service.pool.assign_prefill(request.prompt.len() as u64, &excluded)?;
        let worker = chosen.member.id.clone();
        let failed = |status: Status, begun| worker_error(&worker, "prefill", &status, begun, retry_after_s);
        let call = chosen.client.prefill(request);
        let call = clock.bound("waiting for a prefill worker", call).await?;
        let mut events = call.map_err(|status| failed(status, false))?.into_inner();
        let mut working = false;
        loop {
            // In the worker's queue there is nothing to hear; once it computes, every chunk is heard of.
            let bound = if working { Instant::now() + stall } else { clock.deadline };
            let event = timeout_at(bound.min(clock.deadline), events.message()).await;
            let event = event.map_err(|_| match Instant::now() >= clock.deadline {
                true => clock.passed("computing the prompt"),
                false => RequestError::Stalled {
                    worker: worker.clone(),
                    operation: "prefill",
                    stage: "computing the prompt",
                    after: stall,
                },
            })?;
            match event.map_err(|status| failed(status, working))?.map(|event| event.event) {
                Some(Some(prefill_event::Event::HandedOff(_))) => return Ok(()),
                Some(_) => working = true,
                None => {
                    return Err(RequestError::WorkerFailed {
                        worker,
                        operation: "prefill",
                        problem: "the stream ended before the hand-off was done".into(),
                    });
                }
            }
        }
    }
}
