//! NetworkPolicies: who may connect to the pods of each component.
//!
//! | port of | from |
//! |---|---|
//! | router, clients | pods of the model's namespace, and `spec.network.clients` |
//! | router, coordinator | workers and shards of the model, the operator |
//! | workers, also beside shards | router and workers of the model |
//! | shards | router and workers of the model |
//! | all, metrics | everybody, or `spec.network.metrics` |
//!
//! What leaves the pods is not restricted: a policy that forgets DNS, a proxy or a collector costs more than it
//! protects. A node's own probes always pass. With a network that enforces no policies they say what should be.

use std::collections::BTreeMap;

use cadre_k8s_api::{
    Tier,
    model::PolicyMode,
    names::{label, port},
};
use k8s_openapi::{
    api::networking::v1::{
        IPBlock, NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
        NetworkPolicySpec,
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, LabelSelectorRequirement},
        util::intstr::IntOrString,
    },
};

use super::{
    super::{ObjectKind, component::Component, facts::Facts},
    Child, meta,
};

const PREFILL: Component = Component::Tier(Tier::Prefill);
const DECODE: Component = Component::Tier(Tier::Decode);
const EXPERTS: Component = Component::Tier(Tier::Experts);

/// A label that every namespace has.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// One policy per component, or none.
pub(super) fn policies(facts: &Facts<'_>) -> Vec<Option<Child>> {
    match facts.spec().network.policy {
        PolicyMode::Managed => Component::ALL.into_iter().map(|component| policy(facts, component)).collect(),
        PolicyMode::None => Vec::new(),
    }
}

fn policy(facts: &Facts<'_>, component: Component) -> Option<Child> {
    let network = &facts.spec().network;
    // Pods of shards with a worker beside them are workers as well.
    let beside = facts.spec().experts.worker.is_some();
    let workers: &[Component] = if beside {
        &[Component::Router, PREFILL, DECODE, EXPERTS]
    } else {
        &[Component::Router, PREFILL, DECODE]
    };
    let mut ingress = match component {
        Component::Router => {
            let mut clients = vec![pods(LabelSelector::default())];
            clients.extend(network.clients.iter().map(plain));
            let members = vec![of_model(facts, &[PREFILL, DECODE, EXPERTS]), operator(facts)];
            vec![rule(&[port::GRPC, port::HTTP], clients), rule(&[port::COORDINATOR], members)]
        }
        // The router asks a shard for a step before it admits it.
        EXPERTS => {
            let ports: &[u16] = if beside { &[port::EXPERT, port::WORKER] } else { &[port::EXPERT] };
            vec![rule(ports, vec![of_model(facts, workers)])]
        }
        Component::Tier(_) => vec![rule(&[port::WORKER], vec![of_model(facts, workers)])],
    };
    ingress.push(rule(&[port::ADMIN], network.metrics.iter().map(plain).collect()));
    let policy = NetworkPolicy {
        metadata: meta::metadata(facts, component.object_name(facts.name()), Some(component)),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(meta::selector(facts.name(), component)),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(ingress),
            egress: None,
        }),
    };
    Child::new(ObjectKind::NetworkPolicy, None, &policy)
}

/// Nobody named is everybody.
fn rule(ports: &[u16], from: Vec<NetworkPolicyPeer>) -> NetworkPolicyIngressRule {
    let port = |number: &u16| NetworkPolicyPort {
        port: Some(IntOrString::Int((*number).into())),
        protocol: Some("TCP".to_owned()),
        end_port: None,
    };
    NetworkPolicyIngressRule {
        from: (!from.is_empty()).then_some(from),
        ports: Some(ports.iter().map(port).collect()),
    }
}

fn pods(selector: LabelSelector) -> NetworkPolicyPeer {
    NetworkPolicyPeer { pod_selector: Some(selector), ..NetworkPolicyPeer::default() }
}

/// Pods of these components of the model.
fn of_model(facts: &Facts<'_>, components: &[Component]) -> NetworkPolicyPeer {
    let labels = BTreeMap::from([(label::MODEL.to_owned(), facts.name().to_owned())]);
    let values = components.iter().map(|component| component.label().to_owned()).collect();
    pods(LabelSelector {
        match_labels: Some(labels),
        match_expressions: Some(vec![LabelSelectorRequirement {
            key: label::COMPONENT.to_owned(),
            operator: "In".to_owned(),
            values: Some(values),
        }]),
    })
}

/// The operator's pods: those of its own namespace where that is known.
fn operator(facts: &Facts<'_>) -> NetworkPolicyPeer {
    let labels = |pairs: &[(&str, &str)]| {
        let pairs = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let labels: BTreeMap<String, String> = pairs.collect();
        LabelSelector { match_labels: (!labels.is_empty()).then_some(labels), ..LabelSelector::default() }
    };
    let namespace = facts.observed().operator_namespace.as_deref();
    NetworkPolicyPeer {
        namespace_selector: Some(match namespace {
            Some(namespace) => labels(&[(NAMESPACE_NAME, namespace)]),
            None => labels(&[]),
        }),
        pod_selector: Some(labels(&[(label::COMPONENT, "operator"), (label::PART_OF, "cadre")])),
        ip_block: None,
    }
}

/// A user's peer without what is empty in it, which an API server would drop.
fn plain(peer: &NetworkPolicyPeer) -> NetworkPolicyPeer {
    let selector = |selector: &LabelSelector| LabelSelector {
        match_labels: selector.match_labels.clone().filter(|labels| !labels.is_empty()),
        match_expressions: selector.match_expressions.clone().filter(|all| !all.is_empty()),
    };
    NetworkPolicyPeer {
        ip_block: peer.ip_block.as_ref().map(|block| IPBlock {
            cidr: block.cidr.clone(),
            except: block.except.clone().filter(|except| !except.is_empty()),
        }),
        namespace_selector: peer.namespace_selector.as_ref().map(selector),
        pod_selector: peer.pod_selector.as_ref().map(selector),
    }
}
