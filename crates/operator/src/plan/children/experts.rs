//! The expert shards: a StatefulSet that never updates itself (ADR 10). A shard's index is its pod's ordinal.

use cadre_k8s_api::{Tier, names::port};
use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec, StatefulSetUpdateStrategy};

use super::{
    super::{ObjectKind, component::Component, pods::POD_INDEX},
    Blueprint, Child, meta,
    pod::{self, Process},
    spread,
};

pub(super) fn stateful_set(blueprint: &Blueprint<'_>) -> Option<(Child, String)> {
    let (facts, spec) = (blueprint.facts, blueprint.facts.spec());
    let component = Component::Tier(Tier::Experts);
    let name = component.object_name(facts.name());
    let mut args = vec!["expert".to_owned()];
    args.extend(blueprint.common_args());
    args.extend(blueprint.member_args(port::EXPERT));
    args.extend(spec.experts.limits.flags());
    let mut env = vec![pod::field("CADRE_SHARD", &format!("metadata.labels['{POD_INDEX}']"))];
    env.extend(pod::member_env());
    let process = Process {
        component,
        args,
        ports: vec![("expert", port::EXPERT)],
        env,
        pod: &spec.experts.pod,
        accelerator: spec.experts.accelerator.as_ref(),
        is_member: true,
        spread: spread::by(facts, component, &spec.experts.spread_by),
        volumes: Vec::new(),
    };
    let (template, hash) = pod::template(blueprint, process);
    let replicas = blueprint.pace.experts;
    let set = StatefulSet {
        metadata: meta::metadata(facts, name.clone(), Some(component)),
        spec: Some(StatefulSetSpec {
            replicas: Some(replicas),
            service_name: Some(name),
            pod_management_policy: Some("Parallel".to_owned()),
            update_strategy: Some(StatefulSetUpdateStrategy {
                type_: Some("OnDelete".to_owned()),
                rolling_update: None,
            }),
            selector: meta::selector(facts.name(), component),
            template,
            revision_history_limit: Some(pod::REVISIONS),
            ..StatefulSetSpec::default()
        }),
        ..StatefulSet::default()
    };
    Some((Child::new(ObjectKind::StatefulSet, Some(replicas), &set)?, hash))
}
