//! Pods of a model, each read once: whose it is, how far it is, what the coordinator says of it.

use std::collections::BTreeMap;

use cadre_k8s_api::{
    Tier,
    names::{ROUTABLE_GATE, label},
};
use cadre_types::{CoordinatorStatus, MemberStatus, PodRef};
use k8s_openapi::{
    api::core::v1::{ContainerState, ContainerStatus, Pod, PodCondition},
    jiff::Timestamp,
};

use super::component::Component;

/// Label of a StatefulSet's pods with their ordinal.
pub(super) const POD_INDEX: &str = "apps.kubernetes.io/pod-index";

/// A pod made by one of our workloads.
#[derive(Clone, Copy, Debug)]
pub(super) struct OurPod<'a> {
    pub(super) pod: &'a Pod,
    pub(super) component: Component,
    /// The coordinator's word, if it has one.
    pub(super) member: Option<&'a MemberStatus>,
}

impl<'a> OurPod<'a> {
    pub(super) fn name(&self) -> &'a str {
        self.pod.metadata.name.as_deref().unwrap_or_default()
    }

    pub(super) fn uid(&self) -> &'a str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    pub(super) fn reference(&self) -> PodRef {
        PodRef { name: self.name().to_owned(), uid: self.uid().to_owned() }
    }

    pub(super) fn label(&self, key: &str) -> Option<&'a str> {
        self.pod.metadata.labels.as_ref()?.get(key).map(String::as_str)
    }

    /// Deletion is asked for: it drains.
    pub(super) fn is_terminating(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }

    /// It has ended for good (evicted, refused by its node); its workload replaces it.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.phase(), Some("Failed" | "Succeeded"))
    }

    /// It counts.
    pub(super) fn is_active(&self) -> bool {
        !self.is_terminating() && !self.has_ended()
    }

    pub(super) fn phase(&self) -> Option<&'a str> {
        self.pod.status.as_ref()?.phase.as_deref()
    }

    pub(super) fn created(&self) -> Option<Timestamp> {
        self.pod.metadata.creation_timestamp.as_ref().map(|time| time.0)
    }

    pub(super) fn node(&self) -> Option<&'a str> {
        self.pod.spec.as_ref()?.node_name.as_deref()
    }

    /// Its addresses, as the kubelet says them; none before it has any.
    pub(super) fn ips(&self) -> Vec<String> {
        let Some(status) = self.pod.status.as_ref() else { return Vec::new() };
        let all = status.pod_ips.iter().flatten().map(|one| one.ip.clone());
        let all: Vec<String> = all.filter(|ip| !ip.is_empty()).collect();
        // An API server fills in the list for the one; a kubelet of before dual stack says only the one.
        if all.is_empty() {
            status.pod_ip.clone().into_iter().filter(|ip| !ip.is_empty()).collect()
        } else {
            all
        }
    }

    pub(super) fn condition(&self, type_: &str) -> Option<&'a PodCondition> {
        self.pod.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == type_)
    }

    /// Ready for the kubelet, gate included.
    pub(super) fn is_ready(&self) -> bool {
        self.condition("Ready").is_some_and(|condition| condition.status == "True")
    }

    /// What the gate says now; absent is false.
    pub(super) fn gate(&self) -> bool {
        self.condition(ROUTABLE_GATE).is_some_and(|condition| condition.status == "True")
    }

    /// The coordinator routes to it.
    pub(super) fn is_routable(&self) -> bool {
        self.member.is_some_and(|member| member.routable)
    }

    /// The only container; sidecars that somebody injects come after it or have other names.
    pub(super) fn container(&self) -> Option<&'a ContainerStatus> {
        let statuses = self.pod.status.as_ref()?.container_statuses.as_ref()?;
        statuses.iter().find(|status| status.name == CONTAINER)
    }

    /// The image that it is to run.
    pub(super) fn image(&self) -> Option<&'a str> {
        let containers = &self.pod.spec.as_ref()?.containers;
        containers.iter().find(|container| container.name == CONTAINER)?.image.as_deref()
    }

    /// The process itself says that it serves (`/readyz`).
    pub(super) fn serves(&self) -> bool {
        self.container().is_some_and(|container| container.ready)
    }

    /// The process answers on its admin port (`/healthz`): its servers are up.
    pub(super) fn has_started(&self) -> bool {
        self.container()
            .is_some_and(|container| container.started == Some(true) && self.running_since().is_some())
    }

    /// Since when its process runs.
    pub(super) fn running_since(&self) -> Option<Timestamp> {
        let running = self.state()?.running.as_ref()?;
        running.started_at.as_ref().map(|time| time.0)
    }

    pub(super) fn state(&self) -> Option<&'a ContainerState> {
        self.container()?.state.as_ref()
    }

    /// Shard index: the ordinal of its StatefulSet.
    pub(super) fn shard(&self) -> Option<u16> {
        if self.component != Component::Tier(Tier::Experts) {
            return None;
        }
        let ordinal =
            self.label(POD_INDEX).or_else(|| self.name().rsplit_once('-').map(|(_, ordinal)| ordinal));
        ordinal?.parse().ok()
    }
}

/// Name of the container in every pod.
pub(super) const CONTAINER: &str = "cadre";

/// The pods of our workloads, sorted by name. A pod that only has our labels is nobody's business: it is neither
/// counted nor touched.
pub(super) fn ours<'a>(
    model: &str,
    pods: &'a [Pod],
    status: Option<&'a CoordinatorStatus>,
) -> Vec<OurPod<'a>> {
    let members = members(status);
    let mut ours: Vec<OurPod<'a>> = pods
        .iter()
        .filter_map(|pod| {
            let labels = pod.metadata.labels.as_ref()?;
            let component = Component::of_label(labels.get(label::COMPONENT)?)?;
            (labels.get(label::MODEL).map(String::as_str) == Some(model)).then_some(())?;
            is_made_by(pod, &component.object_name(model), component).then_some(())?;
            let uid = pod.metadata.uid.as_deref()?;
            let member = members.get(uid).copied();
            Some(OurPod { pod, component, member })
        })
        .collect();
    ours.sort_by_key(|pod| (pod.name(), pod.uid()));
    ours
}

/// A Deployment's pods belong to a ReplicaSet of its name and a hash.
fn is_made_by(pod: &Pod, workload: &str, component: Component) -> bool {
    let owners = pod.metadata.owner_references.iter().flatten();
    let mut controllers = owners.filter(|owner| owner.controller == Some(true));
    controllers.any(|owner| match component {
        Component::Tier(Tier::Experts) => owner.kind == "StatefulSet" && owner.name == workload,
        _ => {
            let hash = owner.name.strip_prefix(workload).and_then(|rest| rest.strip_prefix('-'));
            owner.kind == "ReplicaSet" && hash.is_some_and(|hash| !hash.is_empty() && !hash.contains('-'))
        }
    })
}

/// By uid of the pod. Of two lives of one pod (the old one's lease runs) the routable one is it.
fn members(status: Option<&CoordinatorStatus>) -> BTreeMap<&str, &MemberStatus> {
    let mut members: BTreeMap<&str, &MemberStatus> = BTreeMap::new();
    for member in status.iter().flat_map(|status| &status.members) {
        let Some(pod) = &member.member.pod else { continue };
        let known = members.entry(&pod.uid).or_insert(member);
        if (member.routable, &member.member.id) > (known.routable, &known.member.id) {
            *known = member;
        }
    }
    members
}
