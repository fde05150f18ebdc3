//! How a connection ended, as one class that every client of a cadre process goes by: the router, the dispatcher, the
//! hand-off and the tests. It is told by the types of an error's causes (tonic, hyper, h2, the system), never by words.
//!
//! A status that the peer itself has sent ends no connection and has no causes; one that was made on our side, because
//! there was nobody to send one, has. What code tonic gives the latter says little: a GOAWAY without an error is
//! `Internal`, a connection closed before the call was written `Cancelled`, a refused one `Unavailable`.

use std::{error::Error, fmt, iter::successors};

use tonic::{ConnectError, Status};

/// How a connection ended, from the point of view of a call that was to use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConnectionEnd {
    /// None could be made: nobody listens, no route, no such name, no answer in time. The call was not sent.
    NotMade,
    /// The peer closed it in order (GOAWAY without an error, a refused stream), or had closed it before the call was
    /// written. The peer has not worked on the call.
    Closed,
    /// It broke under the call: reset, cut off, silent for too long, or a protocol error. The peer may have worked on
    /// the call.
    Broken,
}

impl ConnectionEnd {
    /// Of a call's status; `None` if the peer sent it.
    pub fn of_status(status: &Status) -> Option<Self> {
        status.source().map(Self::of_causes)
    }

    /// Of an error of the transport itself, from connecting.
    pub fn of_error(error: &tonic::transport::Error) -> Self {
        Self::of_causes(error)
    }

    fn of_causes(error: &(dyn Error + 'static)) -> Self {
        causes(error).find_map(Self::of_cause).unwrap_or(Self::Broken)
    }

    /// What one cause says by itself.
    fn of_cause(cause: &(dyn Error + 'static)) -> Option<Self> {
        if cause.is::<ConnectError>() {
            return Some(Self::NotMade);
        }
        if let Some(error) = cause.downcast_ref::<h2::Error>() {
            let orderly = (error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR))
                || error.reason() == Some(h2::Reason::REFUSED_STREAM);
            return Some(if orderly { Self::Closed } else { Self::Broken });
        }
        let error = cause.downcast_ref::<hyper::Error>()?;
        // Of the others the causes below say more, if there are any.
        (error.is_canceled() || error.is_closed()).then_some(Self::Closed)
    }

    /// Whether the peer has certainly not worked on the call.
    pub fn is_before_work(self) -> bool {
        matches!(self, Self::NotMade | Self::Closed)
    }
}

impl fmt::Display for ConnectionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotMade => "not connected",
            Self::Closed => "connection closed",
            Self::Broken => "connection broken",
        })
    }
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    // A plain `error.source()` in the closure would borrow from the closure's argument.
    successors(Some(error), |error| (**error).source())
}

/// An error in its own words and those of its causes: a transport error says "transport error" and hides the reason.
pub fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = match error.downcast_ref::<Status>() {
        Some(status) => status.message().to_owned(),
        None => error.to_string(),
    };
    for words in causes(error).skip(1).map(ToString::to_string) {
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
    }
    text
}
