//! What is wrong with one pod, from its status.

use std::time::Duration;

use cadre_k8s_api::Reason;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus};

use super::{scheduling, termination};
use crate::plan::{
    component::Component,
    facts::{Facts, GRACE},
    pods::OurPod,
};

/// A process that has run for so long has left its last end behind; one that ends again and again has not.
const PROVEN: Duration = Duration::from_secs(60);

type Fault = (Reason, String);

/// The pod's fault, if it has one.
pub(super) fn fault(facts: &Facts<'_>, pod: &OurPod<'_>) -> Option<Fault> {
    if pod.has_ended() {
        return ended(pod);
    }
    if pod.node().is_none() {
        return unscheduled(facts, pod);
    }
    let mount = || mount(facts, pod);
    match pod.container() {
        Some(container) => {
            container_fault(facts, container).or_else(|| waits(container).then(mount).flatten())
        }
        None => mount(),
    }
}

/// Evicted, or refused by its node.
fn ended(pod: &OurPod<'_>) -> Option<Fault> {
    let status = pod.pod.status.as_ref()?;
    let container = pod.container().and_then(|container| container.state.as_ref()?.terminated.as_ref());
    if let Some(fault) = container.and_then(termination::fault) {
        return Some(fault);
    }
    let reason = status.reason.as_deref().unwrap_or("Failed");
    let message = status.message.as_deref().unwrap_or("no message");
    (pod.phase() == Some("Failed")).then(|| (Reason::PodsCrashing, format!("{reason}: {message}")))
}

fn unscheduled(facts: &Facts<'_>, pod: &OurPod<'_>) -> Option<Fault> {
    let accelerator = match pod.component {
        Component::Router => None,
        Component::Tier(tier) => {
            facts.spec().accelerator(tier).map(|accelerator| accelerator.resource.as_str())
        }
    };
    match pod.condition("PodScheduled") {
        Some(scheduled) if scheduled.status == "False" => {
            let message = scheduled.message.as_deref().unwrap_or("the scheduler gives no reason");
            let reason = scheduling::reason(message, accelerator);
            let scarce = matches!(reason, Reason::InsufficientAccelerators | Reason::InsufficientResources);
            // What a pod that drains gives back may be what this one waits for.
            (!scarce || !facts.pods().iter().any(|other| drains(facts, other)))
                .then(|| (reason, message.to_owned()))
        }
        _ => {
            let old = pod.created().is_some_and(|created| facts.clock().passed(created, GRACE));
            old.then(|| (Reason::Unschedulable, "no scheduler has looked at it".to_owned()))
        }
    }
}

fn drains(facts: &Facts<'_>, pod: &OurPod<'_>) -> bool {
    pod.is_terminating() && !facts.is_on_silent_node(pod)
}

fn waits(container: &ContainerStatus) -> bool {
    container.state.as_ref().is_none_or(|state| state.running.is_none() && state.terminated.is_none())
}

fn mount(facts: &Facts<'_>, pod: &OurPod<'_>) -> Option<Fault> {
    let message = facts.observed().failed_mounts.get(pod.name())?;
    let reason = match message.contains("persistentvolumeclaim") && message.contains("not found") {
        true => Reason::ClaimNotFound,
        false => Reason::VolumeMountFailed,
    };
    Some((reason, message.clone()))
}

fn container_fault(facts: &Facts<'_>, container: &ContainerStatus) -> Option<Fault> {
    let state = container.state.as_ref()?;
    if let Some(terminated) = &state.terminated {
        return termination::fault(terminated);
    }
    if let Some(waiting) = &state.waiting {
        let message = waiting.message.clone().unwrap_or_else(|| "the kubelet gives no reason".to_owned());
        return match waiting.reason.as_deref() {
            Some(
                "ErrImagePull"
                | "ImagePullBackOff"
                | "InvalidImageName"
                | "ErrImageNeverPull"
                | "ImageInspectError"
                | "RegistryUnavailable"
                | "SignatureValidationFailed",
            ) => Some((Reason::ImagePullFailed, format!("image {}: {message}", container.image))),
            Some(
                "CreateContainerConfigError"
                | "CreateContainerError"
                | "RunContainerError"
                | "PreCreateHookError"
                | "PreStartHookError"
                | "PostStartHookError",
            ) => Some((Reason::InvalidConfiguration, message)),
            _ => last_end(container),
        };
    }
    let started = state.running.as_ref().and_then(|running| running.started_at.as_ref())?;
    let proven = container.ready || facts.clock().passed(started.0, PROVEN);
    if proven { None } else { last_end(container) }
}

fn last_end(container: &ContainerStatus) -> Option<Fault> {
    let last: &ContainerState = container.last_state.as_ref()?;
    termination::fault(last.terminated.as_ref()?)
}
