//! The router: one pod, because its coordinator is one.
//!
//! A router goes only once its successor runs. The rolling update adds a pod of the new template and takes none away; when
//! that pod has started (its image is there, its flags are right, the checkpoint can be read, its servers listen) the
//! strategy lets the old one go. The new one has no members until then, because the coordinator's name leads to the one
//! that came first, so it is not ready and gets no requests. Then the old one drains and ends, and its members turn to
//! the new one within 2 s; the new coordinator takes the placement over from them, and nothing is reloaded. What cannot
//! start (a wrong image, a node selector that nothing matches, a checkpoint that is none) costs nothing but a pod that
//! waits, and is told by Degraded.

use cadre_k8s_api::names::{self, LAYOUT_KEY, label, port};
use k8s_openapi::api::{
    apps::v1::{Deployment, DeploymentSpec},
    core::v1::{ConfigMapVolumeSource, Volume, VolumeMount},
};

use super::{
    super::{ObjectKind, component::Component, facts::Facts, pods::OurPod},
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
    args.extend(facts.spec().router.limits.flags());
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
        more_drain_seconds: 0,
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
            strategy: Some(pod::rolling(1, u8::from(has_successor(facts, &hash)))),
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

/// A router of this template runs beside one of another.
fn has_successor(facts: &Facts<'_>, template: &str) -> bool {
    let is_new = |pod: &&OurPod<'_>| pod.label(label::TEMPLATE_HASH) == Some(template);
    let new = facts.active(Component::Router).filter(is_new).any(OurPod::has_started);
    new && facts.active(Component::Router).any(|pod| !is_new(&pod))
}
