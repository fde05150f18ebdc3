//! PodDisruptionBudgets: one pod of a tier at a time.
//!
//! Never none at a time: a tier of one pod, or experts with one copy each, would hold up the drain of a node for
//! ever, and the next upgrade of the cluster with it. A pod that is not ready protects nothing and may go always.
//! The router has none: it is one pod, so its budget could only forbid or say nothing.

use cadre_k8s_api::Tier;
use k8s_openapi::{
    api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::{
    super::{ObjectKind, component::Component, facts::Facts},
    Child, meta,
};

pub(super) fn budget(facts: &Facts<'_>, tier: Tier) -> Option<Child> {
    let component = Component::Tier(tier);
    let budget = PodDisruptionBudget {
        metadata: meta::metadata(facts, component.object_name(facts.name()), Some(component)),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(meta::selector(facts.name(), component)),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    };
    Child::new(ObjectKind::PodDisruptionBudget, None, &budget)
}
