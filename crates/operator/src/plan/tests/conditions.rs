//! What the status says while a model lives: starting, losing, coming back; gates; and what is not written.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_k8s_api::{Tier, names::ROUTABLE_GATE};

use super::{
    cluster::{Cluster, is_empty},
    samples,
};
use crate::plan::{Action, Plan};

fn gates(plan: &Plan) -> Vec<(String, bool, String)> {
    let gate = |action: &Action| match action {
        Action::SetRoutable { pod, routable, reason, .. } => Some((pod.clone(), *routable, reason.clone())),
        _ => None,
    };
    plan.actions.iter().filter_map(gate).collect()
}

fn events(plans: &[Plan]) -> Vec<String> {
    plans.iter().flat_map(|plan| &plan.events).map(|event| event.reason.clone()).collect()
}

fn routable(cluster: &Cluster, pod: &str) -> bool {
    let found = cluster.seen.pods.iter().find(|one| one.metadata.name.as_deref() == Some(pod)).unwrap();
    cluster.coordinator.is_routable(found)
}

#[test]
fn every_condition_is_there_from_the_first_plan_on() {
    let status = Cluster::new(samples::pocket()).plan().status.unwrap();
    let found: Vec<_> =
        status.conditions.iter().map(|one| format!("{} {} {}", one.type_, one.status, one.reason)).collect();
    assert_eq!(
        found,
        [
            "Ready False Starting",
            "Progressing True Starting",
            "Degraded False AsSpecified",
            "ExpertsCovered Unknown CoverageUnknown",
            "ScalingLimited False NotLimited",
        ]
    );
    assert!(status.conditions.iter().all(|one| one.observed_generation == Some(1)));
    assert_eq!(status.observed_generation, Some(1));
}

#[test]
fn a_model_that_comes_up_tells_each_step_once() {
    let mut cluster = Cluster::new(samples::pocket());
    let plans = cluster.until("ready", |cluster| {
        cluster.seen.model.status.is_some() && cluster.verdict("Ready") == "True AsSpecified"
    });
    let told = events(&plans);
    assert_eq!(told.first().map(String::as_str), Some("Starting"));
    assert!(told.contains(&"Ready".to_owned()), "{told:?}");
    assert!(plans.iter().flat_map(|plan| &plan.events).all(|event| !event.warning), "{told:?}");
}

#[test]
fn a_lost_shard_is_degraded_and_not_down() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.kill("pocket-experts-2");
    let plans = cluster.until("at risk", |cluster| cluster.verdict("ExpertsCovered").starts_with("False"));
    assert_eq!(cluster.verdict("Degraded"), "True PodsMissing");
    assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
    let (status, reason, message) = cluster.condition("ExpertsCovered");
    assert_eq!((status.as_str(), reason.as_str()), ("False", "ExpertAtRisk"));
    assert_eq!(message, "expert 7 of layer 3: 1 of 2 copies");
    assert_eq!(events(&plans).iter().filter(|reason| *reason == "PodsMissing").count(), 1);
    cluster.settle();
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
    assert_eq!(cluster.verdict("ExpertsCovered"), "True AsSpecified");
}

#[test]
fn an_uncovered_expert_is_named() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.kill("pocket-experts-1");
    cluster.kill("pocket-experts-2");
    cluster.until("not ready", |cluster| cluster.verdict("Ready").starts_with("False"));
    let (_, reason, message) = cluster.condition("Ready");
    assert_eq!(
        (reason.as_str(), message.as_str()),
        ("ExpertUncovered", "expert 7 of layer 3: no routable copy")
    );
    assert_eq!(cluster.verdict("ExpertsCovered"), "False ExpertUncovered");
}

#[test]
fn a_model_without_decode_workers_is_paused_and_says_so() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.scale(Tier::Decode, 0);
    cluster.settle();
    let (status, reason, message) = cluster.condition("Ready");
    assert_eq!((status.as_str(), reason.as_str()), ("False", "NoDecodeWorker"));
    assert_eq!(message, "the model is paused: decode has 0 replicas");
    assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
    assert_eq!(cluster.verdict("Progressing"), "False AsSpecified");
}

#[test]
fn transitions_keep_their_time() {
    let mut cluster = Cluster::settled(samples::pocket());
    let since = |cluster: &Cluster| {
        let status = cluster.seen.model.status.clone().unwrap();
        status
            .conditions
            .iter()
            .map(|one| (one.type_.clone(), one.last_transition_time.clone()))
            .collect::<Vec<_>>()
    };
    let before = since(&cluster);
    cluster.passes(1000);
    cluster.edit(|model| model.spec.decode.replicas = 2);
    cluster.settle();
    let after = since(&cluster);
    for ((type_, before), (_, after)) in before.into_iter().zip(after) {
        assert_eq!(before == after, type_ != "Progressing", "{type_}");
    }
}

#[test]
fn a_gate_opens_when_the_coordinator_says_so_and_is_written_once() {
    let mut cluster = Cluster::new(samples::pocket());
    let plans = cluster
        .until("six open gates", |cluster| cluster.seen.pods.iter().filter(|pod| is_open(pod)).count() == 6);
    let opened: Vec<_> = plans.iter().flat_map(gates).collect();
    assert_eq!(opened.len(), 6);
    assert!(opened.iter().all(|(_, routable, reason)| *routable && reason == "Admitted"));
    assert!(gates(&cluster.plan()).is_empty());
}

fn is_open(pod: &k8s_openapi::api::core::v1::Pod) -> bool {
    let conditions = pod.status.iter().filter_map(|status| status.conditions.as_ref()).flatten();
    conditions.into_iter().any(|one| one.type_ == ROUTABLE_GATE && one.status == "True")
}

#[test]
fn a_gate_closes_when_the_member_is_lost() {
    let mut cluster = Cluster::settled(samples::pocket());
    let report = cluster.seen.coordinator.as_mut().unwrap();
    let lost = report.status.members.pop().unwrap().member.pod.unwrap().name;
    assert_eq!(gates(&cluster.plan()), [(lost, false, "NotRegistered".into())]);
}

#[test]
fn a_router_that_restarts_closes_no_gate_of_members_on_their_way_back() {
    let mut cluster = Cluster::settled(samples::pocket());
    let now = cluster.seen.now;
    let status =
        &mut cluster.first("router").status.as_mut().unwrap().container_statuses.as_mut().unwrap()[0];
    status.state.as_mut().unwrap().running.as_mut().unwrap().started_at =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now));
    cluster.seen.coordinator.as_mut().unwrap().status.members.clear();
    assert_eq!(gates(&cluster.plan()), []);
    assert!(cluster.plan().requeue.is_some());
    cluster.passes(15);
    assert_eq!(gates(&cluster.plan()).len(), 6);
}

#[test]
fn gates_stay_while_the_coordinator_is_away_for_a_moment() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.coordinator.unreachable = true;
    for _ in 0..25 {
        assert_eq!(gates(&cluster.round()), []);
    }
    let plans: Vec<Plan> = (0..20).map(|_| cluster.round()).collect();
    let closed: Vec<_> = plans.iter().flat_map(gates).collect();
    assert_eq!(closed.len(), 6);
    assert!(closed.iter().all(|(_, routable, reason)| !routable && reason == "CoordinatorUnreachable"));
}

#[test]
fn an_operator_that_has_just_started_changes_nothing_before_it_hears_the_coordinator() {
    let mut cluster = Cluster::settled(samples::pocket());
    let heard = cluster.seen.coordinator.take();
    cluster.seen.watching_since = cluster.seen.now;
    let plan = cluster.plan();
    assert!(is_empty(&plan), "{}", crate::plan::render(&plan));
    assert!(plan.requeue.is_some());
    cluster.seen.coordinator = heard;
    assert!(is_empty(&cluster.plan()));
}

#[test]
fn loading_is_told_in_whole_percents() {
    let mut cluster = Cluster::new(samples::pocket());
    cluster.coordinator.stuck = true;
    (0..8).for_each(|_| drop(cluster.round()));
    let loading = cluster.seen.model.status.clone().unwrap().loading.unwrap();
    assert_eq!((loading.bytes_read, loading.summary.as_str()), (160, "40%"));
    assert_eq!(cluster.verdict("Ready"), "False LoadingWeights");
    assert_eq!(cluster.verdict("Progressing"), "True LoadingWeights");
    let report = cluster.seen.coordinator.as_mut().unwrap();
    report.status.members.iter_mut().filter_map(|one| one.loading.as_mut()).next().unwrap().bytes_read += 1;
    assert!(cluster.plan().status.is_none(), "161 of 400 is 40 percent as well");
    assert_eq!(cluster.seen.tiers[&Tier::Experts].status.as_ref().unwrap().loaded.as_deref(), Some("40%"));
}

#[test]
fn imbalance_has_two_decimals_and_its_noise_is_not_written() {
    let mut cluster = Cluster::settled(samples::pocket());
    let imbalance = |cluster: &mut Cluster, value: Option<f64>| {
        cluster.coordinator.imbalance = value;
        cluster.round();
        cluster.round();
        cluster.seen.model.status.as_ref().unwrap().imbalance.clone()
    };
    assert_eq!(imbalance(&mut cluster, Some(1.0449)).as_deref(), Some("1.04"));
    assert_eq!(imbalance(&mut cluster, Some(1.0899)).as_deref(), Some("1.04"));
    assert_eq!(imbalance(&mut cluster, Some(1.1)).as_deref(), Some("1.10"));
    assert_eq!(imbalance(&mut cluster, None), None);
}

#[test]
fn scaling_up_is_progress_and_not_degraded() {
    let mut cluster = Cluster::settled(samples::pocket());
    cluster.scale(Tier::Decode, 3);
    let plans = cluster.until("three", |cluster| {
        let status = cluster.seen.model.status.as_ref().unwrap();
        assert_eq!(cluster.verdict("Degraded"), "False AsSpecified");
        assert_eq!(cluster.verdict("Ready"), "True AsSpecified");
        status.decode.as_ref().unwrap().summary == "3/3"
    });
    assert_eq!(events(&plans).first().map(String::as_str), Some("Scaling"));
    assert!(routable(&cluster, &cluster.pods("decode")[2]));
    cluster.settle();
    assert_eq!(cluster.verdict("Progressing"), "False AsSpecified");
}
