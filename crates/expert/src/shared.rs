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
    /// Condition of readiness of the process: every role has begun, with conditions of its own.
    pub const ROLES: &str = "roles";

    /// A process without roles yet.
    pub fn new(device: OpenDevice, admin: SocketAddr) -> Result<Self, MetricsError> {
        let metrics = Metrics::new();
        let expert_metrics = Arc::new(ExpertMetrics::register(&metrics)?);
        // A set without a condition would have been ready once before the first role joins, and hold no probe.
        let readiness = Readiness::new(&[(Self::ROLES, "starting")]);
        let shards = LocalConnector::default();
        Ok(Self { device, admin, metrics, readiness, shards, expert_metrics })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use cadre_device::{BackendOptions, Device};
    use cadre_types::NumericsClass;

    use super::*;

    /// A probe that is held waits for the first readiness: there must not have been one before the roles are ready.
    #[test]
    fn a_process_has_not_been_ready_before_its_roles_are() {
        let options = BackendOptions {
            device: Some(Device::Cpu),
            threads: Some(1),
            ..BackendOptions::new(NumericsClass::F32)
        };
        let process =
            SharedProcess::new(OpenDevice::open(&options).unwrap(), SocketAddr::from(([127, 0, 0, 1], 1)));
        let readiness = process.unwrap().readiness;
        assert!(!readiness.was_ready());
        let worker = readiness.part("worker", &[("weights", "not loaded")]);
        worker.met("weights");
        assert!(!readiness.was_ready(), "the others have not begun");
        readiness.met(SharedProcess::ROLES);
        assert!(readiness.was_ready());
    }
}
