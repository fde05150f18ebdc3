//! The pods, which are alike but for their process: restricted security, probes, grace, checkpoint.
//!
//! **Security.** Every pod is admitted by the restricted pod security standard, but for a hostPath checkpoint,
//! which that standard forbids. No process writes a file but its termination message.
//!
//! **Probes.** Liveness asks `/healthz`, which depends on no peer and no weight: nobody is killed for
//! loading slowly or for the loss of somebody else. The start asks `/startedz`, readiness `/readyz`; members are ready for
//! Kubernetes only if the coordinator says so as well (readiness gate). A normal start fails no probe, because each failure
//! is an event `Unhealthy` and a word of alarm: processes serve their admin port before anything else, and `/startedz` and
//! `/readyz` of a process that has not started, or was never ready, hold their answer until it has and is. After that they
//! answer at once.
//!
//! **Accelerators.** A pod with one is told to compute on the first that its container has; which one that is, is the
//! device plugin's choice. One without is told to compute on the CPU, whatever the image could do, and hidden from a node's
//! NVIDIA runtime, which would otherwise mount what the pod has not been given. GPU nodes are tainted by convention; the
//! toleration of that taint comes with the accelerator.
//!
//! **Grace.** A process drains for `drainSeconds` at most and is killed only if it hangs after that.
//!
//! **Lost nodes.** Pods leave a node that does not answer after [`LOST_NODE_SECONDS`] instead of five minutes: the
//! router is one pod, and a tier short of pods is slow. What is still alive there goes on until it is replaced.

use std::collections::BTreeMap;

use cadre_k8s_api::{
    model::{Accelerator, PodSpec as TierPod},
    names::{self, CLUSTER_SECRET_KEY, ROUTABLE_GATE, label, port},
};
use k8s_openapi::{
    api::apps::v1::{DeploymentStrategy, RollingUpdateDeployment},
    api::core::v1::{
        Capabilities, Container, ContainerPort, EnvVar, EnvVarSource, HTTPGetAction, ObjectFieldSelector,
        PodReadinessGate, PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements,
        SeccompProfile, SecretVolumeSource, SecurityContext, Toleration, TopologySpreadConstraint, Volume,
        VolumeMount,
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};

use super::{
    super::{component::Component, pods::CONTAINER},
    Blueprint, checkpoint, meta, overlay,
};

/// Revisions kept for looking back; a return is another apply.
pub(super) const REVISIONS: i32 = 2;
/// Weights of a large model take longer than Kubernetes' ten minutes.
pub(super) const PROGRESS_DEADLINE_SECONDS: i32 = 3600;

/// What a process needs after its drain: closing connections (2.3 s at most), the last answers (1 s), and a node
/// that is slow just then.
const EXIT_SECONDS: i64 = 15;
const LOST_NODE_SECONDS: i64 = 30;
/// `nonroot` of the image.
const USER: i64 = 65532;

/// Where the cluster secret is mounted.
const SECRET_DIR: &str = "/etc/cadre/cluster-secret";
const SECRET_VOLUME: &str = "cluster-secret";

const PROBE_SECONDS: i32 = 2;
/// A process serves its admin port first, a tenth of a second after it began. The first process of an image reads its program
/// from a cold disk, and a node may start many at once: 1 s was too short for that on a busy node of two cores.
const START_DELAY_SECONDS: i32 = 3;
/// Longest hold of `/startedz`: a folder of hundreds of files on a slow network is opened within.
const START_HOLD_SECONDS: i32 = 900;
/// A node that takes so many periods until a process listens is out of order; a process that hangs in reading its files is
/// ended after as many holds, three hours.
const START_FAILURES: i32 = 12;
/// Longest hold of the first readiness: as long as a rollout may take ([`PROGRESS_DEADLINE_SECONDS`]). A process that hangs
/// meanwhile is found by liveness.
const HOLD_SECONDS: i32 = PROGRESS_DEADLINE_SECONDS;
/// A process that hangs is restarted after a minute; one on a busy machine is not.
const LIVENESS_SECONDS: i32 = 10;
const LIVENESS_FAILURES: i32 = 6;
const PROBE_TIMEOUT_SECONDS: i32 = 5;

/// The process in a pod.
pub(super) struct Process<'a> {
    pub(super) component: Component,
    pub(super) args: Vec<String>,
    pub(super) ports: Vec<(&'static str, u16)>,
    pub(super) env: Vec<EnvVar>,
    /// What it takes to end beyond the drain.
    pub(super) more_drain_seconds: i32,
    pub(super) pod: &'a TierPod,
    pub(super) accelerator: Option<&'a Accelerator>,
    /// It is admitted by the coordinator.
    pub(super) is_member: bool,
    pub(super) spread: Vec<TopologySpreadConstraint>,
    pub(super) volumes: Vec<(Volume, VolumeMount)>,
}

impl Blueprint<'_> {
    /// Flags of every role.
    pub(super) fn common_args(&self) -> Vec<String> {
        let spec = self.facts.spec();
        let flags = [
            ("--model", checkpoint::place(self.source).folder),
            ("--numerics", checkpoint::numerics(spec.model.numerics).to_owned()),
            ("--admin", everywhere(port::ADMIN)),
            ("--drain-timeout", spec.drain_seconds.to_string()),
            ("--log-format", "json".to_owned()),
        ];
        flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
    }

    /// Flags of workers and shards.
    pub(super) fn member_args(&self, listen: u16, accelerator: Option<&Accelerator>) -> Vec<String> {
        let coordinator = format!("{}:{}", names::coordinator_service(self.facts.name()), port::COORDINATOR);
        // The device plugin shows a container its own accelerators only, numbered from 0.
        let device = if accelerator.is_some() { "cuda:0" } else { "cpu" };
        let flags = [
            ("--coordinator", coordinator),
            ("--listen", everywhere(listen)),
            ("--device", device.to_owned()),
        ];
        flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
    }
}

/// A rolling update that adds so many pods beyond the wanted ones, and takes so many of them away.
pub(super) fn rolling(surge: u8, unavailable: u8) -> DeploymentStrategy {
    DeploymentStrategy {
        type_: Some("RollingUpdate".to_owned()),
        rolling_update: Some(RollingUpdateDeployment {
            max_surge: Some(IntOrString::Int(surge.into())),
            max_unavailable: Some(IntOrString::Int(unavailable.into())),
        }),
    }
}

/// On every interface, of both families where the node has both.
pub(super) fn everywhere(port: u16) -> String {
    format!("[::]:{port}")
}

/// Who a member is, and where others reach it: at its pod's address and the port that it listens on.
pub(super) fn member_env() -> Vec<EnvVar> {
    vec![
        field("CADRE_POD_NAME", "metadata.name"),
        field("CADRE_POD_UID", "metadata.uid"),
        field("CADRE_POD_IP", "status.podIP"),
    ]
}

/// A variable from the downward API.
pub(super) fn field(name: &str, path: &str) -> EnvVar {
    let field = ObjectFieldSelector { api_version: Some("v1".to_owned()), field_path: path.to_owned() };
    let source = EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() };
    EnvVar { name: name.to_owned(), value_from: Some(source), ..EnvVar::default() }
}

fn value(name: &str, value: String) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value), ..EnvVar::default() }
}

/// The template and its hash, which is also a label of it.
pub(super) fn template(blueprint: &Blueprint<'_>, mut process: Process<'_>) -> (PodTemplateSpec, String) {
    let facts = blueprint.facts;
    let component = process.component;
    process.volumes.splice(0..0, checkpoint::place(blueprint.source).volume);
    process.volumes.extend(facts.observed().cluster_secret.as_deref().map(secret));
    process.volumes.extend(process.pod.volumes.iter().map(overlay::volume));
    if facts.observed().cluster_secret.is_some() {
        // Not a flag: images of before it existed pass over a variable.
        process.env.push(value("CADRE_CLUSTER_SECRET_FILE", format!("{SECRET_DIR}/{CLUSTER_SECRET_KEY}")));
    }
    let (name, words) = match process.accelerator {
        // What of the driver is mounted; an image of somebody else's may not say it.
        Some(_) => ("NVIDIA_DRIVER_CAPABILITIES", "compute,utility"),
        None => ("NVIDIA_VISIBLE_DEVICES", "void"),
    };
    if !process.pod.env.iter().any(|given| given.name == name) {
        process.env.push(value(name, words.to_owned()));
    }
    process.env.extend(process.pod.env.iter().map(overlay::variable));
    process.spread =
        overlay::spread(facts, component, process.spread, &process.pod.topology_spread_constraints);
    let mut labels = meta::labels(facts.name(), Some(component));
    labels.insert(label::CHECKPOINT.to_owned(), blueprint.checkpoint.clone());
    let mut template = PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels), ..ObjectMeta::default() }),
        spec: Some(pod(blueprint, process)),
    };
    let hash = meta::hash(&serde_json::to_value(&template).unwrap_or_default());
    if let Some(labels) = template.metadata.as_mut().and_then(|meta| meta.labels.as_mut()) {
        labels.insert(label::TEMPLATE_HASH.to_owned(), hash.clone());
    }
    (template, hash)
}

/// The model's cluster secret as a file; the processes are not its owner, so everybody in the container may read it.
fn secret(name: &str) -> (Volume, VolumeMount) {
    let source = SecretVolumeSource {
        secret_name: Some(name.to_owned()),
        default_mode: Some(0o444),
        ..SecretVolumeSource::default()
    };
    let volume = Volume { name: SECRET_VOLUME.to_owned(), secret: Some(source), ..Volume::default() };
    let mount = VolumeMount {
        name: SECRET_VOLUME.to_owned(),
        mount_path: SECRET_DIR.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    (volume, mount)
}

fn pod(blueprint: &Blueprint<'_>, process: Process<'_>) -> PodSpec {
    let (facts, spec, given) = (blueprint.facts, blueprint.facts.spec(), process.pod);
    let user = given.security_context.clone().unwrap_or_default();
    let gates = vec![PodReadinessGate { condition_type: ROUTABLE_GATE.to_owned() }];
    let (volumes, mounts): (Vec<_>, Vec<_>) = process.volumes.iter().cloned().unzip();
    PodSpec {
        service_account_name: Some(
            given.service_account_name.clone().unwrap_or_else(|| process.component.object_name(facts.name())),
        ),
        automount_service_account_token: Some(false),
        // Variables of Services would look like flags: CADRE_….
        enable_service_links: Some(false),
        image_pull_secrets: filled(spec.image_pull_secrets.clone()),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(user.run_as_user.unwrap_or(USER)),
            run_as_group: Some(user.run_as_group.unwrap_or(USER)),
            fs_group: user.fs_group,
            supplemental_groups: filled(user.supplemental_groups.clone()),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                localhost_profile: None,
            }),
            ..PodSecurityContext::default()
        }),
        termination_grace_period_seconds: Some(
            i64::from(spec.drain_seconds) + i64::from(process.more_drain_seconds) + EXIT_SECONDS,
        ),
        readiness_gates: process.is_member.then_some(gates),
        priority_class_name: given.priority_class_name.clone(),
        runtime_class_name: given.runtime_class_name.clone(),
        scheduler_name: given.scheduler_name.clone(),
        affinity: given.affinity.as_ref().map(overlay::affinity),
        node_selector: (!process.pod.node_selector.is_empty()).then(|| process.pod.node_selector.clone()),
        tolerations: filled(tolerations(&process.pod.tolerations, process.accelerator.is_some())),
        topology_spread_constraints: filled(process.spread.clone()),
        volumes: filled(volumes),
        containers: vec![container(blueprint.image, process, mounts)],
        ..PodSpec::default()
    }
}

fn container(image: &str, process: Process<'_>, mounts: Vec<VolumeMount>) -> Container {
    let mut env = vec![value("CADRE_TERMINATION_LOG", TERMINATION_LOG.to_owned())];
    env.extend(process.env);
    let mut ports = process.ports;
    ports.push(("admin", port::ADMIN));
    Container {
        name: CONTAINER.to_owned(),
        image: Some(image.to_owned()),
        args: Some(process.args),
        env: Some(env),
        ports: Some(ports.into_iter().map(|(name, number)| container_port(name, number)).collect()),
        resources: resources(process.pod, process.accelerator),
        volume_mounts: filled(mounts),
        startup_probe: Some(Probe {
            initial_delay_seconds: Some(START_DELAY_SECONDS),
            ..held("/startedz", START_HOLD_SECONDS, START_FAILURES)
        }),
        liveness_probe: Some(probe("/healthz", LIVENESS_SECONDS, LIVENESS_FAILURES)),
        readiness_probe: Some(held("/readyz", HOLD_SECONDS, 2)),
        termination_message_path: Some(TERMINATION_LOG.to_owned()),
        // A process that could not write its message (it was killed, it panicked) still has last words.
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            ..SecurityContext::default()
        }),
        ..Container::default()
    }
}

/// The kubelet mounts a file of its own here, writable for everybody.
const TERMINATION_LOG: &str = "/dev/termination-log";

fn container_port(name: &str, number: u16) -> ContainerPort {
    ContainerPort {
        name: Some(name.to_owned()),
        container_port: number.into(),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    }
}

/// A probe whose answer may be held for so long.
fn held(path: &str, seconds: i32, failures: i32) -> Probe {
    Probe {
        timeout_seconds: Some(seconds + PROBE_TIMEOUT_SECONDS),
        ..probe(&format!("{path}?hold={seconds}"), PROBE_SECONDS, failures)
    }
}

fn probe(path: &str, period: i32, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String("admin".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        failure_threshold: Some(failures),
        timeout_seconds: Some(PROBE_TIMEOUT_SECONDS),
        ..Probe::default()
    }
}

/// Accelerators stand in both: Kubernetes wants limits and requests of an extended resource to be the same.
fn resources(pod: &TierPod, accelerator: Option<&Accelerator>) -> Option<ResourceRequirements> {
    let with = |mut quantities: BTreeMap<String, Quantity>| {
        if let Some(Accelerator { resource, count }) = accelerator {
            quantities.insert(resource.clone(), Quantity(count.to_string()));
        }
        (!quantities.is_empty()).then_some(quantities)
    };
    let (requests, limits) = (with(pod.resources.requests.clone()), with(pod.resources.limits.clone()));
    (requests.is_some() || limits.is_some()).then(|| ResourceRequirements {
        requests,
        limits,
        ..ResourceRequirements::default()
    })
}

/// The taint that keeps pods without accelerators off nodes with them.
const GPU_TAINT: &str = "nvidia.com/gpu";

/// The user's, and ours where the user says nothing about it: for lost nodes, and for nodes of accelerators.
fn tolerations(given: &[Toleration], accelerated: bool) -> Vec<Toleration> {
    let given = given.iter().map(|toleration| Toleration {
        key: stated(&toleration.key),
        operator: stated(&toleration.operator),
        value: stated(&toleration.value),
        effect: stated(&toleration.effect),
        toleration_seconds: toleration.toleration_seconds,
    });
    let mut tolerations: Vec<Toleration> = given.collect();
    let all = tolerations.iter().any(|toleration| toleration.key.is_none() && covers_execution(toleration));
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let said = tolerations.iter().any(|said| said.key.as_deref() == Some(key) && covers_execution(said));
        if !all && !said {
            tolerations.push(Toleration {
                key: Some(key.to_owned()),
                operator: Some("Exists".to_owned()),
                effect: Some("NoExecute".to_owned()),
                toleration_seconds: Some(LOST_NODE_SECONDS),
                value: None,
            });
        }
    }
    let said = tolerations.iter().any(|said| said.key.as_deref().is_none_or(|key| key == GPU_TAINT));
    if accelerated && !said {
        tolerations.push(Toleration {
            key: Some(GPU_TAINT.to_owned()),
            operator: Some("Exists".to_owned()),
            effect: Some("NoSchedule".to_owned()),
            ..Toleration::default()
        });
    }
    tolerations
}

fn covers_execution(toleration: &Toleration) -> bool {
    toleration.effect.as_deref().is_none_or(|effect| effect == "NoExecute")
}

fn stated(text: &Option<String>) -> Option<String> {
    text.clone().filter(|text| !text.is_empty())
}

fn filled<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}
