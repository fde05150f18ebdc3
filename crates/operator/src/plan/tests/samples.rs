//! The models of deploy/samples, as an API server would hold them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_k8s_api::{MoEModel, manifest};

fn model(text: &str) -> MoEModel {
    let documents = manifest::read(text).unwrap();
    let model = documents.into_iter().find_map(|document| match document {
        manifest::Document::Model(model) => Some(*model),
        manifest::Document::Other { .. } => None,
    });
    let mut model = model.unwrap();
    model.metadata.namespace = Some("models".into());
    model.metadata.uid = Some("0b5a4c1e-3f4e-4f0b-9d55-2f0d9c7d6a01".into());
    model.metadata.generation = Some(1);
    model
}

/// The bundled checkpoint on CPU.
pub(in crate::plan) fn pocket() -> MoEModel {
    model(include_str!("../../../../../deploy/samples/pocket.yaml"))
}

/// DeepSeek-V3 on node pools.
pub(in crate::plan) fn pools() -> MoEModel {
    model(include_str!("../../../../../deploy/samples/deepseek-v3-pools.yaml"))
}
