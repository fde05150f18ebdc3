//! Where a pod finds the checkpoint. Every way is read-only.

use cadre_k8s_api::{
    MoEModelSpec,
    model::{Numerics, SourceRef},
};
use k8s_openapi::api::core::v1::{
    HostPathVolumeSource, ImageVolumeSource, PersistentVolumeClaimVolumeSource, Volume, VolumeMount,
};
use serde_json::json;

use super::meta;

/// Where the volume is mounted.
const MOUNT: &str = "/checkpoint";
/// Its name.
const VOLUME: &str = "checkpoint";

/// Folder of the checkpoint as the process sees it, and the volume it is on.
pub(super) struct Place {
    pub(super) folder: String,
    pub(super) volume: Option<(Volume, VolumeMount)>,
}

pub(super) fn place(source: SourceRef<'_>) -> Place {
    let (volume, path) = match source {
        SourceRef::Image(image) => return Place { folder: image.path.clone(), volume: None },
        SourceRef::Claim(claim) => {
            let source = PersistentVolumeClaimVolumeSource {
                claim_name: claim.claim_name.clone(),
                read_only: Some(true),
            };
            (Volume { persistent_volume_claim: Some(source), ..Volume::default() }, claim.path.as_deref())
        }
        SourceRef::Host(host) => {
            // `Directory`: a path that does not exist is an error of the mount and not an empty folder.
            let source =
                HostPathVolumeSource { path: host.path.clone(), type_: Some("Directory".to_owned()) };
            (Volume { host_path: Some(source), ..Volume::default() }, None)
        }
        SourceRef::ImageVolume(image) => {
            let source = ImageVolumeSource { reference: Some(image.reference.clone()), pull_policy: None };
            (Volume { image: Some(source), ..Volume::default() }, image.path.as_deref())
        }
    };
    let mount = VolumeMount {
        name: VOLUME.to_owned(),
        mount_path: MOUNT.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    let folder = path.map_or_else(|| MOUNT.to_owned(), |path| format!("{MOUNT}/{path}"));
    Place { folder, volume: Some((Volume { name: VOLUME.to_owned(), ..volume }, mount)) }
}

/// The value of `--numerics`.
pub(super) fn numerics(numerics: Numerics) -> &'static str {
    match numerics {
        Numerics::F32 => "f32",
        Numerics::Bf16 => "bf16",
        Numerics::Fp8 => "fp8",
        Numerics::CudaFp8 => "cuda-fp8",
    }
}

/// Names checkpoint and numerics: processes that differ in it refuse each other. An image with the checkpoint
/// inside counts by its path only, because most new images have the same one; if it is another after all, the
/// pods of before are refused, and what is refused is replaced without waiting.
pub(super) fn hash(spec: &MoEModelSpec) -> String {
    meta::hash(&json!([spec.model.source, numerics(spec.model.numerics)]))
}
