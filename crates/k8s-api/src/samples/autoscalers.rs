//! Autoscalers that turn the tiers of the pocket sample.

use serde_json::{Value, json};

use super::{Object, Sample};
use crate::Tier;

/// The model of the pocket sample.
const MODEL: &str = "pocket";

fn target(tier: Tier) -> Value {
    let api_version = format!("{}/{}", crate::GROUP, crate::VERSION);
    json!({"apiVersion": api_version, "kind": "MoETier", "name": tier.object_name(MODEL)})
}

fn autoscaler(tier: Tier, metrics: &Value, behavior: &Value) -> Value {
    json!({
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": tier.object_name(MODEL)},
        "spec": {
            "scaleTargetRef": target(tier),
            "minReplicas": 1,
            "maxReplicas": 4,
            "metrics": metrics,
            "behavior": behavior,
        },
    })
}

pub(super) fn hpa() -> Sample {
    let prefill = autoscaler(
        Tier::Prefill,
        &json!([{"type": "Resource", "resource": {
            "name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80},
        }}]),
        &json!({"scaleDown": {"stabilizationWindowSeconds": 300}}),
    );
    let decode = autoscaler(
        Tier::Decode,
        &json!([{"type": "Pods", "pods": {
            "metric": {"name": "cadre_worker_sequences"}, "target": {"type": "AverageValue", "averageValue": "16"},
        }}]),
        &json!({"scaleDown": {
            "stabilizationWindowSeconds": 300, "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
        }}),
    );
    Sample {
        file: "hpa.yaml",
        about: "HorizontalPodAutoscalers that turn the tiers of the model `pocket`. They scale the MoETier, never the Deployment
below it, so that the budget and the layout of the experts are kept.

Both need what the metrics come from: metrics-server for CPU, an adapter for `cadre_worker_sequences`
(prometheus-adapter, for instance).",
        objects: vec![
            Object {
                value: prefill,
                notes: &[(
                    "spec.metrics",
                    "Prefill is bound by arithmetic: its CPU time says how busy it is.",
                )],
            },
            Object {
                value: decode,
                notes: &[
                    (
                        "spec.metrics",
                        "Decode is bound by memory: its sequences, running and waiting, say how full it is.",
                    ),
                    (
                        "spec.behavior",
                        "A decode worker that goes away hands nothing over yet; it finishes its sequences first \
                         (`drainSeconds`).",
                    ),
                ],
            },
        ],
    }
}

fn scaled_object(tier: Tier, replicas: [u32; 2], cooldown: u32, query: &str, threshold: &str) -> Value {
    json!({
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": tier.object_name(MODEL)},
        "spec": {
            "scaleTargetRef": target(tier),
            "minReplicaCount": replicas[0],
            "maxReplicaCount": replicas[1],
            "cooldownPeriod": cooldown,
            "triggers": [{"type": "prometheus", "metadata": {
                "serverAddress": "http://prometheus.monitoring:9090", "query": query, "threshold": threshold,
            }}],
        },
    })
}

pub(super) fn keda() -> Sample {
    let decode = "sum(cadre_router_waiting_requests{namespace=\"default\", pod=~\"pocket-router-.*\"}) + \
                  sum(cadre_worker_sequences{namespace=\"default\", pod=~\"pocket-decode-.*\"})";
    let experts = "avg(avg_over_time(cadre_expert_queued_pairs{namespace=\"default\", pod=~\"pocket-experts-.*\"}[5m]))";
    Sample {
        file: "keda.yaml",
        about: "KEDA ScaledObjects for the model `pocket`, with Prometheus as the source. They scale the MoETier, never the
Deployment below it, so that the budget and the layout of the experts are kept.",
        objects: vec![
            Object {
                value: scaled_object(Tier::Decode, [1, 4], 300, decode, "16"),
                notes: &[(
                    "spec.triggers.0.metadata.query",
                    "Requests that no worker has taken yet, and sequences that decode workers have: 16 of them per worker.",
                )],
            },
            Object {
                value: scaled_object(Tier::Experts, [4, 8], 1800, experts, "256"),
                notes: &[
                    (
                        "spec.scaleTargetRef",
                        "64 slots divide among 1, 2, 4, 8, 16, 32 and 64 shards, and two copies need two: of another number \
                         the operator\ntakes the next lower one that fits and says so (ScalingLimited, SlotsNotDivisible).",
                    ),
                    (
                        "spec.triggers.0.metadata.query",
                        "Mean pairs that wait at a shard over the last five minutes.",
                    ),
                ],
            },
        ],
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;

    use super::*;

    #[test]
    fn autoscalers_have_the_fields_of_their_type_and_no_others() {
        for object in hpa().objects {
            let typed: HorizontalPodAutoscaler = serde_json::from_value(object.value.clone()).unwrap();
            assert_eq!(serde_json::to_value(typed).unwrap(), object.value);
        }
    }
}
