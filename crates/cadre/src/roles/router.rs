//! `cadre router`.

use std::{net::SocketAddr, num::NonZeroU16, path::PathBuf, time::Duration};

use anyhow::Result;
use cadre_device::Device;
use cadre_router::{Limits, ListenAddresses, RouterOptions};
use clap::Args;

use super::{RoleArgs, Seconds, announce, ended};

/// Where shards come one by one and are told their failure domains by an operator.
const DEFAULT_PLACEMENT_WAIT: Duration = Duration::from_secs(15);

/// Takes requests, gives them to workers, and keeps the members and the placement (coordinator).
#[derive(Args, Debug)]
pub(crate) struct RouterArgs {
    #[command(flatten)]
    role: RoleArgs,
    /// Name under which clients ask for the model. [default: the folder's name]
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Expert shards that the placement spreads over.
    #[arg(long, value_name = "N", default_value = "4")]
    shards: NonZeroU16,
    /// Extra slots per layer over all shards.
    #[arg(long, value_name = "N", default_value_t = 0)]
    redundant_slots: usize,
    /// Copies that every expert has at least, each on another shard. [default: what the redundant slots give everyone]
    #[arg(long, value_name = "N")]
    min_copies: Option<NonZeroU16>,
    /// File with the layout instead: {"shards": 4, "redundantSlots": 32, "minCopies": 2}; followed while it changes.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shards", "redundant_slots", "min_copies"])]
    layout_file: Option<PathBuf>,
    /// Longest wait for all shards and their failure domains, from the first shard on, before the first placement is planned, in seconds. [default: 15 with a layout file, else 0: planned at start]
    #[arg(long, value_name = "SECONDS")]
    placement_wait: Option<Seconds>,
    /// Routed experts per layer that the checkpoint must have.
    #[arg(long, value_name = "N")]
    routed_experts: Option<usize>,
    /// Expert load to plan from. [default: cadre-expert-load.json of the checkpoint, else even]
    #[arg(long, value_name = "FILE")]
    expert_load: Option<PathBuf>,
    /// Where to serve `cadre.v1.Inference`.
    #[arg(long, value_name = "ADDR", default_value_t = ListenAddresses::default().grpc)]
    grpc: SocketAddr,
    /// Where to serve the OpenAI-compatible API.
    #[arg(long, value_name = "ADDR", default_value_t = ListenAddresses::default().http)]
    http: SocketAddr,
    /// Where to serve members.
    #[arg(long, value_name = "ADDR", default_value_t = ListenAddresses::default().coordinator)]
    coordinator: SocketAddr,
    /// Where to serve metrics, health and readiness.
    #[arg(long, value_name = "ADDR", default_value_t = ListenAddresses::default().admin)]
    admin: SocketAddr,
    /// Sequences generated at one time.
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_concurrent)]
    max_concurrent: u32,
    /// Requests that may wait beyond those; more are refused.
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_waiting)]
    max_waiting: u32,
    /// Largest request in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().max_body_bytes)]
    max_body_bytes: usize,
    /// A request must be complete within so many seconds, on every front door.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(Limits::default().body_timeout))]
    body_timeout: Seconds,
    /// A connection must bring its first request within so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(Limits::default().first_request_timeout))]
    first_request_timeout: Seconds,
    /// How long the HTTP API keeps a connection without a request, in seconds; longer than proxies in front of it keep theirs.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(Limits::default().idle_timeout))]
    idle_timeout: Seconds,
    /// Origin whose pages may use the HTTP API from a browser (CORS), or *; may be repeated. [default: none]
    #[arg(long = "cors-origin", value_name = "ORIGIN", value_parser = origin)]
    cors_origins: Vec<String>,
    /// Deadline of a request that brings none, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(Limits::default().default_timeout))]
    default_timeout: Seconds,
    /// Longest deadline, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(Limits::default().max_timeout))]
    max_timeout: Seconds,
    /// Longest wait for a worker to reserve pages, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(Limits::default().reserve_timeout))]
    reserve_timeout: Seconds,
    /// Longest silence of the workers of a request, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(Limits::default().stall_timeout))]
    stall_timeout: Seconds,
    /// Longest wait for requests in flight when asked to stop, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(Limits::default().drain_timeout))]
    drain_timeout: Seconds,
    /// A member that has not reported for so many seconds is removed.
    #[arg(long, value_name = "SECONDS", default_value = "3")]
    lease: Seconds,
}

/// `*`, or scheme and authority as browsers write them.
fn origin(text: &str) -> Result<String, String> {
    let is_origin = text.split_once("://").is_some_and(|(scheme, authority)| {
        matches!(scheme, "http" | "https")
            && !authority.is_empty()
            && authority.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/')
    });
    match text == "*" || is_origin {
        true => Ok(text.to_owned()),
        false => {
            Err(format!("{text:?} is no origin: expected * or scheme://host, as in https://chat.example.org"))
        }
    }
}

impl RouterArgs {
    fn options(self) -> Result<RouterOptions> {
        Ok(RouterOptions {
            secret: self.role.secret(self.coordinator)?,
            weights: self.role.weights.options(),
            served_model_name: self.served_model_name,
            numerics: self.role.numerics,
            redundant_slots: self.redundant_slots,
            min_copies: self.min_copies,
            placement_wait: match (self.placement_wait, &self.layout_file) {
                (Some(wait), _) => wait.0,
                (None, Some(_)) => DEFAULT_PLACEMENT_WAIT,
                (None, None) => Duration::ZERO,
            },
            layout_file: self.layout_file,
            routed_experts: self.routed_experts,
            expert_load: self.expert_load,
            listen: ListenAddresses {
                grpc: self.grpc,
                http: self.http,
                coordinator: self.coordinator,
                admin: self.admin,
            },
            limits: Limits {
                max_concurrent: self.max_concurrent,
                max_waiting: self.max_waiting,
                max_body_bytes: self.max_body_bytes,
                body_timeout: self.body_timeout.0,
                first_request_timeout: self.first_request_timeout.0,
                idle_timeout: self.idle_timeout.0,
                cors_origins: self.cors_origins,
                default_timeout: self.default_timeout.0,
                max_timeout: self.max_timeout.0,
                reserve_timeout: self.reserve_timeout.0,
                stall_timeout: self.stall_timeout.0,
                drain_timeout: self.drain_timeout.0,
                ..Limits::default()
            },
            lease: self.lease.0,
            bound: Some(announce()),
            ..RouterOptions::new(self.role.model, self.shards)
        })
    }
}

/// Runs the role until it is asked to stop.
pub(crate) async fn router(args: RouterArgs) -> Result<()> {
    let log = args.role.termination_log.clone();
    let stop = args.role.begin("router")?;
    let run = async { Ok::<_, anyhow::Error>(cadre_router::run(args.options()?, stop).await?) };
    ended(run.await, "router", log.as_deref(), Some(Device::Cpu))
}

#[cfg(test)]
mod tests {
    use super::origin;

    #[test]
    fn an_origin_is_a_scheme_and_a_host() {
        for text in ["*", "https://chat.example.org", "http://localhost:3000"] {
            assert_eq!(origin(text).as_deref(), Ok(text));
        }
        for text in ["", "chat.example.org", "https://a/b", "https://", "ftp://a", "https://a b"] {
            assert!(origin(text).is_err(), "{text}");
        }
    }
}
