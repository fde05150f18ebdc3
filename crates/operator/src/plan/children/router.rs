//! The router: one pod, because its coordinator is one.
//!
//! `Recreate`: two coordinators at a time would each gather a part of the members, so the old router drains and
//! goes before the new one starts. Clients find none meanwhile. Workers and shards go on with the placement they
//! have and come back within 2 s; the new coordinator takes the placement over from them, and nothing is reloaded.

use cadre_k8s_api::names::{self, LAYOUT_KEY, port};
use k8s_openapi::api::{
    apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy},
    core::v1::{ConfigMapVolumeSource, Volume, VolumeMount},
};

use super::{
    super::{ObjectKind, component::Component},
    Blueprint, Child, meta,
    pod::{self, Process},
};

/// Where the layout is mounted: a folder, because a mounted file would not follow its ConfigMap.
const LAYOUT_DIR: &str = "/etc/cadre/layout";
const LAYOUT_VOLUME: &str = "layout";

pub(super) fn deployment(blueprint: &Blueprint<'_>) -> Option<(Child, String)> {
    let facts = blueprint.facts;
    let component = Component::Router;
    let ports = [
        ("grpc", "--grpc", port::GRPC),
        ("http", "--http", port::HTTP),
        ("coordinator", "--coordinator", port::COORDINATOR),
    ];
    let mut args = vec!["router".to_owned()];
    args.extend(blueprint.common_args());
    args.extend(["--served-model-name".to_owned(), facts.model().served_name()]);
    args.extend(["--routed-experts".to_owned(), facts.spec().model.routed_experts.to_string()]);
    args.extend(["--layout-file".to_owned(), format!("{LAYOUT_DIR}/{LAYOUT_KEY}")]);
    for (_, flag, number) in ports {
        args.extend([flag.to_owned(), pod::everywhere(number)]);
    }
    let process = Process {
        component,
        args,
        ports: ports.map(|(name, _, number)| (name, number)).to_vec(),
        env: Vec::new(),
        pod: &facts.spec().router.pod,
        accelerator: None,
        is_member: false,
        spread: Vec::new(),
        volumes: vec![layout_volume(facts.name())],
    };
    let (template, hash) = pod::template(blueprint, process);
    let deployment = Deployment {
        metadata: meta::metadata(facts, component.object_name(facts.name()), Some(component)),
        spec: Some(DeploymentSpec {
            replicas: Some(1),
            strategy: Some(DeploymentStrategy { type_: Some("Recreate".to_owned()), rolling_update: None }),
            selector: meta::selector(facts.name(), component),
            template,
            revision_history_limit: Some(pod::REVISIONS),
            progress_deadline_seconds: Some(pod::PROGRESS_DEADLINE_SECONDS),
            ..DeploymentSpec::default()
        }),
        ..Deployment::default()
    };
    Some((Child::new(ObjectKind::Deployment, Some(1), &deployment)?, hash))
}

fn layout_volume(model: &str) -> (Volume, VolumeMount) {
    let source =
        ConfigMapVolumeSource { name: names::layout_config_map(model), ..ConfigMapVolumeSource::default() };
    let volume = Volume { name: LAYOUT_VOLUME.to_owned(), config_map: Some(source), ..Volume::default() };
    let mount = VolumeMount {
        name: LAYOUT_VOLUME.to_owned(),
        mount_path: LAYOUT_DIR.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    (volume, mount)
}
