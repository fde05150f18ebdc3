//! What is wrong, as far as it can be seen: every fault with its reason, the most telling one first.
//!
//! A fault is told as soon as the API shows it. What is on its way out (pods that drain, pods of an old template)
//! has no faults any more: a wrong template that has been corrected is no longer news.

use std::collections::BTreeSet;

use cadre_k8s_api::{Reason, Tier};
use cadre_types::MemberStatus;
use k8s_openapi::api::apps::v1::Deployment;

use super::{
    apply::Applied,
    children::Rendered,
    component::Component,
    facts::{Facts, GRACE},
    pods::OurPod,
    wants::Wants,
};
use crate::observed::ClaimState;

mod pod;
mod scheduling;
mod termination;

/// A fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) reason: Reason,
    /// Whose pods it concerns; `None` is everybody's.
    pub(super) component: Option<Component>,
    /// What it is about: a pod, an object.
    pub(super) subject: String,
    pub(super) message: String,
}

/// Reasons of findings, the one to look at first before the others: what keeps children from existing, then pods
/// from existing, from starting, from running, from being placed.
const ORDER: &[Reason] = &[
    Reason::NameTaken,
    Reason::InvalidConfiguration,
    Reason::NotAllowed,
    Reason::ChildRefused,
    Reason::ClaimNotFound,
    Reason::ClaimNotBound,
    Reason::PodsForbidden,
    Reason::ImagePullFailed,
    Reason::VolumeMountFailed,
    Reason::CheckpointUnreadable,
    Reason::CheckpointInvalid,
    Reason::CheckpointMismatch,
    Reason::AcceleratorUnsupportedByImage,
    Reason::AcceleratorDriverMissing,
    Reason::AcceleratorNotFound,
    Reason::AcceleratorUnsupported,
    Reason::AcceleratorOutOfMemory,
    Reason::OutOfMemory,
    Reason::PodsCrashing,
    Reason::NodeSelectorUnmatched,
    Reason::InsufficientAccelerators,
    Reason::InsufficientResources,
    Reason::Unschedulable,
    Reason::CoordinatorUnreachable,
    Reason::UnknownMember,
    Reason::FailureDomainUnknown,
];

impl Finding {
    fn rank(&self) -> usize {
        ORDER.iter().position(|reason| *reason == self.reason).unwrap_or(ORDER.len())
    }

    /// It keeps pods from serving.
    pub(super) fn blocks(&self) -> bool {
        !matches!(self.reason, Reason::FailureDomainUnknown | Reason::UnknownMember)
    }
}

/// All of them in words: the first, how many more are like it, and what else there is.
pub(super) fn summary(findings: &[&Finding]) -> String {
    let Some(first) = findings.first() else { return String::new() };
    let mut words = format!("{}: {}", first.subject, first.message);
    let alike = findings.iter().skip(1).filter(|other| other.reason == first.reason).count();
    if alike > 0 {
        words.push_str(&format!(" (and {alike} more)"));
    }
    let mut told = BTreeSet::from([first.reason]);
    for other in findings {
        if told.insert(other.reason) {
            words.push_str(&format!("; also {}: {}", other.reason.name(), other.subject));
        }
    }
    words
}

/// Everything that is wrong.
pub(super) fn findings(
    facts: &Facts<'_>,
    wants: &Wants,
    rendered: &Rendered,
    applied: &Applied,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    children(facts, rendered, applied, &mut findings);
    findings.extend(claim(facts));
    findings.extend(Component::ALL.into_iter().filter_map(|component| refused(facts, rendered, component)));
    for component in Component::ALL {
        let wanted = wanted(wants, component);
        let short = facts.active(component).filter(|pod| is_up(pod)).count() < wanted;
        for pod in facts.pods_of(component).filter(|pod| !rendered.is_outdated(pod) && !pod.is_terminating())
        {
            if pod.has_ended() && !short {
                continue;
            }
            let found = pod::fault(facts, pod);
            let subject = format!("pod {}", pod.name());
            findings.extend(found.map(|(reason, message)| Finding {
                reason,
                component: Some(component),
                subject,
                message,
            }));
        }
    }
    findings.extend(coordinator(facts));
    findings.extend(unknown(facts));
    findings.extend(domains(facts));
    // Stable: pods are sorted already.
    findings.sort_by(|a, b| (a.rank(), a.component, &a.subject).cmp(&(b.rank(), b.component, &b.subject)));
    findings
}

fn wanted(wants: &Wants, component: Component) -> usize {
    match component {
        Component::Router => 1,
        Component::Tier(tier) => usize::try_from(wants.desired(tier)).unwrap_or(0),
    }
}

/// Up as far as the kubelet knows.
fn is_up(pod: &OurPod<'_>) -> bool {
    pod.is_ready() || pod.serves()
}

fn children(facts: &Facts<'_>, rendered: &Rendered, applied: &Applied, findings: &mut Vec<Finding>) {
    for (kind, name, who) in &applied.taken {
        findings.push(Finding {
            reason: Reason::NameTaken,
            component: None,
            subject: format!("{} {name}", kind.name()),
            message: format!("the model needs this name, and the object belongs to {who}"),
        });
    }
    for (component, reason, message) in &rendered.faults {
        let (component, subject) = (Some(*component), component.label().to_owned());
        findings.push(Finding { reason: *reason, component, subject, message: message.clone() });
    }
    for (child, message) in &facts.observed().refused_children {
        let (subject, message) = (child.clone(), message.clone());
        findings.push(Finding { reason: Reason::ChildRefused, component: None, subject, message });
    }
}

fn claim(facts: &Facts<'_>) -> Option<Finding> {
    let name = &facts.spec().model.source.persistent_volume_claim.as_ref()?.claim_name;
    let namespace = facts.model().metadata.namespace.as_deref().unwrap_or_default();
    let found = |reason, message| {
        Some(Finding { reason, component: None, subject: format!("claim {name}"), message })
    };
    match &facts.observed().claim {
        ClaimState::NotNamed => None,
        ClaimState::Missing => {
            found(Reason::ClaimNotFound, format!("it does not exist in namespace {namespace}"))
        }
        ClaimState::Found(claim) => match claim.status.as_ref().and_then(|status| status.phase.as_deref()) {
            Some("Bound") => None,
            Some("Lost") => found(Reason::ClaimNotBound, "its volume does not exist any more".to_owned()),
            // A claim may wait for its first pod: only one that keeps pods waiting is a fault.
            phase => facts.pods().iter().any(|pod| waits_for_node(facts, pod)).then(|| {
                let phase = phase.unwrap_or("without a phase");
                found(Reason::ClaimNotBound, format!("it is {phase} and pods wait for its volume"))
            })?,
        },
    }
}

fn waits_for_node(facts: &Facts<'_>, pod: &OurPod<'_>) -> bool {
    pod.is_active()
        && pod.node().is_none()
        && pod.created().is_some_and(|created| facts.clock().passed(created, GRACE))
}

/// A workload that may not make its pods.
fn refused(facts: &Facts<'_>, rendered: &Rendered, component: Component) -> Option<Finding> {
    let workload = component.object_name(facts.name());
    let deployment = facts.deployment(component);
    let replicas = match component {
        Component::Tier(Tier::Experts) => facts.stateful_set()?.spec.as_ref()?.replicas?,
        _ => deployment?.spec.as_ref()?.replicas?,
    };
    // What was refused earlier and has been made since is no news; pods of an old template are none of those.
    let made = facts.active(component).filter(|pod| !rendered.is_outdated(pod)).count();
    if made >= usize::try_from(replicas).unwrap_or(0) {
        return None;
    }
    let heard = facts.observed().refused_pods.get(&workload).cloned();
    let message = heard.or_else(|| deployment.and_then(replica_failure))?;
    let kind = if component == Component::Tier(Tier::Experts) { "StatefulSet" } else { "Deployment" };
    let subject = format!("{kind} {workload}");
    Some(Finding { reason: Reason::PodsForbidden, component: Some(component), subject, message })
}

fn replica_failure(deployment: &Deployment) -> Option<String> {
    let conditions = deployment.status.as_ref()?.conditions.as_ref()?;
    let failure =
        conditions.iter().find(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True");
    failure?.message.clone()
}

/// A router that runs and does not answer.
fn coordinator(facts: &Facts<'_>) -> Option<Finding> {
    let why = facts.unreachable()?;
    if facts.word().is_some() || facts.is_new_here() {
        return None;
    }
    let router = facts.router_in_charge()?;
    if !facts.clock().passed(router.running_since()?, GRACE) {
        return None;
    }
    Some(Finding {
        reason: Reason::CoordinatorUnreachable,
        component: Some(Component::Router),
        subject: format!("pod {}", router.name()),
        message: format!("it runs, and its coordinator does not answer the operator: {why}"),
    })
}

/// Members that the router routes to and that are none of the model's pods.
fn unknown(facts: &Facts<'_>) -> Vec<Finding> {
    let members = facts.present().map(|status| status.members.as_slice()).unwrap_or_default();
    let finding = |member: &MemberStatus| {
        let why = member.stranger.as_ref().filter(|_| member.routable)?;
        Some(Finding {
            reason: Reason::UnknownMember,
            component: None,
            subject: format!("member {} at {}", member.member.id.0, member.member.address),
            message: format!("the router routes to it, and {why}"),
        })
    };
    members.iter().filter_map(finding).collect()
}

/// Shards on nodes whose failure domain nobody knows.
fn domains(facts: &Facts<'_>) -> Vec<Finding> {
    let component = Component::Tier(Tier::Experts);
    let key = &facts.spec().experts.spread_by;
    let unknown = facts.active(component).filter_map(|pod| {
        let node = pod.node()?;
        let seen = facts.observed().nodes.get(node)?;
        (!seen.labels.contains_key(key)).then_some(node)
    });
    let nodes: BTreeSet<&str> = unknown.collect();
    let finding = |node: &str| Finding {
        reason: Reason::FailureDomainUnknown,
        component: Some(component),
        subject: format!("node {node}"),
        message: format!("it runs shards and has no label {key}, so copies cannot be kept apart there"),
    };
    nodes.into_iter().map(finding).collect()
}
