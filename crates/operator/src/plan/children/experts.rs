//! The expert shards: a StatefulSet that never updates itself (ADR 10). A shard's index is its pod's ordinal.
//!
//! With a worker beside each shard (`spec.experts.worker`, ADR 16) the process is that worker, which holds the shard as well:
//! one process has one context on the card. It is two members of one pod: admitted, told and withdrawn together.

use cadre_k8s_api::{Tier, names::port};
use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec, StatefulSetUpdateStrategy};

use super::{
    super::{
        ObjectKind,
        component::Component,
        pods::{POD_INDEX, WORKER_PORT},
    },
    Blueprint, Child, meta,
    pod::{self, Process},
    spread,
};

/// What a shard takes to finish its frames after the worker beside it has drained.
const SHARD_DRAIN_SECONDS: i32 = 5;

/// `kv_bytes` is the cache of the worker beside each shard, if there is one.
pub(super) fn stateful_set(blueprint: &Blueprint<'_>, kv_bytes: Option<u64>) -> Option<(Child, String)> {
    let (facts, spec) = (blueprint.facts, blueprint.facts.spec());
    let component = Component::Tier(Tier::Experts);
    let name = component.object_name(facts.name());
    let accelerator = spec.experts.accelerator.as_ref();
    let index = |variable| pod::field(variable, &format!("metadata.labels['{POD_INDEX}']"));
    let (args, index, ports) = match (&spec.experts.worker, kv_bytes) {
        (Some(worker), Some(kv_bytes)) => {
            let mut args = vec!["worker".to_owned()];
            args.extend(["--role".to_owned(), blueprint.pace.decode_role.flag().to_owned()]);
            args.extend(blueprint.common_args());
            args.extend(blueprint.member_args(port::WORKER, accelerator));
            args.extend(["--kv-bytes".to_owned(), kv_bytes.to_string()]);
            args.extend(["--expert-listen".to_owned(), pod::everywhere(port::EXPERT)]);
            args.extend(["--expert-drain-timeout".to_owned(), SHARD_DRAIN_SECONDS.to_string()]);
            args.extend(worker.limits.flags());
            (args, index("CADRE_WITH_EXPERT"), vec![(WORKER_PORT, port::WORKER), ("expert", port::EXPERT)])
        }
        _ => {
            let mut args = vec!["expert".to_owned()];
            args.extend(blueprint.common_args());
            args.extend(blueprint.member_args(port::EXPERT, accelerator));
            args.extend(spec.experts.limits.flags());
            (args, index("CADRE_SHARD"), vec![("expert", port::EXPERT)])
        }
    };
    let mut env = vec![index];
    env.extend(pod::member_env());
    let drain = if spec.experts.worker.is_some() { SHARD_DRAIN_SECONDS } else { 0 };
    let process = Process {
        component,
        args,
        ports,
        more_drain_seconds: drain,
        env,
        pod: &spec.experts.pod,
        accelerator,
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
