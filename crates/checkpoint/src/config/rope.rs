//! Rotary embedding: the classic `rope_theta` + `rope_scaling`, and the newer `rope_parameters` object
//! into which transformers moves both.

use cadre_types::config::YarnConfig;

use super::fields::{Fields, show};
use crate::problem::ProblemKind;

/// What the two spellings agree on.
#[derive(Debug, PartialEq)]
pub(super) struct Rope {
    pub(super) theta: f32,
    pub(super) yarn: Option<YarnConfig>,
}

const OBJECTS: [&str; 2] = ["rope_parameters", "rope_scaling"];
const TYPES: &[&str] = &["yarn", "default"];

pub(super) fn read(fields: &mut Fields<'_>) -> Option<Rope> {
    let mut thetas = Vec::new();
    if fields.get("rope_theta").is_some() {
        thetas.push(fields.number("rope_theta")?);
    }
    let mut yarns = Vec::new();
    for name in OBJECTS {
        if fields.get(name).is_none() {
            continue;
        }
        let mut nested = fields.nested(name)?;
        if nested.get("rope_theta").is_some() {
            thetas.push(nested.number("rope_theta")?);
        }
        yarns.push(scaling(&mut nested)?);
    }
    // The same thing may be said twice, but not two different things.
    if yarns.windows(2).any(|pair| pair[0] != pair[1]) {
        contradiction(fields, "rope_scaling", "the same scaling as in rope_parameters");
        return None;
    }
    if thetas.windows(2).any(|pair| pair[0] != pair[1]) {
        contradiction(fields, "rope_theta", "one value of rope_theta");
        return None;
    }
    let Some(&theta) = thetas.first() else {
        fields.missing("rope_theta", "a number");
        return None;
    };
    Some(Rope { theta, yarn: yarns.into_iter().next().flatten() })
}

fn contradiction(fields: &mut Fields<'_>, name: &str, expected: &str) {
    fields.problem(
        ProblemKind::BadValue,
        name,
        expected,
        "different values",
        "keep the spelling that the checkpoint was published with and remove the other",
    );
}

/// The scaling of one object: `Some(None)` is plain rotary embedding.
fn scaling(fields: &mut Fields<'_>) -> Option<Option<YarnConfig>> {
    let kind = match (fields.text("rope_type"), fields.text("type")) {
        (Some(new), Some(old)) if new != old => {
            contradiction(fields, "rope_type", &format!("the same value as type, {old:?}"));
            return None;
        }
        (Some(kind), _) | (None, Some(kind)) => kind,
        (None, None) => {
            fields.missing("rope_type", "\"yarn\" or \"default\" in rope_type or type");
            return None;
        }
    };
    match kind {
        "yarn" => yarn(fields).map(Some),
        "default" => Some(None),
        other => {
            let expected = TYPES.join(" or ");
            let found = show(&other.into());
            let name = if fields.get("rope_type").is_some() { "rope_type" } else { "type" };
            fields.problem(
                ProblemKind::Unsupported,
                name,
                expected,
                found,
                "cadre computes YaRN and plain rotary embedding; serve a checkpoint that uses one of them",
            );
            None
        }
    }
}

fn yarn(fields: &mut Fields<'_>) -> Option<YarnConfig> {
    // Both change the published formula; V3 has neither.
    if let Some(value) = fields.get("attention_factor") {
        let found = show(value);
        let fix =
            "cadre derives it from mscale and mscale_all_dim; remove the field if it is the derived value";
        fields.problem(ProblemKind::Unsupported, "attention_factor", "no such field", found, fix);
    }
    if let Some(value) = fields.get("truncate").filter(|value| value.as_bool() != Some(true)) {
        let found = show(value);
        let fix = "cadre rounds the correction range as published; serve a checkpoint that does";
        fields.problem(ProblemKind::Unsupported, "truncate", "true or no such field", found, fix);
    }
    let factor = fields.number("factor");
    let original = fields.integer("original_max_position_embeddings");
    let beta_fast = fields.number_or("beta_fast", 32.0);
    let beta_slow = fields.number_or("beta_slow", 1.0);
    let mscale = fields.number_or("mscale", 1.0);
    let mscale_all_dim = fields.number_or("mscale_all_dim", 0.0);
    Some(YarnConfig {
        factor: factor?,
        original_max_position_embeddings: original?,
        beta_fast: beta_fast?,
        beta_slow: beta_slow?,
        mscale: mscale?,
        mscale_all_dim: mscale_all_dim?,
    })
}
