//! What the roles of one process have in common when it holds a worker and expert shards.

use std::{net::SocketAddr, sync::Arc};

use cadre_device::OpenDevice;
use cadre_dispatch::LocalConnector;
use cadre_telemetry::{Metrics, MetricsError, Readiness};

use crate::metrics::ExpertMetrics;

/// One device, one admin port, and links inside the process. Clones share all of it.
#[derive(Clone, Debug)]
pub struct SharedProcess {
    /// What every role computes on.
    pub device: OpenDevice,
    /// Where the process serves metrics, health and readiness: no role does it itself.
    pub admin: SocketAddr,
    /// Metrics of all roles.
    pub metrics: Metrics,
    /// Conditions of all roles; each reports on a part of its own.
    pub readiness: Readiness,
    /// Shards of this process by the address under which they register, so that its worker reaches them without a
    /// socket.
    pub shards: LocalConnector,
    /// Metrics of the shards: sums over them.
    pub expert_metrics: Arc<ExpertMetrics>,
}

impl SharedProcess {
    /// A process without roles yet.
    pub fn new(device: OpenDevice, admin: SocketAddr) -> Result<Self, MetricsError> {
        let metrics = Metrics::new();
        let expert_metrics = Arc::new(ExpertMetrics::register(&metrics)?);
        let (readiness, shards) = (Readiness::new(&[]), LocalConnector::default());
        Ok(Self { device, admin, metrics, readiness, shards, expert_metrics })
    }
}
