//! Events of models: what a plan calls a transition, told once.
//!
//! kube's recorder turns repetitions within six minutes into a count of one event. An event that cannot be written is
//! logged and not tried again: what a user must act on is in the status too.

use cadre_k8s_api::MoEModel;
use kube::{
    Client, Resource,
    runtime::events::{Event, EventType, Recorder, Reporter},
};

use crate::plan::Transition;

/// Most bytes of a note; the API server refuses more.
const MAX_NOTE: usize = 1024;

/// The reporting controller of every event.
const CONTROLLER: &str = "cadre-operator";

/// Tells transitions as events.
#[derive(Clone)]
pub(crate) struct Events(Recorder);

impl Events {
    /// Reports as this process.
    pub(crate) fn new(client: Client, identity: &str) -> Self {
        Self(Recorder::new(
            client,
            Reporter { controller: CONTROLLER.into(), instance: Some(identity.to_owned()) },
        ))
    }

    /// One event per transition.
    pub(crate) async fn tell(&self, model: &MoEModel, transitions: &[Transition]) {
        let about = model.object_ref(&());
        for transition in transitions {
            let event = Event {
                type_: if transition.warning { EventType::Warning } else { EventType::Normal },
                reason: transition.reason.clone(),
                note: Some(cut(&transition.note).to_owned()),
                action: transition.action.clone(),
                secondary: None,
            };
            if let Err(error) = self.0.publish(&event, &about).await {
                tracing::warn!(model = about.name, reason = transition.reason, %error, "Event was not written");
            }
        }
    }
}

/// The beginning of a note that is too long, cut between characters.
fn cut(note: &str) -> &str {
    &note[..note.floor_char_boundary(MAX_NOTE)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_cut_between_characters() {
        assert_eq!(cut("short"), "short");
        let long = "ü".repeat(600) + "x";
        assert_eq!(cut(&long).len(), MAX_NOTE);
        assert_eq!(cut(&format!("x{long}")).len(), MAX_NOTE - 1);
    }
}
