//! The membership: who we are, and what every report carries.

use std::{
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use cadre_device::DeviceMeter;
use cadre_dispatch::{ExpertLoadWindow, LoadReport, Membership, MembershipOptions, membership};
use cadre_engine::EngineHandle;
use cadre_proto::v1;
use cadre_types::{Generation, Member, MemberId, MemberState, Role};

use crate::{metrics::WorkerMetrics, options::WorkerOptions};

/// What reports to the coordinator are made of.
#[derive(Default)]
pub(super) struct Report {
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_expected: AtomicU64,
    /// Of the weights, once they are loaded.
    pub(super) weights_digest: AtomicU64,
    /// Once it is open.
    pub(super) device: OnceLock<DeviceMeter>,
    pub(super) engine: OnceLock<EngineHandle>,
    pub(super) expert_load: Mutex<Option<ExpertLoadWindow>>,
}

/// Registers with the coordinator and keeps reporting.
pub(super) fn join(
    options: &WorkerOptions,
    role: Role,
    address: String,
    generation: Generation,
    report: &Arc<Report>,
    metrics: &Arc<WorkerMetrics>,
) -> Result<Membership> {
    let born = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let member = Member {
        // Unique per process life: an address is used by one process at a time.
        id: MemberId(format!("{role}-{address}-{:x}", born.as_millis())),
        role,
        address,
        state: MemberState::Starting,
        pod: options.pod.clone(),
    };
    let (report, metrics) = (Arc::clone(report), Arc::clone(metrics));
    let load = move || {
        let mut window = report.expert_load.lock().unwrap_or_else(PoisonError::into_inner);
        let expert_load = window.as_mut().map(ExpertLoadWindow::take).unwrap_or_default();
        let faults = window.as_ref().map(ExpertLoadWindow::faults).unwrap_or_default();
        metrics.expert_load(&expert_load);
        let worker = report.engine.get().map(|engine| {
            let load = engine.stats().load();
            let narrow = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
            v1::WorkerLoad {
                running_sequences: narrow(load.running),
                waiting_sequences: narrow(load.waiting),
                free_pages: load.pages_free,
                total_pages: load.pages_total,
            }
        });
        let loading = v1::LoadProgress {
            bytes_read: report.bytes_read.load(Ordering::Relaxed),
            bytes_expected: report.bytes_expected.load(Ordering::Relaxed),
        };
        let device = report.device.get().map(|device| device.read().into());
        LoadReport { worker, loading: Some(loading), device, expert_load, faults }
    };
    let to = MembershipOptions {
        secret: options.secret.clone(),
        weights: options.weights.to_string(),
        ..MembershipOptions::new(&options.coordinator)
    };
    Ok(membership::join(to, member, generation, load)?)
}
