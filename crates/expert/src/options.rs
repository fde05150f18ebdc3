//! Everything an expert shard can be told, with its defaults in one place.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    time::Duration,
};

use cadre_checkpoint::WeightsOptions;
use cadre_device::Device;
use cadre_proto::secret::ClusterSecret;
use cadre_types::{AdvertiseError, NumericsClass, PodRef, ShardIndex};
use serde::Serialize;
use tokio::sync::oneshot;

use crate::shared::SharedProcess;

/// How a shard is set up.
#[derive(Debug)]
pub struct ExpertOptions {
    /// The checkpoint; only our experts' byte ranges of it are read.
    pub model_dir: PathBuf,
    /// Where its weights come from, and what is changed of its configuration. The same in every process of a model.
    pub weights: WeightsOptions,
    /// Which shard this is.
    pub shard: ShardIndex,
    /// `host:port` of the coordinator (the router's).
    pub coordinator: String,
    /// Where `cadre.v1.Expert` and health are served. Port 0 takes any free one.
    pub listen: SocketAddr,
    /// `host:port` under which workers reach it; absent is the bound address, which must then not be a
    /// wildcard.
    pub advertise: Option<String>,
    /// Where metrics, health and readiness are served.
    pub admin: SocketAddr,
    /// The numerics class; the coordinator refuses another than its own.
    pub numerics: NumericsClass,
    /// Threads of the backend; absent takes what the machine or its container allows.
    pub threads: Option<NonZeroUsize>,
    /// What it computes on; absent takes what the machine has.
    pub device: Option<Device>,
    /// Longest that frames are waited for when the shard is told to stop.
    pub drain: Duration,
    /// The pod that it runs in; `None` outside Kubernetes.
    pub pod: Option<PodRef>,
    /// The pod's address, advertised where `advertise` is absent.
    pub pod_ip: Option<IpAddr>,
    /// The cluster's secret: asked of workers, shown to the coordinator.
    pub secret: Option<ClusterSecret>,
    /// The process that it is a role of; `None` for a process of its own. `device`, `threads` and `admin` are then the
    /// process's.
    pub shared: Option<SharedProcess>,
    /// Receives the real addresses once every port is bound.
    pub bound: Option<oneshot::Sender<BoundAddresses>>,
}

impl ExpertOptions {
    /// The options of another life of the same shard; nobody is told where it is bound.
    #[must_use]
    pub fn again(&self) -> Self {
        Self {
            model_dir: self.model_dir.clone(),
            weights: self.weights.clone(),
            coordinator: self.coordinator.clone(),
            advertise: self.advertise.clone(),
            pod: self.pod.clone(),
            secret: self.secret.clone(),
            shared: self.shared.clone(),
            bound: None,
            ..*self
        }
    }

    /// The defaults for a checkpoint, a shard and a coordinator.
    pub fn new(model_dir: PathBuf, shard: ShardIndex, coordinator: impl Into<String>) -> Self {
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Self {
            model_dir,
            weights: WeightsOptions::default(),
            shard,
            coordinator: coordinator.into(),
            listen: any_port,
            advertise: None,
            admin: any_port,
            numerics: NumericsClass::default(),
            threads: None,
            device: None,
            drain: Duration::from_secs(5),
            pod: None,
            pod_ip: None,
            secret: None,
            shared: None,
            bound: None,
        }
    }
}

/// Where a shard listens indeed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BoundAddresses {
    /// gRPC.
    pub grpc: SocketAddr,
    /// Admin.
    pub admin: SocketAddr,
}

/// Why options are unusable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// Nobody could reach the shard.
    #[error(transparent)]
    Advertise(#[from] AdvertiseError),
}
