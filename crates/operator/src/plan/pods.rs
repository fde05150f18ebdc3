//! Pods of a model, each read once: whose it is, how far it is, what the coordinator says of it.

use std::collections::BTreeMap;

use cadre_k8s_api::{
    Tier,
    names::{ROUTABLE_GATE, label},
};
use cadre_types::{CoordinatorStatus, MemberStatus, PodRef, Role};
use k8s_openapi::{
    api::core::v1::{Container, ContainerPort, ContainerState, ContainerStatus, Pod, PodCondition},
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
    /// The coordinator's word on what the pod is there for (a shard's, in a pod of the shards), if it has one.
    pub(super) member: Option<&'a MemberStatus>,
    /// The same on the worker beside a shard.
    pub(super) beside: Option<&'a MemberStatus>,
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

    /// A shard with a worker beside it, by what it was made from.
    pub(super) fn has_worker_beside(&self) -> bool {
        self.component == Component::Tier(Tier::Experts)
            && self.spec().is_some_and(|own| own.ports.iter().flatten().any(is_workers))
    }

    /// The coordinator routes to the worker beside its shard.
    pub(super) fn is_worker_routable(&self) -> bool {
        self.beside.is_some_and(|member| member.routable)
    }

    fn spec(&self) -> Option<&'a Container> {
        let containers = &self.pod.spec.as_ref()?.containers;
        containers.iter().find(|container| container.name == CONTAINER)
    }

    /// The only container; sidecars that somebody injects come after it or have other names.
    pub(super) fn container(&self) -> Option<&'a ContainerStatus> {
        let statuses = self.pod.status.as_ref()?.container_statuses.as_ref()?;
        statuses.iter().find(|status| status.name == CONTAINER)
    }

    /// The image that it is to run.
    pub(super) fn image(&self) -> Option<&'a str> {
        self.spec()?.image.as_deref()
    }

    /// The process itself says that it serves (`/readyz`).
    pub(super) fn serves(&self) -> bool {
        self.container().is_some_and(|container| container.ready)
    }

    /// The process says that it has started (`/startedz`): its files are read and its servers are up.
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

/// Name of a worker's port.
pub(super) const WORKER_PORT: &str = "worker";

fn is_workers(port: &ContainerPort) -> bool {
    port.name.as_deref() == Some(WORKER_PORT)
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
            let of = |is_shard: bool| members.get(&(uid, is_shard)).copied();
            let is_shard = component == Component::Tier(Tier::Experts);
            let beside = is_shard.then(|| of(false)).flatten();
            Some(OurPod { pod, component, member: of(is_shard), beside })
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

/// By uid of the pod, shards apart from workers: a pod may hold one of each. Of two lives of one pod (the old one's lease runs) the routable one is it.
fn members(status: Option<&CoordinatorStatus>) -> BTreeMap<(&str, bool), &MemberStatus> {
    let mut members: BTreeMap<(&str, bool), &MemberStatus> = BTreeMap::new();
    for member in status.iter().flat_map(|status| &status.members) {
        let Some(pod) = &member.member.pod else { continue };
        let is_shard = matches!(member.member.role, Role::Expert(_));
        let known = members.entry((&pod.uid, is_shard)).or_insert(member);
        if (member.routable, &member.member.id) > (known.routable, &known.member.id) {
            *known = member;
        }
    }
    members
}
