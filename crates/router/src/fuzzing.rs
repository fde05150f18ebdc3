//! What tests/fuzz reaches that the crate keeps to itself: the coordinator's state, and the HTTP routes before a
//! worker that does not answer.

use std::{sync::Arc, time::Duration};

use cadre_telemetry::Metrics;
use cadre_types::{Member, MemberId, MemberState, Role};
use tokio::sync::watch;

use crate::{
    admission::Admission,
    coordinator::{WorkerEntry, WorkerLoad, WorkerTable},
    http,
    metrics::RouterMetrics,
    model::ServedModel,
    options::Limits,
    ready,
    service::Service,
    workers::WorkerPool,
};

pub use crate::coordinator::fuzzing::{Event, coordinate, generation};

/// The routes of the HTTP API. Whatever is right ends at the only worker, at whose address nobody listens.
pub fn http_routes(model: ServedModel) -> Result<axum::Router, cadre_telemetry::MetricsError> {
    let limits = Limits {
        connect_timeout: Duration::from_millis(200),
        // It is refused at once, again and again until then.
        reserve_timeout: Duration::from_millis(20),
        ..Limits::default()
    };
    // Port 1 of the loopback address refuses at once.
    let member = Member {
        id: MemberId("nobody".into()),
        role: Role::Both,
        address: "127.0.0.1:1".into(),
        state: MemberState::Ready,
        pod: None,
    };
    let load = WorkerLoad { free_pages: 1 << 20, total_pages: 1 << 20, ..WorkerLoad::default() };
    let workers = vec![WorkerEntry { member, load, report: 1 }];
    let table = WorkerTable { generation: model.generation(), workers };
    let (_, table) = watch::channel(Arc::new(table));
    let metrics = RouterMetrics::register(&Metrics::new())?;
    let admission = Admission::new(&limits, metrics.clone());
    let pool = WorkerPool::new(table, limits.connect_timeout);
    let service = Service::new(Arc::new(model), admission, pool, metrics, limits);
    Ok(http::routes(service, ready::conditions()))
}
