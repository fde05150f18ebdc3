//! When this router may be sent traffic: the placement is covered by ready shards, and some worker can
//! generate. Follows the coordinator's channels and reports to readiness and gRPC health.

use std::{sync::Arc, time::Duration};

use cadre_proto::v1::inference_server::InferenceServer;
use cadre_telemetry::Readiness;
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tonic::server::NamedService;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    coordinator::{NO_PLACEMENT, PublishedView, WorkerTable, uncovered},
    grpc::InferenceService,
    workers::missing_workers,
};

/// Every expert has a copy on a ready shard.
pub(crate) const EXPERTS: &str = "experts_covered";
/// Some worker can generate.
pub(crate) const WORKERS: &str = "workers";
/// The router takes requests (it is up, and not draining).
pub(crate) const ACCEPTING: &str = "accepting";

/// How long requests are still taken when nothing can serve them: a process that died is back within seconds, and
/// requests that came meanwhile wait for it. After that they are refused at once instead of at their deadline.
const BRIDGED: Duration = Duration::from_secs(10);

/// Since when no request can be served, and why. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outage(Arc<Mutex<Option<(Instant, String)>>>);

impl Outage {
    /// Why requests are refused; `None` while they are taken.
    pub(crate) fn lasting(&self, now: Instant) -> Option<String> {
        let outage = self.0.lock();
        let (since, why) = outage.as_ref()?;
        let lasted = now.duration_since(*since);
        (lasted >= BRIDGED).then(|| format!("{why}, for {} s", lasted.as_secs()))
    }

    fn set(&self, now: Instant, missing: Option<String>) {
        let mut outage = self.0.lock();
        *outage = missing.map(|why| (outage.as_ref().map_or(now, |(since, _)| *since), why));
    }
}

/// The conditions of a router, none met.
pub(crate) fn conditions() -> Readiness {
    Readiness::new(&[
        (EXPERTS, "no view of the cluster yet"),
        (WORKERS, "no view of the cluster yet"),
        (ACCEPTING, "starting"),
    ])
}

/// Keeps readiness and health up to date until the coordinator is gone.
pub(crate) async fn follow(
    readiness: Readiness,
    health: HealthReporter,
    mut views: watch::Receiver<Option<Arc<PublishedView>>>,
    mut workers: watch::Receiver<Arc<WorkerTable>>,
    outage: Outage,
) {
    loop {
        let experts = match &*views.borrow_and_update() {
            Some(published) => uncovered(&published.view),
            None => Some(NO_PLACEMENT.to_owned()),
        };
        let missing = missing_workers(&workers.borrow_and_update());
        outage.set(Instant::now(), experts.clone().or_else(|| missing.clone()));
        readiness.set(EXPERTS, experts.map_or(Ok(()), Err));
        readiness.set(WORKERS, missing.map_or(Ok(()), Err));
        report_health(&readiness, &health).await;
        let changed = tokio::select! {
            changed = views.changed() => changed,
            changed = workers.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

/// Says to gRPC health what readiness says.
pub(crate) async fn report_health(readiness: &Readiness, health: &HealthReporter) {
    let status = match readiness.is_ready() {
        true => ServingStatus::Serving,
        false => ServingStatus::NotServing,
    };
    for service in ["", <InferenceServer<InferenceService> as NamedService>::NAME] {
        health.set_service_status(service, status).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn requests_are_refused_when_an_outage_lasts_and_not_before() {
        let outage = Outage::default();
        let begun = Instant::now();
        assert_eq!(outage.lasting(begun + 2 * BRIDGED), None);
        outage.set(begun, Some("expert 3".into()));
        assert_eq!(outage.lasting(begun + BRIDGED - Duration::from_millis(1)), None, "it may be over soon");
        outage.set(begun + BRIDGED / 2, Some("expert 4".into()));
        assert_eq!(outage.lasting(begun + BRIDGED).as_deref(), Some("expert 4, for 10 s"), "one outage");
        outage.set(begun + BRIDGED, None);
        outage.set(begun + BRIDGED, Some("expert 5".into()));
        assert_eq!(outage.lasting(begun + BRIDGED), None, "another one");
    }
}
