//! From `helm install` and one `kubectl apply` to answers, and back to nothing.

use std::collections::BTreeMap;

use cadre_e2e_k8s::{
    Front, Kubectl, Model, Namespace, Operator, Soak, cluster,
    figures::{self, Figures},
    front, operator, pod,
    soak::STREAMS,
    wait::{self, LIMIT, holds},
};
use cadre_k8s_api::{Tier, names::label};
use serde_json::{Value, json};

#[test]
fn one_apply_makes_a_model_that_answers_with_the_golden_texts() {
    Operator::installed();
    let namespace = Namespace::new("install");
    let model = Model::ready(&namespace, &json!({}));
    Figures::new("install", &["step", "seconds"]).row(
        "kubectl apply of the pocket sample until everything is ready",
        &[figures::seconds(model.age())],
    );
    front::assert_golden(&model);

    let table = namespace.kubectl().must(&["get", "moe", "pocket"]);
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        lines[0],
        ["NAME", "READY", "PREFILL", "DECODE", "SHARDS", "COVERED", "IMBALANCE", "AGE"],
        "{table}"
    );
    assert_eq!(lines[1][..6], ["pocket", "True", "1/1", "1/1", "4/4", "True"], "{table}");
    let loading = model.get().expect("the model").status.and_then(|status| status.loading);
    let loading = loading.expect("progress of the weights");
    assert!(loading.bytes_read == loading.bytes_expected && loading.bytes_read > 0, "{loading:?}");
}

#[test]
fn shards_are_on_different_nodes_and_tokens_cross_between_them() {
    Operator::installed();
    let namespace = Namespace::new("apart");
    let model = Model::ready(&namespace, &json!({}));
    let shards = model.tier_pods(Tier::Experts);
    let all = cluster().nodes().len();
    assert_eq!(pod::nodes(&shards).len(), all.min(shards.len()), "{}", pod::names(&shards));
    if all == 1 {
        println!("NOTICE: not shown on this cluster, it has one node: tokens cross between nodes");
        return;
    }
    Front::open(&model).assert_golden();
    let decode = &model.tier_pods(Tier::Decode)[0];
    let sent = model.metrics(decode);
    let elsewhere: Vec<_> = shards.iter().filter(|shard| shard.node != decode.node).collect();
    assert!(!elsewhere.is_empty(), "{}", pod::names(&shards));
    for shard in elsewhere {
        let (_, index) = shard.name.rsplit_once('-').expect("a pod of a StatefulSet has a number");
        let frames = sent.sum("cadre_dispatch_frames_total", &[&format!("shard=\"{index}\"")]);
        assert!(frames > 0.0, "{}: nothing sent", shard.name);
        // The shard brings its counts up by the clock. On a busy machine a frame may be taken back and sent to another copy.
        wait::until("what was sent has been computed, or taken back", LIMIT, || {
            let seen = model.metrics(shard);
            let computed = seen.sum("cadre_expert_frames_total", &["outcome=\"computed\""]);
            let cancelled = seen.sum("cadre_expert_frames_total", &["outcome=\"cancelled\""]);
            holds(computed > cancelled && computed + cancelled >= frames, || {
                format!("{}: {frames} sent, {computed} computed, {cancelled} taken back", shard.name)
            })
        });
    }
}

#[test]
fn every_child_is_owned_and_every_pod_is_restricted() {
    Operator::installed();
    let namespace = Namespace::new("owned");
    let model = Model::ready(&namespace, &json!({}));
    let uid = model.get().expect("the model").metadata.uid;
    let children = model.children().expect("children");
    for kind in [
        "MoETier",
        "Deployment",
        "StatefulSet",
        "Service",
        "ConfigMap",
        "ServiceAccount",
        "PodDisruptionBudget",
        "NetworkPolicy",
    ] {
        assert!(
            children.keys().any(|name| name.starts_with(&format!("{kind}/"))),
            "no {kind}: {:?}",
            children.keys()
        );
    }
    for (name, child) in &children {
        let owner = &child["metadata"]["ownerReferences"][0];
        assert_eq!(owner["uid"].as_str(), uid.as_deref(), "{name}: {owner}");
        assert_eq!(owner["controller"], true, "{name}: {owner}");
        assert_eq!(child["metadata"]["labels"][label::MANAGED_BY], "cadre-operator", "{name}");
    }
    // The namespace enforces the restricted standard; what that does not ask for is asked for here.
    let pods: Vec<Value> = namespace.kubectl().list(&["pods"]).expect("pods");
    for pod in &pods {
        let (name, spec) = (&pod["metadata"]["name"], &pod["spec"]);
        assert_eq!(spec["automountServiceAccountToken"], false, "{name}");
        assert_ne!(spec["serviceAccountName"], "default", "{name}");
        assert_eq!(spec["containers"][0]["securityContext"]["readOnlyRootFilesystem"], true, "{name}");
    }
}

/// The version of every child and pod.
fn versions(model: &Model<'_>) -> BTreeMap<String, String> {
    let version =
        |object: &Value| object["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned();
    let children = model.children().expect("children");
    let mut versions: BTreeMap<String, String> =
        children.iter().map(|(name, object)| (name.clone(), version(object))).collect();
    let pods: Vec<Value> = model.namespace().kubectl().list(&["pods"]).expect("pods");
    versions.extend(pods.iter().map(|pod| (format!("Pod/{}", pod["metadata"]["name"]), version(pod))));
    versions
}

#[test]
fn a_settled_model_is_looked_at_and_left_alone() {
    let operator = Operator::installed();
    let namespace = Namespace::new("steady");
    let model = Model::ready(&namespace, &json!({}));
    // A look of the operator, made to happen; how many writes came with it.
    let mut touches = 0;
    let mut look = || {
        let before = operator.metrics();
        touches += 1;
        model.touch(&touches.to_string());
        let after = wait::until("the operator looks again", LIMIT, || {
            let after = operator.metrics();
            let [earlier, now] =
                [&before, &after].map(|metrics| metrics.sum("cadre_operator_reconciles_total", &[]));
            holds(now > earlier, || format!("{now} reconciles")).map(|()| after)
        });
        after.operator_writes_since(&before)
    };
    wait::until("the last writes of the start are done", LIMIT, || {
        let writes = look();
        holds(writes.is_empty(), || format!("{writes:?}"))
    });
    let (children, status) = (versions(&model), model.get().expect("the model").status);
    for _ in 0..3 {
        assert_eq!(look(), BTreeMap::new(), "the operator writes what is there already");
    }
    assert_eq!(versions(&model), children);
    assert_eq!(model.get().expect("the model").status, status);
    let imbalance = status.expect("a status").imbalance;
    assert_eq!(imbalance, None, "nobody has asked it anything");
    // A normal start is no alarm.
    let events: Vec<Value> =
        namespace.kubectl().list(&["events", "--field-selector=reason=Unhealthy"]).expect("events");
    let told: Vec<&Value> = events.iter().map(|event| &event["message"]).collect();
    assert!(told.is_empty(), "{told:?}");
}

#[test]
fn helm_test_passes_and_an_upgrade_of_the_operator_touches_no_pod_of_a_model() {
    let operator = Operator::installed();
    let timeout = ["--timeout", "120s"];
    cluster().must_helm(
        &[&["test", operator::RELEASE, "--namespace", operator::NAMESPACE], &timeout[..]].concat(),
    );
    let namespace = Namespace::new("upgrade");
    let model = Model::ready(&namespace, &json!({}));
    let (pods, lives) = (model.all_pods().expect("pods"), operator.lives());
    let soak = Soak::start(&model);
    operator::install(&["--set-string", "podAnnotations.example\\.com/e2e=upgraded"]);
    operator.until_leading();
    assert!(operator.lives().is_disjoint(&lives), "the upgrade has replaced the operator's pods");
    soak.more(2 * STREAMS);
    soak.end_without_failure().record("the operator is upgraded by helm");
    model.until_settled();
    assert_eq!(pod::uids(&model.all_pods().expect("pods")), pod::uids(&pods));
}

#[test]
fn a_deleted_model_leaves_nothing_behind() {
    Operator::installed();
    let namespace = Namespace::new("deleted");
    assert_eq!(namespace.contents().expect("objects"), Vec::<String>::new());
    let model = Model::ready(&namespace, &json!({}));
    assert!(namespace.contents().expect("objects").len() > 20);
    let begun = std::time::Instant::now();
    model.delete();
    wait::until("nothing is left", LIMIT, || {
        let contents = namespace.contents()?;
        holds(contents.is_empty(), || contents.join(", "))
    });
    Figures::new("install", &["step", "seconds"])
        .row("kubectl delete of the model until nothing is left", &[figures::seconds(begun.elapsed())]);
}

#[test]
fn without_its_operator_a_model_serves_on_and_is_taken_over_again() {
    let operator = Operator::installed();
    let namespace = Namespace::new("uninstall");
    let model = Model::ready(&namespace, &json!({}));
    let pods = model.all_pods().expect("pods");
    let soak = Soak::start(&model);
    for release in [operator::RELEASE, operator::CRDS] {
        cluster().must_helm(&["uninstall", release, "--namespace", operator::NAMESPACE, "--wait"]);
    }
    let definitions = ["crd", "moemodels.cadre.dev", "moetiers.cadre.dev", "--output=name"];
    Kubectl::cluster_wide().must(&[&["get"], &definitions[..]].concat());
    assert!(model.get().expect("the model is still there").metadata.deletion_timestamp.is_none());
    soak.more(2 * STREAMS);
    operator::install(&[]);
    operator.until_leading();
    model.until_settled();
    soak.end_without_failure().record("the operator is uninstalled and installed again");
    assert_eq!(pod::uids(&model.all_pods().expect("pods")), pod::uids(&pods));
}
