//! The spec changes while the model serves: it converges to the last word, and the text stays.

use cadre_e2e_k8s::{
    Claim, Model, Namespace, Operator, PodView, Soak, cluster, front, pod,
    soak::STREAMS,
    wait::{self, LIMIT, LONG, holds},
};
use cadre_k8s_api::{ConditionType, Reason, Tier};
use serde_json::json;

/// What a request may end with when the one router is replaced.
const CONNECTION: [&str; 5] = ["Unavailable", "Unknown", "Internal", "Cancelled", "DataLoss"];

/// Waits until no pod of before is left and everything is settled.
fn until_all_replaced(model: &Model<'_>, before: &[PodView]) {
    wait::until("every pod is replaced", LONG, || {
        let pods = model.all_pods()?;
        holds(pod::uids(&pods).is_disjoint(&pod::uids(before)), || pod::names(&pods))
    });
    model.until_settled();
}

#[test]
fn a_new_image_replaces_every_pod_and_no_text() {
    let Some(scripts) = cluster().scripts_or_notice("a second image in the nodes") else { return };
    Operator::installed();
    let namespace = Namespace::new("image");
    let model = Model::ready(&namespace, &json!({}));
    let before = model.all_pods().expect("pods");
    let image = "registry.example.com/cadre:next";
    let nodes = cluster().nodes();
    scripts.tag_image(nodes.iter().map(String::as_str), cluster().image(), image);
    let soak = Soak::start(&model);
    model.change(&json!({"spec": {"image": image}}));
    model.until_reason(ConditionType::Progressing, Reason::Updating, LIMIT);
    until_all_replaced(&model, &before);
    let pods = model.all_pods().expect("pods");
    assert!(pods.iter().all(|pod| pod.image == image), "{pods:#?}");
    soak.more(2 * STREAMS);
    let summary = soak.end();
    summary.record("a new image");
    // One router: while it is replaced, streams find none and ask again 100 ms later.
    summary.assert_bounded(&CONNECTION, STREAMS * 1200);
    front::assert_golden(&model);
}

#[test]
fn a_typo_in_the_image_costs_no_request_and_is_named() {
    const TYPO: &str = "registry.example.com/cadre:typo";
    Operator::installed();
    let namespace = Namespace::new("typo");
    let model = Model::ready(&namespace, &json!({}));
    let before = model.all_pods().expect("pods");
    let image = model.get().expect("the model").spec.image;
    let soak = Soak::start(&model);
    model.change(&json!({"spec": {"image": TYPO}}));
    let condition = model.until_reason(ConditionType::Degraded, Reason::ImagePullFailed, LIMIT);
    assert!(condition.message.contains(TYPO), "{}", condition.message);
    soak.more(4 * STREAMS);
    assert_eq!(model.condition(ConditionType::Ready).expect("a condition").status, "True");
    let now = model.all_pods().expect("pods");
    assert!(pod::uids(&before).is_subset(&pod::uids(&now)), "{}", pod::names(&now));
    model.change(&json!({"spec": {"image": image}}));
    model.until_settled();
    soak.end_without_failure().record("a typo in the image");
    assert_eq!(pod::uids(&model.all_pods().expect("pods")), pod::uids(&before), "nothing was replaced");
}

#[test]
fn a_new_template_of_one_tier_replaces_its_pods_and_no_others() {
    Operator::installed();
    let namespace = Namespace::new("template");
    let model = Model::ready(&namespace, &json!({"spec": {"decode": {"replicas": 2}}}));
    for (tier, field) in [(Tier::Decode, "decode"), (Tier::Experts, "experts")] {
        let before = model.all_pods().expect("pods");
        let soak = Soak::start(&model);
        model.change(&json!({"spec": {field: {"resources": {"requests": {"cpu": "90m"}}}}}));
        let (old, others): (Vec<PodView>, Vec<PodView>) =
            before.into_iter().partition(|pod| pod.component == tier.suffix());
        wait::until(&format!("{field} pods are replaced"), LONG, || {
            let pods = model.pods(tier.suffix())?;
            let done = pods.len() == old.len() && pod::uids(&pods).is_disjoint(&pod::uids(&old));
            holds(done, || pod::names(&pods))
        });
        model.until_settled();
        let kept = model.all_pods().expect("pods");
        let kept: Vec<PodView> = kept.into_iter().filter(|pod| pod.component != tier.suffix()).collect();
        assert_eq!(pod::uids(&kept), pod::uids(&others), "the other tiers are left alone");
        soak.more(2 * STREAMS);
        // Copies of every expert, and a second decode worker, are there all the time.
        soak.end_without_failure().record(&format!("a new template of the {field} pods"));
    }
}

#[test]
fn many_edits_in_a_row_end_at_the_last_one() {
    let operator = Operator::installed();
    let namespace = Namespace::new("edits");
    let model = Model::apply(&namespace, &json!({}));
    let lives = operator.lives();
    for round in 0..12_i32 {
        let experts = [4, 8, 2][usize::try_from(round % 3).expect("small")];
        model.change(&json!({"spec": {
            "drainSeconds": 5 + round,
            "prefill": {"replicas": round % 2},
            "decode": {"replicas": 1 + round % 3, "resources": {"requests": {"cpu": format!("{}m", 50 + round)}}},
            "experts": {"shards": experts},
        }}));
    }
    let last =
        json!({"spec": {"prefill": {"replicas": 1}, "decode": {"replicas": 2}, "experts": {"shards": 4}}});
    model.change(&last);
    for (tier, replicas) in [(Tier::Prefill, 1), (Tier::Decode, 2), (Tier::Experts, 4)] {
        model.until_scaled(tier, replicas);
    }
    let cpu = ["get", "deployment", "pocket-decode"];
    let path = "--output=jsonpath={.spec.template.spec.containers[0].resources.requests.cpu}";
    assert_eq!(namespace.kubectl().must(&[&cpu[..], &[path]].concat()), "61m");
    front::assert_golden(&model);
    assert_eq!(operator.lives(), lives, "the operator was not restarted");
}

#[test]
fn another_numerics_class_replaces_all_pods_at_once() {
    Operator::installed();
    let namespace = Namespace::new("numerics");
    let model = Model::ready(&namespace, &json!({}));
    let hash = model.get().expect("the model").status.and_then(|status| status.model_hash);
    for class in ["F32", "Bf16"] {
        let before = model.all_pods().expect("pods");
        model.change(&json!({"spec": {"model": {"numerics": class}}}));
        until_all_replaced(&model, &before);
        // These texts are the same in every class.
        front::assert_golden(&model);
    }
    assert_eq!(model.get().expect("the model").status.and_then(|status| status.model_hash), hash);
}

#[test]
fn another_checkpoint_is_taken_from_a_claim() {
    if cluster().scripts_or_notice("weights from a claim").is_none() {
        return;
    }
    Operator::installed();
    let namespace = Namespace::new("claim");
    let model = Model::ready(&namespace, &json!({}));
    let before = model.all_pods().expect("pods");
    let claim = Claim::of_copy(&namespace, "weights", |_| {});
    model.change(&claim.source());
    until_all_replaced(&model, &before);
    front::assert_golden(&model);
    let loading = model.get().expect("the model").status.and_then(|status| status.loading);
    let loading = loading.expect("progress of the weights");
    assert!(loading.bytes_read == loading.bytes_expected && loading.bytes_read > 0, "{loading:?}");
}

#[test]
fn a_model_deleted_on_its_way_is_gone_and_may_come_again() {
    Operator::installed();
    let namespace = Namespace::new("midway");
    let model = Model::apply(&namespace, &json!({}));
    wait::until("its pods are being made", LIMIT, || {
        let pods = model.all_pods()?;
        holds(!pods.is_empty(), || "no pod".into())
    });
    model.delete();
    // At once, while the children of the first one are still being collected.
    let again = Model::ready(&namespace, &json!({}));
    front::assert_golden(&again);
    again.delete();
    wait::until("nothing is left", LIMIT, || {
        let contents = namespace.contents()?;
        holds(contents.is_empty(), || contents.join(", "))
    });
}
