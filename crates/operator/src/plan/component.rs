//! The parts of a model that have pods.

use cadre_k8s_api::names::{self, Tier};

/// A part of a model: the value of the label `app.kubernetes.io/component`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Component {
    /// Router and coordinator.
    Router,
    /// A tier that scales.
    Tier(Tier),
}

impl Component {
    /// All, in the order in which they are told.
    pub(super) const ALL: [Self; 4] =
        [Self::Router, Self::Tier(Tier::Prefill), Self::Tier(Tier::Decode), Self::Tier(Tier::Experts)];

    /// The label's value.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Router => names::ROUTER_COMPONENT,
            Self::Tier(tier) => tier.suffix(),
        }
    }

    pub(super) fn of_label(label: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|component| component.label() == label)
    }

    /// Name of its workload and of its ServiceAccount.
    pub(super) fn object_name(self, model: &str) -> String {
        match self {
            Self::Router => names::router(model),
            Self::Tier(tier) => tier.object_name(model),
        }
    }
}
