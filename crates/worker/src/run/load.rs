//! From a checkpoint to a running engine; on a thread of its own.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use cadre_checkpoint::Checkpoint;
use cadre_device::{BackendOptions, DeviceMeter, OnBackend, OpenDevice};
use cadre_dispatch::{Dispatcher, IoThread};
use cadre_engine::{Engine, EngineParts};
use cadre_model::{LoadOptions, LoadProgress, Model, WorkerSizes, element_type, plan, worker_plan};
use cadre_ops::{Backend, DispatchBatch, ExchangeError, ExchangeTicket, ExpertExchange, ExpertRows};
use cadre_scheduler::SchedulerConfig;

use super::report::Report;
use crate::metrics::WorkerMetrics;

/// Everything that becomes an engine.
pub(super) struct Load {
    pub(super) checkpoint: Arc<Checkpoint>,
    pub(super) backend: BackendOptions,
    /// The device of a shared process.
    pub(super) device: Option<OpenDevice>,
    pub(super) scheduler: SchedulerConfig,
    pub(super) dispatcher: Dispatcher,
    /// Lives as long as the engine's last step.
    pub(super) io: IoThread,
    pub(super) timeouts: (Duration, Duration),
    pub(super) report: Arc<Report>,
    pub(super) metrics: Arc<WorkerMetrics>,
}

impl Load {
    pub(super) fn run(self) -> Result<Engine> {
        let device = match &self.device {
            Some(device) => device.clone(),
            None => OpenDevice::open(&self.backend)?,
        };
        let _turn = device.loading();
        device.with(self)
    }
}

impl OnBackend for Load {
    type Output = Result<Engine>;

    fn run<B: Backend>(self, backend: Arc<B>) -> Result<Engine> {
        let Self { checkpoint, scheduler, dispatcher, io, timeouts, report, metrics, .. } = self;
        // Set once: this is the only device of the process.
        let _ = report.device.set(DeviceMeter::of(&backend));
        let mtp = checkpoint.config().drafts();
        let sizes = WorkerSizes { mtp, pages: scheduler.pages as usize, rows: scheduler.max_step_tokens };
        let plan =
            worker_plan(&*backend, checkpoint.config(), &|name| element_type(&checkpoint, name), sizes)?;
        plan.check("worker", &backend.identity().device, &backend.memory(), plan::WORKER_ADVICE)?;
        tracing::info!(backend = backend.describe(), "loading weights");
        let began = Instant::now();
        let mut told = 0;
        let mut progress = |progress| note(&report, &metrics, progress, &mut told);
        let model = Model::load(backend, &checkpoint, &LoadOptions { mtp }, &mut progress)
            .with_context(|| format!("load {}", checkpoint.dir().display()))?;
        report.weights_digest.store(model.weights_digest(), Ordering::Relaxed);
        tracing::info!(seconds = began.elapsed().as_secs_f64(), "weights loaded");
        let (handoff_timeout, handoff_begin_timeout) = timeouts;
        let exchange = Box::new(OverIo { dispatcher, _io: io });
        let parts = EngineParts {
            handoff_timeout,
            handoff_begin_timeout,
            on_step: Box::new(metrics.step_observer()),
            ..EngineParts::new(model, scheduler, exchange)
        };
        Engine::spawn(parts).context("start the engine")
    }
}

/// Reports loading progress, and logs it at every tenth.
fn note(report: &Report, metrics: &WorkerMetrics, progress: LoadProgress, told: &mut u64) {
    let LoadProgress { bytes_read, bytes_expected } = progress;
    report.bytes_read.store(bytes_read, Ordering::Relaxed);
    report.bytes_expected.store(bytes_expected, Ordering::Relaxed);
    metrics.loading(bytes_read, bytes_expected);
    let tenths = bytes_read * 10 / bytes_expected.max(1);
    if tenths > *told {
        *told = tenths;
        tracing::info!(percent = tenths * 10, bytes_read, bytes_expected, "loading weights");
    }
}

/// A dispatcher together with the thread that its links live on.
struct OverIo {
    dispatcher: Dispatcher,
    _io: IoThread,
}

impl ExpertExchange for OverIo {
    fn dispatch(&mut self, batch: DispatchBatch<'_>) -> Result<ExchangeTicket, ExchangeError> {
        self.dispatcher.dispatch(batch)
    }

    fn combine(&mut self, ticket: ExchangeTicket, out: &mut ExpertRows) -> Result<(), ExchangeError> {
        self.dispatcher.combine(ticket, out)
    }
}
