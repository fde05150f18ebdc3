//! The operator's side of `Coordinator.Operate`, played by a test.

use cadre_proto::v1::{self, coordinator_client::CoordinatorClient};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::wait::LIMIT;

/// An open stream.
pub struct Operator {
    views: mpsc::Sender<v1::OperatorView>,
    statuses: Streaming<v1::CoordinatorStatus>,
    last: Option<v1::CoordinatorStatus>,
}

/// A pod on a node, whose process listens on loopback.
pub fn pod(name: &str, node: &str) -> v1::PodView {
    let pod = Some(v1::PodRef { name: name.into(), uid: format!("uid-{name}") });
    v1::PodView { pod, domain: node.into(), withdrawn: false, ips: vec!["127.0.0.1".into()] }
}

impl Operator {
    /// Opens the stream with a first view.
    pub async fn open(coordinator: &str, view: v1::OperatorView) -> Self {
        let client = CoordinatorClient::connect(format!("http://{coordinator}")).await;
        let mut client = client.expect("the coordinator answers");
        let (views, outgoing) = mpsc::channel(4);
        views.send(view).await.expect("room for the first view");
        let statuses = client.operate(ReceiverStream::new(outgoing)).await.expect("an operator is welcome");
        Self { views, statuses: statuses.into_inner(), last: None }
    }

    /// Sends a whole view.
    pub async fn tell(&self, view: v1::OperatorView) {
        self.views.send(view).await.expect("the stream is open");
    }

    /// Waits for a status, the last one that was seen included: the coordinator tells changes, and what it has said
    /// already it does not say again. So what is waited for after [`Self::tell`] must be something new.
    pub async fn until(
        &mut self,
        what: &str,
        wanted: impl Fn(&v1::CoordinatorStatus) -> bool,
    ) -> v1::CoordinatorStatus {
        if let Some(last) = self.last.clone().filter(&wanted) {
            return last;
        }
        let (statuses, last) = (&mut self.statuses, &mut self.last);
        let waiting = async {
            loop {
                let status = statuses.message().await.expect("the stream goes on").expect("a status");
                *last = Some(status.clone());
                if wanted(&status) {
                    return status;
                }
            }
        };
        match tokio::time::timeout(LIMIT, waiting).await {
            Ok(status) => status,
            Err(_) => panic!("waited in vain: {what}; last status: {:?}", self.last),
        }
    }

    /// Waits until a layout of so many shards is in force and nothing else is on its way.
    pub async fn settled(&mut self, shards: u32) -> v1::CoordinatorStatus {
        self.until(&format!("a layout of {shards} shards is in force"), |status| {
            status.next.is_none() && status.layout.is_some_and(|layout| layout.shards == shards)
        })
        .await
    }
}
