//! From any state that edits, faults and other people leave behind, plans lead to the same children, and then to
//! nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_k8s_api::{MoEModel, Tier, model::Numerics};
use cadre_types::PodRef;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proptest::{collection::vec, prelude::*};
use serde_json::{Value, json};

use super::{
    cluster::{Cluster, is_empty},
    samples,
};

/// Something that happens between two plans.
#[derive(Clone, Debug)]
enum Happening {
    Rounds(usize),
    /// Without the operator.
    Steps(usize),
    Scale(Tier, i32),
    Shards(i32),
    Replicas(Tier, i32),
    Copies(i32),
    Image(u8),
    Numerics(bool),
    Budget(i32),
    KillPod(usize),
    LoseMember(usize),
    DeleteChild(usize),
    ChangeChild(usize),
    Orphan(usize),
    ForgetStatus,
    BreakStream(bool),
    BreakImage(bool),
    Silence(usize, bool),
    OperatorRestarts,
    Wait(u64),
}

fn tier() -> impl Strategy<Value = Tier> {
    prop::sample::select(&Tier::ALL[..])
}

fn happening() -> impl Strategy<Value = Happening> {
    use Happening::{
        BreakImage, BreakStream, Budget, ChangeChild, Copies, DeleteChild, ForgetStatus, Image, KillPod,
        LoseMember, OperatorRestarts, Orphan, Replicas, Rounds, Scale, Shards, Silence, Steps, Wait,
    };
    prop_oneof![
        6 => (1..6_usize).prop_map(Rounds),
        2 => (1..4_usize).prop_map(Steps),
        4 => (tier(), 0..10_i32).prop_map(|(tier, replicas)| Scale(tier, replicas)),
        2 => prop::sample::select(&[2, 4, 8][..]).prop_map(Shards),
        2 => (tier(), 0..4_i32).prop_map(|(tier, replicas)| Replicas(tier, replicas)),
        1 => (1..3_i32).prop_map(Copies),
        3 => (0..3_u8).prop_map(Image),
        1 => any::<bool>().prop_map(Happening::Numerics),
        1 => (0..20_i32).prop_map(Budget),
        4 => (0..32_usize).prop_map(KillPod),
        2 => (0..32_usize).prop_map(LoseMember),
        2 => (0..32_usize).prop_map(DeleteChild),
        2 => (0..32_usize).prop_map(ChangeChild),
        1 => (0..32_usize).prop_map(Orphan),
        1 => Just(ForgetStatus),
        2 => any::<bool>().prop_map(BreakStream),
        1 => any::<bool>().prop_map(BreakImage),
        1 => (0..3_usize, any::<bool>()).prop_map(|(node, ready)| Silence(node, ready)),
        1 => Just(OperatorRestarts),
        1 => (1..100_u64).prop_map(Wait),
    ]
}

fn happens(cluster: &mut Cluster, what: Happening) {
    match what {
        Happening::Rounds(rounds) => (0..rounds).for_each(|_| drop(cluster.round())),
        Happening::Steps(steps) => (0..steps).for_each(|_| cluster.step()),
        Happening::Scale(tier, replicas) => {
            if cluster.seen.tiers.contains_key(&tier) {
                cluster.scale(tier, replicas.max(i32::from(tier == Tier::Experts)));
            }
        }
        Happening::Shards(shards) => cluster.edit(|model| model.spec.experts.shards = shards),
        Happening::Replicas(Tier::Prefill, replicas) => {
            cluster.edit(|model| model.spec.prefill.replicas = replicas)
        }
        Happening::Replicas(_, replicas) => cluster.edit(|model| model.spec.decode.replicas = replicas),
        Happening::Copies(copies) => cluster.edit(|model| model.spec.experts.min_copies = copies),
        Happening::Image(image) => {
            cluster.edit(|model| model.spec.image = Some(format!("registry.example/cadre:{image}")));
        }
        Happening::Numerics(f32) => cluster.edit(|model| {
            model.spec.model.numerics = if f32 { Numerics::F32 } else { Numerics::Bf16 };
        }),
        Happening::Budget(extra) => cluster.edit(|model| budget(model, extra)),
        Happening::KillPod(pod) => {
            if let Some(name) = nth(&cluster.seen.pods, pod).and_then(|pod| pod.metadata.name.clone()) {
                cluster.kill(&name);
            }
        }
        Happening::LoseMember(member) => lose_member(cluster, member),
        Happening::DeleteChild(child) => delete_child(cluster, child),
        Happening::ChangeChild(child) => change_child(cluster, child),
        Happening::Orphan(child) => {
            let metas = metas(cluster);
            let count = metas.len();
            if let Some(meta) = metas.into_iter().nth(child % count.max(1)) {
                meta.owner_references = None;
            }
        }
        Happening::ForgetStatus => cluster.seen.model.status = None,
        Happening::BreakStream(broken) => cluster.coordinator.unreachable = broken,
        Happening::BreakImage(broken) => {
            cluster.broken_image = broken.then(|| "registry.example/cadre:1".to_owned());
        }
        Happening::Silence(node, ready) => {
            cluster.seen.nodes.get_mut(&format!("node-{node}")).unwrap().ready = ready;
        }
        Happening::OperatorRestarts => {
            cluster.seen.coordinator = None;
            cluster.seen.watching_since = cluster.seen.now;
        }
        Happening::Wait(seconds) => cluster.passes(seconds),
    }
}

fn nth<T>(list: &[T], index: usize) -> Option<&T> {
    list.get(index % list.len().max(1))
}

/// Accelerators for workers, with so many more in the budget than are declared.
fn budget(model: &mut MoEModel, extra: i32) {
    let accelerator = cadre_k8s_api::model::Accelerator { resource: "nvidia.com/gpu".into(), count: 1 };
    model.spec.decode.accelerator = Some(accelerator);
    let gpus = model.spec.decode.replicas + extra;
    model.spec.budget = Some(cadre_k8s_api::model::BudgetSpec { gpus });
}

fn lose_member(cluster: &mut Cluster, member: usize) {
    let Some(report) = cluster.seen.coordinator.as_mut() else { return };
    let pod: Option<PodRef> =
        nth(&report.status.members, member).and_then(|member| member.member.pod.clone());
    report.status.members.retain(|member| member.member.pod != pod);
}

fn metas(cluster: &mut Cluster) -> Vec<&mut ObjectMeta> {
    let seen = &mut cluster.seen;
    let mut metas: Vec<&mut ObjectMeta> = Vec::new();
    metas.extend(seen.children.services.iter_mut().map(|one| &mut one.metadata));
    metas.extend(seen.children.config_maps.iter_mut().map(|one| &mut one.metadata));
    metas.extend(seen.children.disruption_budgets.iter_mut().map(|one| &mut one.metadata));
    metas.extend(seen.children.service_accounts.iter_mut().map(|one| &mut one.metadata));
    metas.extend(seen.children.deployments.iter_mut().map(|one| &mut one.metadata));
    metas
}

fn delete_child(cluster: &mut Cluster, child: usize) {
    let seen = &mut cluster.seen;
    match child % 6 {
        0 => drop(seen.children.services.pop()),
        1 => seen.children.config_maps.clear(),
        2 => drop(seen.children.disruption_budgets.pop()),
        3 => drop(seen.children.service_accounts.pop()),
        4 => drop(seen.children.deployments.pop().map(|gone| {
            let name = gone.metadata.name.unwrap();
            seen.pods.retain(|pod| !pod.metadata.name.as_ref().unwrap().starts_with(&name));
        })),
        _ => drop(seen.tiers.pop_last()),
    }
}

fn change_child(cluster: &mut Cluster, child: usize) {
    let seen = &mut cluster.seen;
    match child % 4 {
        0 => seen.children.services.iter_mut().for_each(|one| one.spec.as_mut().unwrap().selector = None),
        1 => seen.children.config_maps.iter_mut().for_each(|one| one.data = None),
        2 => {
            seen.children.deployments.iter_mut().for_each(|one| one.spec.as_mut().unwrap().replicas = Some(3))
        }
        _ => seen.children.deployments.iter_mut().for_each(|one| one.metadata.annotations = None),
    }
}

/// The children without what the API server adds.
fn children(cluster: &Cluster) -> Value {
    fn plain<T: serde::Serialize>(objects: &[T]) -> Vec<Value> {
        let mut plain: Vec<Value> =
            objects.iter().map(|object| serde_json::to_value(object).unwrap()).collect();
        for object in &mut plain {
            object.as_object_mut().unwrap().remove("status");
            let meta = object["metadata"].as_object_mut().unwrap();
            for key in ["uid", "resourceVersion", "generation", "creationTimestamp"] {
                meta.remove(key);
            }
        }
        plain.sort_by_key(|object| object["metadata"]["name"].to_string());
        plain
    }
    let seen = &cluster.seen;
    let tiers: Vec<_> = seen.tiers.values().cloned().collect();
    json!([
        plain(&tiers),
        plain(&seen.children.deployments),
        plain(&seen.children.stateful_sets),
        plain(&seen.children.services),
        plain(&seen.children.config_maps),
        plain(&seen.children.service_accounts),
        plain(&seen.children.disruption_budgets),
    ])
}

/// Everything that was broken is whole again.
fn repair(cluster: &mut Cluster) {
    cluster.coordinator.unreachable = false;
    cluster.broken_image = None;
    cluster.seen.nodes.values_mut().for_each(|node| node.ready = true);
    // Pods that could not start are started by their kubelets now.
    for pod in &mut cluster.seen.pods {
        let waits = pod.status.as_ref().is_some_and(|status| status.phase.as_deref() == Some("Pending"));
        if waits {
            pod.status = None;
        }
    }
    // A spec that admission would have refused is not what this is about.
    let model = &mut cluster.seen.model;
    if let Some(budget) = &mut model.spec.budget {
        budget.gpus = budget.gpus.max(model.spec.decode.replicas);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_state_comes_to_the_same_rest(happenings in vec(happening(), 1..24)) {
        let mut cluster = Cluster::new(samples::pocket());
        for what in happenings {
            happens(&mut cluster, what);
        }
        repair(&mut cluster);
        cluster.settle();
        let plan = cluster.plan();
        prop_assert!(is_empty(&plan), "{}", crate::plan::render(&plan));
        prop_assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
        prop_assert_eq!(cluster.verdict("Progressing"), "False AsSpecified");

        let mut model = cluster.seen.model.clone();
        model.status = None;
        let mut fresh = Cluster::new(model);
        fresh.settle();
        for (tier, object) in cluster.seen.tiers.clone() {
            if fresh.seen.tiers[&tier].spec.replicas != object.spec.replicas {
                fresh.scale(tier, object.spec.replicas);
            }
        }
        fresh.settle();
        prop_assert_eq!(children(&cluster), children(&fresh));
    }
}
