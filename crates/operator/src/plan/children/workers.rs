//! Prefill and decode workers: a Deployment each.
//!
//! A new pod counts only once it is routable (readiness gate), so a rolling update takes no worker away before
//! another one has proven itself. Without accelerators it adds a pod first and drops no capacity. With them it
//! takes one away first: a pod more would wait for an accelerator that nobody has to spare, and the update with it.
//! But not for an image that no pod of the model has run yet: until the router's successor has shown that it exists and
//! starts, nothing that serves is taken away for it.
//!
//! Which pods go when the tier shrinks is the Deployment's choice. It asks them to stop, and a worker that is
//! asked to stop says so to the coordinator before anything else, gets nothing new, and finishes what it has: the
//! plan has nothing to withdraw before.

use cadre_k8s_api::{Tier, names::port};
use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec};

use super::{
    super::{
        ObjectKind,
        component::Component,
        facts::Facts,
        pace::DecodeRole,
        pods::{OurPod, WORKER_PORT},
    },
    Blueprint, Child, meta,
    pod::{self, Process},
    spread,
};

pub(super) fn deployment(blueprint: &Blueprint<'_>, tier: Tier, kv_bytes: u64) -> Option<(Child, String)> {
    let (facts, spec) = (blueprint.facts, blueprint.facts.spec());
    let component = Component::Tier(tier);
    let role = match (tier, blueprint.pace.decode_role) {
        (Tier::Decode, role) => role.flag(),
        _ => "prefill",
    };
    debug_assert!(tier != Tier::Prefill || role != DecodeRole::Both.flag());
    let mut args: Vec<String> = ["worker", "--role", role].map(str::to_owned).to_vec();
    args.extend(blueprint.common_args());
    args.extend(blueprint.member_args(port::WORKER, spec.accelerator(tier)));
    args.extend(["--kv-bytes".to_owned(), kv_bytes.to_string()]);
    args.extend(spec.worker(tier).into_iter().flat_map(|worker| worker.limits.flags()));
    let accelerator = spec.accelerator(tier);
    let process = Process {
        component,
        args,
        ports: vec![(WORKER_PORT, port::WORKER)],
        env: pod::member_env(),
        more_drain_seconds: 0,
        pod: spec.pod(tier),
        accelerator,
        is_member: true,
        spread: spread::by_host(facts, component),
        volumes: Vec::new(),
    };
    let (template, hash) = pod::template(blueprint, process);
    let replicas = blueprint.pace.replicas(tier);
    let takes_first = accelerator.is_some() && !is_at_risk(facts, component, blueprint.image);
    let deployment = Deployment {
        metadata: meta::metadata(facts, component.object_name(facts.name()), Some(component)),
        spec: Some(DeploymentSpec {
            replicas: Some(replicas),
            strategy: Some(if takes_first { pod::rolling(0, 1) } else { pod::rolling(1, 0) }),
            selector: meta::selector(facts.name(), component),
            template,
            revision_history_limit: Some(pod::REVISIONS),
            progress_deadline_seconds: Some(pod::PROGRESS_DEADLINE_SECONDS),
            ..DeploymentSpec::default()
        }),
        ..Deployment::default()
    };
    Some((Child::new(ObjectKind::Deployment, Some(replicas), &deployment)?, hash))
}

/// Pods of another image serve, and nobody has seen this one run.
fn is_at_risk(facts: &Facts<'_>, component: Component, image: &str) -> bool {
    let serves = |pod: &OurPod<'_>| pod.image() != Some(image) && (pod.serves() || pod.is_routable());
    facts.active(component).any(serves) && !facts.is_proven(image)
}
