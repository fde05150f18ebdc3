//! Change: scaling, updates, in order and without taking away what is needed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use cadre_k8s_api::{Tier, model::Numerics};
use cadre_types::{Layout, Role};

use super::{
    cluster::{Cluster, is_empty, is_ready, name, template_of},
    samples,
};
use crate::plan::{Action, Plan};

const NEW_IMAGE: &str = "ghcr.io/cadre-dev/cadre:0.2.0";

fn update(cluster: &mut Cluster) {
    cluster.edit(|model| model.spec.image = Some(NEW_IMAGE.into()));
}

fn deleted(plan: &Plan) -> Vec<String> {
    let name = |action: &Action| match action {
        Action::Delete { name, .. } => Some(name.clone()),
        _ => None,
    };
    plan.actions.iter().filter_map(name).collect()
}

/// Shards in the order in which the plan deletes them, one list per plan that deletes some.
fn deletions(plans: &[Plan]) -> Vec<Vec<String>> {
    plans.iter().map(deleted).filter(|names| !names.is_empty()).collect()
}

fn layout(cluster: &Cluster) -> Layout {
    cluster.plan().operator_view.unwrap().layout
}

#[test]
fn a_new_model_comes_up_and_then_nothing_is_written() {
    let mut cluster = Cluster::new(samples::pocket());
    cluster.settle();
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
    assert_eq!(cluster.verdict("Progressing"), "False AsSpecified");
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
    assert_eq!(cluster.verdict("ExpertsCovered"), "True AsSpecified");
    assert_eq!(cluster.verdict("ScalingLimited"), "False NotLimited");
    let status = cluster.seen.model.status.clone().unwrap();
    assert_eq!(status.experts.unwrap().summary, "4/4");
    assert_eq!((status.placement_epoch, status.loading.unwrap().summary.as_str()), (Some(1), "100%"));
    let plan = cluster.plan();
    assert!(is_empty(&plan) && plan.requeue.is_none());
    let tier = cluster.seen.tiers[&Tier::Decode].status.clone().unwrap();
    assert_eq!((tier.replicas, tier.ready, tier.desired), (1, 1, 1));
    assert_eq!(tier.selector, "cadre.dev/model=pocket,app.kubernetes.io/component=decode");
}

#[test]
fn shards_are_added_first_and_serve_after_the_flip() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.scale(Tier::Experts, 8);
    let first = cluster.round();
    assert_eq!(first.operator_view.unwrap().layout.shards, 8);
    assert_eq!(cluster.shards(), 8);
    cluster.until("scaling", |cluster| cluster.verdict("Progressing") == "True Scaling");
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified", "served meanwhile");
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
    cluster.settle();
    assert_eq!(cluster.coordinator.in_force.unwrap().shards, 8);
    assert_eq!(cluster.seen.model.status.as_ref().unwrap().experts.as_ref().unwrap().summary, "8/8");
}

#[test]
fn shards_are_taken_away_only_after_the_flip() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.scale(Tier::Experts, 8);
    cluster.settle();
    cluster.coordinator.stuck = true;
    cluster.scale(Tier::Experts, 4);
    for _ in 0..10 {
        cluster.round();
        assert_eq!((cluster.shards(), layout(&cluster).shards), (8, 4), "they hold what is in force");
    }
    assert_eq!(cluster.verdict("Progressing"), "True Scaling");
    cluster.coordinator.stuck = false;
    cluster.settle();
    assert_eq!((cluster.shards(), cluster.pods("experts").len()), (4, 4));
    assert_eq!(cluster.verdict("Progressing"), "False AsSpecified");
}

#[test]
fn shards_stay_while_the_coordinator_cannot_be_asked() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.scale(Tier::Experts, 8);
    cluster.settle();
    cluster.coordinator.unreachable = true;
    cluster.scale(Tier::Experts, 4);
    for _ in 0..60 {
        cluster.round();
        assert_eq!(cluster.shards(), 8);
    }
}

#[test]
fn a_layout_that_was_never_in_force_is_given_up_at_once() {
    let mut cluster = Cluster::new(samples::pocket());
    cluster.edit(|model| model.spec.experts.shards = 8);
    cluster.broken_image = model_image(&cluster);
    for _ in 0..5 {
        cluster.round();
    }
    assert_eq!(cluster.shards(), 8);
    cluster.edit(|model| model.spec.experts.shards = 4);
    cluster.round();
    assert_eq!(cluster.shards(), 4, "no shard serves, and no router ever said that one does");
}

fn model_image(cluster: &Cluster) -> Option<String> {
    cluster.seen.model.spec.image.clone()
}

#[test]
fn more_copies_are_another_layout_and_no_other_pod() {
    let mut cluster = Cluster::settled(samples::pocket());
    let before: BTreeSet<String> =
        cluster.seen.pods.iter().map(|pod| pod.metadata.uid.clone().unwrap()).collect();
    cluster.edit(|model| model.spec.experts.redundant_slots = 64);
    cluster.settle();
    assert_eq!(cluster.coordinator.in_force.unwrap().redundant_slots, 64);
    let after: BTreeSet<String> =
        cluster.seen.pods.iter().map(|pod| pod.metadata.uid.clone().unwrap()).collect();
    assert_eq!(before, after);
}

#[test]
fn the_models_number_is_taken_over_when_it_changes_and_only_then() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.scale(Tier::Decode, 3);
    cluster.settle();
    assert_eq!(cluster.replicas("pocket-decode"), 3, "the last writer wins");
    cluster.edit(|model| model.spec.drain_seconds = 31);
    cluster.settle();
    assert_eq!(cluster.replicas("pocket-decode"), 3, "another field of the model is no number");
    cluster.edit(|model| model.spec.decode.replicas = 2);
    cluster.settle();
    let tier = &cluster.seen.tiers[&Tier::Decode].spec;
    assert_eq!((tier.replicas, tier.declared_replicas, cluster.replicas("pocket-decode")), (2, 2, 2));
}

#[test]
fn a_tiers_number_is_written_only_as_it_was_seen() {
    let mut cluster = Cluster::settled(samples::pocket());
    let version = cluster.seen.tiers[&Tier::Decode].metadata.resource_version.clone();
    cluster.edit(|model| model.spec.decode.replicas = 2);
    let plan = cluster.plan();
    let tier = plan.actions.iter().find_map(|action| match action {
        Action::Apply { object, .. } if object.types.as_ref().unwrap().kind == "MoETier" => Some(object),
        _ => None,
    });
    assert_eq!(tier.unwrap().metadata.resource_version, version);
}

#[test]
fn a_tier_that_gets_less_than_it_asks_for_says_so() {
    let mut cluster = Cluster::settled(samples::pools());
    cluster.scale(Tier::Decode, 20);
    cluster.settle();
    assert_eq!(cluster.replicas("deepseek-v3-decode"), 14);
    assert_eq!(cluster.verdict("ScalingLimited"), "True BudgetExceeded");
    let tier = cluster.seen.tiers[&Tier::Decode].status.clone().unwrap();
    assert_eq!((tier.desired, tier.conditions[0].status.as_str()), (14, "True"));
    let other = cluster.seen.tiers[&Tier::Prefill].status.clone().unwrap();
    assert_eq!(other.conditions[0].reason, "NotLimited");
    assert_eq!(cluster.seen.tiers[&Tier::Decode].spec.replicas, 20, "what is asked for is not corrected");
}

#[test]
fn a_new_image_replaces_one_shard_at_a_time_after_router_and_workers() {
    let mut cluster = Cluster::settled(samples::pocket());
    update(&mut cluster);
    let plans = cluster.until("the update", |cluster| {
        let templates: BTreeSet<String> = cluster.seen.pods.iter().map(pod_image).collect();
        templates == BTreeSet::from([NEW_IMAGE.to_owned()]) && cluster.pods("experts").len() == 4
    });
    let order: Vec<String> = (0..4).rev().map(|shard| format!("pocket-experts-{shard}")).collect();
    let each: Vec<Vec<String>> = order.into_iter().map(|name| vec![name]).collect();
    assert_eq!(deletions(&plans), each);
    cluster.settle();
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
}

fn pod_image(pod: &k8s_openapi::api::core::v1::Pod) -> String {
    pod.spec.as_ref().unwrap().containers[0].image.clone().unwrap()
}

#[test]
fn no_shard_goes_while_another_is_missing() {
    let mut cluster = Cluster::settled(samples::pocket());
    update(&mut cluster);
    cluster.until("the shards' turn", |cluster| !deleted(&cluster.plan()).is_empty());
    let waiting = deleted(&cluster.plan());
    assert_eq!(waiting, ["pocket-experts-3"]);
    cluster.kill("pocket-experts-1");
    assert_eq!(deleted(&cluster.plan()), Vec::<String>::new());
    cluster.round();
    let (_, reason, message) = cluster.condition("Progressing");
    assert_eq!(reason, "Updating");
    assert!(message.contains("the next shard waits: pocket-experts-1 drains"), "{message}");
    cluster.settle();
}

#[test]
fn with_one_copy_of_each_expert_shards_are_still_replaced_one_at_a_time() {
    let mut model = samples::pocket();
    (model.spec.experts.min_copies, model.spec.experts.redundant_slots) = (1, 0);
    let mut cluster = Cluster::settled(model);
    update(&mut cluster);
    let plans = cluster.until("the update", |cluster| {
        assert!(cluster.pods("experts").len() >= 3, "more than one shard is away");
        cluster.seen.pods.iter().all(|pod| pod_image(pod) == NEW_IMAGE)
    });
    assert!(deletions(&plans).iter().all(|names| names.len() == 1));
    assert_eq!(deletions(&plans).len(), 4);
    cluster.settle();
}

#[test]
fn a_router_of_a_silent_node_is_removed_when_another_one_runs() {
    let mut cluster = Cluster::settled(samples::pocket());
    let lost = cluster.pods("router")[0].clone();
    let node = cluster.pod(&lost).spec.as_ref().unwrap().node_name.clone().unwrap();
    cluster.seen.nodes.get_mut(&node).unwrap().ready = false;
    cluster.kill(&lost);
    cluster.until("the lost router to be removed", |cluster| {
        cluster.seen.pods.iter().all(|pod| name(&pod.metadata) != lost)
    });
    assert_eq!(cluster.pods("router").len(), 1);
    cluster.settle();
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
}

#[test]
fn a_victim_is_withdrawn_in_the_plan_that_deletes_it() {
    let mut cluster = Cluster::settled(samples::pocket());
    update(&mut cluster);
    cluster.until("the shards' turn", |cluster| !deleted(&cluster.plan()).is_empty());
    let view = cluster.plan().operator_view.unwrap();
    let withdrawn: Vec<&str> =
        view.pods.iter().filter(|pod| pod.withdrawn).map(|pod| pod.pod.name.as_str()).collect();
    assert_eq!(withdrawn, ["pocket-experts-3"]);
    assert!(view.pods.is_sorted_by_key(|pod| pod.pod.uid.clone()));
    assert!(
        view.pods.iter().all(|pod| pod.domain.as_ref().is_some_and(|domain| domain.starts_with("node-")))
    );
}

#[test]
fn another_checkpoint_replaces_all_shards_at_once_when_the_old_router_is_gone() {
    let mut cluster = Cluster::settled(samples::pocket());
    let old = template_of(cluster.first("router"));
    let worker = template_of(cluster.first("decode"));
    cluster.edit(|model| model.spec.model.numerics = Numerics::F32);
    cluster.until("the old router to be gone", |cluster| {
        let there = cluster.seen.pods.iter().any(|pod| template_of(pod) == old);
        let held = cluster.deployment("pocket-decode").spec.as_ref().unwrap().template.metadata.clone();
        let template = held.unwrap().labels.unwrap()["cadre.dev/template-hash"].clone();
        assert!(
            !there || (template == worker && deleted(&cluster.plan()).is_empty()),
            "requests in flight end first"
        );
        !there
    });
    let plans = cluster.until("all shards", |cluster| deleted(&cluster.plan()).len() == 4);
    assert_eq!(deletions(&plans), Vec::<Vec<String>>::new());
    assert_eq!(deleted(&cluster.plan()).len(), 4);
    cluster.settle();
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
}

#[test]
fn a_template_that_does_not_work_costs_one_shard_and_is_repaired() {
    let mut cluster = Cluster::settled(samples::pocket());
    // Only the shards' template: router and workers would stop a new image earlier.
    let priority = |cluster: &mut Cluster, name: &str| {
        cluster.edit(|model| model.spec.experts.pod.priority_class_name = Some(name.into()));
    };
    priority(&mut cluster, "wrong");
    cluster.broken_shards = true;
    for _ in 0..30 {
        cluster.round();
        let down = cluster.pods("experts").iter().filter(|name| !is_up(&cluster, name)).count();
        assert!(down <= 1, "{down} shards down");
        assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
    }
    assert_eq!(cluster.verdict("Degraded"), "True ImagePullFailed");
    assert!(cluster.condition("Progressing").2.contains("the next shard waits: shard 3 is not routable"));
    priority(&mut cluster, "right");
    cluster.broken_shards = false;
    cluster.settle();
    assert_eq!(
        (cluster.verdict("Ready"), cluster.verdict("Degraded")),
        ("True AsSpecified".into(), "False AsSpecified".into())
    );
}

fn is_up(cluster: &Cluster, pod: &str) -> bool {
    let found = cluster.seen.pods.iter().find(|one| one.metadata.name.as_deref() == Some(pod)).unwrap();
    cluster.coordinator.is_routable(found)
}

/// Nothing that serves goes before what replaces it is up, whatever is wrong with what replaces it.
#[test]
fn a_wrong_image_costs_nothing_and_the_right_one_repairs_it() {
    const TYPO: &str = "registry.example/typo:1";
    let mut accelerated = samples::pools();
    accelerated.spec.experts.shards = 8;
    for model in [samples::pocket(), accelerated] {
        let mut cluster = Cluster::settled(model);
        let before: BTreeSet<String> =
            cluster.seen.pods.iter().map(|pod| pod.metadata.uid.clone().unwrap()).collect();
        cluster.broken_image = Some(TYPO.into());
        cluster.edit(|model| model.spec.image = Some(TYPO.into()));
        for _ in 0..30 {
            let plan = cluster.round();
            assert_eq!(deleted(&plan), Vec::<String>::new(), "no shard is touched");
            assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
            let up = |uid: &String| {
                let pod = cluster.seen.pods.iter().find(|pod| pod.metadata.uid.as_ref() == Some(uid));
                pod.is_some_and(|pod| is_ready(pod) && pod.metadata.deletion_timestamp.is_none())
            };
            assert!(before.iter().all(up), "a pod that served is gone");
        }
        let (status, reason, message) = cluster.condition("Degraded");
        assert_eq!((status.as_str(), reason.as_str()), ("True", "ImagePullFailed"));
        assert!(message.contains(TYPO), "{message}");
        update(&mut cluster);
        cluster.settle();
        assert_eq!(
            (cluster.verdict("Ready"), cluster.verdict("Degraded")),
            ("True AsSpecified".into(), "False AsSpecified".into())
        );
        assert!(cluster.seen.pods.iter().all(|pod| pod_image(pod) == NEW_IMAGE));
    }
}

/// The same of whatever else keeps a router from starting: here a pod that no node takes.
#[test]
fn the_old_router_goes_once_its_successor_runs_and_never_two_have_members() {
    let mut cluster = Cluster::settled(samples::pocket());
    let old = cluster.pods("router");
    let selector = |cluster: &Cluster| {
        let mut services = cluster.seen.children.services.iter();
        let found = services.find(|one| one.metadata.name.as_deref() == Some("pocket-coordinator")).unwrap();
        found.spec.as_ref().unwrap().selector.as_ref().unwrap()["cadre.dev/template-hash"].clone()
    };
    let unavailable = |cluster: &Cluster| {
        let strategy = cluster.deployment("pocket-router").spec.as_ref().unwrap().strategy.clone();
        format!("{:?}", strategy.unwrap().rolling_update.unwrap().max_unavailable.unwrap())
    };
    let before = selector(&cluster);
    assert_eq!(before, template_of(cluster.first("router")));
    cluster.edit(|model| {
        model.spec.router.pod.node_selector = [("pool".to_owned(), "none".to_owned())].into();
    });
    cluster.unschedulable = Some("pool".into());
    for _ in 0..20 {
        cluster.round();
        assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
        assert_eq!((selector(&cluster), unavailable(&cluster).as_str()), (before.clone(), "Int(0)"));
        assert!(cluster.pods("router").contains(&old[0]));
    }
    assert_eq!(cluster.verdict("Degraded"), "True NodeSelectorUnmatched");
    cluster.unschedulable = None;
    cluster.until("the successor to run", |cluster| unavailable(cluster) == "Int(1)");
    assert_eq!(selector(&cluster), before, "members stay with the old router");
    cluster.until("the old router to drain", |cluster| !cluster.pods("router").contains(&old[0]));
    cluster.settle();
    assert_eq!(selector(&cluster), template_of(cluster.first("router")));
    assert_ne!(selector(&cluster), before);
    assert_eq!((cluster.pods("router").len(), unavailable(&cluster).as_str()), (1, "Int(0)"));
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
}

#[test]
fn quick_edits_end_at_the_last_one() {
    let mut cluster = Cluster::settled(samples::pocket());
    let before: BTreeSet<String> = cluster.seen.pods.iter().map(template_of).collect();
    for image in ["a", "b", "c"] {
        cluster.edit(|model| model.spec.image = Some(format!("registry.example/{image}:1")));
        cluster.round();
    }
    cluster.edit(|model| *model = edited_back(model));
    cluster.settle();
    let after: BTreeSet<String> = cluster.seen.pods.iter().map(template_of).collect();
    assert_eq!(before, after);
    assert_eq!(cluster.verdict("Progressing"), "False AsSpecified");
}

fn edited_back(model: &cadre_k8s_api::MoEModel) -> cadre_k8s_api::MoEModel {
    let mut model = model.clone();
    model.spec.image = samples::pocket().spec.image;
    model
}

#[test]
fn prefill_goes_to_zero_only_after_decode_workers_compute_prompts() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.scale(Tier::Prefill, 0);
    let plans = cluster.until("no prefill", |cluster| {
        let both = |cluster: &Cluster| {
            let report = cluster.seen.coordinator.as_ref().unwrap();
            report.status.members.iter().any(|one| one.routable && one.member.role == Role::Both)
        };
        let gone = cluster.replicas("pocket-prefill") == 0;
        assert!(!gone || both(cluster), "prefill was taken away from a decode worker that needs it");
        assert!(cluster.seen.coordinator.as_ref().unwrap().status.serving);
        gone
    });
    assert!(plans.len() > 2);
    cluster.settle();
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
}

#[test]
fn decode_workers_compute_prompts_until_a_prefill_worker_is_routable() {
    let mut model = samples::pocket();
    model.spec.prefill.replicas = 0;
    let mut cluster = Cluster::settled(model);
    cluster.scale(Tier::Prefill, 1);
    for _ in 0..40 {
        cluster.round();
        assert!(cluster.seen.coordinator.as_ref().unwrap().status.serving);
    }
    cluster.settle();
    let args = cluster.first("decode").spec.as_ref().unwrap().containers[0].args.clone().unwrap();
    assert_eq!(args[..3], ["worker", "--role", "decode"]);
}

#[test]
fn a_model_that_is_deleted_is_left_to_the_garbage_collector() {
    let mut cluster = Cluster::settled(samples::pocket());
    let now = cluster.seen.now;
    cluster.seen.model.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now));
    let plan = cluster.plan();
    assert!(plan.actions.is_empty() && plan.operator_view.is_none() && plan.requeue.is_none());
    cluster.apply(&plan);
    assert_eq!(
        (cluster.verdict("Ready"), cluster.verdict("Progressing")),
        ("False Deleting".into(), "True Deleting".into())
    );
    assert!(is_empty(&cluster.plan()));
}

#[test]
fn a_shard_of_a_silent_node_is_removed_once_it_is_lost_and_not_while_it_serves() {
    let mut cluster = Cluster::settled(samples::pocket());
    let victim = cluster.pods("experts")[0].clone();
    let node = cluster.pod(&victim).spec.as_ref().unwrap().node_name.clone().unwrap();
    cluster.seen.nodes.get_mut(&node).unwrap().ready = false;
    cluster.kill(&victim);
    cluster.passes(60);
    let plan = cluster.round();
    assert_eq!(deleted(&plan), Vec::<String>::new(), "its process is reached");
    let view = plan.operator_view.unwrap();
    assert!(view.pods.iter().all(|pod| !pod.withdrawn), "and nobody told it to stop");
    let uid = cluster.pod(&victim).metadata.uid.clone().unwrap();
    let report = cluster.seen.coordinator.as_mut().unwrap();
    report.status.members.retain(|member| member.member.pod.as_ref().unwrap().uid != uid);
    let plan = cluster.plan();
    let force = plan
        .actions
        .iter()
        .any(|action| matches!(action, Action::Delete { name, force: true, .. } if *name == victim));
    assert!(force, "{:?}", plan.actions);
    cluster.apply(&plan);
    cluster.settle();
    assert_eq!(cluster.pods("experts").len(), 4);
    assert!(
        cluster
            .seen
            .pods
            .iter()
            .all(|pod| name(&pod.metadata) != victim || pod.metadata.uid.as_ref() != Some(&uid))
    );
}
