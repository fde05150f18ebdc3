//! Kinds of children as the API knows them.

use cadre_k8s_api::{MoEModel, MoETier};
use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    core::v1::{ConfigMap, Pod, Service, ServiceAccount},
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, Client, Resource,
    core::{ApiResource, DynamicObject, TypeMeta},
};

use crate::plan::ObjectKind;

const ALL: [ObjectKind; 8] = [
    ObjectKind::Tier,
    ObjectKind::Deployment,
    ObjectKind::StatefulSet,
    ObjectKind::Service,
    ObjectKind::ConfigMap,
    ObjectKind::ServiceAccount,
    ObjectKind::PodDisruptionBudget,
    ObjectKind::Pod,
];

/// Group, version and plural of a kind.
pub(crate) fn resource(kind: ObjectKind) -> ApiResource {
    match kind {
        ObjectKind::Tier => of::<MoETier>(),
        ObjectKind::Deployment => of::<Deployment>(),
        ObjectKind::StatefulSet => of::<StatefulSet>(),
        ObjectKind::Service => of::<Service>(),
        ObjectKind::ConfigMap => of::<ConfigMap>(),
        ObjectKind::ServiceAccount => of::<ServiceAccount>(),
        ObjectKind::PodDisruptionBudget => of::<PodDisruptionBudget>(),
        ObjectKind::Pod => of::<Pod>(),
    }
}

/// The kind that an object says it is.
pub(crate) fn kind_of(types: &TypeMeta) -> Option<ObjectKind> {
    ALL.into_iter().find(|kind| {
        let resource = resource(*kind);
        resource.kind == types.kind && resource.api_version == types.api_version
    })
}

/// Objects of a kind in a namespace.
pub(crate) fn api(client: &Client, kind: ObjectKind, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &resource(kind))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_found_again_by_its_type() {
        for kind in ALL {
            let resource = resource(kind);
            let types = TypeMeta { api_version: resource.api_version, kind: resource.kind };
            assert_eq!(kind_of(&types), Some(kind));
        }
        assert_eq!(kind_of(&TypeMeta { api_version: "v1".into(), kind: "Secret".into() }), None);
    }
}
