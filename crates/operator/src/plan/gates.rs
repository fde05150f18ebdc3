//! The readiness gate of workers and shards: what the coordinator says of a pod, as a condition of the pod.
//!
//! Written on change only. While the coordinator cannot be reached the last value stays for a while, and a router
//! that has just started takes nothing away: its members are on their way back. Pods that drain are left alone;
//! they are not ready for anybody any more.

use cadre_k8s_api::names::ROUTABLE_GATE;
use cadre_types::{CoordinatorStatus, MemberState, MemberStatus};

use super::{Action, component::Component, facts::Facts, pods::OurPod};

/// The gates that change.
pub(super) fn changes(facts: &Facts<'_>) -> Vec<Action> {
    let members = facts.pods().iter().filter(|pod| pod.component != Component::Router && pod.is_active());
    members.filter_map(|pod| change(facts, pod)).collect()
}

fn change(facts: &Facts<'_>, pod: &OurPod<'_>) -> Option<Action> {
    let (routable, reason, message) = verdict(facts, pod)?;
    if routable == pod.gate() {
        return None;
    }
    Some(Action::SetRoutable {
        pod: pod.name().to_owned(),
        uid: pod.uid().to_owned(),
        routable,
        reason: reason.to_owned(),
        message,
    })
}

/// What the gate is to say; `None` leaves it.
fn verdict(facts: &Facts<'_>, pod: &OurPod<'_>) -> Option<(bool, &'static str, String)> {
    let has_gate = pod
        .pod
        .spec
        .as_ref()?
        .readiness_gates
        .iter()
        .flatten()
        .any(|gate| gate.condition_type == ROUTABLE_GATE);
    if !has_gate {
        return None;
    }
    match facts.present() {
        Some(status) => {
            let shard_or_worker = of_member(facts, status, pod.member);
            if !pod.has_worker_beside() {
                return shard_or_worker;
            }
            // Two members: the pod is routable when both are, and the first that is not says why.
            let worker = of_member(facts, status, pod.beside);
            let beside = worker.map(|(routable, reason, message)| {
                (routable, reason, format!("the worker beside it: {message}"))
            });
            match shard_or_worker {
                Some((true, ..)) => match beside {
                    Some((true, ..)) => shard_or_worker,
                    other => other,
                },
                other => other,
            }
        }
        None if facts.word().is_some() || facts.is_new_here() => None,
        None => {
            let why = facts.unreachable().unwrap_or_default();
            Some((false, "CoordinatorUnreachable", format!("the coordinator does not answer: {why}")))
        }
    }
}

fn of_member(
    facts: &Facts<'_>,
    status: &CoordinatorStatus,
    member: Option<&MemberStatus>,
) -> Option<(bool, &'static str, String)> {
    let Some(member) = member else {
        let message = "not registered with the coordinator".to_owned();
        return (!facts.is_settling()).then_some((false, "NotRegistered", message));
    };
    if member.routable {
        return Some((true, "Admitted", "admitted by the router, and a real step ran through it".to_owned()));
    }
    let (reason, message) = match member.member.state {
        MemberState::Draining => ("Draining", "it finishes what it has"),
        MemberState::Starting => {
            ("Starting", "registered; weights, peers or a step that the router asks for are missing")
        }
        MemberState::Ready if status.generation.epoch.0 == 0 => ("NotPlaced", "no placement is in force"),
        MemberState::Ready => ("NotPlaced", "no placement in use has it"),
    };
    // A router that has just started has no placement before its members bring it back.
    (!facts.is_settling() || member.member.state == MemberState::Draining)
        .then(|| (false, reason, message.to_owned()))
}
