//! Connections to decode workers, kept from one hand-off to the next.
//!
//! A prompt's KV goes where the caller of `Prefill` says, but only to an address that the coordinator's last view
//! has for a worker that decodes: a caller alone cannot send it anywhere.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use cadre_dispatch::tuning;
use cadre_proto::{
    secret::{ClusterSecret, InternalChannel, Present},
    v1::worker_client::WorkerClient,
};
use cadre_types::{ClusterView, Role};
use tokio::sync::watch;
use tonic::{Status, transport::Channel};

use super::MAX_WORKER_MESSAGE_BYTES;

/// Connections kept. A prefill worker serves tens of decode workers; restarted ones come with new
/// addresses, so beyond this all are let go and opened again as needed.
const MAX_PEERS: usize = 256;

type Views = watch::Receiver<Option<Arc<ClusterView>>>;

/// Channels by address. The lock is std's: it is never held across an await.
#[derive(Debug, Default)]
pub(super) struct Peers {
    channels: Mutex<HashMap<String, Channel>>,
    present: Present,
    /// Unset (in a process without a coordinator) every address may be dialled.
    views: OnceLock<Views>,
}

impl Peers {
    /// Peers that are shown this secret.
    pub(super) fn new(secret: Option<&ClusterSecret>) -> Self {
        Self { present: Present::new(secret), ..Self::default() }
    }

    /// Only decode workers of these views are dialled from now on.
    pub(super) fn limit_to(&self, views: Views) {
        // A second coordinator is none of this process's.
        let _ = self.views.set(views);
    }

    /// `UNAVAILABLE`, because the view may be older than the worker: the caller may ask again, or another.
    fn check(&self, address: &str) -> Result<(), Status> {
        let Some(views) = self.views.get() else { return Ok(()) };
        let view = views.borrow();
        let known = view.as_ref().is_some_and(|view| {
            view.members
                .iter()
                .any(|member| matches!(member.role, Role::Decode | Role::Both) && member.address == address)
        });
        match known {
            true => Ok(()),
            false => Err(Status::unavailable(format!(
                "prefill.decode_address {address:?}: the coordinator's last view has no decode worker there"
            ))),
        }
    }

    /// A client of the worker at `host:port`; connects on first use.
    pub(super) fn client(&self, address: &str) -> Result<WorkerClient<InternalChannel>, Status> {
        self.check(address)?;
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = match channels.get(address) {
            Some(channel) => channel.clone(),
            None => {
                let endpoint = tuning::endpoint(address).map_err(|error| {
                    Status::invalid_argument(format!("prefill.decode_address {address:?}: {error}"))
                })?;
                if channels.len() >= MAX_PEERS {
                    channels.clear();
                }
                channels.entry(address.to_owned()).or_insert(endpoint.connect_lazy()).clone()
            }
        };
        Ok(WorkerClient::with_interceptor(channel, self.present.clone())
            .max_decoding_message_size(MAX_WORKER_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_WORKER_MESSAGE_BYTES))
    }

    /// Lets a connection go after a failure, so that the next hand-off dials anew.
    pub(super) fn forget(&self, address: &str) {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner).remove(address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_bad_address_is_refused_and_named() {
        let status = Peers::default().client("no spaces allowed").expect_err("refused");
        assert!(status.message().contains("no spaces allowed"), "{}", status.message());
    }

    #[tokio::test]
    async fn only_decode_workers_of_the_view_are_dialled() {
        use cadre_types::{
            Generation, LayerId, LayerPlacement, LogicalExpert, Member, MemberId, MemberState, ModelHash,
            NumericsClass, Placement, PlacementEpoch,
        };

        let member = |role, port: u16| Member {
            id: MemberId(port.to_string()),
            role,
            address: format!("127.0.0.1:{port}"),
            state: MemberState::Ready,
            pod: None,
        };
        let layers = vec![LayerPlacement { layer: LayerId(1), slots: vec![vec![LogicalExpert(0)]] }];
        let placement = Placement::new(PlacementEpoch(1), 1, layers).expect("a placement");
        let generation =
            Generation { model: ModelHash([0; 16]), numerics: NumericsClass::Bf16, epoch: placement.epoch() };
        let members = vec![member(Role::Decode, 1), member(Role::Both, 2), member(Role::Prefill, 3)];
        let peers = Peers::default();
        let (view, views) = watch::channel(None);
        peers.limit_to(views);
        let refused =
            |port: u16| peers.client(&format!("127.0.0.1:{port}")).err().map(|status| status.code());
        assert_eq!(refused(1), Some(tonic::Code::Unavailable), "there is no view yet");
        view.send_replace(Some(Arc::new(ClusterView::settled(generation, Arc::new(placement), members))));
        assert_eq!(
            [1, 2, 3, 4].map(refused),
            [None, None, Some(tonic::Code::Unavailable), Some(tonic::Code::Unavailable)]
        );
    }

    #[tokio::test]
    async fn connections_are_bounded() {
        let peers = Peers::default();
        for port in 0..2 * MAX_PEERS {
            peers.client(&format!("127.0.0.1:{}", port + 1)).expect("a lazy connection");
            assert!(peers.channels.lock().expect("unpoisoned").len() <= MAX_PEERS);
        }
    }
}
