//! The controllers of workloads and the kubelets, one step at a time.

use super::*;
use k8s_openapi::{
    api::core::v1::{
        ContainerState, ContainerStateRunning, ContainerStateWaiting, ContainerStatus, PodStatus,
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

/// How long a pod drains: it is seen on its way out.
const DRAIN: Duration = Duration::from_secs(2);

impl Cluster {
    /// Everything but the operator moves.
    pub(in super::super) fn step(&mut self) {
        self.passes(2);
        self.remove_terminated();
        for deployment in self.seen.children.deployments.clone() {
            if super::super::super::facts::Facts::new(&self.seen).owns(&deployment.metadata) {
                self.roll(&deployment);
            }
        }
        if let Some(set) = self.seen.children.stateful_sets.first().cloned() {
            self.fill(&set);
        }
        let running: Vec<bool> = self.seen.pods.iter().map(|pod| self.may_run(pod)).collect();
        let now = self.seen.now;
        let unschedulable = self.unschedulable.clone();
        for (pod, may_run) in self.seen.pods.iter_mut().zip(running) {
            let spec = pod.spec.as_mut().unwrap();
            let matches = |key: &String| spec.node_selector.as_ref().is_some_and(|all| all.contains_key(key));
            if unschedulable.as_ref().is_some_and(matches) {
                spec.node_name = None;
                refuse(pod);
            } else {
                spec.node_name.get_or_insert_with(|| "node-0".into());
                start(pod, may_run, now);
            }
        }
        self.coordinator.follow(&mut self.seen, self.view.as_ref());
    }

    fn may_run(&self, pod: &Pod) -> bool {
        let image = &pod.spec.as_ref().unwrap().containers[0].image;
        let pulled = self.broken_image.is_none() || *image != self.broken_image;
        let newest = || {
            let set = self.seen.children.stateful_sets.first().and_then(|set| set.spec.as_ref());
            set.is_some_and(|spec| template_hash(&spec.template) == template_of(pod))
        };
        pulled && !(self.broken_shards && component_of(pod) == "experts" && newest())
    }

    /// What drains is gone two steps later, unless its node is silent.
    fn remove_terminated(&mut self) {
        let now = self.seen.now;
        let nodes = &self.seen.nodes;
        self.seen.pods.retain(|pod| {
            let node =
                pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()).and_then(|node| nodes.get(node));
            let silent = node.is_some_and(|node| !node.ready);
            pod.metadata.deletion_timestamp.as_ref().is_none_or(|since| silent || since.0 + DRAIN >= now)
        });
    }

    fn roll(&mut self, deployment: &Deployment) {
        let spec = deployment.spec.as_ref().unwrap();
        let name = name(&deployment.metadata);
        let hash = template_hash(&spec.template);
        let wanted = usize::try_from(spec.replicas.unwrap()).unwrap();
        let all: Vec<Pod> = self.seen.pods.iter().filter(|pod| is_of(pod, &name)).cloned().collect();
        let active: Vec<&Pod> = all.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect();
        let (new, old): (Vec<&Pod>, Vec<&Pod>) = active.into_iter().partition(|pod| template_of(pod) == hash);
        let strategy = spec.strategy.as_ref().unwrap();
        let rolling = strategy.rolling_update.as_ref().unwrap();
        let (surge, unavailable) = (number(&rolling.max_surge), number(&rolling.max_unavailable));
        let ready = |pods: &[&Pod]| pods.iter().filter(|pod| is_ready(pod)).count();
        let room = (wanted + surge).saturating_sub(new.len() + old.len());
        let made = room.min(wanted.saturating_sub(new.len()));
        // As the controller counts: what is new and not ready yet may not be counted on.
        let least = wanted.saturating_sub(unavailable);
        let mut may_go = (new.len() + old.len()).saturating_sub(least + new.len() - ready(&new));
        let mut spare = (ready(&new) + ready(&old)).saturating_sub(least);
        let (sick, well): (Vec<&Pod>, Vec<&Pod>) = old.iter().copied().partition(|pod| !is_ready(pod));
        for pod in sick.into_iter().chain(well) {
            let serves = is_ready(pod);
            if may_go > 0 && (!serves || spare > 0) {
                may_go -= 1;
                spare -= usize::from(serves);
                self.kill(&super::name(&pod.metadata));
            }
        }
        for _ in 0..made {
            self.make(&name, None, &spec.template);
        }
        for pod in new.iter().skip(wanted) {
            self.kill(&super::name(&pod.metadata));
        }
    }

    fn fill(&mut self, set: &StatefulSet) {
        let spec = set.spec.as_ref().unwrap();
        let name = name(&set.metadata);
        let wanted = usize::try_from(spec.replicas.unwrap()).unwrap();
        for ordinal in 0..wanted {
            let pod = format!("{name}-{ordinal}");
            if !self.seen.pods.iter().any(|known| known.metadata.name.as_deref() == Some(&pod)) {
                self.make(&name, Some(ordinal), &spec.template);
            }
        }
        for pod in self.seen.pods.clone().iter().filter(|pod| is_of(pod, &name)) {
            let pod = super::name(&pod.metadata);
            let ordinal: usize = pod.rsplit_once('-').unwrap().1.parse().unwrap();
            if ordinal >= wanted && self.pod(&pod).metadata.deletion_timestamp.is_none() {
                self.kill(&pod);
            }
        }
        self.seen.children.stateful_sets[0].status = Some(StatefulSetStatus {
            observed_generation: set.metadata.generation,
            ..StatefulSetStatus::default()
        });
    }

    fn make(&mut self, workload: &str, ordinal: Option<usize>, template: &PodTemplateSpec) {
        self.version();
        let serial = self.serial;
        let (suffix, kind, owner) = match ordinal {
            Some(ordinal) => (ordinal.to_string(), "StatefulSet", workload.to_owned()),
            None => (
                format!("{serial:05}"),
                "ReplicaSet",
                format!("{workload}-{}", &template_hash(template)[..8]),
            ),
        };
        let owner = OwnerReference {
            kind: kind.into(),
            name: owner,
            uid: workload.into(),
            controller: Some(true),
            ..OwnerReference::default()
        };
        let mut spec = template.spec.clone();
        spec.as_mut().unwrap().node_name = Some(format!("node-{}", serial % 3));
        let metadata = ObjectMeta {
            name: Some(format!("{workload}-{suffix}")),
            uid: Some(format!("{}-{serial:06}", if ordinal.is_some() { "shard" } else { "pod" })),
            creation_timestamp: Some(Time(self.seen.now)),
            owner_references: Some(vec![owner]),
            labels: template.metadata.as_ref().unwrap().labels.clone(),
            ..ObjectMeta::default()
        };
        self.seen.pods.push(Pod { metadata, spec, status: None });
    }
}

/// As the scheduler says it.
fn refuse(pod: &mut Pod) {
    set_condition(pod, "PodScheduled", false);
    let conditions = pod.status.as_mut().unwrap().conditions.as_mut().unwrap();
    conditions.last_mut().unwrap().message =
        Some("0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.".into());
}

fn start(pod: &mut Pod, may_run: bool, now: Timestamp) {
    if pod.status.as_ref().is_none_or(|status| status.phase.is_none()) {
        let phase = Some("Pending".into());
        pod.status = Some(PodStatus { phase, ..PodStatus::default() });
        set_condition(pod, "PodScheduled", true);
        return;
    }
    let image = pod.spec.as_ref().unwrap().containers[0].image.clone().unwrap();
    let status = pod.status.as_mut().unwrap();
    if status.container_statuses.as_ref().is_some_and(|all| all[0].state.as_ref().unwrap().running.is_some())
    {
        return;
    }
    let state = match may_run {
        true => ContainerState {
            running: Some(ContainerStateRunning { started_at: Some(Time(now)) }),
            ..ContainerState::default()
        },
        false => ContainerState {
            waiting: Some(ContainerStateWaiting {
                reason: Some("ImagePullBackOff".into()),
                message: Some("not found".into()),
            }),
            ..ContainerState::default()
        },
    };
    status.phase = Some(if may_run { "Running" } else { "Pending" }.into());
    status.container_statuses = Some(vec![ContainerStatus {
        name: "cadre".into(),
        image,
        started: Some(may_run),
        state: Some(state),
        ..ContainerStatus::default()
    }]);
}

fn number(value: &Option<IntOrString>) -> usize {
    match value {
        Some(IntOrString::Int(number)) => usize::try_from(*number).unwrap(),
        other => panic!("{other:?} is no number"),
    }
}

fn is_of(pod: &Pod, workload: &str) -> bool {
    pod.metadata.owner_references.as_ref().unwrap()[0].uid == workload
}

pub(in super::super) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().filter_map(|status| status.conditions.as_ref()).flatten();
    conditions.into_iter().any(|one| one.type_ == "Ready" && one.status == "True")
}

pub(in super::super) fn template_of(pod: &Pod) -> String {
    pod.metadata.labels.as_ref().unwrap()[label::TEMPLATE_HASH].clone()
}

fn template_hash(template: &PodTemplateSpec) -> String {
    template.metadata.as_ref().unwrap().labels.as_ref().unwrap()[label::TEMPLATE_HASH].clone()
}
