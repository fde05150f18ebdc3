//! Each tier turned by `kubectl scale` while requests run.

use std::time::Instant;

use cadre_e2e_k8s::{
    Metrics, Model, Namespace, Operator, Soak,
    figures::{self, Figures},
    pod,
    soak::STREAMS,
    wait::{self, LIMIT, holds},
};
use cadre_k8s_api::{ConditionType, Reason, Tier};
use serde_json::json;

/// Scales a tier through `sizes` under load: every pod gets work, and no request fails.
fn under_load(tier: Tier, sizes: [i32; 2], work: impl Fn(&Metrics) -> f64) {
    Operator::installed();
    let namespace = Namespace::new(tier.suffix());
    let model = Model::ready(&namespace, &json!({}));
    let soak = Soak::start(&model);
    let mut from = model.tier(tier).expect("the tier").spec.replicas;
    for to in sizes {
        let begun = Instant::now();
        model.scale(tier, to);
        model.until_scaled(tier, to);
        let what = format!("{} {from} → {to} until settled", tier.suffix());
        Figures::new("scaling", &["step", "seconds"]).row(&what, &[figures::seconds(begun.elapsed())]);
        wait::until("every pod of the tier has work", LIMIT, || {
            let pods = model.pods(tier.suffix())?;
            let idle: Vec<_> = pods.iter().filter(|pod| work(&model.metrics(pod)) == 0.0).cloned().collect();
            holds(idle.is_empty(), || format!("idle: {}", pod::names(&idle)))
        });
        soak.more(2 * STREAMS);
        from = to;
    }
    soak.end_without_failure().record(&format!(
        "{} scaled to {} and to {}",
        tier.suffix(),
        sizes[0],
        sizes[1]
    ));
}

#[test]
fn decode_workers_come_and_go_without_a_failed_request() {
    under_load(Tier::Decode, [3, 1], |metrics| {
        metrics.sum("cadre_worker_tokens_total", &["kind=\"decode\""])
    });
}

#[test]
fn prefill_workers_come_and_go_without_a_failed_request() {
    under_load(Tier::Prefill, [3, 1], |metrics| {
        metrics.sum("cadre_worker_tokens_total", &["kind=\"prefill\""])
    });
}

#[test]
fn shards_come_and_go_without_a_failed_request() {
    under_load(Tier::Experts, [8, 4], |metrics| metrics.sum("cadre_expert_pairs_total", &[]));
}

/// Waits until a tier asked for one number gets another.
fn until_desired(model: &Model<'_>, tier: Tier, asked: i32, desired: i32) {
    wait::until(&format!("{desired} of {asked} pods for {}", tier.suffix()), LIMIT, || {
        let object = model.tier(tier)?;
        let status = object.status.clone().unwrap_or_default();
        let fits = object.spec.replicas == asked
            && status.desired == desired
            && status.observed_generation == object.metadata.generation;
        holds(fits, || format!("{:?} {status:?}", object.spec))
    });
}

#[test]
fn the_budget_cuts_a_tier_and_says_so() {
    Operator::installed();
    let namespace = Namespace::new("budget");
    let accelerator = json!({"resource": "nvidia.com/gpu", "count": 1});
    let model = Model::apply(
        &namespace,
        &json!({"spec": {"budget": {"gpus": 2}, "decode": {"replicas": 2, "accelerator": accelerator}}}),
    );
    until_desired(&model, Tier::Decode, 2, 2);
    model.scale(Tier::Decode, 4);
    until_desired(&model, Tier::Decode, 4, 2);
    let limited = model.until_reason(ConditionType::ScalingLimited, Reason::BudgetExceeded, LIMIT);
    assert!(limited.message.contains("budget.gpus 2"), "{}", limited.message);
    let deployment = ["get", "deployment", "pocket-decode", "--output=jsonpath={.spec.replicas}"];
    assert_eq!(namespace.kubectl().must(&deployment), "2");

    model.change(&json!({"spec": {"budget": {"gpus": 4}}}));
    until_desired(&model, Tier::Decode, 4, 4);
    model.until(ConditionType::ScalingLimited, "False", LIMIT);
    assert_eq!(namespace.kubectl().must(&deployment), "4");
}

#[test]
fn a_number_of_shards_that_does_not_divide_the_slots_becomes_the_next_lower_one() {
    Operator::installed();
    let namespace = Namespace::new("slots");
    let model = Model::ready(&namespace, &json!({}));
    let epoch = model.get().expect("the model").status.and_then(|status| status.placement_epoch);
    model.scale(Tier::Experts, 5);
    until_desired(&model, Tier::Experts, 5, 4);
    model.until_reason(ConditionType::ScalingLimited, Reason::SlotsNotDivisible, LIMIT);
    model.scale(Tier::Experts, 4);
    model.until(ConditionType::ScalingLimited, "False", LIMIT);
    model.until_scaled(Tier::Experts, 4);
    assert_eq!(model.get().expect("the model").status.and_then(|status| status.placement_epoch), epoch);
}

#[test]
fn the_last_writer_of_a_number_wins() {
    Operator::installed();
    let namespace = Namespace::new("writer");
    let model = Model::ready(&namespace, &json!({}));
    model.scale(Tier::Decode, 2);
    model.until_scaled(Tier::Decode, 2);
    // An edit of something else takes nothing back.
    model.change(&json!({"spec": {"drainSeconds": 20}}));
    model.until_settled();
    model.until_scaled(Tier::Decode, 2);
    model.change(&json!({"spec": {"decode": {"replicas": 3}}}));
    model.until_scaled(Tier::Decode, 3);
    assert_eq!(model.tier(Tier::Decode).expect("the tier").spec.replicas, 3);
}
