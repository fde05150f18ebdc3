//! The dispatcher's mailbox: answers and wake-ups from links, taken by the one thread that owns it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

use crossbeam_channel::{Receiver, Sender, bounded};
use tokio::sync::Notify;

use crate::{
    frame::Answer,
    transport::{AnswerSink, MAX_LINK_FRAMES},
};

/// Most links whose frames can all be out at once without the mailbox filling: shards of a model.
const MAX_LINKS: usize = 64;

/// Answers in the mailbox never exceed frames out, and a link carries at most [`MAX_LINK_FRAMES`]. The
/// owner empties it on every dispatch and combine, so with more links than [`MAX_LINKS`] it would take
/// dozens of abandoned steps to fill it; then answers are dropped and their frames time out, which is
/// what happened to them anyway. One more place for the pending wake-up.
const CAPACITY: usize = MAX_LINKS * MAX_LINK_FRAMES + 1;

/// What arrives.
#[derive(Debug)]
pub(super) enum Event {
    /// The answer to a frame, and when it arrived.
    Answer { sequence: u64, answer: Answer, at: Instant },
    /// A link or the view changed, or the dispatcher was closed.
    Wake,
}

/// The sending side.
#[derive(Debug)]
pub(super) struct Mailbox {
    events: Sender<Event>,
    waiting: AtomicUsize,
    wake_pending: AtomicBool,
    /// Notified after every event, for an owner that waits by running I/O.
    arrived: Notify,
}

impl Mailbox {
    pub(super) fn new() -> (Arc<Self>, Receiver<Event>) {
        let (events, receiver) = bounded(CAPACITY);
        let mailbox = Self {
            events,
            waiting: AtomicUsize::new(0),
            wake_pending: AtomicBool::new(false),
            arrived: Notify::new(),
        };
        (Arc::new(mailbox), receiver)
    }

    /// Wakes the owner; several wake-ups before it looks are one.
    pub(super) fn wake(&self) {
        if !self.wake_pending.swap(true, Ordering::AcqRel) {
            // Never full: answers leave one place free.
            let _ = self.events.try_send(Event::Wake);
            self.arrived.notify_one();
        }
    }

    /// Notified when something may have arrived.
    pub(super) fn arrived(&self) -> &Notify {
        &self.arrived
    }

    /// The owner took the wake-up; called before it looks at what changed.
    pub(super) fn awake(&self) {
        self.wake_pending.store(false, Ordering::Release);
    }

    /// The owner took an answer.
    pub(super) fn received(&self) {
        self.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl AnswerSink for Mailbox {
    fn deliver(&self, sequence: u64, answer: Answer) {
        if self.waiting.fetch_add(1, Ordering::AcqRel) < CAPACITY - 1 {
            let _ = self.events.try_send(Event::Answer { sequence, answer, at: Instant::now() });
            self.arrived.notify_one();
        } else {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(sequence, "answer dropped: the dispatcher's mailbox is full");
        }
    }

    fn is_cancelled(&self) -> bool {
        false
    }
}
