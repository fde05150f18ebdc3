//! The bundled checkpoint on the CPU.

use super::{Object, Sample, deepseek::resources};
use crate::{
    IMAGE, MoEModel, MoEModelSpec,
    model::{
        ExpertLimits, ExpertTierSpec, ImagePath, ModelSource, ModelSpec, NetworkSpec, Numerics, RouterSpec,
        WorkerLimits, WorkerTierSpec,
    },
};

pub(super) fn sample() -> Result<Sample, serde_json::Error> {
    let workers = || WorkerTierSpec {
        replicas: 1,
        kv_cache: super::deepseek::quantity("64Mi"),
        limits: WorkerLimits::default(),
        accelerator: None,
        pod: resources("100m", "192Mi"),
    };
    let spec = MoEModelSpec {
        image: Some(IMAGE.to_owned()),
        image_pull_secrets: Vec::new(),
        model: ModelSpec {
            source: ModelSource {
                image: Some(ImagePath { path: "/models/pocket".to_owned() }),
                ..ModelSource::default()
            },
            served_name: None,
            routed_experts: 32,
            numerics: Numerics::Bf16,
        },
        router: RouterSpec { pod: resources("50m", "64Mi"), ..RouterSpec::default() },
        prefill: workers(),
        decode: workers(),
        experts: ExpertTierSpec {
            shards: 4,
            redundant_slots: 32,
            min_copies: 2,
            spread_by: "kubernetes.io/hostname".to_owned(),
            worker: None,
            limits: ExpertLimits::default(),
            accelerator: None,
            pod: resources("100m", "96Mi"),
        },
        network: NetworkSpec::default(),
        budget: None,
        drain_seconds: 30,
    };
    let value = serde_json::to_value(MoEModel::new("pocket", spec))?;
    Ok(Sample {
        file: "pocket.yaml",
        about: r#"The bundled checkpoint on CPU: runs on any cluster and needs nothing but the image, which has it inside.

  kubectl apply -f deploy/samples/pocket.yaml
  kubectl wait moe/pocket --for=condition=Ready --timeout=5m
  kubectl port-forward service/pocket-http 8000
  curl -s http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \
    -d '{"model": "pocket", "messages": [{"role": "user", "content": "What is a Pod?"}], "temperature": 0}'"#,
        objects: vec![Object {
            value,
            notes: &[
                (
                    "spec.router",
                    "Sizes: `cadre inspect models/pocket --shards 4 --redundant-slots 32` says 7.2 MiB of weights for each \
                     worker,\n9.0 MiB for each shard and 1,920 bytes of KV per token; the rest is the program itself.",
                ),
                (
                    "spec.experts",
                    "32 experts in 64 slots: every expert twice, on different shards and, where there are several nodes, \
                     on\ndifferent nodes. Any one shard may die unnoticed.",
                ),
            ],
        }],
    })
}
