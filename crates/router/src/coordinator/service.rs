//! The `Coordinator` service: `Watch` with one reader and one writer per member's stream, and `Operate` with
//! the same for the operator's.
//!
//! The reader turns reports into commands and waits until each is taken (so a member cannot flood the
//! owner); the writer sends the newest view on every change and ends with the owner's verdict. The first
//! report must come within a lease.

use std::{pin::Pin, time::Duration};

use cadre_proto::v1::{self, coordinator_server};
use cadre_types::OperatorView;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Command, Coordinator, Joined, Operating, OperatorStream, report::MemberReport, state::ConnectionId,
};

/// The gRPC face of the coordinator.
#[derive(Clone, Debug)]
pub(crate) struct CoordinatorService {
    coordinator: Coordinator,
    lease: Duration,
}

impl CoordinatorService {
    /// A service over the owner task.
    pub(crate) fn new(coordinator: Coordinator, lease: Duration) -> Self {
        Self { coordinator, lease }
    }
}

#[tonic::async_trait]
impl coordinator_server::Coordinator for CoordinatorService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::ClusterView, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<v1::Report>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let mut reports = request.into_inner();
        let first = tokio::time::timeout(self.lease, reports.message())
            .await
            .map_err(|_| Status::deadline_exceeded(format!("no first report within {:?}", self.lease)))??
            .ok_or_else(|| Status::invalid_argument("the stream ended before a first report"))?;
        let report = MemberReport::try_from(first)?;
        let (reply, answer) = oneshot::channel();
        let gone = || Status::unavailable("the coordinator is shutting down");
        let commands = self.coordinator.commands.clone();
        commands.send(Command::Join { report, reply }).await.map_err(|_| gone())?;
        let joined = answer.await.map_err(|_| gone())??;
        tokio::spawn(read_reports(reports, joined.connection, commands));
        Ok(Response::new(Box::pin(send_views(joined))))
    }

    type OperateStream = Pin<Box<dyn Stream<Item = Result<v1::CoordinatorStatus, Status>> + Send>>;

    async fn operate(
        &self,
        request: Request<Streaming<v1::OperatorView>>,
    ) -> Result<Response<Self::OperateStream>, Status> {
        let mut views = request.into_inner();
        let first = tokio::time::timeout(self.lease, views.message())
            .await
            .map_err(|_| Status::deadline_exceeded(format!("no first view within {:?}", self.lease)))??
            .ok_or_else(|| Status::invalid_argument("the stream ended before a first view"))?;
        let view = OperatorView::try_from(&first)?;
        let (reply, answer) = oneshot::channel();
        let gone = || Status::unavailable("the coordinator is shutting down");
        let commands = self.coordinator.commands.clone();
        commands.send(Command::Operate { view, reply }).await.map_err(|_| gone())?;
        let operating = answer.await.map_err(|_| gone())?;
        tokio::spawn(read_operator_views(views, operating.stream, commands));
        Ok(Response::new(Box::pin(send_statuses(operating))))
    }
}

/// A view that cannot be read ends the stream: half a view is none.
async fn read_operator_views(
    mut views: Streaming<v1::OperatorView>,
    stream: OperatorStream,
    commands: mpsc::Sender<Command>,
) {
    loop {
        let view = match views.message().await {
            Ok(Some(wire)) => OperatorView::try_from(&wire),
            Ok(None) | Err(_) => break,
        };
        let command = match view {
            Ok(view) => Command::OperatorView { stream, view },
            Err(error) => {
                tracing::error!(%error, "the operator's view was refused");
                break;
            }
        };
        if commands.send(command).await.is_err() {
            return;
        }
    }
    // The owner being gone ends everything anyway.
    let _ = commands.send(Command::OperatorGone { stream }).await;
}

fn send_statuses(operating: Operating) -> impl Stream<Item = Result<v1::CoordinatorStatus, Status>> + Send {
    let Operating { mut statuses, mut ended, .. } = operating;
    async_stream::stream! {
        loop {
            let status = v1::CoordinatorStatus::clone(&statuses.borrow_and_update());
            yield Ok(status);
            tokio::select! {
                biased;
                status = &mut ended => {
                    yield Err(status.unwrap_or_else(|_| Status::unavailable("the coordinator has ended the stream")));
                    return;
                }
                changed = statuses.changed() => if changed.is_err() { return },
            }
        }
    }
}

async fn read_reports(
    mut reports: Streaming<v1::Report>,
    connection: ConnectionId,
    commands: mpsc::Sender<Command>,
) {
    loop {
        let command = match reports.message().await {
            Ok(Some(wire)) => match MemberReport::try_from(wire) {
                Ok(report) => Command::Report { connection, report },
                Err(error) => Command::Refused { connection, status: error.into() },
            },
            Ok(None) | Err(_) => Command::Leave { connection },
        };
        let last = !matches!(command, Command::Report { .. });
        // The owner being gone ends everything anyway.
        if commands.send(command).await.is_err() || last {
            return;
        }
    }
}

fn send_views(joined: Joined) -> impl Stream<Item = Result<v1::ClusterView, Status>> + Send {
    let Joined { mut views, mut ended, .. } = joined;
    async_stream::stream! {
        loop {
            let wire = views.borrow_and_update().as_ref().map(|published| published.wire.clone());
            if let Some(wire) = wire {
                yield Ok(wire);
            }
            tokio::select! {
                // The verdict first: a view without this member is of no use to it.
                biased;
                status = &mut ended => {
                    yield Err(status.unwrap_or_else(|_| Status::unavailable("the coordinator has stopped")));
                    return;
                }
                changed = views.changed() => if changed.is_err() { return },
            }
        }
    }
}
