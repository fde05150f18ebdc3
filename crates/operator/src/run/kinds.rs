//! Objects of a kind as the API serves them.

use cadre_k8s_api::MoEModel;
use kube::{
    Api, Client, Resource,
    core::{ApiResource, DynamicObject},
};

use crate::plan::ObjectKind;

/// Objects of a kind in a namespace.
pub(crate) fn api(client: &Client, kind: ObjectKind, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &kind.resource())
}

/// Models of a namespace, for their status.
pub(crate) fn models(client: &Client, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &of::<MoEModel>())
}

/// `Deployment demo-router`: how a child is named in messages and in `Observed::refused_children`.
pub(crate) fn child(kind: ObjectKind, name: &str) -> String {
    format!("{} {name}", kind.name())
}

pub(crate) fn of<K: Resource<DynamicType = ()>>() -> ApiResource {
    ApiResource::erase::<K>(&())
}
