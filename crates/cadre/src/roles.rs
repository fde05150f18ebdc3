//! The roles as commands: flags in, options of the role's crate out, and the request to stop.
//!
//! Each role prints one line of JSON on standard output once all its servers listen: the addresses, which
//! matter where a port was 0. Everything else goes to the log on standard error.

use std::{
    fmt,
    future::Future,
    net::{IpAddr, SocketAddr},
    num::ParseFloatError,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use anyhow::{Context, Result};
use cadre_device::Device;
use cadre_proto::secret::{ClusterSecret, SecretError};
use cadre_telemetry::{LogFormat, init_logging, one_line};
use cadre_types::{NumericsClass, PodRef};
use clap::Args;
use serde::Serialize;
use tokio::sync::oneshot;

use crate::{output, stop, weights::WeightsArgs};

mod expert;
#[cfg(feature = "operator")]
mod operator;
#[cfg(not(feature = "operator"))]
#[path = "roles/without_operator.rs"]
mod operator;
mod router;
mod termination;
mod worker;

pub(crate) use termination::{TERMINATION_LOG_ENV, of_usage};

pub(crate) use expert::{ExpertArgs, expert};
pub(crate) use operator::{OperatorArgs, operator};
pub(crate) use router::{RouterArgs, router};
pub(crate) use worker::{WorkerArgs, worker};

/// What every role needs.
#[derive(Args, Clone, Debug)]
struct RoleArgs {
    /// A Hugging Face folder of the DeepSeek-V3 architecture.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    weights: WeightsArgs,
    /// Numerics class: f32, bf16, fp8 or cuda-fp8 (docs/numerics.md). The same for every process of a model.
    #[arg(long, value_name = "CLASS", default_value_t = NumericsClass::Bf16)]
    numerics: NumericsClass,
    /// Log filter (`info`, `warn,cadre_dispatch=debug`).
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log: String,
    /// Log lines as text for people or as json for collectors.
    #[arg(long, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Drain and exit when standard input ends (`cadre up` holds the other end).
    #[arg(long)]
    exit_on_stdin_close: bool,
    /// Where to write one line, `Reason: message`, when the process ends with an error.
    #[arg(long, value_name = "FILE", env = TERMINATION_LOG_ENV)]
    termination_log: Option<PathBuf>,
    /// File with the cluster's secret, 16 to 256 visible characters: asked of whoever calls this process from inside the cluster, and shown to those that it calls. [default: none is asked or shown]
    #[arg(long, value_name = "FILE", env = "CADRE_CLUSTER_SECRET_FILE")]
    cluster_secret_file: Option<PathBuf>,
}

/// The pod that a member runs in.
#[derive(Args, Clone, Debug)]
struct PodArgs {
    /// Name of the pod that it runs in.
    #[arg(long, value_name = "NAME", env = "CADRE_POD_NAME", requires = "pod_uid")]
    pod_name: Option<String>,
    /// Unique id of that pod.
    #[arg(long, value_name = "UID", env = "CADRE_POD_UID", requires = "pod_name")]
    pod_uid: Option<String>,
    /// Address of that pod: advertised, with the port that it listens on, where --advertise is absent.
    #[arg(long, value_name = "IP", env = "CADRE_POD_IP")]
    pod_ip: Option<IpAddr>,
}

impl PodArgs {
    fn pod(self) -> Option<PodRef> {
        Some(PodRef { name: self.pod_name?, uid: self.pod_uid? })
    }
}

impl RoleArgs {
    /// The cluster's secret. `internal` is where processes of the cluster call this one.
    fn secret(&self, internal: SocketAddr) -> Result<Option<ClusterSecret>, SecretError> {
        let secret = self.cluster_secret_file.as_deref().map(ClusterSecret::read).transpose()?;
        if secret.is_none() && !internal.ip().is_loopback() {
            tracing::warn!(
                listen = %internal,
                "no --cluster-secret-file: whoever reaches this address is taken for a process of this cluster, may \
                 read prompts and may forge answers"
            );
        }
        Ok(secret)
    }

    /// Sets up the log under this name and returns the request to stop.
    fn begin(&self, name: &str) -> Result<impl Future<Output = ()> + Send + 'static> {
        init_logging(self.log_format, name, &self.log)?;
        raise_descriptors();
        let requested = stop::requested(self.exit_on_stdin_close)?;
        Ok(async move {
            let cause = requested.await;
            tracing::info!(cause, "asked to stop: draining");
        })
    }
}

/// Every connection is a descriptor, and processes are often started with a soft limit of 1024.
fn raise_descriptors() {
    match cadre_net::descriptors::raise() {
        Ok((before, after)) => tracing::debug!(before, after, "limit of open files"),
        Err(error) => tracing::warn!(%error, "the limit of open files stays as it is"),
    }
}

/// A channel whose receiver prints the addresses as one line of JSON.
fn announce<T: Serialize + Send + 'static>() -> oneshot::Sender<T> {
    let (sender, receiver) = oneshot::channel();
    tokio::spawn(async move {
        // A role that fails before it listens drops the sender and says why itself.
        if let Ok(addresses) = receiver.await
            && let Err(error) = output::json(&addresses)
        {
            tracing::warn!(%error, "the addresses could not be printed");
        }
    });
    sender
}

/// A duration on the command line, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Seconds(Duration);

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let seconds: f64 = text.parse().map_err(|error: ParseFloatError| error.to_string())?;
        Duration::try_from_secs_f64(seconds).map(Self).map_err(|error| error.to_string())
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.as_secs_f64())
    }
}

/// Loopback with this port, for defaults.
fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Ends a role: its error gets the role's name, and goes to the termination log if there is one.
/// `device` is what it was told to compute on.
fn ended<E: Into<anyhow::Error>>(
    result: Result<(), E>,
    name: &str,
    log: Option<&Path>,
    device: Option<Device>,
) -> Result<()> {
    let result = result.map_err(Into::into).with_context(|| name.to_owned());
    if let (Err(error), Some(log)) = (&result, log) {
        termination::write(log, error, device.unwrap_or_else(Device::of_machine));
    }
    // It is printed among the log lines of this and, under `up`, of other processes.
    result.map_err(|error| {
        let words = termination::words(&error);
        let lines: Vec<&str> = words.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        anyhow::Error::msg(one_line(&lines.join("; ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_roles_error_is_one_line_whatever_peers_put_into_it() {
        let refused: Result<(), _> = Err(anyhow::anyhow!("refused by w-1\n[router] INFO forged\u{1b}[2J"));
        let error = ended(refused, "worker", None, None).expect_err("it failed");
        assert_eq!(format!("{error:#}"), "worker: refused by w-1; [router] INFO forged\\u{1b}[2J");
    }

    #[test]
    fn seconds_come_back_as_they_were_written() {
        for text in ["90", "2.5", "0"] {
            assert_eq!(text.parse::<Seconds>().expect("a duration").to_string(), text);
        }
        for text in ["-1", "soon", "inf", "NaN", "1e30"] {
            text.parse::<Seconds>().expect_err(text);
        }
    }
}
