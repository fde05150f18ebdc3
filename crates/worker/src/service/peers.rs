//! Connections to decode workers, kept from one hand-off to the next.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use cadre_dispatch::tuning;
use cadre_proto::v1::worker_client::WorkerClient;
use tonic::{Status, transport::Channel};

use super::MAX_WORKER_MESSAGE_BYTES;

/// Connections kept. A prefill worker serves tens of decode workers; restarted ones come with new
/// addresses, so beyond this all are let go and opened again as needed.
const MAX_PEERS: usize = 256;

/// Channels by address. The lock is std's: it is never held across an await.
#[derive(Debug, Default)]
pub(super) struct Peers {
    channels: Mutex<HashMap<String, Channel>>,
}

impl Peers {
    /// A client of the worker at `host:port`; connects on first use.
    pub(super) fn client(&self, address: &str) -> Result<WorkerClient<Channel>, Status> {
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
        Ok(WorkerClient::new(channel)
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
    async fn connections_are_bounded() {
        let peers = Peers::default();
        for port in 0..2 * MAX_PEERS {
            peers.client(&format!("127.0.0.1:{}", port + 1)).expect("a lazy connection");
            assert!(peers.channels.lock().expect("unpoisoned").len() <= MAX_PEERS);
        }
    }
}
