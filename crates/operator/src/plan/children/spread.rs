//! Spreading pods over nodes and failure domains.
//!
//! Always as a wish, never as a demand: a shard that runs on the wrong node serves, one that waits for the right
//! one does not. What could not be kept apart is told by ExpertsCovered (ExpertAtRisk, FailureDomainUnknown).

use k8s_openapi::api::core::v1::TopologySpreadConstraint;

use super::{
    super::{component::Component, facts::Facts},
    meta,
};

const HOST: &str = "kubernetes.io/hostname";

/// Over the domains of a label, and over nodes within them.
pub(super) fn by(facts: &Facts<'_>, component: Component, label: &str) -> Vec<TopologySpreadConstraint> {
    let mut keys = vec![label];
    if label != HOST {
        keys.push(HOST);
    }
    keys.into_iter().map(|key| constraint(facts, component, key)).collect()
}

/// Over nodes.
pub(super) fn by_host(facts: &Facts<'_>, component: Component) -> Vec<TopologySpreadConstraint> {
    by(facts, component, HOST)
}

fn constraint(facts: &Facts<'_>, component: Component, key: &str) -> TopologySpreadConstraint {
    TopologySpreadConstraint {
        max_skew: 1,
        topology_key: key.to_owned(),
        when_unsatisfiable: "ScheduleAnyway".to_owned(),
        label_selector: Some(meta::selector(facts.name(), component)),
        // A node that takes no pods is no domain that lacks some.
        node_taints_policy: Some("Honor".to_owned()),
        ..TopologySpreadConstraint::default()
    }
}
