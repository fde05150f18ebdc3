//! The bundled checkpoint against the published implementation (tests/golden, made by transformers in
//! float32 on dequantised weights): logits, activations by layer, gate, MTP, greedy text.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]

mod support;

use std::collections::HashMap;

use cadre_model::{ModelError, Observed, SegmentKind, Site, StepObserver};
use cadre_ops::{Backend, reference::ReferenceBackend};
use cadre_types::{LayerId, NumericsClass};
use support::{Golden, Pocket, argmax, relative_distance, repo, table};

/// Relative to the row's largest magnitude; issue 3 asks for 1e-3.
const BOUND: f32 = 1e-3;
/// Below this golden margin the choice of the largest logit is not held against us.
const MARGIN: f32 = 1e-2;

/// Keeps what the golden files have per layer.
#[derive(Default)]
struct Recorder {
    activations: HashMap<(u16, Site), Vec<f32>>,
    gates: HashMap<u16, (Vec<u16>, Vec<f32>)>,
}

impl<B: Backend> StepObserver<B> for Recorder {
    fn routed(
        &mut self,
        backend: &B,
        queue: &mut B::Queue,
        layer: LayerId,
        topk_idx: &[u16],
        routing: &B::Routing,
    ) -> Result<(), ModelError> {
        let mut weights = Vec::new();
        backend.read_weights(queue, routing, &mut weights).unwrap();
        self.gates.insert(layer.0, (topk_idx.to_vec(), weights));
        Ok(())
    }

    fn activation(
        &mut self,
        backend: &B,
        queue: &mut B::Queue,
        layer: LayerId,
        site: Site,
        observed: Observed<'_, B>,
        rows: usize,
    ) -> Result<(), ModelError> {
        self.activations.insert((layer.0, site), observed.read(backend, queue, rows).unwrap());
        Ok(())
    }
}

/// Compares row by row and returns the largest relative distance.
fn compare(what: &str, found: &[f32], expected: &[f32], width: usize) -> f32 {
    assert_eq!(found.len(), expected.len(), "{what}");
    let worst = found
        .chunks(width)
        .zip(expected.chunks(width))
        .map(|(found, expected)| relative_distance(found, expected))
        .fold(0f32, f32::max);
    assert!(worst <= BOUND, "{what}: relative distance {worst} exceeds {BOUND}");
    worst
}

fn check_case<B: Backend>(pocket: &mut Pocket<B>, case: usize) {
    let golden = Golden::case(case);
    let ids = golden.u32("input_ids");
    let pages = table(ids.len());
    let config = pocket.model.config().clone();
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let mut seen = Recorder::default();
    let out = pocket.step(SegmentKind::Prefill, &ids, 0, &pages, &mut seen);

    let last = out.logits.len() - vocab;
    compare("logits_last", &out.logits[last..], &golden.f32("logits_last"), vocab);
    let names = golden.names();
    if names.iter().any(|name| name == "logits") {
        compare("logits", &out.logits, &golden.f32("logits"), vocab);
        compare("final_norm", &out.hidden, &golden.f32("final_norm"), hidden);
        for layer in 0..config.num_hidden_layers as u16 {
            let attention = &seen.activations[&(layer, Site::Attention)];
            compare(
                &format!("layer {layer} attn"),
                attention,
                &golden.f32(&format!("layer.{layer}.attn")),
                hidden,
            );
            let block = &seen.activations[&(layer, Site::Block)];
            compare(&format!("layer {layer} out"), block, &golden.f32(&format!("layer.{layer}.out")), hidden);
        }
    }
    let margins = golden.f32("margin");
    for (position, (&expected, margin)) in golden.u32("argmax").iter().zip(&margins).enumerate() {
        let found = argmax(&out.logits[position * vocab..][..vocab]);
        assert!(
            found == expected || *margin <= MARGIN,
            "case {case}, position {position}: {found} is not {expected}, margin {margin}"
        );
    }
    for layer in config.first_k_dense_replace as u16..config.num_hidden_layers as u16 {
        let (idx, weights) = &seen.gates[&layer];
        let expected: Vec<u16> =
            golden.u32(&format!("gate.{layer}.topk_idx")).iter().map(|&e| e as u16).collect();
        assert_eq!(idx, &expected, "case {case}, gate of layer {layer}");
        let golden_weights = golden.f32(&format!("gate.{layer}.topk_weight"));
        compare(
            &format!("gate weights of layer {layer}"),
            weights,
            &golden_weights,
            config.num_experts_per_tok,
        );
    }

    let mtp = pocket.mtp(&golden.u32("mtp_next_id"), &out.hidden, &pages);
    let last = mtp.logits.len() - vocab;
    compare("mtp_logits_last", &mtp.logits[last..], &golden.f32("mtp_logits_last"), vocab);
    let agree = golden
        .u32("mtp_argmax")
        .iter()
        .enumerate()
        .filter(|(position, expected)| argmax(&mtp.logits[position * vocab..][..vocab]) == **expected)
        .count();
    // The golden file has no margins for MTP; ties within the bound may flip a handful.
    assert!(agree * 100 >= ids.len() * 99, "case {case}: {agree} of {} MTP choices agree", ids.len());
}

#[test]
fn f32_equals_the_published_implementation_at_every_length() {
    let mut pocket = Pocket::open(NumericsClass::F32, 3000);
    for case in 0..10 {
        check_case(&mut pocket, case);
    }
}

/// The specification itself, before any fast path: the short cases through the scalar reference.
#[test]
fn the_scalar_reference_equals_the_published_implementation() {
    let mut pocket = Pocket::on(ReferenceBackend::new(NumericsClass::F32), 64);
    for case in [0, 1, 7] {
        check_case(&mut pocket, case);
    }
}

#[test]
fn f32_greedy_text_is_the_golden_text() {
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(repo("tests/golden/golden.json")).unwrap()).unwrap();
    let mut pocket = Pocket::open(NumericsClass::F32, 64);
    let vocab = pocket.model.config().vocab_size;
    let list = |value: &serde_json::Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    for generation in golden["generation"].as_array().unwrap() {
        let prompt = list(&generation["prompt_ids"]);
        let expected = list(&generation["greedy_ids"]);
        let margins = generation["margins"].as_array().unwrap();
        let pages = table(prompt.len() + expected.len());
        let mut out = pocket.prefill(&prompt, 64, &pages);
        for (step, (&token, margin)) in expected.iter().zip(margins).enumerate() {
            let found = argmax(&out.logits[out.logits.len() - vocab..]);
            if found != token {
                let margin = margin.as_f64().unwrap();
                assert!(
                    margin <= f64::from(MARGIN),
                    "{}: token {step} is {found}, not {token}, margin {margin}",
                    generation["prompt"]
                );
                break;
            }
            let position = prompt.len() + step;
            out = pocket.step(SegmentKind::Decode, &[token], position, &pages, &mut ());
        }
    }
}
