//! What tests look at in a pod.

use std::collections::BTreeSet;

use cadre_k8s_api::names::{ROUTABLE_GATE, label};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

/// A pod with one container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodView {
    /// Its name.
    pub name: String,
    /// Tells it from a later one of the same name.
    pub uid: String,
    /// Which part of the model it is.
    pub component: String,
    /// Where it runs.
    pub node: Option<String>,
    /// Its address.
    pub ip: Option<String>,
    /// `Running`, …
    pub phase: String,
    /// Kubernetes takes it for ready.
    pub ready: bool,
    /// Its readiness gate; `None` if it has none or nobody has set it.
    pub routable: Option<bool>,
    /// The image that it asks for.
    pub image: String,
    /// The runtime's id of its container.
    pub container: Option<String>,
    /// Restarts of its container.
    pub restarts: i32,
    /// Why its container waits.
    pub waiting: Option<String>,
    /// Why its process ended, now or the last time.
    pub ended: Option<String>,
    /// It is being deleted.
    pub terminating: bool,
}

impl From<&Pod> for PodView {
    fn from(pod: &Pod) -> Self {
        let (meta, spec, status) = (&pod.metadata, pod.spec.as_ref(), pod.status.as_ref());
        let labels = meta.labels.clone().unwrap_or_default();
        let condition = |type_: &str| {
            let conditions = status.and_then(|status| status.conditions.as_ref())?;
            conditions.iter().find(|known| known.type_ == type_).map(|known| known.status == "True")
        };
        let container: Option<&ContainerStatus> =
            status.and_then(|status| status.container_statuses.as_ref()?.first());
        let id = container.and_then(|container| container.container_id.as_deref());
        let waiting = container.and_then(|container| container.state.as_ref()?.waiting.as_ref());
        let states = container.into_iter().flat_map(|container| [&container.state, &container.last_state]);
        let ended = states.filter_map(|state| state.as_ref()?.terminated.as_ref()).next();
        Self {
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            component: labels.get(label::COMPONENT).cloned().unwrap_or_default(),
            node: spec.and_then(|spec| spec.node_name.clone()),
            ip: status.and_then(|status| status.pod_ip.clone()),
            phase: status.and_then(|status| status.phase.clone()).unwrap_or_default(),
            ready: condition("Ready") == Some(true),
            routable: condition(ROUTABLE_GATE),
            image: spec.and_then(|spec| spec.containers.first()?.image.clone()).unwrap_or_default(),
            container: id.and_then(|id| id.split_once("://")).map(|(_, id)| id.to_owned()),
            restarts: container.map_or(0, |container| container.restart_count),
            waiting: waiting.and_then(|waiting| waiting.reason.clone()),
            ended: ended.map(|end| end.reason.clone().unwrap_or_default()),
            terminating: meta.deletion_timestamp.is_some(),
        }
    }
}

/// Names in words, for messages.
pub fn names(pods: &[PodView]) -> String {
    let told = pods.iter().map(|pod| {
        let node = pod.node.as_deref().unwrap_or("no node");
        let state = if pod.terminating { "terminating" } else { &pod.phase };
        let ready = if pod.ready { "ready" } else { "not ready" };
        format!("{} ({node}, {state}, {ready}, gate {:?}, {} restarts)", pod.name, pod.routable, pod.restarts)
    });
    told.collect::<Vec<_>>().join("; ")
}

/// The nodes that they run on.
pub fn nodes(pods: &[PodView]) -> BTreeSet<&str> {
    pods.iter().filter_map(|pod| pod.node.as_deref()).collect()
}

/// Their uids, sorted.
pub fn uids(pods: &[PodView]) -> BTreeSet<&str> {
    pods.iter().map(|pod| pod.uid.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_what_the_api_server_writes() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "pocket-experts-0", "uid": "u", "labels": {"app.kubernetes.io/component": "experts"}},
            "spec": {"nodeName": "node2", "containers": [{"name": "cadre", "image": "i:1"}]},
            "status": {
                "phase": "Running", "podIP": "10.244.2.7",
                "conditions": [{"type": "Ready", "status": "False"}, {"type": "cadre.dev/Routable", "status": "True"}],
                "containerStatuses": [{"name": "cadre", "image": "i:1", "imageID": "", "ready": false, "restartCount": 2,
                    "containerID": "containerd://abc", "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                    "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}],
            },
        }))
        .expect("a pod");
        let view = PodView::from(&pod);
        assert_eq!((view.container.as_deref(), view.restarts), (Some("abc"), 2));
        assert_eq!((view.ready, view.routable, view.terminating), (false, Some(true), false));
        assert_eq!(view.waiting.as_deref(), Some("CrashLoopBackOff"));
        assert_eq!(view.ended.as_deref(), Some("OOMKilled"));
        assert_eq!((view.component.as_str(), view.node.as_deref()), ("experts", Some("node2")));
        let fresh = PodView::from(&Pod::default());
        assert_eq!((fresh.routable, fresh.container, fresh.node), (None, None, None));
    }
}
