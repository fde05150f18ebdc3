//! When this router may be sent traffic: the placement is covered by ready shards, and some worker can
//! generate. Follows the coordinator's channels and reports to readiness and gRPC health.

use std::sync::Arc;

use cadre_proto::v1::inference_server::InferenceServer;
use cadre_telemetry::Readiness;
use tokio::sync::watch;
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
) {
    loop {
        let missing = match &*views.borrow_and_update() {
            Some(published) => uncovered(&published.view),
            None => Some(NO_PLACEMENT.to_owned()),
        };
        readiness.set(EXPERTS, missing.map_or(Ok(()), Err));
        let missing = missing_workers(&workers.borrow_and_update());
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
