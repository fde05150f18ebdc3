//! A model in a namespace of a test: the pocket sample with changes.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use cadre_k8s_api::{
    ConditionType, MoEModel, MoETier, Reason, Tier,
    names::{ROUTER_COMPONENT, label},
};
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::Condition};
use serde_json::{Value, json};

use crate::{
    diagnosis,
    kubectl::Kubectl,
    metrics::Metrics,
    namespace::Namespace,
    operator::metrics_of,
    pod::{self, PodView},
    sample,
    wait::{self, LIMIT, LONG, holds},
};

/// Kinds of children.
const CHILDREN: &str = "moetiers,deployments,statefulsets,services,configmaps,serviceaccounts,poddisruptionbudgets,networkpolicies";

/// A model that was applied.
#[derive(Debug)]
pub struct Model<'a> {
    namespace: &'a Namespace,
    name: String,
    applied: Instant,
}

impl<'a> Model<'a> {
    /// Applies the pocket sample with a merge patch, and waits for nothing.
    #[track_caller]
    pub fn apply(namespace: &'a Namespace, patch: &Value) -> Self {
        let object = sample::patched(sample::pocket(), patch);
        namespace.kubectl().apply(&object);
        let name = object["metadata"]["name"].as_str().expect("the sample has a name").to_owned();
        Self { namespace, name, applied: Instant::now() }
    }

    /// Applies it and waits until it is ready and settled.
    #[track_caller]
    pub fn ready(namespace: &'a Namespace, patch: &Value) -> Self {
        let model = Self::apply(namespace, patch);
        model.until_settled();
        model
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its namespace.
    pub fn namespace(&self) -> &'a Namespace {
        self.namespace
    }

    fn kubectl(&self) -> &Kubectl {
        self.namespace.kubectl()
    }

    /// Since it was applied.
    pub fn age(&self) -> Duration {
        self.applied.elapsed()
    }

    /// As the API server has it.
    pub fn get(&self) -> Result<MoEModel, String> {
        self.kubectl().get(&["moemodels", &self.name])
    }

    /// A tier of it.
    pub fn tier(&self, tier: Tier) -> Result<MoETier, String> {
        self.kubectl().get(&["moetiers", &tier.object_name(&self.name)])
    }

    /// Changes its spec by a merge patch, which must be accepted.
    #[track_caller]
    pub fn change(&self, patch: &Value) {
        self.kubectl().patch(&format!("moemodel/{}", self.name), patch);
    }

    /// Scales a tier as users do.
    #[track_caller]
    pub fn scale(&self, tier: Tier, replicas: i32) {
        let (what, replicas) =
            (format!("moetier/{}", tier.object_name(&self.name)), format!("--replicas={replicas}"));
        self.kubectl().must(&["scale", &what, &replicas]);
    }

    /// A condition that is about the newest spec.
    pub fn condition(&self, type_: ConditionType) -> Result<Condition, String> {
        let model = self.get()?;
        current(&model, type_).cloned().ok_or_else(|| diagnosis::of_model(&model))
    }

    /// Waits for a condition's status.
    #[track_caller]
    pub fn until(&self, type_: ConditionType, status: &str, limit: Duration) -> Condition {
        let what = format!("{} of {} is {status}", type_.name(), self.name);
        self.until_condition(&what, type_, limit, |condition| condition.status == status)
    }

    /// Waits until a condition has left its healthy status for this reason.
    #[track_caller]
    pub fn until_reason(&self, type_: ConditionType, reason: Reason, limit: Duration) -> Condition {
        let what = format!("{} of {} says {}", type_.name(), self.name, reason.name());
        self.until_condition(&what, type_, limit, |condition| {
            condition.reason == reason.name() && condition.status != type_.healthy()
        })
    }

    #[track_caller]
    fn until_condition(
        &self,
        what: &str,
        type_: ConditionType,
        limit: Duration,
        fits: impl Fn(&Condition) -> bool,
    ) -> Condition {
        wait::until(what, limit, || {
            let model = self.get()?;
            let found = current(&model, type_).filter(|condition| fits(condition));
            found.cloned().ok_or_else(|| diagnosis::of_model(&model))
        })
    }

    /// Waits until every condition is as it is in a model without a problem, for the newest spec, and nothing drains.
    /// `ScalingLimited` is a state that lasts, and left out.
    #[track_caller]
    pub fn until_settled(&self) {
        let settled = [
            ConditionType::Ready,
            ConditionType::Progressing,
            ConditionType::Degraded,
            ConditionType::ExpertsCovered,
        ];
        wait::until(&format!("{} is ready and settled", self.name), LONG, || {
            let model = self.get()?;
            let is_healthy = |type_: &ConditionType| {
                current(&model, *type_).is_some_and(|condition| condition.status == type_.healthy())
            };
            let unwell: Vec<&ConditionType> = settled.iter().filter(|type_| !is_healthy(type_)).collect();
            let is_well = match unwell[..] {
                [] => true,
                [ConditionType::ExpertsCovered] => {
                    current(&model, ConditionType::ExpertsCovered)
                        .is_some_and(|condition| condition.reason == Reason::ExpertAtRisk.name())
                        && self.shards_are_crowded()?
                }
                _ => false,
            };
            holds(is_well, || diagnosis::of_model(&model))?;
            let pods = self.all_pods()?;
            holds(pods.iter().all(|pod| pod.ready && !pod.terminating), || pod::names(&pods))
        });
    }

    /// Whether more than half of the shards are on one node, so that no placement keeps two copies of every expert apart.
    /// Spreading is a wish of theirs: a scheduler that saw other shards on their way out may not have followed it, and then the
    /// model rightly says for good that experts are at risk.
    fn shards_are_crowded(&self) -> Result<bool, String> {
        let shards = self.pods(Tier::Experts.suffix())?;
        let mut on_node: BTreeMap<&str, usize> = BTreeMap::new();
        for shard in &shards {
            *on_node.entry(shard.node.as_deref().unwrap_or_default()).or_default() += 1;
        }
        Ok(on_node.values().any(|count| 2 * count > shards.len()))
    }

    /// Waits until a tier has so many pods that work is routed to, and no others.
    #[track_caller]
    pub fn until_scaled(&self, tier: Tier, replicas: i32) {
        let what = format!("{} has {replicas} routable pods", tier.object_name(&self.name));
        wait::until(&what, LONG, || {
            let object = self.tier(tier)?;
            let status = object.status.clone().unwrap_or_default();
            let fits = status.observed_generation == object.metadata.generation
                && [status.desired, status.ready, status.replicas] == [replicas; 3];
            holds(fits, || format!("{status:?}"))?;
            let pods = self.pods(tier.suffix())?;
            holds(pods.len() == usize::try_from(replicas).unwrap_or(0), || pod::names(&pods))
        });
        self.until_settled();
    }

    /// Every pod of it.
    pub fn all_pods(&self) -> Result<Vec<PodView>, String> {
        self.pods_by(&format!("{}={}", label::MODEL, self.name))
    }

    /// Pods of a component: `router`, `prefill`, `decode`, `experts`.
    pub fn pods(&self, component: &str) -> Result<Vec<PodView>, String> {
        self.pods_by(&format!("{}={},{}={component}", label::MODEL, self.name, label::COMPONENT))
    }

    fn pods_by(&self, selector: &str) -> Result<Vec<PodView>, String> {
        let pods: Vec<Pod> = self.kubectl().list(&["pods", "--selector", selector])?;
        Ok(pods.iter().map(PodView::from).collect())
    }

    /// Pods of a tier, of which there must be some.
    #[track_caller]
    pub fn tier_pods(&self, tier: Tier) -> Vec<PodView> {
        let pods = self.pods(tier.suffix()).unwrap_or_else(|error| panic!("{error}"));
        assert!(!pods.is_empty(), "{} has no pods", tier.object_name(&self.name));
        pods
    }

    /// The router's pod.
    #[track_caller]
    pub fn router(&self) -> PodView {
        let pods = self.pods(ROUTER_COMPONENT).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(pods.len(), 1, "{}", pod::names(&pods));
        pods.into_iter().next().expect("one pod")
    }

    /// Waits until a pod's gate says so; the pod may be made anew meanwhile.
    #[track_caller]
    pub fn until_gate(&self, name: &str, routable: bool) -> PodView {
        wait::until(&format!("the gate of {name} is {routable}"), LIMIT, || {
            let pods = self.all_pods()?;
            let found = pods.iter().find(|pod| pod.name == name && pod.routable == Some(routable));
            found.cloned().ok_or_else(|| pod::names(&pods))
        })
    }

    /// Deletes a pod at once, without a word to it, as Kubernetes does with those of a lost node.
    #[track_caller]
    pub fn kill(&self, pod: &PodView) {
        self.kubectl().must(&["delete", "pod", &pod.name, "--force", "--grace-period=0"]);
    }

    /// Waits until a pod has gone and a model without problems is back.
    #[track_caller]
    pub fn until_replaced(&self, pod: &PodView) {
        wait::until(&format!("{} has a successor", pod.name), LIMIT, || {
            let pods = self.pods(&pod.component)?;
            let gone = pods.iter().all(|other| other.uid != pod.uid || other.restarts > pod.restarts);
            holds(gone, || pod::names(&pods))
        });
        self.until_settled();
    }

    /// Metrics of a pod.
    #[track_caller]
    pub fn metrics(&self, pod: &PodView) -> Metrics {
        let metrics = metrics_of(self.kubectl(), self.namespace.name(), &pod.name);
        metrics.unwrap_or_else(|error| panic!("metrics of {}: {error}", pod.name))
    }

    /// Every child, by kind and name.
    pub fn children(&self) -> Result<BTreeMap<String, Value>, String> {
        let selector = format!("{}={}", label::MODEL, self.name);
        let children: Vec<Value> = self.kubectl().list(&[CHILDREN, "--selector", &selector])?;
        let name = |object: &Value| {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            format!("{}/{}", text(&object["kind"]), text(&object["metadata"]["name"]))
        };
        Ok(children.into_iter().map(|object| (name(&object), object)).collect())
    }

    /// Writes an annotation of no meaning: the operator looks at the model again.
    #[track_caller]
    pub fn touch(&self, value: &str) {
        self.change(&json!({"metadata": {"annotations": {"example.com/touched": value}}}));
    }

    /// Deletes it and waits until it is gone.
    #[track_caller]
    pub fn delete(&self) {
        let timeout = format!("--timeout={}s", LIMIT.as_secs());
        self.kubectl().must(&["delete", "moemodel", &self.name, &timeout]);
    }
}

/// A condition of the model, if it is about its newest spec.
fn current(model: &MoEModel, type_: ConditionType) -> Option<&Condition> {
    let conditions = model.status.iter().flat_map(|status| &status.conditions);
    let mut found = conditions.filter(|condition| condition.type_ == type_.name());
    found.find(|condition| condition.observed_generation == model.metadata.generation)
}
