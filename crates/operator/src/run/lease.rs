//! Leader election: of several operators one works, the others stand by with full caches.
//!
//! kube-lease-manager takes, renews and releases the lease. Three things are added to it. **A fence in time**: the
//! manager keeps believing in a lease that it cannot renew, so every renewal that the API server acknowledged is noted
//! ([`Renewals`], a layer of the lease's own client), and without one for [`FENCE`] the lease counts as lost before
//! another may take it. **A quick hand-over**: a manager that waits sleeps until the lease would run out; a released
//! lease is looked for in between. **Patience**: an API server that is away while the lease is sought is waited for.
//!
//! A lease is no fence for writes that are on their way; they are idempotent, by one field manager. A process that lost
//! its lease ends and is started again as a standby.

use std::{
    future::Future,
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use http::{Method, Request, Response};
use k8s_openapi::api::coordination::v1::Lease as LeaseObject;
use kube::{Api, Client, client::Body};
use kube_lease_manager::{LeaseManager, LeaseManagerBuilder, LeaseManagerError, LeaseParams};
use tokio::{sync::watch, time::Instant};
use tower::{BoxError, Layer, Service};

use super::backoff::Backoff;

/// How long a lease holds without a renewal: what a successor of a dead leader waits for.
const DURATION: Duration = Duration::from_secs(15);

/// So long before the end it is renewed: every 5 seconds.
const GRACE: Duration = Duration::from_secs(10);

/// Without a renewal for so long the leader gives up: two seconds for clocks that differ.
const FENCE: Duration = Duration::from_secs(13);

/// How often a standby looks whether the lease was released.
const RELEASED_EVERY: Duration = Duration::from_secs(2);

/// Longest time that releasing may take.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(3);

/// Longest wait for an answer about the lease: twice within a renewal.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(3);

/// Longest field manager that the API server takes.
const MAX_FIELD_MANAGER: usize = 128;

/// A lease that is held.
#[derive(Debug)]
pub(crate) struct Lease {
    manager: LeaseManager,
    renewals: Renewals,
    /// Before the first acknowledged renewal the lease counts from here.
    acquired: Instant,
}

/// Which lease, and who wants it.
#[derive(Clone)]
pub(crate) struct Candidate {
    /// A client with the layer [`Renewals`].
    pub(crate) client: Client,
    pub(crate) renewals: Renewals,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) identity: String,
}

impl Candidate {
    /// Waits until the lease is ours, through errors of any kind.
    pub(crate) async fn acquire(&self) -> Lease {
        let mut backoff = Backoff::of_watch();
        loop {
            match self.attempt().await {
                Ok(Some(manager)) => {
                    tracing::info!(lease = self.name, identity = self.identity, "Took the lease");
                    return Lease { manager, renewals: self.renewals.clone(), acquired: Instant::now() };
                }
                // It was released: a new manager sees that.
                Ok(None) => backoff.reset(),
                Err(error) => {
                    let delay = backoff.next_delay();
                    tracing::warn!(lease = self.name, namespace = self.namespace, %error, ?delay, "No lease yet");
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    /// A manager that holds the lease; `None` if the lease was released while another manager slept.
    async fn attempt(&self) -> Result<Option<LeaseManager>, LeaseManagerError> {
        let manager = LeaseManagerBuilder::new(self.client.clone(), &self.name)
            .with_namespace(&self.namespace)
            .with_parameters(
                LeaseParams::new(&self.identity, DURATION.as_secs(), GRACE.as_secs())
                    .with_field_manager(self.field_manager()),
            )
            .build()
            .await?;
        let acquired = async {
            while !manager.changed().await? {}
            Ok::<(), LeaseManagerError>(())
        };
        tokio::select! {
            acquired = acquired => acquired?,
            () = self.released() => return Ok(None),
        }
        Ok(Some(manager))
    }

    /// Completes when nobody holds the lease, a while after another did.
    async fn released(&self) {
        let leases = Api::<LeaseObject>::namespaced(self.client.clone(), &self.namespace);
        loop {
            tokio::time::sleep(RELEASED_EVERY).await;
            let lease = leases.get_opt(&self.name).await;
            if let Ok(Some(lease)) = lease
                && lease.spec.is_none_or(|spec| spec.holder_identity.is_none())
            {
                return;
            }
        }
    }

    /// One per candidate: two that take the lease at once conflict, and one of them gets it.
    fn field_manager(&self) -> String {
        let name = format!("cadre-operator-{}", self.identity);
        name[name.ceil_char_boundary(name.len().saturating_sub(MAX_FIELD_MANAGER))..].to_owned()
    }
}

impl Lease {
    /// Renews the lease until it is lost; says why it is.
    pub(crate) async fn lost(&self) -> String {
        tokio::select! {
            reason = self.renew() => reason,
            () = self.run_out() => format!("it could not be renewed for {FENCE:?}"),
        }
    }

    async fn renew(&self) -> String {
        let mut backoff = Backoff::of_watch();
        loop {
            match self.manager.changed().await {
                Ok(false) => return "another process holds it".to_owned(),
                Ok(true) => backoff.reset(),
                Err(error) => {
                    let delay = backoff.next_delay();
                    tracing::warn!(%error, ?delay, "The lease was not renewed");
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    /// Completes [`FENCE`] after the last renewal.
    async fn run_out(&self) {
        let mut renewals = self.renewals.0.subscribe();
        loop {
            let last = renewals.borrow_and_update().unwrap_or(self.acquired).max(self.acquired);
            tokio::select! {
                () = tokio::time::sleep_until(last + FENCE) => return,
                // The sender lives as long as `self`.
                _ = renewals.changed() => {}
            }
        }
    }

    /// Gives the lease to whoever waits.
    pub(crate) async fn release(self) {
        match tokio::time::timeout(RELEASE_TIMEOUT, self.manager.release()).await {
            Ok(Ok(())) => tracing::info!("Released the lease"),
            Ok(Err(error)) => tracing::warn!(%error, "The lease was not released; it runs out by itself"),
            Err(_) => {
                tracing::warn!(after = ?RELEASE_TIMEOUT, "The lease was not released in time; it runs out by itself")
            }
        }
    }
}

/// When the last acknowledged write to the lease was sent. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Renewals(std::sync::Arc<watch::Sender<Option<Instant>>>);

impl<S> Layer<S> for Renewals {
    type Service = Renewing<S>;

    fn layer(&self, inner: S) -> Renewing<S> {
        Renewing { inner, renewals: self.clone() }
    }
}

/// See [`Renewals`].
#[derive(Clone, Debug)]
pub(crate) struct Renewing<S> {
    inner: S,
    renewals: Renewals,
}

impl<S, B> Service<Request<Body>> for Renewing<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Future<Output = Result<Response<B>, S::Error>> + Send + 'static,
    S::Error: Into<BoxError>,
{
    type Response = Response<B>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<B>, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The lease holds from before the request: the server may have taken it at once and answered late.
        let sent = (request.method() == Method::PATCH).then(Instant::now);
        let answer = self.inner.call(request);
        let renewals = self.renewals.clone();
        Box::pin(async move {
            let answer = answer.await.map_err(Into::into)?;
            if answer.status().is_success() && sent.is_some() {
                renewals.0.send_replace(sent);
            }
            Ok(answer)
        })
    }
}

#[cfg(test)]
mod tests;
