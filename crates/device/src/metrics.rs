//! What a process says of its device: to the coordinator in every report, and at `/metrics`.

use std::{fmt, sync::Arc};

use cadre_ops::{Backend, DeviceIdentity, DeviceMemory};
use cadre_telemetry::{Gauge, GaugeFamily, Label, MetricKind, MetricSpec, Metrics, MetricsError};
use cadre_types::MemberDevice;

const USED: MetricSpec = MetricSpec {
    name: "cadre_device_memory_used_bytes",
    kind: MetricKind::Gauge,
    help: "Memory of the device in use: by everybody on a GPU, by this process on a processor; 0 before it is open.",
    labels: &[],
};
const TOTAL: MetricSpec = MetricSpec {
    name: "cadre_device_memory_total_bytes",
    kind: MetricKind::Gauge,
    help: "Memory of the device (of a container, its limit); 0 before it is open.",
    labels: &[],
};
const INFO: MetricSpec = MetricSpec {
    name: "cadre_device_info",
    kind: MetricKind::Gauge,
    help: "1 for the device that this process computes on, once it is open.",
    labels: &[
        Label::Bounded("device", "`cpu` or `cuda:N`, one a process"),
        Label::Bounded("name", "what it is, one a process"),
        Label::Bounded("architecture", "what its code is compiled for, one a process"),
    ],
};

/// Every metric of a device, for registration and docs/metrics.md.
pub const CATALOG: &[MetricSpec] = &[USED, TOTAL, INFO];

/// Reads a device's memory, whatever its backend. It does not keep the backend open.
#[derive(Clone)]
pub struct DeviceMeter {
    identity: DeviceIdentity,
    memory: Arc<dyn Fn() -> Option<DeviceMemory> + Send + Sync>,
}

impl DeviceMeter {
    /// The meter of a backend.
    pub fn of<B: Backend>(backend: &Arc<B>) -> Self {
        let (identity, backend) = (backend.identity(), Arc::downgrade(backend));
        Self { identity, memory: Arc::new(move || backend.upgrade().map(|backend| backend.memory())) }
    }

    /// As reports carry it. Memory is 0 once the backend is closed.
    pub fn read(&self) -> MemberDevice {
        let DeviceIdentity { device, name, architecture } = self.identity.clone();
        let DeviceMemory { used, total, .. } = (self.memory)().unwrap_or_default();
        MemberDevice { device, name, architecture, memory_used: used, memory_total: total }
    }
}

impl fmt::Debug for DeviceMeter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMeter").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// The handles.
#[derive(Debug)]
pub struct DeviceMetrics {
    used: Gauge,
    total: Gauge,
    info: GaugeFamily,
}

impl DeviceMetrics {
    /// Registers all of [`CATALOG`].
    pub fn register(metrics: &Metrics) -> Result<Self, MetricsError> {
        Ok(Self { used: metrics.gauge(&USED)?, total: metrics.gauge(&TOTAL)?, info: metrics.gauges(&INFO)? })
    }

    /// Brings the metrics up to date.
    pub fn refresh(&self, meter: &DeviceMeter) {
        let MemberDevice { device, name, architecture, memory_used, memory_total } = meter.read();
        self.used.set(memory_used as f64);
        self.total.set(memory_total as f64);
        self.info.with(&[&device, &name, &architecture]).set(1.0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use cadre_ops_cpu::{CpuBackend, CpuOptions};
    use cadre_types::NumericsClass;

    use super::*;

    #[test]
    fn a_device_is_named_and_its_memory_read_while_it_is_open() {
        let registry = Metrics::new();
        let metrics = DeviceMetrics::register(&registry).unwrap();
        let options = CpuOptions { threads: Some(1), ..CpuOptions::new(NumericsClass::F32) };
        let backend = Arc::new(CpuBackend::new(options).unwrap());
        let meter = DeviceMeter::of(&backend);
        metrics.refresh(&meter);
        let read = meter.read();
        assert_eq!((read.device.as_str(), read.name.as_str()), ("cpu", "cpu"));
        assert!(read.memory_used > 0 && read.memory_used < read.memory_total, "{read:?}");
        let text = registry.encode().unwrap();
        let info = format!(
            "cadre_device_info{{architecture=\"{}\",device=\"cpu\",name=\"cpu\"}} 1\n",
            read.architecture
        );
        assert!(text.contains(&info), "{info} not in\n{text}");
        assert!(text.contains(&format!("cadre_device_memory_total_bytes {}\n", read.memory_total)), "{text}");
        for spec in CATALOG {
            assert!(text.contains(&format!("# TYPE {} ", spec.name)), "{} is not exposed", spec.name);
        }
        drop(backend);
        assert_eq!((meter.read().memory_used, meter.read().memory_total), (0, 0));
    }
}
