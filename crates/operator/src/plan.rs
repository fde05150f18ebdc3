//! The plan: a pure function from what is observed to what is to be done.
//!
//! [`plan`] is called for one model at a time, on every change. It decides everything (children, order of
//! replacement, budget, conditions, what the coordinator is told); the executor only carries it out. A plan of
//! the steady state is empty: no write, no event.
//!
//! In order: [`facts`] reads the observation → [`wants`] says how many pods each tier is to have → [`pace`] how
//! many of them now → [`children`] renders → [`apply`] compares → [`replace`] picks pods that go → [`gates`],
//! [`view`], [`findings`], [`status`] and [`events`] tell. Each is a pure function of those before it.

mod apply;
mod children;
mod clock;
mod component;
mod events;
mod facts;
mod findings;
mod gates;
mod pace;
mod pods;
mod print;
mod replace;
mod status;
mod view;
mod wants;

use cadre_k8s_api::{MoEModel, MoEModelStatus, MoETierStatus, Tier};
use cadre_types::OperatorView;
use kube::core::DynamicObject;

pub use print::{PrintError, manifests, render};

pub use crate::kinds::ObjectKind;
use crate::observed::Observed;

/// What is to be done, in order.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Writes, in order; a failed one does not stop those that do not depend on it.
    pub actions: Vec<Action>,
    /// The model's status; written only if it differs from the observed one.
    pub status: Option<MoEModelStatus>,
    /// Tiers whose status differs.
    pub tier_status: Vec<(Tier, MoETierStatus)>,
    /// Transitions to tell as events, at most one each.
    pub events: Vec<Transition>,
    /// What the coordinator is told; `None` while the model is being deleted or the layout is unknown.
    pub operator_view: Option<OperatorView>,
    /// Look again after so long even if nothing changes.
    pub requeue: Option<std::time::Duration>,
}

/// One write.
#[derive(Clone, Debug)]
pub enum Action {
    /// Server-side apply of a child (forced, field manager `cadre-operator`). `resource_version` in its metadata
    /// makes it fail on a stale observation.
    Apply {
        /// The whole applied configuration.
        object: Box<DynamicObject>,
        /// Why, for people (`cadre operator plan`) and logs.
        why: String,
    },
    /// Deletion with preconditions.
    Delete {
        /// `apiVersion` and `kind` of what is deleted.
        kind: ObjectKind,
        /// Its name.
        name: String,
        /// It must still be this one...
        uid: String,
        /// ...and, where it is set, unchanged.
        resource_version: Option<String>,
        /// Without a grace period: the node does not answer, so nobody is there to drain or to confirm.
        force: bool,
        /// Why.
        why: String,
    },
    /// Sets the readiness gate of a pod (its `status.conditions` entry `cadre.dev/Routable`).
    SetRoutable {
        /// The pod's name.
        pod: String,
        /// It must still be this one.
        uid: String,
        /// The gate's status.
        routable: bool,
        /// CamelCase reason of the pod condition.
        reason: String,
        /// Words.
        message: String,
    },
}

/// A state change worth an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transition {
    /// `Warning` or `Normal`.
    pub warning: bool,
    /// A reason of the closed set, or the name of the condition that changed.
    pub reason: String,
    /// What was done or seen (`Scale`, `Update`, `Observe`…).
    pub action: String,
    /// Words, at most 1 KiB.
    pub note: String,
}

/// Plans one model.
pub fn plan(observed: &Observed) -> Plan {
    let facts = facts::Facts::new(observed);
    if facts.is_deleting() {
        return deleting(&facts);
    }
    let wants = wants::Wants::new(&facts);
    let pace = pace::Pace::new(&facts, &wants);
    let rendered = children::render(&facts, &wants, &pace);
    let applied = apply::compare(&facts, &rendered);
    let (victims, waits) = replace::victims(&facts, &rendered, &applied);
    let gates = gates::changes(&facts);
    let findings = findings::findings(&facts, &wants, &rendered, &applied);
    let judged = status::Judged {
        facts: &facts,
        wants: &wants,
        rendered: &rendered,
        findings: &findings,
        waits,
        leaving: &applied.leaving,
    };
    let status = judged.model();
    let tier_status = judged.tiers();
    let events = events::transitions(observed.model.status.as_ref(), &status);
    let operator_view = Some(view::view(&facts, wants.layout(), &victims));
    let mut actions = applied.actions;
    actions.extend(gates);
    actions.extend(victims.into_iter().map(replace::Victim::into_action));
    Plan {
        actions,
        status: (observed.model.status.as_ref() != Some(&status)).then_some(status),
        tier_status,
        events,
        operator_view,
        requeue: facts.clock().next(),
    }
}

/// What would be done for a new model, without a cluster.
pub fn preview(model: MoEModel, default_image: &str) -> Plan {
    plan(&Observed::nothing(model, default_image))
}

/// The children go with their owner (garbage collection), and the pods drain by themselves.
fn deleting(facts: &facts::Facts<'_>) -> Plan {
    let before = facts.model().status.as_ref();
    let status = status::deleting(facts);
    Plan {
        actions: Vec::new(),
        events: events::transitions(before, &status),
        status: (before != Some(&status)).then_some(status),
        tier_status: Vec::new(),
        operator_view: None,
        requeue: None,
    }
}

#[cfg(test)]
mod tests;
