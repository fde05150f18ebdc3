//! The life of one connection: how long it may say nothing, and its end.

use std::{
    convert::Infallible,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, body::Body};
use bytes::Bytes;
use futures::future::BoxFuture;
use hyper::{
    Request, Response,
    body::{Body as HttpBody, Frame, Incoming, SizeHint},
    service::Service,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use crate::{
    intake::{Intake, Metered},
    options::ServerOptions,
    own_errors::OwnErrors,
};

/// Time for a connection that is given up to close well; then it is cut.
const CLOSE_BOUND: Duration = Duration::from_secs(2);

/// What a connection is doing.
#[derive(Debug)]
pub(crate) struct Activity(Mutex<State>);

#[derive(Clone, Copy, Debug)]
struct State {
    /// Whether it has ever asked.
    asked: bool,
    /// Requests whose answers are not complete.
    in_flight: u32,
    /// Those of them that are not complete themselves.
    receiving: u32,
    /// When one of these last changed.
    since: Instant,
}

/// When a connection has to be looked at again.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Over,
    At(Instant),
    Never,
}

impl Activity {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { asked: false, in_flight: 0, receiving: 0, since: Instant::now() })))
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.0.lock();
        change(&mut state);
        state.since = Instant::now();
    }

    /// A request has come completely.
    pub(crate) fn received(&self) {
        self.change(|state| state.receiving = state.receiving.saturating_sub(1));
    }

    /// Whether the connection has had its time, or when that is to be asked again.
    fn next(&self, options: &ServerOptions, full: bool) -> Next {
        let state = *self.0.lock();
        let bound = match (state.asked, full) {
            (false, false) => Some(options.first_request),
            (true, false) => options.idle,
            (_, true) => Some(options.idle_when_full),
        };
        let Some(bound) = bound else { return Next::Never };
        let nothing_is_answered = state.in_flight == 0 || (full && state.in_flight == state.receiving);
        let now = Instant::now();
        match nothing_is_answered {
            // What is answered now ends later than now, so its time cannot be over before this.
            false => Next::At(now + bound),
            true if state.since + bound <= now => Next::Over,
            true => Next::At(state.since + bound),
        }
    }
}

/// A request in flight, until its answer has left.
struct InFlight(Arc<Activity>);

impl InFlight {
    fn begin(activity: &Arc<Activity>) -> Self {
        activity.change(|state| {
            state.asked = true;
            state.in_flight += 1;
            state.receiving += 1;
        });
        Self(Arc::clone(activity))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.change(|state| state.in_flight = state.in_flight.saturating_sub(1));
    }
}

/// The routes, with every request metered and counted.
struct Counted {
    routes: TowerToHyperService<Router>,
    intake: Arc<Intake>,
    activity: Arc<Activity>,
}

impl Service<Request<Incoming>> for Counted {
    type Response = Response<Answer>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let in_flight = InFlight::begin(&self.activity);
        let (parts, body) = request.into_parts();
        let body = Metered::new(body, &parts, Arc::clone(&self.intake), Arc::clone(&self.activity));
        let answer = self.routes.call(Request::from_parts(parts, Body::new(body)));
        Box::pin(async move {
            let answer = answer.await?;
            Ok(answer.map(|body| Answer { body, _in_flight: in_flight }))
        })
    }
}

/// An answer's body; the request is over when it is gone.
struct Answer {
    body: Body,
    _in_flight: InFlight,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What a connection shares with its port.
#[derive(Clone)]
pub(crate) struct Port {
    pub(crate) routes: Router,
    pub(crate) options: Arc<ServerOptions>,
    pub(crate) builder: Arc<auto::Builder<TokioExecutor>>,
    pub(crate) intake: Arc<Intake>,
    pub(crate) full: watch::Receiver<bool>,
    pub(crate) stopped: watch::Receiver<bool>,
}

/// Serves a connection to its end.
pub(crate) async fn attend(mut port: Port, io: OwnErrors) {
    let activity = Activity::new();
    let service = Counted {
        routes: TowerToHyperService::new(port.routes),
        intake: port.intake,
        activity: Arc::clone(&activity),
    };
    let name = port.options.port;
    let mut connection = pin!(port.builder.serve_connection(TokioIo::new(io), service));
    let mut stopping = false;
    loop {
        let full = *port.full.borrow_and_update();
        let again = async {
            match activity.next(&port.options, full) {
                Next::Over => {}
                Next::At(at) => tokio::time::sleep_until(at).await,
                Next::Never => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = connection.as_mut() => return log_end(name, ended),
            // Whoever stops the port bounds the wait for its connections.
            true = turned(&mut port.stopped), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
            changed = port.full.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = again => {
                if activity.next(&port.options, full) == Next::Over {
                    break;
                }
            }
        }
    }
    connection.as_mut().graceful_shutdown();
    if let Ok(ended) = tokio::time::timeout(CLOSE_BOUND, connection.as_mut()).await {
        log_end(name, ended);
    }
}

/// Whether a flag has turned true; false if nobody can turn it any more.
async fn turned(flag: &mut watch::Receiver<bool>) -> bool {
    flag.wait_for(|on| *on).await.is_ok()
}

fn log_end(port: &'static str, ended: Result<(), Box<dyn std::error::Error + Send + Sync>>) {
    if let Err(error) = ended {
        tracing::debug!(port, %error, "connection ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intake::IntakeOptions;

    #[tokio::test(start_paused = true)]
    async fn silence_has_a_bound_before_the_first_request_after_it_and_while_the_port_is_full() {
        let second = Duration::from_secs(1);
        let mut options = ServerOptions::http("test", IntakeOptions::new(100));
        (options.first_request, options.idle) = (20 * second, Some(120 * second));
        let activity = Activity::new();
        let start = Instant::now();
        assert_eq!(activity.next(&options, false), Next::At(start + 20 * second));
        assert_eq!(activity.next(&options, true), Next::At(start + second));
        tokio::time::advance(second).await;
        assert_eq!(activity.next(&options, true), Next::Over);

        let request = InFlight::begin(&activity);
        tokio::time::advance(500 * second).await;
        assert_eq!(activity.next(&options, false), Next::At(Instant::now() + 120 * second));
        assert_eq!(activity.next(&options, true), Next::Over, "its request is not complete");
        activity.received();
        tokio::time::advance(10 * second).await;
        assert_eq!(activity.next(&options, true), Next::At(Instant::now() + second), "it is answered");
        drop(request);
        assert_eq!(activity.next(&options, false), Next::At(Instant::now() + 120 * second));
        options.idle = None;
        assert_eq!(activity.next(&options, false), Next::Never);
    }
}
