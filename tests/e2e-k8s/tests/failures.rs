//! What requests notice when something is lost, and how the model finds back.

use cadre_e2e_k8s::{
    Model, Namespace, Operator, PodView, Soak, cluster, pod,
    soak::STREAMS,
    wait::{self, LIMIT, LONG, holds},
};
use cadre_k8s_api::{ConditionType, Reason, Tier, names::port};
use serde_json::{Value, json};

/// Ends the process of a pod as a crash does; where nobody can, the pod is deleted without grace.
fn crash(model: &Model<'_>, pod: &PodView) {
    match cluster().scripts() {
        Some(scripts) => scripts.signal(pod, "SIGKILL"),
        None => model.kill(pod),
    }
}

/// Router and workers on one node, so that others have nothing but shards.
fn workers_on(node: &str) -> Value {
    let here = json!({"nodeSelector": {"kubernetes.io/hostname": node}});
    json!({"spec": {"router": here, "prefill": here, "decode": here}})
}

#[test]
fn a_lost_shard_with_copies_elsewhere_fails_no_request() {
    Operator::installed();
    let namespace = Namespace::new("shard");
    let model = Model::ready(&namespace, &json!({}));
    let soak = Soak::start(&model);
    let victim = model.tier_pods(Tier::Experts).remove(1);
    crash(&model, &victim);
    model.until_replaced(&victim);
    soak.more(2 * STREAMS);
    let victim = model.tier_pods(Tier::Experts).remove(2);
    model.kill(&victim);
    model.until_replaced(&victim);
    soak.more(2 * STREAMS);
    soak.end_without_failure().record("a shard crashes, another one's pod is deleted");
}

#[test]
fn a_lost_decode_worker_ends_its_own_requests_and_no_others() {
    Operator::installed();
    let namespace = Namespace::new("decode");
    let model = Model::ready(&namespace, &json!({"spec": {"decode": {"replicas": 2}}}));
    let soak = Soak::start(&model);
    let victim = model.tier_pods(Tier::Decode).remove(0);
    crash(&model, &victim);
    model.until_replaced(&victim);
    soak.more(2 * STREAMS);
    let summary = soak.end();
    summary.record("a decode worker of 2 crashes");
    // A stream may meet the loss twice: in the request that ran, and in the next one if that is sent before the
    // router has seen the end of the connection.
    summary.assert_bounded(&["Unavailable"], 2 * STREAMS);
}

#[test]
fn a_lost_prefill_worker_ends_its_own_requests_and_no_others() {
    Operator::installed();
    let namespace = Namespace::new("prefill");
    let model = Model::ready(&namespace, &json!({"spec": {"prefill": {"replicas": 2}}}));
    let soak = Soak::start(&model);
    let victim = model.tier_pods(Tier::Prefill).remove(0);
    crash(&model, &victim);
    model.until_replaced(&victim);
    soak.more(2 * STREAMS);
    let summary = soak.end();
    summary.record("a prefill worker of 2 crashes");
    summary.assert_bounded(&["Unavailable"], 2 * STREAMS);
}

#[test]
fn a_lost_router_is_back_within_a_minute_and_nothing_is_loaded_again() {
    Operator::installed();
    let namespace = Namespace::new("router");
    let model = Model::ready(&namespace, &json!({}));
    let epoch = model.get().expect("the model").status.and_then(|status| status.placement_epoch);
    let shards = model.tier_pods(Tier::Experts);
    let soak = Soak::start(&model);
    let victim = model.router();
    crash(&model, &victim);
    model.until_replaced(&victim);
    soak.more(2 * STREAMS);
    let summary = soak.end();
    summary.record("the router crashes");
    assert!(summary.failed > 0, "every stream runs through the router: {summary:#?}");
    assert!(summary.outage() < 60.0, "{summary:#?}");
    let connection = ["Unavailable", "Unknown", "Internal", "Cancelled", "DataLoss"];
    // Each stream asks again 100 ms after a failure.
    summary.assert_bounded(&connection, STREAMS * 600);
    assert_eq!(model.get().expect("the model").status.and_then(|status| status.placement_epoch), epoch);
    let after = model.tier_pods(Tier::Experts);
    assert_eq!(pod::uids(&after), pod::uids(&shards));
    assert!(after.iter().all(|pod| pod.restarts == 0), "{}", pod::names(&after));
}

#[test]
fn a_lost_operator_is_noticed_by_nobody_and_its_successor_goes_on() {
    let operator = Operator::installed();
    let namespace = Namespace::new("operator");
    let model = Model::ready(&namespace, &json!({}));
    let pods = model.all_pods().expect("pods");
    let soak = Soak::start(&model);
    let lives = operator.lives();
    operator.kill();
    soak.more(2 * STREAMS);
    operator.until_leading();
    assert!(operator.lives().is_disjoint(&lives));
    model.until_settled();
    assert_eq!(pod::uids(&model.all_pods().expect("pods")), pod::uids(&pods), "nothing was made anew");
    model.scale(Tier::Decode, 2);
    model.until_scaled(Tier::Decode, 2);
    soak.more(2 * STREAMS);
    soak.end_without_failure().record("the operator is killed");
}

#[test]
fn while_the_api_server_is_away_requests_are_answered() {
    let Some(scripts) = cluster().scripts_or_notice("the API server stopped under load") else { return };
    let operator = Operator::installed();
    let namespace = Namespace::new("apiserver");
    let model = Model::ready(&namespace, &json!({}));
    let pods = model.all_pods().expect("pods");
    let soak = Soak::start(&model);
    let router = model.router().ip.expect("the router has an address");
    let answered = || {
        let text = scripts.http_get(&format!("http://{router}:{}/metrics", port::ADMIN))?;
        Ok::<_, String>(
            cadre_e2e_k8s::Metrics::new(text).sum("cadre_router_requests_total", &["outcome=\"ok\""]),
        )
    };
    let stopped = scripts.stop_api_server();
    let before = answered().expect("the router's metrics");
    wait::until("requests are answered without the API server", LIMIT, || {
        let now = answered()?;
        holds(now >= before + 50.0, || format!("{before} and then {now} answers"))
    });
    stopped.start();
    operator.until_leading();
    model.until_settled();
    soak.more(2 * STREAMS);
    soak.end_without_failure().record("the API server is away");
    assert_eq!(pod::uids(&model.all_pods().expect("pods")), pod::uids(&pods), "nothing was made anew");
    model.scale(Tier::Decode, 2);
    model.until_scaled(Tier::Decode, 2);
}

#[test]
fn a_node_that_falls_silent_takes_its_shards_with_it_and_no_request() {
    let Some(scripts) = cluster().scripts_or_notice("a kubelet stopped under load") else { return };
    Operator::installed();
    let namespace = Namespace::new("kubelet");
    let nodes = cluster().nodes();
    let [safe, .., silent] = nodes.as_slice() else { panic!("one node: {nodes:?}") };
    let model = Model::ready(&namespace, &workers_on(safe));
    let soak = Soak::start_on(&model, safe);
    let shards = model.tier_pods(Tier::Experts);
    let lost: Vec<&PodView> = shards.iter().filter(|pod| pod.node.as_ref() == Some(silent)).collect();
    assert!(!lost.is_empty(), "{}", pod::names(&shards));

    let stopped = scripts.stop_kubelet(silent);
    // The node is NotReady after some 20 s, and its pods are given up 30 s later.
    let degraded = model.until(ConditionType::Degraded, "True", LONG);
    assert!(
        degraded.reason == Reason::PodsMissing.name() || degraded.message.contains("pod"),
        "{degraded:?}"
    );
    model.until(ConditionType::Ready, "True", LIMIT);
    soak.more(2 * STREAMS);
    stopped.start();
    model.until_settled();
    soak.more(2 * STREAMS);
    soak.end_without_failure().record("the kubelet of a node with shards stops and starts");
}

#[test]
fn a_shard_that_hangs_loses_its_gate_and_gets_it_back() {
    let Some(scripts) = cluster().scripts_or_notice("a shard that hangs") else { return };
    Operator::installed();
    let namespace = Namespace::new("hang");
    let model = Model::ready(&namespace, &json!({}));
    let soak = Soak::start(&model);
    let victim = model.tier_pods(Tier::Experts).remove(3);
    assert_eq!(victim.routable, Some(true));
    scripts.signal(&victim, "SIGSTOP");
    model.until_gate(&victim.name, false);
    model.until(ConditionType::Degraded, "True", LIMIT);
    let covered = model.until_reason(ConditionType::ExpertsCovered, Reason::ExpertAtRisk, LIMIT);
    assert!(covered.message.contains("layer") && covered.message.contains("expert"), "{}", covered.message);
    model.until(ConditionType::Ready, "True", LIMIT);
    scripts.signal(&victim, "SIGCONT");
    model.until_gate(&victim.name, true);
    model.until_settled();
    soak.more(2 * STREAMS);
    soak.end_without_failure().record("a shard hangs and comes back");
}

#[test]
fn without_a_copy_the_uncovered_expert_and_its_layer_are_named() {
    let Some(scripts) = cluster().scripts_or_notice("an expert without a copy") else { return };
    Operator::installed();
    let namespace = Namespace::new("uncovered");
    let once = json!({"spec": {"experts": {"shards": 2, "redundantSlots": 0, "minCopies": 1}}});
    let model = Model::ready(&namespace, &once);
    let victim = model.tier_pods(Tier::Experts).remove(0);
    scripts.signal(&victim, "SIGSTOP");
    let covered = model.until_reason(ConditionType::ExpertsCovered, Reason::ExpertUncovered, LIMIT);
    assert!(covered.message.contains("layer") && covered.message.contains("expert"), "{}", covered.message);
    let ready = model.until(ConditionType::Ready, "False", LIMIT);
    assert_eq!(ready.reason, Reason::ExpertUncovered.name(), "{}", ready.message);
    scripts.signal(&victim, "SIGCONT");
    model.until_settled();
}
