//! Status of the tiers and of the model, applied to the status subresource.

use cadre_k8s_api::names::FIELD_MANAGER;
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
    core::{ApiResource, DynamicObject},
};
use serde::Serialize;
use serde_json::json;

use super::{Context, Effect, Pass, Subject, Verdict, judge, record};
use crate::{
    plan::{ObjectKind, Plan},
    run::{
        kinds,
        memory::{Memory, Target},
    },
};

/// Writes every status of the plan that differs from the observed one. The model's comes last: it speaks of the tiers'.
pub(super) async fn write(context: &Context<'_>, plan: &Plan, memory: &mut Memory, pass: &mut Pass) {
    for (tier, status) in &plan.tier_status {
        // A tier that was only just applied has a status at the next pass.
        let Some(object) = context.observed.tiers.get(tier) else { continue };
        if pass.is_over() || object.status.as_ref() == Some(status) {
            continue;
        }
        let name = object.name_any();
        let api = kinds::api(context.client, ObjectKind::Tier, &context.key.namespace);
        let result = apply_status(&api, &ObjectKind::Tier.resource(), &name, status).await;
        let subject = Subject { name: kinds::child(ObjectKind::Tier, &name), applies: false };
        let target = Target::Object(ObjectKind::Tier, name);
        record(context, memory, pass, subject, result.map(|version| Effect::Version(target, version)));
    }
    let Some(status) = &plan.status else { return };
    if pass.is_over() || context.observed.model.status.as_ref() == Some(status) {
        return;
    }
    let api = kinds::models(context.client, &context.key.namespace);
    let name = &context.key.name;
    let result = apply_status(&api, &kinds::of::<cadre_k8s_api::MoEModel>(), name, status).await;
    if result.as_ref().is_err_and(|error| judge(error) == Verdict::Missing) {
        pass.gone = true;
        return;
    }
    let subject = Subject { name: format!("MoEModel {name}"), applies: false };
    record(context, memory, pass, subject, result.map(|version| Effect::Version(Target::Model, version)));
}

/// A field that the new status lacks is removed, because it was ours. There is no precondition: the status subresource
/// of a custom resource ignores the uid, and a status on an object that was just made again under the same name is
/// corrected at once, by the reconcile of that object.
async fn apply_status(
    api: &Api<DynamicObject>,
    resource: &ApiResource,
    name: &str,
    status: &impl Serialize,
) -> Result<String, kube::Error> {
    let patch = json!({
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": {"name": name},
        "status": status,
    });
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let applied = api.patch_status(name, &params, &Patch::Apply(&patch)).await?;
    Ok(applied.resource_version().unwrap_or_default())
}
