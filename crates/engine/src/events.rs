//! Events on their way from the loop to whoever reads them, and how many bytes of them wait in all.
//!
//! A sequence's channel holds every event that it can have, so a reader that is slow delays nobody; but a sequence that
//! has ended gives its pages back while its events still wait, so the number of sequences bounds nothing. What bounds
//! it is admission: while [`Backlog`] is over its bound, nothing new is taken.

use std::{
    mem::size_of,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use cadre_types::TokenId;
use tokio::sync::mpsc;

use crate::request::EngineEvent;

/// Bytes of events that nobody has read yet, of all sequences of an engine.
#[derive(Debug, Default)]
pub(crate) struct Backlog(AtomicU64);

impl Backlog {
    pub(crate) fn bytes(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// An event was read.
    pub(crate) fn read(&self, event: &EngineEvent) {
        self.0.fetch_sub(bytes_of(event), Ordering::AcqRel);
    }
}

/// What an event takes while it waits.
fn bytes_of(event: &EngineEvent) -> u64 {
    let top = match event {
        EngineEvent::Token(token) => token.top.len() * size_of::<(TokenId, f32)>(),
        _ => 0,
    };
    (size_of::<EngineEvent>() + top) as u64
}

/// The loop's end of a sequence's events.
#[derive(Clone, Debug)]
pub(crate) struct EventSink {
    events: mpsc::Sender<EngineEvent>,
    backlog: Arc<Backlog>,
}

impl EventSink {
    pub(crate) fn new(events: mpsc::Sender<EngineEvent>, backlog: Arc<Backlog>) -> Self {
        Self { events, backlog }
    }

    /// Sends; an event that nobody can read any more is dropped.
    pub(crate) fn send(&self, event: EngineEvent) {
        // Counted first: the reader may be quicker than we are.
        let bytes = bytes_of(&event);
        self.backlog.0.fetch_add(bytes, Ordering::AcqRel);
        if self.events.try_send(event).is_err() {
            self.backlog.0.fetch_sub(bytes, Ordering::AcqRel);
        }
    }

    /// Whether the reader has gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }
}
