//! What every child has: name, labels, owner, and the hash of what was applied.

use std::collections::BTreeMap;

use cadre_k8s_api::{
    MoEModel,
    names::{APPLIED_HASH, FIELD_MANAGER, label},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use kube::{Resource, core::DynamicObject};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::super::{ObjectKind, component::Component, facts::Facts};

/// Hex digits of a hash: as many as nobody hits by accident, few enough to read.
const DIGITS: usize = 16;

/// Metadata of a child; `None` for children of the model as a whole.
pub(super) fn metadata(facts: &Facts<'_>, name: String, component: Option<Component>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: facts.model().metadata.namespace.clone(),
        labels: Some(labels(facts.name(), component)),
        owner_references: Some(vec![owner(facts.model())]),
        ..ObjectMeta::default()
    }
}

/// Labels of a child and of its pods.
pub(super) fn labels(model: &str, component: Option<Component>) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::from(
        [
            (label::NAME, "cadre"),
            (label::INSTANCE, model),
            (label::MANAGED_BY, FIELD_MANAGER),
            (label::MODEL, model),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned())),
    );
    if let Some(component) = component {
        labels.insert(label::COMPONENT.to_owned(), component.label().to_owned());
    }
    labels
}

/// Labels that select the pods of a component; they never change.
pub(super) fn pod_labels(model: &str, component: Component) -> BTreeMap<String, String> {
    BTreeMap::from(
        [(label::MODEL, model), (label::COMPONENT, component.label())]
            .map(|(key, value)| (key.to_owned(), value.to_owned())),
    )
}

pub(super) fn selector(model: &str, component: Component) -> LabelSelector {
    LabelSelector { match_labels: Some(pod_labels(model, component)), ..LabelSelector::default() }
}

fn owner(model: &MoEModel) -> OwnerReference {
    OwnerReference {
        api_version: MoEModel::api_version(&()).into_owned(),
        kind: MoEModel::kind(&()).into_owned(),
        name: model.metadata.name.clone().unwrap_or_default(),
        uid: model.metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// A hash of JSON; keys are in the order of the types, which is fixed.
pub(super) fn hash(value: &Value) -> String {
    let digest = Sha256::digest(value.to_string());
    digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>()[..DIGITS].to_owned()
}

/// Notes the hash of what is applied. A tier's replicas are not the operator's: they are left out.
pub(super) fn stamp(object: &mut DynamicObject, kind: ObjectKind) {
    let mut value = serde_json::to_value(&*object).unwrap_or_default();
    if kind == ObjectKind::Tier
        && let Some(spec) = value.get_mut("spec").and_then(Value::as_object_mut)
    {
        spec.remove("replicas");
    }
    let annotations = object.metadata.annotations.get_or_insert_default();
    annotations.insert(APPLIED_HASH.to_owned(), hash(&value));
}
