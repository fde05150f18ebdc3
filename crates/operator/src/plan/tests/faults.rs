//! Faults: each shows as Degraded, and as the reason of Ready where it keeps the model from it, as soon as the API
//! shows it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_k8s_api::{Reason, Tier, model::SourceRef};
use k8s_openapi::{
    api::core::v1::{
        ContainerState, ContainerStateTerminated, ContainerStateWaiting, PersistentVolumeClaim,
        PersistentVolumeClaimStatus, Pod, PodCondition, PodStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::{
    cluster::{Cluster, set_condition},
    samples,
};
use crate::observed::ClaimState;

/// A model whose pods have just been made.
fn starting(model: cadre_k8s_api::MoEModel) -> Cluster {
    let mut cluster = Cluster::new(model);
    cluster.round();
    cluster
}

/// Writes what is planned, without anything else moving.
fn judge(cluster: &mut Cluster) {
    let plan = cluster.plan();
    cluster.apply(&plan);
}

fn assert_fault(cluster: &mut Cluster, reason: Reason, words: &str) {
    judge(cluster);
    let (status, found, message) = cluster.condition("Degraded");
    assert_eq!((status.as_str(), found.as_str()), ("True", reason.name()), "{message}");
    assert!(message.contains(words), "{message:?} does not say {words:?}");
}

fn end(pod: &mut Pod, reason: &str, exit_code: i32, message: &str) {
    let status = pod.status.as_mut().unwrap().container_statuses.as_mut().unwrap();
    status[0].last_state = Some(ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code,
            reason: Some(reason.into()),
            message: Some(message.into()),
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    });
    status[0].state = Some(waiting("CrashLoopBackOff", "back-off 10s restarting failed container"));
    status[0].ready = false;
    status[0].started = Some(false);
}

fn waiting(reason: &str, message: &str) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting { reason: Some(reason.into()), message: Some(message.into()) }),
        ..ContainerState::default()
    }
}

fn unscheduled(pod: &mut Pod, message: &str) {
    pod.spec.as_mut().unwrap().node_name = None;
    let scheduled = PodCondition {
        type_: "PodScheduled".into(),
        status: "False".into(),
        reason: Some("Unschedulable".into()),
        message: Some(message.into()),
        ..PodCondition::default()
    };
    let phase = Some("Pending".into());
    pod.status = Some(PodStatus { phase, conditions: Some(vec![scheduled]), ..PodStatus::default() });
}

#[test]
fn an_image_that_cannot_be_pulled() {
    let mut cluster = Cluster::new(samples::pocket());
    cluster.broken_image = samples::pocket().spec.image;
    (0..4).for_each(|_| drop(cluster.round()));
    assert_fault(
        &mut cluster,
        Reason::ImagePullFailed,
        "image ghcr.io/cadre-dev/cadre:0.1.0: not found (and 6 more)",
    );
    assert_eq!(cluster.verdict("Ready"), "False ImagePullFailed");
    cluster.broken_image = None;
    cluster.settle();
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
}

#[test]
fn a_checkpoint_that_a_process_refuses_is_told_in_its_words() {
    let mut cluster = starting(samples::pocket());
    (0..2).for_each(|_| drop(cluster.round()));
    let words = "CheckpointInvalid: expert 0: tensor model.layers.3.mlp.experts.1.up_proj.weight: absent\n";
    end(cluster.first("experts"), "Error", 1, words);
    assert_fault(
        &mut cluster,
        Reason::CheckpointInvalid,
        "model.layers.3.mlp.experts.1.up_proj.weight: absent",
    );
    assert!(cluster.condition("Degraded").2.starts_with("pod pocket-experts-0: "));
}

#[test]
fn a_router_that_finds_other_experts_than_declared() {
    let mut cluster = starting(samples::pocket());
    (0..2).for_each(|_| drop(cluster.round()));
    let words = "CheckpointMismatch: router: m has 32 routed experts, 256 expected\n";
    end(cluster.first("router"), "Error", 1, words);
    cluster.seen.coordinator = None;
    assert_fault(&mut cluster, Reason::CheckpointMismatch, "32 routed experts, 256 expected");
    assert_eq!(cluster.verdict("Ready"), "False CheckpointMismatch");
}

#[test]
fn memory_and_crashes() {
    let mut cluster = Cluster::settled(samples::pocket());
    end(cluster.first("decode"), "OOMKilled", 137, "");
    assert_fault(&mut cluster, Reason::OutOfMemory, "more memory than its limit");
    end(cluster.first("decode"), "Error", 101, "thread 'main' panicked at src/x.rs:1");
    assert_fault(&mut cluster, Reason::PodsCrashing, "exit code 101: thread 'main' panicked at src/x.rs:1");
    end(cluster.first("decode"), "Error", 2, "InvalidConfiguration: error: unexpected argument '--x'\n");
    assert_fault(&mut cluster, Reason::InvalidConfiguration, "unexpected argument '--x'");
}

#[test]
fn a_process_that_runs_again_is_a_fault_until_it_serves_or_has_run_for_a_minute() {
    let mut cluster = Cluster::settled(samples::pocket());
    let now = cluster.seen.now;
    let pod = cluster.first("decode");
    end(pod, "Error", 1, "Internal: worker: boom\n");
    let status = &mut pod.status.as_mut().unwrap().container_statuses.as_mut().unwrap()[0];
    let running = k8s_openapi::api::core::v1::ContainerStateRunning { started_at: Some(Time(now)) };
    status.state = Some(ContainerState { running: Some(running), ..ContainerState::default() });
    assert_fault(&mut cluster, Reason::PodsCrashing, "worker: boom");
    assert!(cluster.plan().requeue.is_some(), "the plan is looked at again");
    cluster.passes(60);
    judge(&mut cluster);
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
}

#[test]
fn pods_that_no_node_takes() {
    for (message, reason) in [
        ("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", Reason::InsufficientAccelerators),
        ("0/3 nodes are available: 3 Insufficient memory.", Reason::InsufficientResources),
        (
            "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.",
            Reason::NodeSelectorUnmatched,
        ),
        ("0/3 nodes are available: 3 node(s) had volume node affinity conflict.", Reason::Unschedulable),
    ] {
        let mut cluster = starting(samples::pools());
        unscheduled(cluster.first("decode"), message);
        assert_fault(&mut cluster, reason, message);
    }
}

#[test]
fn an_accelerator_that_is_about_to_be_free_is_no_lack() {
    let mut cluster = starting(samples::pools());
    unscheduled(cluster.first("decode"), "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.");
    let drains = cluster.pods("decode")[1].clone();
    cluster.kill(&drains);
    judge(&mut cluster);
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
}

#[test]
fn a_pod_that_nobody_schedules_is_no_silent_pending() {
    let mut cluster = starting(samples::pocket());
    let pod = cluster.first("decode");
    pod.spec.as_mut().unwrap().node_name = None;
    pod.status = Some(PodStatus { phase: Some("Pending".into()), ..PodStatus::default() });
    judge(&mut cluster);
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
    let wait = cluster.plan().requeue.unwrap();
    assert!(wait.as_secs() < 15, "{wait:?}");
    cluster.passes(wait.as_secs() + 1);
    assert_fault(&mut cluster, Reason::Unschedulable, "no scheduler has looked at it");
}

fn claimed() -> Cluster {
    let model = samples::pools();
    assert!(matches!(model.spec.model.source.given(), Some(SourceRef::Claim(_))));
    starting(model)
}

#[test]
fn a_claim_that_does_not_exist_or_has_no_volume() {
    let mut cluster = claimed();
    cluster.seen.claim = ClaimState::Missing;
    assert_fault(
        &mut cluster,
        Reason::ClaimNotFound,
        "claim deepseek-v3: it does not exist in namespace models",
    );
    assert_eq!(cluster.verdict("Ready"), "False ClaimNotFound");
    let phase = |phase: &str| {
        let status = Some(PersistentVolumeClaimStatus { phase: Some(phase.into()), ..Default::default() });
        ClaimState::Found(Box::new(PersistentVolumeClaim { status, ..Default::default() }))
    };
    cluster.seen.claim = phase("Pending");
    judge(&mut cluster);
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified", "it may wait for its first pod");
    unscheduled(
        cluster.first("experts"),
        "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims.",
    );
    cluster.passes(13);
    assert_fault(
        &mut cluster,
        Reason::ClaimNotBound,
        "claim deepseek-v3: it is Pending and pods wait for its volume",
    );
    cluster.seen.claim = phase("Lost");
    assert_fault(&mut cluster, Reason::ClaimNotBound, "does not exist any more");
}

#[test]
fn a_volume_that_cannot_be_mounted() {
    let mut cluster = claimed();
    cluster.seen.claim = ClaimState::NotNamed;
    let name = cluster.pods("experts")[0].clone();
    cluster.seen.failed_mounts.insert(name, "MountVolume.SetUp failed: hostPath type check failed".into());
    assert_fault(&mut cluster, Reason::VolumeMountFailed, "hostPath type check failed");
}

#[test]
fn a_namespace_that_refuses_the_pods() {
    let mut cluster = starting(samples::pocket());
    let message = "pods \"pocket-experts-0\" is forbidden: violates PodSecurity \"restricted:latest\"";
    cluster.seen.pods.retain(|pod| !pod.metadata.name.as_ref().unwrap().contains("experts"));
    cluster.seen.refused_pods.insert("pocket-experts".into(), message.into());
    assert_fault(&mut cluster, Reason::PodsForbidden, message);
    cluster.settle();
    assert_eq!(
        cluster.verdict("Degraded"),
        "False AsSpecified",
        "what has been made since was refused before"
    );
}

#[test]
fn an_update_whose_pods_are_refused_is_no_silent_standstill() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.edit(|model| model.spec.image = Some("registry.example/cadre:2".into()));
    cluster.seen.refused_pods.insert("pocket-decode".into(), "exceeded quota: pods=7".into());
    assert_fault(&mut cluster, Reason::PodsForbidden, "Deployment pocket-decode: exceeded quota: pods=7");
}

#[test]
fn a_child_that_the_api_server_refuses() {
    let mut cluster = Cluster::new(samples::pocket());
    cluster
        .seen
        .refused_children
        .insert("Service pocket-http".into(), "namespace is being terminated".into());
    assert_fault(&mut cluster, Reason::ChildRefused, "Service pocket-http: namespace is being terminated");
}

#[test]
fn a_node_without_the_label() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.seen.nodes.get_mut("node-1").unwrap().labels.clear();
    assert_fault(&mut cluster, Reason::FailureDomainUnknown, "node node-1: it runs shards and has no label");
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified", "it is served all the same");
}

#[test]
fn a_router_that_does_not_answer_the_operator() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.coordinator.unreachable = true;
    (0..20).for_each(|_| drop(cluster.round()));
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified", "its last word counts for a while");
    (0..20).for_each(|_| drop(cluster.round()));
    assert_eq!(cluster.verdict("Ready"), "Unknown CoordinatorUnreachable");
    assert_eq!(cluster.verdict("ExpertsCovered"), "Unknown CoverageUnknown");
    assert_fault(&mut cluster, Reason::CoordinatorUnreachable, "deadline exceeded");
    cluster.coordinator.unreachable = false;
    cluster.settle();
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
}

#[test]
fn the_first_thing_to_look_at_comes_first_and_the_others_are_named() {
    let mut cluster = claimed();
    (0..2).for_each(|_| drop(cluster.round()));
    cluster.seen.claim = ClaimState::Missing;
    end(cluster.first("decode"), "OOMKilled", 137, "");
    judge(&mut cluster);
    let (_, reason, message) = cluster.condition("Degraded");
    assert_eq!(reason, "ClaimNotFound");
    assert!(message.contains("; also OutOfMemory: pod deepseek-v3-decode-"), "{message}");
}

#[test]
fn what_is_replaced_anyway_has_no_faults() {
    let mut cluster = Cluster::settled(samples::pocket());
    end(cluster.first("decode"), "OOMKilled", 137, "");
    cluster.edit(|model| model.spec.image = Some("registry.example/cadre:2".into()));
    judge(&mut cluster);
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
    assert_eq!(cluster.verdict("Progressing"), "True Updating");
}

#[test]
fn a_pod_that_its_node_refused_counts_for_nothing_and_is_told() {
    let mut cluster = Cluster::settled(samples::pocket());
    let pod = cluster.first("decode");
    let status = pod.status.as_mut().unwrap();
    status.phase = Some("Failed".into());
    status.reason = Some("Evicted".into());
    status.message = Some("The node was low on resource: memory.".into());
    status.container_statuses = None;
    set_condition(pod, "Ready", false);
    assert_fault(&mut cluster, Reason::PodsCrashing, "Evicted: The node was low on resource: memory.");
    let status = cluster.seen.model.status.as_ref().unwrap();
    assert_eq!(status.decode.as_ref().unwrap().replicas, 0);
}

#[test]
fn a_field_without_a_usable_value_is_named() {
    let mut model = samples::pocket();
    model.spec.decode.kv_cache.0 = "99999999999999999999".into();
    let mut cluster = Cluster::new(model);
    assert_fault(&mut cluster, Reason::InvalidConfiguration, "spec.decode.kvCache: quantity");
    assert!(
        cluster
            .seen
            .children
            .deployments
            .iter()
            .all(|one| one.metadata.name.as_deref() != Some("pocket-decode"))
    );
    cluster.edit(|model| model.spec.model.source = Default::default());
    assert_fault(&mut cluster, Reason::InvalidConfiguration, "spec.model.source: give exactly one");
    assert!(
        !cluster.seen.children.deployments.is_empty(),
        "what runs is not taken away for a spec that cannot be read"
    );
    assert_eq!(cluster.seen.tiers[&Tier::Decode].spec.replicas, 1);
}

#[test]
fn a_member_that_is_none_of_the_models_pods_is_told_and_takes_no_readiness() {
    let mut cluster = Cluster::settled(samples::pocket());
    let report = cluster.seen.coordinator.as_mut().unwrap();
    let mut stranger = report.status.members[0].clone();
    stranger.member.id = cadre_types::MemberId("decode-10.9.9.9".into());
    stranger.member.address = "10.9.9.9:50052".into();
    stranger.member.pod = None;
    stranger.stranger = Some("it has no pod".into());
    stranger.routable = false;
    report.status.members.push(stranger);
    judge(&mut cluster);
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified", "the router routes nothing to it");
    cluster.seen.coordinator.as_mut().unwrap().status.members.last_mut().unwrap().routable = true;
    assert_fault(
        &mut cluster,
        Reason::UnknownMember,
        "member decode-10.9.9.9 at 10.9.9.9:50052: the router routes to it",
    );
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
}

#[test]
fn the_coordinator_is_told_where_each_pod_is() {
    let mut cluster = Cluster::settled(samples::pocket());
    let (one, both) = (cluster.pods("decode")[0].clone(), cluster.pods("experts")[0].clone());
    cluster.pod(&one).status.as_mut().unwrap().pod_ip = Some("10.0.0.7".into());
    let status = cluster.pod(&both).status.as_mut().unwrap();
    status.pod_ip = Some("10.0.0.8".into());
    let ip = |ip: &str| k8s_openapi::api::core::v1::PodIP { ip: ip.into() };
    status.pod_ips = Some(vec![ip("10.0.0.8"), ip("fd00::8")]);
    let view = cluster.plan().operator_view.unwrap();
    let of = |name: &str| view.pods.iter().find(|pod| pod.pod.name == name).unwrap().ips.clone();
    assert_eq!(of(&one), ["10.0.0.7"]);
    assert_eq!(of(&both), ["10.0.0.8", "fd00::8"]);
    assert_eq!(of(&cluster.pods("router")[0]), Vec::<String>::new());
}

/// Every pod has the secret as a file that it may read, once the operator has one.
#[test]
fn pods_find_the_models_secret() {
    let mut cluster = Cluster::new(samples::pocket());
    cluster.seen.cluster_secret = Some("pocket-cluster-0123456789".into());
    cluster.settle();
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
    for pod in &cluster.seen.pods {
        let spec = serde_json::to_value(pod.spec.as_ref().unwrap()).unwrap();
        let volumes = spec["volumes"].as_array().unwrap();
        let volume = volumes.iter().find(|volume| volume["name"] == "cluster-secret").unwrap();
        assert_eq!(volume["secret"]["secretName"], "pocket-cluster-0123456789");
        assert_eq!(volume["secret"]["defaultMode"], 0o444);
        let container = &spec["containers"][0];
        let mounts = container["volumeMounts"].as_array().unwrap();
        let mount = mounts.iter().find(|mount| mount["name"] == "cluster-secret").unwrap();
        let variables = container["env"].as_array().unwrap();
        let file = variables.iter().find(|one| one["name"] == "CADRE_CLUSTER_SECRET_FILE").unwrap();
        assert_eq!(file["value"], format!("{}/secret", mount["mountPath"].as_str().unwrap()));
        let shown = spec.to_string();
        assert!(!shown.contains("--cluster-secret"), "{shown}");
    }
}
