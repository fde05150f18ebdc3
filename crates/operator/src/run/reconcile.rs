//! One reconcile of one model: are the stores up to date, gather, plan, tell the coordinator, execute, tell events.
//!
//! Bounded in time as a whole. What comes out is counted, and says when to look again: as the plan wants after a pass
//! that did everything, with a back-off of the model after one that did not.

use std::{sync::Arc, time::Duration};

use cadre_k8s_api::MoEModel;
use k8s_openapi::jiff::Timestamp;
use kube::{Client, ResourceExt};
use tokio::time::Instant;

use super::{
    Planner,
    client::Pressure,
    coordinator::Coordinators,
    events::Events,
    execute::{self, Context, Pass},
    gather::{Settings, gather},
    memory::{Memories, Memory},
    metrics::OperatorMetrics,
    queue::ModelKey,
    secrets::{ClusterSecret, Secrets},
    stores::Stores,
    strangers::RECHECK,
    verdict::{Verdict, judge},
};
use crate::plan::Plan;

/// Longest reconcile. Three hundred gates and a dozen applies take a second or two; what takes longer waits for a
/// server that does not answer.
const RECONCILE_TIMEOUT: Duration = Duration::from_secs(30);

/// A model is looked at this often even if nothing seems to happen.
const RESYNC: Duration = Duration::from_secs(600);

/// Everything that a reconcile needs.
pub(crate) struct Reconciler {
    pub(crate) client: Client,
    pub(crate) stores: Stores,
    pub(crate) coordinators: Coordinators,
    pub(crate) events: Events,
    pub(crate) pressure: Pressure,
    pub(crate) metrics: OperatorMetrics,
    pub(crate) memories: Memories,
    pub(crate) planner: Planner,
    pub(crate) settings: Settings,
    /// `None` leaves the processes of models without a secret.
    pub(crate) secrets: Option<Secrets>,
}

/// What came out, in the words of the metric `cadre_operator_reconciles_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Steady,
    Written,
    Behind,
    Stale,
    Refused,
    Failed,
    Timeout,
    Gone,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Self::Steady => "steady",
            Self::Written => "written",
            Self::Behind => "behind",
            Self::Stale => "stale",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Timeout => "timeout",
            Self::Gone => "gone",
        }
    }

    /// Of a pass; the worst that happened names it.
    fn of(pass: &Pass) -> Self {
        if pass.gone {
            Self::Gone
        } else if pass.failure.is_some() {
            Self::Failed
        } else if pass.stale {
            Self::Stale
        } else if !pass.refused.is_empty() {
            Self::Refused
        } else if pass.written > 0 {
            Self::Written
        } else {
            Self::Steady
        }
    }
}

/// A pass that ended at the model's Secret.
fn refused_secret(name: &str, error: &kube::Error) -> Pass {
    match judge(error) {
        Verdict::NamespaceGone => Pass { gone: true, ..Pass::default() },
        _ => Pass { failure: Some(format!("Secret {name}: {error}")), ..Pass::default() },
    }
}

impl Reconciler {
    /// Reconciles the model and says when to do it again, whatever happens.
    pub(crate) async fn reconcile(self: Arc<Self>, key: ModelKey) -> Option<Duration> {
        if let Some(silence) = self.pressure.silence() {
            return Some(silence);
        }
        let started = Instant::now();
        let (outcome, again) = self.observed(&key).await;
        self.metrics.reconcile_seconds.observe(started.elapsed().as_secs_f64());
        self.metrics.reconciles.with(&[outcome.name()]).inc();
        tracing::debug!(model = %key, outcome = outcome.name(), ?again, "Reconciled");
        again
    }

    async fn observed(&self, key: &ModelKey) -> (Outcome, Option<Duration>) {
        let Some(model) = self.stores.models.get(&key.namespace, &key.name) else {
            self.coordinators.forget(key);
            self.memories.forget(key);
            return (Outcome::Gone, None);
        };
        let uid = model.uid().unwrap_or_default();
        let memory = self.memories.recall(key, &uid).unwrap_or_else(|| {
            // What a former model's coordinator said is not about this one.
            self.coordinators.forget(key);
            self.memories.begin(key, &uid, Timestamp::now())
        });
        let mut memory = memory.lock().await;
        if let Some(left) = memory.written.behind(&self.stores, key) {
            return (Outcome::Behind, Some(left));
        }
        let pass = tokio::time::timeout(RECONCILE_TIMEOUT, self.pass(key, &model, &uid, &mut memory)).await;
        let (outcome, requeue) = match pass {
            Ok((pass, requeue)) => {
                if let Some(problem) = &pass.failure {
                    tracing::warn!(model = %key, problem, "Reconcile failed");
                }
                (Outcome::of(&pass), requeue)
            }
            Err(_) => {
                tracing::warn!(model = %key, after = ?RECONCILE_TIMEOUT, "Reconcile took too long and was abandoned");
                (Outcome::Timeout, None)
            }
        };
        (outcome, self.again(outcome, requeue, &mut memory))
    }

    /// Plans and executes.
    async fn pass(
        &self,
        key: &ModelKey,
        model: &MoEModel,
        uid: &str,
        memory: &mut Memory,
    ) -> (Pass, Option<Duration>) {
        let failed = |error: kube::Error| Pass { failure: Some(error.to_string()), ..Pass::default() };
        if let Err(error) = memory.strangers.recheck(&self.client, &key.namespace, &key.name, uid).await {
            return (failed(error), None);
        }
        let secret = match &self.secrets {
            None => None,
            Some(secrets) => match secrets.of(model).await {
                Ok(secret) => Some(secret),
                Err(error) => return (Pass { failure: Some(error.to_string()), ..Pass::default() }, None),
            },
        };
        let coordinator = self.coordinators.report(key);
        let now = Timestamp::now();
        let observed = gather(
            &self.stores,
            key,
            memory,
            coordinator,
            &self.settings,
            secret.as_ref().map(|secret| secret.name.clone()),
            now,
        );
        let Some(observed) = observed else { return (Pass { gone: true, ..Pass::default() }, None) };
        if let (Some(secrets), Some(secret)) = (&self.secrets, &secret)
            && model.metadata.deletion_timestamp.is_none()
            && memory.is_secret_due(&observed, &secret.name)
        {
            match secrets.make(model, secret).await {
                Ok(()) => memory.secret_made = Some(Instant::now()),
                Err(error) => return (refused_secret(&secret.name, &error), None),
            }
        }
        let mut plan: Plan = (self.planner)(&observed);
        // First of all: who is about to go must get no new work.
        if let Some(view) = plan.operator_view.take() {
            self.coordinators.tell(key, view, secret.as_ref().map(ClusterSecret::value));
        }
        let context = Context { client: &self.client, key, stores: &self.stores, observed: &observed, uid };
        let pass = execute::execute(&context, &plan, memory).await;
        if pass.is_complete() {
            self.events.tell(model, &plan.events).await;
        }
        (pass, plan.requeue)
    }

    fn again(&self, outcome: Outcome, requeue: Option<Duration>, memory: &mut Memory) -> Option<Duration> {
        let planned = || {
            let recheck = (!memory.strangers.is_empty()).then_some(RECHECK);
            [requeue, recheck, Some(RESYNC)].into_iter().flatten().min()
        };
        match outcome {
            Outcome::Steady | Outcome::Written => {
                let planned = planned();
                memory.refusals.reset();
                memory.outages.reset();
                memory.conflicts.reset();
                planned
            }
            Outcome::Stale | Outcome::Behind => Some(memory.conflicts.next_delay()),
            Outcome::Refused => {
                memory.outages.reset();
                Some(memory.refusals.next_delay())
            }
            Outcome::Failed | Outcome::Timeout => {
                Some(memory.outages.next_delay().max(self.pressure.silence().unwrap_or_default()))
            }
            // The watch will say so; if the namespace stays after all, the model is looked at again.
            Outcome::Gone => Some(RESYNC),
        }
    }
}

#[cfg(test)]
mod tests;
