//! Workers beside shards: planned, counted, admitted and drained as two members of one pod.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_k8s_api::{
    MoEModel, Tier,
    model::{ShardWorkerSpec, WorkerLimits},
    names::{ROUTABLE_GATE, label},
};
use cadre_types::MemberDevice;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde_json::{Value, json};

use super::{
    cluster::{Cluster, component_of, template_of},
    samples,
};

/// The pocket sample with so many decode workers of their own, and one beside each of 4 shards.
fn model(decode: i32) -> MoEModel {
    let mut model = samples::pocket();
    model.spec.decode.replicas = decode;
    model.spec.experts.worker = Some(ShardWorkerSpec {
        kv_cache: Quantity("64Mi".into()),
        limits: WorkerLimits { threads: Some(2), ..WorkerLimits::default() },
    });
    model
}

fn shard_pod(cluster: &Cluster) -> Value {
    let set = &cluster.seen.children.stateful_sets[0];
    serde_json::to_value(set.spec.as_ref().unwrap().template.spec.as_ref().unwrap()).unwrap()
}

fn flags(pod: &Value) -> Vec<String> {
    serde_json::from_value(pod["containers"][0]["args"].clone()).unwrap()
}

fn flag(args: &[String], name: &str) -> String {
    args[args.iter().position(|arg| arg == name).unwrap() + 1].clone()
}

#[test]
fn shard_and_worker_are_one_process_of_the_shards_pod() {
    let cluster = Cluster::settled(model(0));
    let pod = shard_pod(&cluster);
    let args = flags(&pod);
    assert_eq!(args[0], "worker");
    for (name, value) in [
        ("--role", "decode"),
        ("--listen", "[::]:50052"),
        ("--expert-listen", "[::]:50053"),
        ("--kv-bytes", "67108864"),
        ("--threads", "2"),
        ("--device", "cpu"),
        ("--drain-timeout", "30"),
        ("--expert-drain-timeout", "5"),
    ] {
        assert_eq!(flag(&args, name), value, "{name}");
    }
    let env = pod["containers"][0]["env"].as_array().unwrap();
    let index = env.iter().find(|variable| variable["name"] == "CADRE_WITH_EXPERT").unwrap();
    assert_eq!(
        index["valueFrom"]["fieldRef"]["fieldPath"],
        "metadata.labels['apps.kubernetes.io/pod-index']"
    );
    assert!(!env.iter().any(|variable| variable["name"] == "CADRE_SHARD"));
    let ports: Vec<&Value> =
        pod["containers"][0]["ports"].as_array().unwrap().iter().map(|port| &port["containerPort"]).collect();
    assert_eq!(ports, [&json!(50052), &json!(50053), &json!(9090)]);
    assert!(pod["terminationGracePeriodSeconds"].as_i64().unwrap() >= 30 + 5 + 5, "both drain");
}

#[test]
fn the_model_serves_with_no_other_decode_worker_and_counts_those() {
    let mut cluster = Cluster::settled(model(0));
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
    let decode = cluster.seen.model.status.as_ref().unwrap().decode.clone().unwrap();
    assert_eq!((decode.desired, decode.replicas, decode.ready), (4, 4, 4));
    let tier = cluster.seen.tiers[&Tier::Decode].status.clone().unwrap();
    assert_eq!((tier.desired, tier.replicas), (0, 0), "the tier scales its own pods");
    cluster.scale(Tier::Decode, 2);
    cluster.settle();
    let decode = cluster.seen.model.status.as_ref().unwrap().decode.clone().unwrap();
    assert_eq!((decode.desired, decode.ready), (6, 6));
    // 64 slots on 8 shards: the workers come with them.
    cluster.scale(Tier::Experts, 8);
    cluster.settle();
    assert_eq!(cluster.seen.model.status.as_ref().unwrap().decode.as_ref().unwrap().summary, "10/10");
}

#[test]
fn a_pod_is_routable_when_both_of_its_members_are() {
    let mut cluster = Cluster::new(model(1));
    cluster.coordinator.broken_beside = true;
    for _ in 0..40 {
        cluster.round();
    }
    let gate = |cluster: &mut Cluster| {
        let conditions = cluster.first("experts").status.as_ref().unwrap().conditions.clone().unwrap();
        conditions.iter().any(|one| one.type_ == ROUTABLE_GATE && one.status == "True")
    };
    assert!(!gate(&mut cluster));
    let status = cluster.seen.model.status.clone().unwrap();
    assert_eq!(status.experts.unwrap().ready, 4, "the shards serve");
    assert_eq!(status.decode.unwrap().summary, "1/5");
    cluster.coordinator.broken_beside = false;
    cluster.settle();
    assert!(gate(&mut cluster));
}

#[test]
fn without_prefill_workers_they_compute_prompts_and_change_one_after_the_other() {
    let mut cluster = Cluster::settled(model(0));
    cluster.edit(|model| model.spec.prefill.replicas = 0);
    cluster.settle();
    assert_eq!(flag(&flags(&shard_pod(&cluster)), "--role"), "both");
    assert_eq!(cluster.replicas("pocket-prefill"), 0);
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
    let wanted = cluster.seen.children.stateful_sets[0].spec.as_ref().unwrap().template.clone();
    let hash = wanted.metadata.unwrap().labels.unwrap()[label::TEMPLATE_HASH].clone();
    let mut shards = cluster.seen.pods.iter().filter(|pod| component_of(pod) == "experts");
    assert!(shards.all(|pod| template_of(pod) == hash));
}

#[test]
fn who_reaches_a_shard_reaches_the_worker_beside_it() {
    let cluster = Cluster::settled(model(0));
    let policies = &cluster.seen.children.network_policies;
    let ports = |name: &str| -> Vec<Value> {
        let policy = policies.iter().find(|one| one.metadata.name.as_deref() == Some(name)).unwrap();
        let rule = serde_json::to_value(&policy.spec.as_ref().unwrap().ingress.as_ref().unwrap()[0]).unwrap();
        let values = rule["from"][0]["podSelector"]["matchExpressions"][0]["values"].clone();
        assert_eq!(values, json!(["router", "prefill", "decode", "experts"]), "{name}");
        rule["ports"].as_array().unwrap().iter().map(|port| port["port"].clone()).collect()
    };
    assert_eq!(ports("pocket-experts"), [json!(50053), json!(50052)]);
    assert_eq!(ports("pocket-prefill"), [json!(50052)]);
}

#[test]
fn the_card_of_shard_and_worker_counts_once_and_its_noise_is_not_written() {
    let mut cluster = Cluster::new(model(1));
    const GIB: u64 = 1 << 30;
    let card = |used: u64| MemberDevice {
        device: "cuda:0".into(),
        name: "NVIDIA H200".into(),
        architecture: "sm_90".into(),
        memory_used: used,
        memory_total: 140 * GIB,
    };
    cluster.coordinator.device = Some(card(61 * GIB));
    cluster.settle();
    let status = cluster.seen.model.status.clone().unwrap().accelerators.unwrap();
    // One prefill worker, one decode worker of its own, four shards with one beside each.
    assert_eq!(status.summary, "6 x NVIDIA H200, 61.0/140.0 GiB");
    let counts: Vec<_> = status.cards.iter().map(|card| (card.tier, card.count)).collect();
    assert_eq!(counts, [(Tier::Prefill, 1), (Tier::Decode, 1), (Tier::Experts, 4)]);
    let tier = cluster.seen.tiers[&Tier::Experts].status.clone().unwrap();
    assert_eq!(tier.accelerators.as_deref(), Some("4 x NVIDIA H200, 61.0/140.0 GiB"));
    let summary = |cluster: &mut Cluster, used| {
        cluster.coordinator.device = Some(card(used));
        cluster.settle();
        cluster.seen.model.status.clone().unwrap().accelerators.unwrap().summary
    };
    assert_eq!(summary(&mut cluster, 62 * GIB), "6 x NVIDIA H200, 61.0/140.0 GiB", "less than a hundredth");
    assert_eq!(summary(&mut cluster, 63 * GIB), "6 x NVIDIA H200, 63.0/140.0 GiB");
    cluster.coordinator.device = Some(MemberDevice { device: "cpu".into(), ..card(GIB) });
    cluster.settle();
    assert_eq!(cluster.seen.model.status.clone().unwrap().accelerators, None);
}
