//! Manifests of models: YAML as it comes, or a sample whose fields are changed. What the rules of the API let pass has
//! a plan, which can be told and written, and which is the same when it is asked for again.

use std::sync::LazyLock;

use cadre_k8s_api::{
    manifest::{self, Document},
    samples,
};
use cadre_operator::{observed::Observed, plan};
use serde_json::{Value, json};

use crate::draw::Draw;

/// The samples that users start from, as JSON.
static SAMPLES: LazyLock<Vec<Value>> = LazyLock::new(|| {
    let texts = samples::all().expect("samples").into_iter().map(|sample| sample.text());
    let documents = texts.flat_map(|text| manifest::read(&text).expect("a right sample"));
    documents
        .filter_map(|document| match document {
            Document::Model(model) => Some(serde_json::to_value(model).expect("JSON")),
            Document::Other { .. } => None,
        })
        .collect()
});

pub(crate) fn run(bytes: &[u8]) {
    let mut draw = Draw::new(bytes);
    if draw.one_in(4) {
        let text = String::from_utf8_lossy(draw.rest()).into_owned();
        let Ok(documents) = manifest::read(&text) else { return };
        for document in documents {
            if let Document::Model(model) = document {
                planned(*model);
            }
        }
        return;
    }
    let mut object = SAMPLES[draw.below(SAMPLES.len())].clone();
    while !draw.is_empty() {
        change(&mut object, &mut draw, 0);
    }
    if let Ok(model) = manifest::model(&object) {
        planned(model);
    }
}

fn planned(model: cadre_k8s_api::MoEModel) {
    let observed = Observed::nothing(model, "registry.example/cadre:1");
    let plan = plan::plan(&observed);
    let manifests = plan::manifests(&plan).expect("what is applied can be written");
    plan::render(&plan);
    let again = plan::manifests(&plan::plan(&observed)).expect("what is applied can be written");
    assert_eq!(manifests, again, "a plan is a function");
}

/// Goes down a few fields and changes what is there.
fn change(value: &mut Value, draw: &mut Draw<'_>, depth: usize) {
    let stay = depth > 6 || draw.one_in(5);
    match value {
        Value::Object(fields) if !stay && !fields.is_empty() => {
            let at = draw.below(fields.len());
            if let Some(inner) = fields.values_mut().nth(at) {
                change(inner, draw, depth + 1);
            }
        }
        Value::Array(items) if !stay && !items.is_empty() => {
            let at = draw.below(items.len());
            change(&mut items[at], draw, depth + 1);
        }
        Value::Object(fields) if draw.one_in(2) => {
            let at = draw.below(fields.len());
            let name = match draw.below(3) {
                0 => String::from_utf8_lossy(draw.bytes()).into_owned(),
                _ => draw
                    .of(&[
                        "affinity",
                        "resources",
                        "tolerations",
                        "env",
                        "volumes",
                        "budget",
                        "accelerator",
                        "service",
                        "network",
                        "overlay",
                        "podAnnotations",
                        "nodeSelector",
                        "limits",
                        "image",
                        "kvCache",
                        "topologySpreadConstraints",
                        "drainSeconds",
                        "replicas",
                        "shards",
                        "minCopies",
                    ])
                    .to_owned(),
            };
            match draw.one_in(2) {
                true => drop(fields.keys().nth(at).cloned().and_then(|key| fields.remove(&key))),
                false => drop(fields.insert(name, fresh(draw))),
            }
        }
        _ => *value = fresh(draw),
    }
}

fn fresh(draw: &mut Draw<'_>) -> Value {
    match draw.below(9) {
        0 => Value::Null,
        1 => draw.number().into(),
        2 => (draw.number() as i64).into(),
        3 => (draw.below(64) as u64).into(),
        4 => draw.one_in(2).into(),
        5 => draw
            .of(&[
                "",
                "1Gi",
                "0",
                "-1",
                "1e999",
                "250m",
                "a/b",
                "/",
                "..",
                "CADRE_X",
                "9223372036854775807Gi",
            ])
            .into(),
        6 => String::from_utf8_lossy(draw.bytes()).into(),
        7 => json!([fresh_leaf(draw)]),
        _ => json!({ draw.of(&["cpu", "memory", "name", "key", "x"]): fresh_leaf(draw) }),
    }
}

fn fresh_leaf(draw: &mut Draw<'_>) -> Value {
    match draw.below(3) {
        0 => draw.number().into(),
        1 => String::from_utf8_lossy(draw.bytes()).into(),
        _ => json!({"name": "x"}),
    }
}
