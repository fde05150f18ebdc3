//! The readiness gate of a pod.

use cadre_k8s_api::names::{FIELD_MANAGER, ROUTABLE_GATE};
use k8s_openapi::{
    api::core::v1::{Pod, PodCondition},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::json;

use super::{Context, Effect};
use crate::{plan::ObjectKind, run::memory::Target};

/// What the gate will say.
pub(super) struct Gate<'a> {
    pub(super) routable: bool,
    pub(super) reason: &'a str,
    pub(super) message: &'a str,
}

/// Patches the one condition; the uid in the patch makes it fail on another pod of the same name.
pub(super) async fn set_routable(
    context: &Context<'_>,
    pod: &str,
    uid: &str,
    gate: &Gate<'_>,
) -> Result<Effect, kube::Error> {
    let status = if gate.routable { "True" } else { "False" };
    let before = condition(context.observed.pods.iter().find(|seen| seen.name_any() == pod));
    // The time is that of the last change of the status; a new reason for the same status is none.
    let same = before.filter(|before| before.status == status);
    let since =
        same.and_then(|before| before.last_transition_time.clone()).unwrap_or(Time(context.observed.now));
    let patch = json!({
        "metadata": {"uid": uid},
        "status": {"conditions": [{
            "type": ROUTABLE_GATE,
            "status": status,
            "reason": gate.reason,
            "message": gate.message,
            "lastTransitionTime": since,
        }]},
    });
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    let pods = Api::<Pod>::namespaced(context.client.clone(), &context.key.namespace);
    let patched = pods.patch_status(pod, &params, &Patch::Strategic(patch)).await?;
    tracing::info!(model = %context.key, pod, routable = gate.routable, reason = gate.reason, "Set the readiness gate");
    let version = patched.resource_version().unwrap_or_default();
    Ok(Effect::Version(Target::Object(ObjectKind::Pod, pod.to_owned()), version))
}

fn condition(pod: Option<&Pod>) -> Option<&PodCondition> {
    let conditions = pod?.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == ROUTABLE_GATE)
}
