//! What follows from an observation at once: our pods, and what the coordinator's word is worth now.
//!
//! **The coordinator's word.** While its stream is up, what it said last is the present. After the stream broke,
//! it is believed for [`BELIEVED`]: members live by their leases and go on serving, and a router that restarts is
//! back by then. A process that has just begun to watch waits for [`GRACE`] before it takes silence for a fault.
//! A router that has just started knows nobody for a moment ([`SETTLING`]): what it does not name is not lost.

use std::time::Duration;

use cadre_k8s_api::{MoEModel, MoEModelSpec, Tier};
use cadre_types::CoordinatorStatus;
use k8s_openapi::{
    api::apps::v1::{Deployment, StatefulSet},
    apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta},
};

use super::{
    clock::Clock,
    component::Component,
    pods::{self, OurPod},
};
use crate::observed::{CoordinatorReport, Observed};

/// How long the last word of a coordinator that cannot be reached counts. Longer than a router takes to be
/// replaced (a drain without requests, a start, 2 s for members to come back), shorter than anybody would wait.
pub(super) const BELIEVED: Duration = Duration::from_secs(60);

/// How long a coordinator that has never been heard may stay so: first for this process after its start, then
/// for the router after its own. A condition is to show a fault within 15 s.
pub(super) const GRACE: Duration = Duration::from_secs(12);

/// How long members take to come back to a router that has started: their back-off is at most 2 s, a lease is 3 s
/// and placements settle for 4 s.
pub(super) const SETTLING: Duration = Duration::from_secs(15);

/// An observation, read.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    observed: &'a Observed,
    name: &'a str,
    clock: Clock,
    pods: Vec<OurPod<'a>>,
}

impl<'a> Facts<'a> {
    pub(super) fn new(observed: &'a Observed) -> Self {
        let name = observed.model.metadata.name.as_deref().unwrap_or_default();
        let clock = Clock::new(observed.now);
        let word = observed
            .coordinator
            .as_ref()
            .filter(|report| counts(report, &clock))
            .map(|report| &report.status);
        let pods = pods::ours(name, &observed.pods, word);
        Self { observed, name, clock, pods }
    }

    pub(super) fn observed(&self) -> &'a Observed {
        self.observed
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    pub(super) fn model(&self) -> &'a MoEModel {
        &self.observed.model
    }

    pub(super) fn spec(&self) -> &'a MoEModelSpec {
        &self.observed.model.spec
    }

    pub(super) fn name(&self) -> &'a str {
        self.name
    }

    pub(super) fn is_deleting(&self) -> bool {
        self.model().metadata.deletion_timestamp.is_some()
    }

    /// Whether this object is a child of this model, by its controller.
    pub(super) fn owns(&self, meta: &ObjectMeta) -> bool {
        let uid = self.model().metadata.uid.as_deref();
        controller(meta).is_some_and(|owner| Some(owner.uid.as_str()) == uid)
    }

    /// A condition of the model as it was written last.
    pub(super) fn condition(&self, type_: &str) -> Option<&'a Condition> {
        let status = self.model().status.as_ref()?;
        status.conditions.iter().find(|condition| condition.type_ == type_)
    }

    /// All pods of our workloads, by name.
    pub(super) fn pods(&self) -> &[OurPod<'a>] {
        &self.pods
    }

    /// Those of a component.
    pub(super) fn pods_of(&self, component: Component) -> impl Iterator<Item = &OurPod<'a>> {
        self.pods.iter().filter(move |pod| pod.component == component)
    }

    /// Those that count.
    pub(super) fn active(&self, component: Component) -> impl Iterator<Item = &OurPod<'a>> {
        self.pods_of(component).filter(|pod| pod.is_active())
    }

    /// Pods of a tier that work is routed to. Without the coordinator's word the gates are the memory of it.
    pub(super) fn routable(&self, tier: Tier) -> usize {
        let by_word = self.word().is_some();
        let routable = |pod: &&OurPod<'a>| if by_word { pod.is_routable() } else { pod.gate() };
        self.active(Component::Tier(tier)).filter(routable).count()
    }

    /// Pods of shards with a worker beside them, and those of them whose worker gets work.
    pub(super) fn workers_beside_shards(&self) -> (usize, usize) {
        let by_word = self.word().is_some();
        let routable = |pod: &&OurPod<'a>| if by_word { pod.is_worker_routable() } else { pod.gate() };
        let pods = || self.active(Component::Tier(Tier::Experts)).filter(|pod| pod.has_worker_beside());
        (pods().count(), pods().filter(routable).count())
    }

    /// The router whose coordinator members and operator ask: of several that run, the one that came first. A newer one
    /// stands by until that has gone.
    pub(super) fn router_in_charge(&self) -> Option<&OurPod<'a>> {
        let running = self.active(Component::Router).filter(|pod| pod.has_started());
        running.min_by_key(|pod| (pod.created(), pod.name()))
    }

    /// Some pod of the model runs this image: it exists, it can be pulled, and its program starts.
    pub(super) fn is_proven(&self, image: &str) -> bool {
        self.pods.iter().any(|pod| pod.is_active() && pod.has_started() && pod.image() == Some(image))
    }

    /// A Deployment of ours by component.
    pub(super) fn deployment(&self, component: Component) -> Option<&'a Deployment> {
        let name = component.object_name(self.name);
        let mut named = self
            .observed
            .children
            .deployments
            .iter()
            .filter(move |found| found.metadata.name.as_ref() == Some(&name));
        named.next().filter(|found| self.owns(&found.metadata))
    }

    /// The StatefulSet of the shards, if it is ours.
    pub(super) fn stateful_set(&self) -> Option<&'a StatefulSet> {
        let name = Tier::Experts.object_name(self.name);
        let mut named = self
            .observed
            .children
            .stateful_sets
            .iter()
            .filter(|found| found.metadata.name.as_ref() == Some(&name));
        named.next().filter(|found| self.owns(&found.metadata))
    }

    /// The coordinator's word as far as it counts.
    pub(super) fn word(&self) -> Option<&'a CoordinatorStatus> {
        let report = self.observed.coordinator.as_ref()?;
        counts(report, &self.clock).then_some(&report.status)
    }

    /// The coordinator's word while its stream is up: the present.
    pub(super) fn present(&self) -> Option<&'a CoordinatorStatus> {
        let report = self.observed.coordinator.as_ref()?;
        report.connected.is_ok().then_some(&report.status)
    }

    /// The stream is down, or never was up; why.
    pub(super) fn unreachable(&self) -> Option<&'a str> {
        match &self.observed.coordinator {
            None => Some("no connection yet"),
            Some(report) => report.connected.as_ref().err().map(String::as_str),
        }
    }

    /// This process has not watched for long enough to call silence a fault.
    pub(super) fn is_new_here(&self) -> bool {
        !self.clock.passed(self.observed.watching_since, GRACE)
    }

    /// The router has just started, so its coordinator may not know everybody yet.
    pub(super) fn is_settling(&self) -> bool {
        let started = self.router_in_charge().and_then(OurPod::running_since);
        started.is_some_and(|started| !self.clock.passed(started, SETTLING))
    }

    /// The node is known and does not answer: what the API says of its pods is old, and nobody drains them.
    pub(super) fn is_on_silent_node(&self, pod: &OurPod<'_>) -> bool {
        pod.node().and_then(|node| self.observed.nodes.get(node)).is_some_and(|node| !node.ready)
    }

    /// Failure domain of a pod.
    pub(super) fn domain(&self, pod: &OurPod<'_>) -> Option<&'a str> {
        let node = self.observed.nodes.get(pod.node()?)?;
        node.labels.get(&self.spec().experts.spread_by).map(String::as_str)
    }
}

/// The owner that manages an object.
pub(super) fn controller(
    meta: &ObjectMeta,
) -> Option<&k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference> {
    meta.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

fn counts(report: &CoordinatorReport, clock: &Clock) -> bool {
    report.connected.is_ok() || !clock.passed(report.heard, BELIEVED)
}
