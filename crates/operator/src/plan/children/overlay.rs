//! What a tier adds to its pods, as Kubernetes wants it.

use cadre_k8s_api::model::{EnvVariable, SpreadConstraint, TierVolume, VariableSource};
use k8s_openapi::api::core::v1::{
    Affinity, ConfigMapKeySelector, ConfigMapVolumeSource, EmptyDirVolumeSource, EnvVar, EnvVarSource,
    HostPathVolumeSource, ObjectFieldSelector, PersistentVolumeClaimVolumeSource, SecretKeySelector,
    SecretVolumeSource, TopologySpreadConstraint, Volume, VolumeMount,
};
use serde_json::Value;

use super::{
    super::{component::Component, facts::Facts},
    meta,
};

/// A volume and its mount.
pub(super) fn volume(given: &TierVolume) -> (Volume, VolumeMount) {
    let read_only = given.read_only.then_some(true);
    let volume = Volume {
        name: given.name.clone(),
        empty_dir: given.empty_dir.as_ref().map(|folder| EmptyDirVolumeSource {
            medium: folder.medium.map(|_| "Memory".to_owned()),
            size_limit: folder.size_limit.clone(),
        }),
        config_map: given
            .config_map
            .as_ref()
            .map(|of| ConfigMapVolumeSource { name: of.name.clone(), ..ConfigMapVolumeSource::default() }),
        secret: given.secret.as_ref().map(|of| SecretVolumeSource {
            secret_name: Some(of.name.clone()),
            ..SecretVolumeSource::default()
        }),
        persistent_volume_claim: given
            .persistent_volume_claim
            .as_ref()
            .map(|of| PersistentVolumeClaimVolumeSource { claim_name: of.name.clone(), read_only }),
        // `Directory`: a path that does not exist is an error of the mount and not an empty folder.
        host_path: given.host_path.as_ref().map(|host| HostPathVolumeSource {
            path: host.path.clone(),
            type_: Some("Directory".to_owned()),
        }),
        ..Volume::default()
    };
    let mount = VolumeMount {
        name: given.name.clone(),
        mount_path: given.mount_path.clone(),
        read_only,
        ..VolumeMount::default()
    };
    (volume, mount)
}

/// An environment variable.
pub(super) fn variable(given: &EnvVariable) -> EnvVar {
    EnvVar {
        name: given.name.clone(),
        value: given.value.clone(),
        value_from: given.value_from.as_ref().map(source),
    }
}

fn source(given: &VariableSource) -> EnvVarSource {
    EnvVarSource {
        config_map_key_ref: given.config_map_key_ref.as_ref().map(|of| ConfigMapKeySelector {
            name: of.name.clone(),
            key: of.key.clone(),
            optional: None,
        }),
        secret_key_ref: given.secret_key_ref.as_ref().map(|of| SecretKeySelector {
            name: of.name.clone(),
            key: of.key.clone(),
            optional: None,
        }),
        field_ref: given.field_ref.as_ref().map(|of| ObjectFieldSelector {
            api_version: Some("v1".to_owned()),
            field_path: of.field_path.clone(),
        }),
        ..EnvVarSource::default()
    }
}

/// The operator's rules of spreading, each unless the tier has one of its key, and the tier's.
pub(super) fn spread(
    facts: &Facts<'_>,
    component: Component,
    ours: Vec<TopologySpreadConstraint>,
    given: &[SpreadConstraint],
) -> Vec<TopologySpreadConstraint> {
    let is_given = |key: &str| given.iter().any(|one| one.topology_key == key);
    let kept = ours.into_iter().filter(|one| !is_given(&one.topology_key));
    let given = given.iter().map(|one| TopologySpreadConstraint {
        max_skew: one.max_skew,
        topology_key: one.topology_key.clone(),
        when_unsatisfiable: one.when_unsatisfiable.name().to_owned(),
        min_domains: one.min_domains,
        label_selector: Some(meta::selector(facts.name(), component)),
        node_taints_policy: Some("Honor".to_owned()),
        ..TopologySpreadConstraint::default()
    });
    kept.chain(given).collect()
}

/// Affinity without the empty lists in it, which an API server would drop. Empty selectors say something: all pods.
pub(super) fn affinity(given: &Affinity) -> Affinity {
    let mut value = serde_json::to_value(given).unwrap_or_default();
    without_empty_lists(&mut value);
    serde_json::from_value(value).unwrap_or_else(|_| given.clone())
}

fn without_empty_lists(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, inner| match inner {
                Value::Array(list) => !list.is_empty(),
                Value::Object(map) => key != "matchLabels" || !map.is_empty(),
                _ => true,
            });
            map.values_mut().for_each(without_empty_lists);
        }
        Value::Array(list) => list.iter_mut().for_each(without_empty_lists),
        _ => {}
    }
}
