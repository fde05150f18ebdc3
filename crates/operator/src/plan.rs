//! The plan: a pure function from what is observed to what is to be done.
//!
//! [`plan`] is called for one model at a time, on every change. It decides everything (children, order of
//! replacement, budget, conditions, what the coordinator is told); the executor only carries it out. A plan of
//! the steady state is empty: no write, no event.

use cadre_k8s_api::{MoEModelStatus, MoETierStatus, Tier};
use cadre_types::OperatorView;
use kube::core::DynamicObject;

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

/// A kind of child.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// `cadre.dev/v1alpha1 MoETier`
    Tier,
    /// `apps/v1 Deployment`
    Deployment,
    /// `apps/v1 StatefulSet`
    StatefulSet,
    /// `v1 Service`
    Service,
    /// `v1 ConfigMap`
    ConfigMap,
    /// `v1 ServiceAccount`
    ServiceAccount,
    /// `policy/v1 PodDisruptionBudget`
    PodDisruptionBudget,
    /// `v1 Pod`
    Pod,
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
