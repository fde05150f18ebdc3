//! Applies and deletes children.

use cadre_k8s_api::names::FIELD_MANAGER;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    ResourceExt,
    api::{DeleteParams, Patch, PatchParams, Preconditions, PropagationPolicy},
    core::DynamicObject,
};

use super::{Context, Effect};
use crate::{
    plan::ObjectKind,
    run::{kinds, memory::Target, strangers},
};

/// Server-side apply, forced: the fields of a plan are ours. Never over an object that belongs to somebody else.
pub(super) async fn apply(
    context: &Context<'_>,
    object: &DynamicObject,
    why: &str,
) -> Result<Effect, kube::Error> {
    let name = object.name_any();
    let kind = object.types.as_ref().and_then(ObjectKind::of);
    // A plan of a kind that this crate does not know is a defect; it is refused like by a server that does not.
    let kind = kind.ok_or_else(|| unknown_kind(object))?;
    let namespace = context.key.namespace.as_str();
    if context.stores.version(kind, namespace, &name).is_none() {
        let (client, model) = (context.client, context.key.name.as_str());
        match strangers::look_up(client, kind, namespace, &name, model, context.uid).await? {
            strangers::Found::Stranger(object) => return Ok(Effect::Stranger(kind, object)),
            strangers::Found::Ours { labelled: true } => return Ok(Effect::Behind),
            strangers::Found::Ours { labelled: false } | strangers::Found::Free => {}
        }
    }
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let applied =
        kinds::api(context.client, kind, namespace).patch(&name, &params, &Patch::Apply(object)).await?;
    tracing::info!(model = %context.key, object = kinds::child(kind, &name), why, "Applied");
    Ok(Effect::Version(Target::Object(kind, name), applied.resource_version().unwrap_or_default()))
}

/// What is deleted, and how.
pub(super) struct Exactly<'a> {
    pub(super) uid: &'a str,
    pub(super) resource_version: Option<&'a str>,
    /// Without a grace period.
    pub(super) force: bool,
}

/// Deletion of exactly what was observed.
pub(super) async fn delete(
    context: &Context<'_>,
    kind: ObjectKind,
    name: &str,
    exactly: &Exactly<'_>,
    why: &str,
) -> Result<Effect, kube::Error> {
    let params = DeleteParams {
        grace_period_seconds: exactly.force.then_some(0),
        preconditions: Some(Preconditions {
            uid: Some(exactly.uid.to_owned()),
            resource_version: exactly.resource_version.map(str::to_owned),
        }),
        propagation_policy: Some(PropagationPolicy::Background),
        ..DeleteParams::default()
    };
    let namespace = &context.key.namespace;
    match kind {
        // The answer is the whole object or a status; as a pod it is read for nothing.
        ObjectKind::Pod => {
            let pods = kube::Api::<Pod>::namespaced(context.client.clone(), namespace);
            drop(pods.delete(name, &params).await?);
        }
        _ => drop(kinds::api(context.client, kind, namespace).delete(name, &params).await?),
    }
    tracing::info!(model = %context.key, object = kinds::child(kind, name), why, "Deleted");
    Ok(Effect::Leaving(Target::Object(kind, name.to_owned()), exactly.uid.to_owned()))
}

fn unknown_kind(object: &DynamicObject) -> kube::Error {
    let types = object.types.clone().unwrap_or_default();
    let message = format!("{} {} is no kind of child", types.api_version, types.kind);
    kube::Error::Api(kube::core::Status::failure(&message, "Invalid").with_code(422).boxed())
}
