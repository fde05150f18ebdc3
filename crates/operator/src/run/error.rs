//! Why an operator does not start, or ends.

use std::{io, net::SocketAddr};

use cadre_telemetry::MetricsError;

/// Why an operator does not start, or ends before it is asked to.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// There is neither a service account nor a usable kubeconfig.
    #[error("no way to the Kubernetes API: {0}")]
    Config(#[from] kube::config::InferConfigError),
    /// The client cannot be made from the configuration.
    #[error("client of the Kubernetes API: {0}")]
    Client(#[from] kube::Error),
    /// The admin port cannot be had.
    #[error("listen on {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's words.
        source: io::Error,
    },
    /// The table of metrics is wrong.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The lease is gone; another process may lead.
    #[error("lost the lease: {reason}")]
    LeaseLost {
        /// How.
        reason: String,
    },
    /// A part that never ends did.
    #[error("{what} stopped: {problem}")]
    Stopped {
        /// Which part.
        what: &'static str,
        /// Why.
        problem: String,
    },
}
