//! Why a process ended, for whoever reads a pod's termination message.
//!
//! One line, `Reason: message`, at most [`MAX_BYTES`]. The reason is one of a closed set and follows from
//! the types of the errors in the chain, never from their words; the message is the whole chain in words.
//! The operator turns it into a condition (docs/operations.md), so a name here is an interface.

use std::{error::Error, io, path::Path};

use cadre_checkpoint::{CheckpointError, ProblemKind};
use cadre_device::{CudaError, Device, DeviceError};
use cadre_dispatch::{GenerationRefused, membership::MembershipError};
use cadre_model::{MemoryShort, loader::LoadError};
#[cfg(feature = "operator")]
use cadre_operator::OperatorError;
use cadre_ops::OpsError;
use cadre_router::RouterError;

/// The variable of `--termination-log`, which also serves a command line that cannot be read.
pub(crate) const TERMINATION_LOG_ENV: &str = "CADRE_TERMINATION_LOG";

/// Kubernetes reads 4 KiB per container and 12 KiB per pod.
const MAX_BYTES: usize = 2048;

/// Why a role ended with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The checkpoint is there and is not a usable one.
    CheckpointInvalid,
    /// The checkpoint is not the one that the rest of the model runs, or was meant.
    CheckpointMismatch,
    /// Files of the checkpoint are absent or cannot be read, and nothing else is wrong with it.
    CheckpointUnreadable,
    /// Memory for weights or caches could not be had.
    InsufficientMemory,
    /// No driver of the accelerator, or one that is too old.
    AcceleratorDriverMissing,
    /// The driver shows no such accelerator.
    AcceleratorNotFound,
    /// There are no kernels for the accelerator.
    AcceleratorUnsupported,
    /// The program cannot use an accelerator: no kernels, those of another build, no way to open a driver.
    AcceleratorUnsupportedByImage,
    /// The accelerator has no room.
    AcceleratorOutOfMemory,
    /// Flags, files or addresses that cannot be used.
    InvalidConfiguration,
    /// Everything else: a fault of the process.
    Internal,
}

impl Reason {
    /// The word.
    fn name(self) -> &'static str {
        match self {
            Self::CheckpointInvalid => "CheckpointInvalid",
            Self::CheckpointMismatch => "CheckpointMismatch",
            Self::CheckpointUnreadable => "CheckpointUnreadable",
            Self::InsufficientMemory => "InsufficientMemory",
            Self::AcceleratorDriverMissing => "AcceleratorDriverMissing",
            Self::AcceleratorNotFound => "AcceleratorNotFound",
            Self::AcceleratorUnsupported => "AcceleratorUnsupported",
            Self::AcceleratorUnsupportedByImage => "AcceleratorUnsupportedByImage",
            Self::AcceleratorOutOfMemory => "AcceleratorOutOfMemory",
            Self::InvalidConfiguration => "InvalidConfiguration",
            Self::Internal => "Internal",
        }
    }

    /// The reason of the first error in the chain that has one. Memory that a process on an accelerator lacks is the
    /// accelerator's: who lacks the host's is killed by the kernel.
    fn of(error: &anyhow::Error, device: Device) -> Self {
        match (error.chain().find_map(of_one).unwrap_or(Self::Internal), device) {
            (Self::InsufficientMemory, Device::Cuda(_)) => Self::AcceleratorOutOfMemory,
            (reason, _) => reason,
        }
    }
}

fn of_one(error: &(dyn Error + 'static)) -> Option<Reason> {
    if let Some(error) = error.downcast_ref::<RouterError>() {
        return of_router(error);
    }
    #[cfg(feature = "operator")]
    if let Some(OperatorError::Config(_) | OperatorError::Bind { .. }) = error.downcast_ref() {
        return Some(Reason::InvalidConfiguration);
    }
    if let Some(error) = error.downcast_ref::<CheckpointError>() {
        return Some(of_checkpoint(error));
    }
    // Transparent errors hide what they wrap from the chain.
    if let Some(error) = error.downcast_ref::<LoadError>() {
        return match error {
            LoadError::Checkpoint(error) => Some(of_checkpoint(error)),
            LoadError::Backend { source: OpsError::OutOfMemory { .. }, .. } => {
                Some(Reason::InsufficientMemory)
            }
            LoadError::Backend { .. } => None,
        };
    }
    if let Some(error) = error.downcast_ref::<DeviceError>() {
        return match error {
            DeviceError::Cuda { source, .. } => of_cuda(source),
            DeviceError::Static { .. } => Some(Reason::AcceleratorUnsupportedByImage),
            DeviceError::Class { .. } => Some(Reason::InvalidConfiguration),
            DeviceError::Open { .. } => None,
        };
    }
    if let Some(OpsError::OutOfMemory { .. }) = error.downcast_ref() {
        return Some(Reason::InsufficientMemory);
    }
    if error.is::<Box<MemoryShort>>() || error.is::<MemoryShort>() {
        return Some(Reason::InsufficientMemory);
    }
    if error.is::<GenerationRefused>() {
        return Some(Reason::CheckpointMismatch);
    }
    if error.is::<cadre_worker::options::OptionsError>()
        || error.is::<cadre_expert::options::OptionsError>()
        || error.is::<MembershipError>()
        || error.is::<cadre_proto::secret::SecretError>()
        || error.is::<cadre_telemetry::logging::LoggingError>()
    {
        return Some(Reason::InvalidConfiguration);
    }
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return of_io(error);
    }
    None
}

fn of_cuda(error: &CudaError) -> Option<Reason> {
    match error {
        CudaError::NoDriver { .. } | CudaError::OldDriver { .. } => Some(Reason::AcceleratorDriverMissing),
        CudaError::NoDevice { .. } => Some(Reason::AcceleratorNotFound),
        CudaError::Architecture { .. } => Some(Reason::AcceleratorUnsupported),
        CudaError::NoKernels { .. } | CudaError::WrongKernels { .. } => {
            Some(Reason::AcceleratorUnsupportedByImage)
        }
        CudaError::OutOfMemory { .. } => Some(Reason::AcceleratorOutOfMemory),
        CudaError::Failed { .. } => None,
    }
}

fn of_checkpoint(error: &CheckpointError) -> Reason {
    match error {
        CheckpointError::Invalid { problems, .. }
            if problems.iter().all(|problem| problem.kind == ProblemKind::Unreadable) =>
        {
            Reason::CheckpointUnreadable
        }
        CheckpointError::Mapping(_) => Reason::CheckpointUnreadable,
        CheckpointError::Invalid { .. }
        | CheckpointError::Overridden { .. }
        | CheckpointError::Drawn { .. }
        | CheckpointError::UnknownTensor { .. }
        | CheckpointError::WrongRank { .. }
        | CheckpointError::UnknownExpert { .. }
        | CheckpointError::BadNumber(_) => Reason::CheckpointInvalid,
    }
}

fn of_router(error: &RouterError) -> Option<Reason> {
    match error {
        RouterError::Checkpoint(error) => Some(of_checkpoint(error)),
        RouterError::Text(_) => Some(Reason::CheckpointInvalid),
        RouterError::RoutedExperts { .. } => Some(Reason::CheckpointMismatch),
        RouterError::File { .. }
        | RouterError::Plan(_)
        | RouterError::Load { .. }
        | RouterError::Bind { .. } => Some(Reason::InvalidConfiguration),
        RouterError::Metrics(_) | RouterError::Server { .. } => None,
    }
}

/// Addresses come from flags; other I/O fails for reasons of its own.
fn of_io(error: &io::Error) -> Option<Reason> {
    match error.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable => Some(Reason::InvalidConfiguration),
        io::ErrorKind::OutOfMemory => Some(Reason::InsufficientMemory),
        _ => None,
    }
}

/// Writes why a role ended. A log that cannot be written is noted, and changes nothing else.
/// `device` is what the process computes on.
pub(crate) fn write(log: &Path, error: &anyhow::Error, device: Device) {
    write_line(log, &line(Reason::of(error, device), &words(error)));
}

/// The chain in words. An error that says its cause itself does not have it said again.
pub(crate) fn words(error: &anyhow::Error) -> String {
    error.chain().skip(1).fold(error.to_string(), |mut words, cause| {
        let cause = cause.to_string();
        if !words.ends_with(&cause) {
            words.push_str(": ");
            words.push_str(&cause);
        }
        words
    })
}

/// The same for a command line that cannot be read.
pub(crate) fn of_usage(log: &Path, error: &clap::Error) {
    write_line(log, &line(Reason::InvalidConfiguration, &error.to_string()));
}

fn write_line(log: &Path, line: &str) {
    if let Err(problem) = std::fs::write(log, line) {
        tracing::error!(path = %log.display(), %problem, "the termination log could not be written");
    }
}

/// One line within the bound, cut between characters.
fn line(reason: Reason, message: &str) -> String {
    const ENDING: &str = "…\n";
    let words: Vec<&str> = message.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let mut line = format!("{}: {}", reason.name(), words.join("; "));
    if line.len() + 1 > MAX_BYTES {
        let mut cut = MAX_BYTES - ENDING.len();
        while !line.is_char_boundary(cut) {
            cut -= 1;
        }
        line.truncate(cut);
        line.push_str(ENDING);
    } else {
        line.push('\n');
    }
    line
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use anyhow::Context;
    use cadre_checkpoint::Checkpoint;
    use cadre_shard::ApplyError;
    use cadre_types::{LayerId, LogicalExpert, PlacementEpoch};

    use super::*;

    fn reason<E: Into<anyhow::Error>>(error: E) -> Reason {
        on(Device::Cpu, error)
    }

    fn on<E: Into<anyhow::Error>>(device: Device, error: E) -> Reason {
        Reason::of(&Err::<(), _>(error.into()).context("role").context("outer").unwrap_err(), device)
    }

    #[test]
    fn what_an_accelerator_lacks_is_told_apart() {
        let device = Device::Cuda(0);
        let cuda = |source| on(device, DeviceError::Cuda { device, source });
        for (source, reason) in [
            (
                CudaError::NoDriver { looked_for: vec!["libcuda.so.1".into()] },
                Reason::AcceleratorDriverMissing,
            ),
            (CudaError::OldDriver { found: 12080 }, Reason::AcceleratorDriverMissing),
            (CudaError::NoDevice { ordinal: 0, count: 0 }, Reason::AcceleratorNotFound),
            (
                CudaError::Architecture { ordinal: 0, name: "NVIDIA A100".into(), found: "8.0".into() },
                Reason::AcceleratorUnsupported,
            ),
            (
                CudaError::NoKernels { file: "gemm.cubin".into(), looked_in: vec!["/kernels".into()] },
                Reason::AcceleratorUnsupportedByImage,
            ),
            (CudaError::OutOfMemory { op: "kv_cache", bytes: 2, free: 1 }, Reason::AcceleratorOutOfMemory),
        ] {
            assert_eq!(cuda(source), reason);
        }
        assert_eq!(on(device, DeviceError::Static { device }), Reason::AcceleratorUnsupportedByImage);
        let loading = || LoadError::Backend {
            tensor: "lm_head".into(),
            source: OpsError::OutOfMemory { op: "upload", bytes: 1 << 40, free: Some(1 << 30) },
        };
        assert_eq!(on(device, loading()), Reason::AcceleratorOutOfMemory);
        assert_eq!(reason(loading()), Reason::InsufficientMemory, "the host's");
    }

    #[test]
    fn the_reason_is_that_of_the_error_however_deep() {
        let absent = || Checkpoint::open("/no/such/checkpoint").unwrap_err();
        assert_eq!(reason(absent()), Reason::CheckpointUnreadable);
        assert_eq!(reason(RouterError::Checkpoint(absent())), Reason::CheckpointUnreadable);
        assert_eq!(reason(LoadError::Checkpoint(absent())), Reason::CheckpointUnreadable);

        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        let broken = Checkpoint::open(dir.path()).unwrap_err();
        assert_eq!(reason(broken), Reason::CheckpointInvalid);

        let memory = OpsError::OutOfMemory { op: "alloc", bytes: 1 << 40, free: None };
        let loading = LoadError::Backend { tensor: "lm_head".into(), source: memory };
        let key = cadre_model::ExpertKey { layer: LayerId(3), expert: LogicalExpert(7) };
        let applying = ApplyError::Load { epoch: PlacementEpoch(1), key, source: Box::new(loading) };
        assert_eq!(reason(applying), Reason::InsufficientMemory);

        assert_eq!(reason(GenerationRefused { reason: "theirs".into() }), Reason::CheckpointMismatch);
        let experts = RouterError::RoutedExperts { path: "m".into(), found: 32, expected: 256 };
        assert_eq!(reason(experts), Reason::CheckpointMismatch);
        let taken = io::Error::from(io::ErrorKind::AddrInUse);
        let bind = RouterError::Bind { what: "gRPC", address: ([127, 0, 0, 1], 1).into(), source: taken };
        assert_eq!(reason(bind), Reason::InvalidConfiguration);
        assert_eq!(reason(io::Error::from(io::ErrorKind::AddrInUse)), Reason::InvalidConfiguration);
        assert_eq!(reason(anyhow::anyhow!("CheckpointInvalid, it says")), Reason::Internal);
    }

    #[test]
    fn a_cause_is_said_once() {
        let device = Device::Cuda(0);
        let error = DeviceError::Cuda { device, source: CudaError::OldDriver { found: 12080 } };
        let said = words(&anyhow::Error::new(error).context("expert 0"));
        assert_eq!(
            said,
            "expert 0: device cuda:0: the NVIDIA driver is of CUDA 12.8; 13.0 or newer is needed"
        );
    }

    #[test]
    fn a_line_is_one_line_within_the_bound() {
        assert_eq!(line(Reason::Internal, "a:\n  b\n\nc"), "Internal: a:; b; c\n");
        let long = line(Reason::CheckpointInvalid, &"ü".repeat(5000));
        assert!(long.len() <= MAX_BYTES && long.len() > MAX_BYTES - 4, "{}", long.len());
        assert!(long.starts_with("CheckpointInvalid: ü") && long.ends_with("…\n"));
        assert_eq!(long.matches('\n').count(), 1);
    }

    #[test]
    fn an_error_is_written_and_an_unwritable_log_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        write(&log, &anyhow::anyhow!("inner").context("router"), Device::Cpu);
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "Internal: router: inner\n");
        write(&dir.path().join("no/such/folder"), &anyhow::anyhow!("x"), Device::Cpu);
    }
}
