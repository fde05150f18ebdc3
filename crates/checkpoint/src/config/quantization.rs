//! `quantization_config`: absent for BF16 weights, or the published static FP8 in 128x128 blocks.

use cadre_types::config::{Fp8Config, ScaleFormat};
use serde_json::{Value, json};

use super::fields::{Fields, show};
use crate::{problem::ProblemKind, table::BLOCK};

/// `Some(None)` is an unquantised checkpoint; `None` was reported.
pub(super) fn read(fields: &mut Fields<'_>) -> Option<Option<Fp8Config>> {
    const NAME: &str = "quantization_config";
    if fields.get(NAME).is_none() {
        return Some(None);
    }
    let mut fields = fields.nested(NAME)?;
    fields.only_text("quant_method", &["fp8"], None);
    fields.only_text("fmt", &["e4m3"], Some("e4m3"));
    fields.only_text("activation_scheme", &["dynamic"], None);
    let block = block_size(&mut fields);
    let scale_fmt = scale_format(&mut fields);
    Some(Some(Fp8Config { weight_block_size: block?, scale_fmt: scale_fmt? }))
}

fn block_size(fields: &mut Fields<'_>) -> Option<[usize; 2]> {
    const NAME: &str = "weight_block_size";
    let allowed = json!([BLOCK, BLOCK]);
    match fields.get(NAME) {
        None => {
            fields.missing(NAME, &allowed.to_string());
            None
        }
        Some(value) if *value == allowed => Some([BLOCK, BLOCK]),
        Some(value) => {
            let found = show(value);
            let fix = "cadre's FP8 has one scale per 128x128 block; serve a checkpoint quantised that way";
            fields.problem(ProblemKind::Unsupported, NAME, allowed.to_string(), found, fix);
            None
        }
    }
}

fn scale_format(fields: &mut Fields<'_>) -> Option<ScaleFormat> {
    const NAME: &str = "scale_fmt";
    match fields.get(NAME) {
        None => Some(ScaleFormat::F32),
        Some(Value::String(text)) if text == "ue8m0" => Some(ScaleFormat::Ue8m0),
        // What transformers 5 writes for absence.
        Some(Value::String(text)) if text == "float" => Some(ScaleFormat::F32),
        Some(value) => {
            let found = show(value);
            let fix = "remove the field for F32 scales (V3, R1) or give \"ue8m0\" (V3.1)";
            fields.problem(
                ProblemKind::Unsupported,
                NAME,
                "\"ue8m0\", \"float\" or no such field",
                found,
                fix,
            );
            None
        }
    }
}
