//! The listing against the table: every tensor there, with the right shape and element type.

use cadre_types::ModelConfig;

use crate::{
    catalog::Tensor,
    header::Dtype,
    listing::Listing,
    problem::{About, ProblemKind, Problems},
    table::{Content, TensorSpec, table},
};

/// Compares the listing with the configuration's table, and marks the tensors that are in it. The others
/// go to `warnings`, except those of an indexer, which mean another architecture.
pub(crate) fn check(
    config: &ModelConfig,
    listing: &mut Listing,
    problems: &mut Problems,
    warnings: &mut Problems,
) {
    let fused = report_fused_experts(listing, problems);
    for spec in table(config) {
        match listing.catalog.get(&spec.name) {
            Some(tensor) => {
                check_tensor(&spec, &tensor, problems, warnings);
                listing.catalog.mark_known(&spec.name);
            }
            None if spec.optional || listing.hidden.contains(&spec.name) => {}
            // One finding about the fused ones says more than thousands of missing ones.
            None if fused && spec.expert.is_some() => {}
            None => missing(config, listing, &spec, problems),
        }
    }
    for tensor in listing.catalog.iter().filter(|tensor| !tensor.is_known()) {
        if !is_fused_expert(tensor.name) {
            unexpected(config, &tensor, problems, warnings);
        }
    }
}

/// A configuration that names an MTP layer of which the files have no tensor at all is served without it:
/// transformers saves V3 that way, because its class has no MTP layer. Returns whether the layer is to be
/// forgotten; one that is there in part is missing tensors like any other.
pub(crate) fn mtp_is_absent(config: &ModelConfig, listing: &Listing, warnings: &mut Problems) -> bool {
    // Without a readable listing nothing is known to be absent.
    if config.num_nextn_predict_layers == 0 || listing.catalog.iter().len() + listing.hidden.len() == 0 {
        return false;
    }
    let mtp = config.num_hidden_layers..config.total_layers();
    let of_mtp = |name: &str| layer_of(name).is_some_and(|layer| mtp.contains(&layer));
    let named = listing.catalog.iter().any(|tensor| of_mtp(tensor.name));
    if named || listing.hidden.iter().any(|name| of_mtp(name)) {
        return false;
    }
    warnings.push(About::new(&listing.source).field(
        ProblemKind::MissingTensor,
        "num_nextn_predict_layers",
        format!("tensors of layer {}, as config.json says", config.num_hidden_layers),
        "none of them",
        "it is served without its MTP layer; set the field to 0, or fetch the layer's tensors",
    ));
    true
}

/// The layer that a tensor's name says it belongs to.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// Experts of a layer in one tensor, as transformers holds them in memory.
fn is_fused_expert(name: &str) -> bool {
    [".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"].iter().any(|part| name.contains(part))
}

fn report_fused_experts(listing: &Listing, problems: &mut Problems) -> bool {
    let Some(tensor) = listing.catalog.iter().find(|tensor| is_fused_expert(tensor.name)) else {
        return false;
    };
    problems.push(About::new(tensor.shard.mapping.path()).tensor(
        ProblemKind::Unsupported,
        tensor.name,
        "three matrices for each expert, as DeepSeek-V3 is published",
        format!("the experts of a layer fused into one tensor {:?}", tensor.shape),
        "save it with save_pretrained(..., save_original_format=True), which writes the experts one by one",
    ));
    true
}

fn check_tensor(spec: &TensorSpec, entry: &Tensor<'_>, problems: &mut Problems, warnings: &mut Problems) {
    let about = About::new(entry.shard.mapping.path());
    if entry.shape != spec.shape {
        problems.push(about.tensor(
            ProblemKind::WrongShape,
            &spec.name,
            format!("shape {:?}", spec.shape),
            format!("{:?}", entry.shape),
            "config.json and this file are of different checkpoints: fetch both from the same one",
        ));
    }
    if !spec.dtypes.contains(&entry.dtype) {
        let names: Vec<&str> = spec.dtypes.iter().map(|dtype| dtype.name()).collect();
        problems.push(about.tensor(
            ProblemKind::WrongDtype,
            &spec.name,
            format!("dtype {}", names.join(" or ")),
            entry.dtype.name(),
            wrong_dtype_fix(spec, entry.dtype),
        ));
    } else if spec.content == Content::Bias && entry.dtype == Dtype::Bf16 {
        warnings.push(about.tensor(
            ProblemKind::WrongDtype,
            &spec.name,
            "dtype F32",
            "BF16",
            "it is used; experts whose scores differ by less than BF16 spacing may be chosen otherwise than published",
        ));
    }
}

fn wrong_dtype_fix(spec: &TensorSpec, found: Dtype) -> &'static str {
    match (spec.dtypes[0], found) {
        (Dtype::E4m3, Dtype::Bf16 | Dtype::F32 | Dtype::F16) => {
            "the weights are not quantised: remove quantization_config from config.json, or fetch the FP8 files"
        }
        (Dtype::Bf16, Dtype::E4m3) => {
            "the weights are quantised: use the config.json with quantization_config that was published with them"
        }
        (_, Dtype::F16) => "convert the tensor to BF16 or F32; cadre does not read F16",
        _ => "fetch the checkpoint as published, or convert the tensor to the expected dtype",
    }
}

fn missing(config: &ModelConfig, listing: &Listing, spec: &TensorSpec, problems: &mut Problems) {
    let fix = if spec.layer.is_some_and(|layer| layer.index() >= config.num_hidden_layers) {
        "fetch the complete checkpoint, or set num_nextn_predict_layers to 0 if it was saved without its MTP layer"
    } else if spec.is_scale() {
        "fetch the complete FP8 checkpoint: quantised weights are useless without their scales"
    } else {
        "fetch the complete checkpoint"
    };
    problems.push(About::new(&listing.source).tensor(
        ProblemKind::MissingTensor,
        &spec.name,
        format!("{} {:?}", spec.dtypes[0], spec.shape),
        "no such tensor",
        fix,
    ));
}

fn unexpected(config: &ModelConfig, tensor: &Tensor<'_>, problems: &mut Problems, warnings: &mut Problems) {
    let Tensor { name, dtype, shape, .. } = tensor;
    let about = About::new(tensor.shard.mapping.path());
    let found = format!("{dtype} {shape:?}");
    if name.contains(".indexer.") {
        let fix =
            "DeepSeek-V3.2 (sparse attention with an indexer) is not served; use V3, V3-0324, R1 or V3.1";
        let expected = "no indexer tensor";
        problems.push(about.tensor(ProblemKind::Unsupported, name, expected, found, fix));
        return;
    }
    let beyond = layer_of(name).is_some_and(|layer| layer >= config.total_layers());
    let fix = if beyond {
        "it is not loaded; if it is an MTP layer, set num_nextn_predict_layers in config.json to use it"
    } else {
        "it is not loaded"
    };
    let expected = "no such tensor in this architecture";
    warnings.push(about.tensor(ProblemKind::ExtraTensor, name, expected, found, fix));
}
